//! Values out of TOML, with a mistake noted for each that is not what it should be.

use std::ops::Range;

use devices::text::{parse_duration, parse_size, unknown};
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::Mistake;

pub(super) type Value<'a> = Spanned<DeValue<'a>>;

/// What a value is read as: nothing when its type is wrong, or why it cannot be.
pub(super) type Parsed<T> = Option<Result<T, String>>;

/// Collects mistakes: a method that meets one notes it and returns nothing, or what lets the rest be looked at.
pub(super) struct Reader<'t> {
    text: &'t str,
    pub(super) mistakes: Vec<Mistake>,
}

impl<'t> Reader<'t> {
    pub(super) fn new(text: &'t str) -> Reader<'t> {
        Reader { text, mistakes: Vec::new() }
    }

    pub(super) fn mistake(&mut self, span: Range<usize>, problem: String) {
        self.mistakes.push(Mistake::at(self.text, span.start, problem));
    }

    pub(super) fn missing(&mut self, span: Range<usize>, key: &str, example: &str) {
        self.mistake(span, format!("`{key}` is missing: write, for example, `{example}`"));
    }

    fn wrong_type(&mut self, value: &Value<'_>, key: &str, expected: &str) {
        let found = value.get_ref().type_str();
        self.mistake(value.span(), format!("`{key}` takes {expected}, not {found}"));
    }

    pub(super) fn known_keys(&mut self, table: &DeTable<'_>, known: &[&str]) {
        for key in table.keys().filter(|key| !known.contains(&&**key.get_ref())) {
            self.mistake(key.span(), unknown("key", key.get_ref(), known));
        }
    }

    /// A value that has to be there only if the caller says so.
    pub(super) fn value<T>(
        &mut self,
        table: &DeTable<'_>,
        key: &str,
        expected: &str,
        parse: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Option<T> {
        self.parse(table.get(key)?, key, expected, &parse)
    }

    /// One value or an array of them, none twice; empty when the key is not there.
    pub(super) fn list<T: PartialEq>(
        &mut self,
        table: &DeTable<'_>,
        key: &str,
        expected: &str,
        parse: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Vec<T> {
        table.get(key).map_or(Vec::new(), |value| self.values(value, key, expected, parse))
    }

    /// The same for a value that is at hand.
    pub(super) fn values<T: PartialEq>(
        &mut self,
        value: &Value<'_>,
        key: &str,
        expected: &str,
        parse: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Vec<T> {
        let Some(array) = value.get_ref().as_array() else {
            return self.parse(value, key, expected, &parse).into_iter().collect();
        };
        if array.is_empty() {
            self.mistake(
                value.span(),
                format!("the list of `{key}` is empty: leave `{key}` out, or name a value"),
            );
        }
        let mut values = Vec::new();
        for value in array.iter() {
            match self.parse(value, key, expected, &parse) {
                Some(parsed) if values.contains(&parsed) => {
                    self.mistake(value.span(), format!("`{key}` has this value twice"));
                }
                parsed => values.extend(parsed),
            }
        }
        values
    }

    fn parse<T>(
        &mut self,
        value: &Value<'_>,
        key: &str,
        expected: &str,
        parse: &impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Option<T> {
        match parse(value.get_ref()) {
            Some(Ok(parsed)) => return Some(parsed),
            Some(Err(why)) => self.mistake(value.span(), format!("`{key}`: {why}")),
            None => self.wrong_type(value, key, expected),
        }
        None
    }

    /// The table under a key.
    pub(super) fn table<'v>(&mut self, table: &'v DeTable<'v>, key: &str) -> Option<&'v DeTable<'v>> {
        let value = table.get(key)?;
        let found = value.get_ref().as_table();
        if found.is_none() {
            self.wrong_type(value, key, &format!("a table: write [{key}] and its keys below"));
        }
        found
    }

    /// The tables that begin with `[[key]]`, each with its place.
    pub(super) fn tables<'v>(
        &mut self,
        table: &'v DeTable<'v>,
        key: &str,
    ) -> Vec<(Range<usize>, &'v DeTable<'v>)> {
        let Some(value) = table.get(key) else { return Vec::new() };
        let expected = format!("tables: begin each with [[{key}]]");
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(value, key, &expected);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for value in array.iter() {
            match value.get_ref().as_table() {
                Some(table) => tables.push((value.span(), table)),
                None => self.wrong_type(value, key, &expected),
            }
        }
        tables
    }
}

/// A string that is not empty.
pub(super) fn text(value: &DeValue<'_>) -> Parsed<String> {
    let not_empty = |text: &str| match text.is_empty() {
        true => Err("the string is empty; leave the key out instead".to_owned()),
        false if text.contains('\0') => Err("no program takes a NUL character".to_owned()),
        false => Ok(text.to_owned()),
    };
    value.as_str().map(not_empty)
}

pub(super) fn boolean(value: &DeValue<'_>) -> Parsed<bool> {
    value.as_bool().map(Ok)
}

/// A whole number in a range.
pub(super) fn number(min: u64, max: u64) -> impl Fn(&DeValue<'_>) -> Parsed<u64> {
    move |value| {
        let number = whole(value)?;
        let in_range = number.filter(|number| (min..=max).contains(number));
        Some(in_range.ok_or_else(|| format!("write a number from {min} to {max}")))
    }
}

/// `Some(None)` for an integer that is negative or too large.
fn whole(value: &DeValue<'_>) -> Option<Option<u64>> {
    let integer = value.as_integer()?;
    Some(u64::from_str_radix(integer.as_str(), integer.radix()).ok())
}

/// A size: bytes, or text such as `512M`.
pub(super) fn size(value: &DeValue<'_>) -> Parsed<u64> {
    match whole(value) {
        Some(bytes) => Some(bytes.ok_or_else(|| "no size is negative, or beyond 2^64".to_owned())),
        None => value.as_str().map(parse_size),
    }
}

/// A duration that is not zero: seconds, or text such as `90s`.
pub(super) fn duration(value: &DeValue<'_>) -> Parsed<Duration> {
    let duration = match whole(value) {
        Some(seconds) => seconds.map(Duration::from_secs).ok_or_else(|| "no time is negative".to_owned()),
        None => parse_duration(value.as_str()?),
    };
    Some(duration.and_then(|duration| match duration.is_zero() {
        true => Err("a time limit of 0 leaves no time to run".to_owned()),
        false => Ok(duration),
    }))
}
