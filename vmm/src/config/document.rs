//! TOML that people write: reads it into a type, or finds all that is wrong with it, each with its place.

use std::fmt;
use std::iter;
use std::mem;
use std::ops::Range;

use devices::text::{nearest, position, unknown};
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

/// Something wrong in a file, printed as LINE:COLUMN: MESSAGE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl Mistake {
    /// What is wrong at a byte offset of `text`.
    pub(crate) fn at(text: &str, offset: usize, message: String) -> Mistake {
        let (line, column) = position(text, offset);
        Mistake { line, column, message }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// A TOML file of version 1, and what was found to be wrong with it.
pub(super) struct Document<'t> {
    text: &'t str,
    table: Spanned<DeTable<'t>>,
    mistakes: Vec<Mistake>,
    /// What was taken away: it is not missing after that.
    taken: Vec<Taken>,
}

impl<'t> Document<'t> {
    /// Parses the text and takes `version = 1` from it.
    ///
    /// # Errors
    /// It is no TOML, or of no known version: nobody knows then what the rest means.
    pub(super) fn parse(text: &'t str) -> Result<Document<'t>, Vec<Mistake>> {
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut document = Document { text, table, mistakes: Vec::new(), taken: Vec::new() };
        for error in &errors {
            let offset = error.span().map_or(text.len(), |span| span.start);
            document.mistake(offset, error.message().replace('\n', "; "));
        }
        if errors.is_empty() {
            match document.table.get_ref().get("version") {
                None => document.mistake(0, "`version` is missing: write `version = 1`".into()),
                Some(version)
                    if version.get_ref().as_integer().is_none_or(|number| number.as_str() != "1") =>
                {
                    let offset = version.span().start;
                    document
                        .mistake(offset, "this daxvm reads files of version 1: write `version = 1`".into());
                }
                Some(_) => drop(document.table.get_mut().remove("version")),
            }
        }
        if document.mistakes.is_empty() { Ok(document) } else { Err(document.into_mistakes()) }
    }

    /// Reads a `T`. serde stops at the first mistake: so the value in which it is found is noted and taken away, and the
    /// rest is read again, until nothing more is found.
    ///
    /// # Errors
    /// All mistakes, in the order of the text.
    pub(super) fn read<T: DeserializeOwned>(mut self) -> Result<T, Vec<Mistake>> {
        loop {
            let error = match T::deserialize(Deserializer::from(self.table.clone())) {
                Ok(value) if self.mistakes.is_empty() => return Ok(value),
                Ok(_) => return Err(self.into_mistakes()),
                Err(error) => error,
            };
            let span = error.span().unwrap_or(0..0);
            let start = self.table.span().start;
            let found = take(self.table.get_mut(), start, &span);
            if !self.was_taken(error.message(), span.start) {
                let key = found.as_ref().map(|found| found.key.as_str());
                self.mistake(span.start, in_words(key, error.message()));
            }
            match found {
                Some(found) => self.taken.push(found),
                None => return Err(self.into_mistakes()),
            };
        }
    }

    /// Whether serde misses what was there, as a wrong value or under a wrong name.
    fn was_taken(&self, message: &str, table: usize) -> bool {
        let missing = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
        let mut here = self.taken.iter().filter(|taken| taken.parent == table);
        missing.is_some_and(|missing| here.any(|taken| nearest(&taken.key, [missing]).is_some()))
    }

    /// Notes that the value at `path` (keys, and indexes of arrays) is wrong. What is not in the file is wrong at the
    /// nearest table around it.
    pub(super) fn mistake_at(&mut self, path: &[&str], message: String) {
        let mut offset = 0;
        let mut here: Option<&DeValue<'_>> = None;
        for step in path {
            let next = match here {
                None => self.table.get_ref().get(*step),
                Some(DeValue::Table(table)) => table.get(*step),
                Some(DeValue::Array(array)) => step.parse().ok().and_then(|index: usize| array.get(index)),
                Some(_) => None,
            };
            let Some(next) = next else { break };
            offset = next.span().start;
            here = Some(next.get_ref());
        }
        self.mistake(offset, message);
    }

    fn mistake(&mut self, offset: usize, message: String) {
        self.mistakes.push(Mistake::at(self.text, offset, message));
    }

    /// All that was found, in the order of the text.
    pub(super) fn into_mistakes(mut self) -> Vec<Mistake> {
        self.mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
        self.mistakes
    }
}

/// What was taken out of a document.
struct Taken {
    /// The key, or that of the array.
    key: String,
    /// Where the table begins that it was in.
    parent: usize,
}

/// Takes the innermost key, value or element that has this span out of `table`, which begins at `parent`.
fn take(table: &mut DeTable<'_>, parent: usize, span: &Range<usize>) -> Option<Taken> {
    let mut whole = None;
    for (key, value) in table.iter_mut() {
        let name = key.get_ref().as_ref();
        if key.span() == *span {
            whole = Some(name.to_owned());
        } else if let Some(taken) = take_inside(name, value, parent, span) {
            return Some(taken);
        } else if value.span() == *span {
            whole = Some(name.to_owned());
        }
    }
    let key = whole?;
    table.remove(key.as_str());
    Some(Taken { key, parent })
}

/// The same for what is inside the value of the key `name`.
fn take_inside(
    name: &str,
    value: &mut Spanned<DeValue<'_>>,
    parent: usize,
    span: &Range<usize>,
) -> Option<Taken> {
    let start = value.span().start;
    match value.get_mut() {
        DeValue::Table(table) => take(table, start, span),
        DeValue::Array(array) => {
            let inner = array.iter_mut().find_map(|element| take_inside(name, element, parent, span));
            inner.or_else(|| {
                let elements = mem::replace(array, iter::empty().collect());
                let (taken, kept): (Vec<_>, Vec<_>) =
                    elements.into_iter().partition(|element| element.span() == *span);
                *array = kept.into_iter().collect();
                (!taken.is_empty()).then(|| Taken { key: name.to_owned(), parent })
            })
        }
        _ => None,
    }
}

/// What serde says, as we say it, with the nearest name where one is unknown.
fn in_words(key: Option<&str>, message: &str) -> String {
    // serde's messages have names in backticks: first what was given, then what is known.
    let mut names = message.split('`').skip(1).step_by(2);
    let prefix = key.map_or(String::new(), |key| format!("`{key}`: "));
    if message.starts_with("unknown field") {
        let given = names.next().unwrap_or_default();
        return unknown("key", given, &names.collect::<Vec<_>>());
    }
    if message.starts_with("unknown variant") {
        let given = names.next().unwrap_or_default();
        return format!("{prefix}{}", unknown("value", given, &names.collect::<Vec<_>>()));
    }
    if message.starts_with("missing field") {
        return format!("`{}` is missing", names.next().unwrap_or_default());
    }
    let wrong = message.strip_prefix("invalid type: ").or(message.strip_prefix("invalid value: "));
    match wrong.and_then(|text| text.split_once(", expected ")).zip(key) {
        Some(((found, expected), key)) => {
            format!("`{key}` takes {}, not {}", kind(expected), kind(found))
        }
        // What has several forms, a name among them.
        None if message == "wanted string or table" => format!("{prefix}give a name, in quotes"),
        None => format!("{prefix}{message}"),
    }
}

/// The name of a kind of values in TOML's words.
fn kind(serde: &str) -> String {
    match serde {
        "a boolean" => "true or false".into(),
        "a sequence" => "an array".into(),
        "sequence" => "an array".into(),
        "map" => "a table".into(),
        "path string" => "a path".into(),
        _ if serde.starts_with("struct ") => "a table".into(),
        _ => serde.replace("string \"", "the string \"").replace("boolean `", "`"),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Top {
        count: u8,
        names: Vec<String>,
        item: Vec<Item>,
        one: Option<Item>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Item {
        name: String,
        #[serde(default)]
        kind: Kind,
        #[serde(default)]
        on: bool,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        #[default]
        Plain,
        Fancy,
    }

    fn mistakes(text: &str) -> Vec<String> {
        let result = Document::parse(text).and_then(Document::read::<Top>);
        result.unwrap_err().iter().map(Mistake::to_string).collect()
    }

    #[test]
    fn what_is_right_is_read() {
        let text = "version = 1\ncount = 3\n[[item]]\nname = \"a\"\nkind = \"fancy\"\n";
        let top: Top = Document::parse(text).and_then(Document::read).unwrap();
        let item = Item { name: "a".into(), kind: Kind::Fancy, on: false };
        assert_eq!(top, Top { count: 3, item: vec![item], ..Top::default() });
    }

    #[test]
    fn all_mistakes_are_found_with_their_places() {
        let text = "version = 1\ncuont = 3\ncount = 300\nnames = [\"a\", 1, 2]\n\
                    [[item]]\nname = 1\nkind = \"fanci\"\n\
                    [[item]]\non = true\n\
                    [[item]]\nname = \"ö\"\non = \"yes\"\ncolour = 1\n";
        assert_eq!(
            mistakes(text),
            [
                "2:1: unknown key `cuont`; did you mean `count`?",
                "3:9: `count` takes u8, not integer `300`",
                "4:15: `names` takes a string, not integer `1`",
                "4:18: `names` takes a string, not integer `2`",
                "6:8: `name` takes a string, not integer `1`",
                "7:8: `kind`: unknown value `fanci`; did you mean `fancy`?",
                "8:1: `name` is missing",
                "12:6: `on` takes true or false, not the string \"yes\"",
                "13:1: unknown key `colour`; known are name, kind, on",
            ]
        );
        assert_eq!(
            mistakes("version = 1\none = { kind = 7, name = 3 }\nitem = 5\n"),
            [
                "2:16: `kind`: give a name, in quotes",
                "2:26: `name` takes a string, not integer `3`",
                "3:8: `item` takes an array, not integer `5`",
            ]
        );
        let text = "version = 1\n[[item]]\nnaem = \"a\"\n[[item]]\ncolour = 1\n";
        assert_eq!(
            mistakes(text),
            [
                "3:1: unknown key `naem`; did you mean `name`?",
                "4:1: `name` is missing",
                "5:1: unknown key `colour`; known are name, kind, on",
            ]
        );
    }

    #[test]
    fn other_versions_and_other_languages_are_refused_at_once() {
        assert_eq!(mistakes("cuont = 1"), ["1:1: `version` is missing: write `version = 1`"]);
        let version = "this daxvm reads files of version 1: write `version = 1`";
        assert_eq!(mistakes("version = 2\ncuont = 1"), [format!("1:11: {version}")]);
        assert_eq!(mistakes("version = \"1\""), [format!("1:11: {version}")]);
        assert_eq!(
            mistakes("version = 1\ncount = \nnames = ["),
            [
                "2:9: string values must be quoted, expected literal string",
                "3:10: unclosed array, expected `]`"
            ]
        );
    }

    #[test]
    fn later_mistakes_are_placed_by_their_path() {
        let text = "version = 1\n[[item]]\nname = \"a\"\n[[item]]\nname = \"b\"\n";
        let mut document = Document::parse(text).unwrap();
        document.mistake_at(&["item", "1", "name"], "twice".into());
        document.mistake_at(&["item", "1", "on"], "off".into());
        document.mistake_at(&["count"], "low".into());
        let places: Vec<_> = document.into_mistakes().iter().map(Mistake::to_string).collect();
        assert_eq!(places, ["1:1: low", "4:1: off", "5:8: twice"]);
    }
}
