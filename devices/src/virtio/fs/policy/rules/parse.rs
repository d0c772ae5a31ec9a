//! From the text of a rule file to its rules, or to all of its mistakes.

use std::ffi::CString;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::super::{Needs, Policy, Prefault, UnknownPrefault};
use super::conditions::{Choice, Conditions, Flags, Interval, Sets};
use super::paths::Glob;
use super::{Mistake, Outcome, Problem};
use crate::text::{parse_duration, parse_size, unknown};

/// What a rule file says.
pub(super) struct Document {
    pub(super) enforce: bool,
    pub(super) default: Policy,
    pub(super) rules: Vec<ParsedRule>,
    pub(super) needs: Needs,
}

pub(super) struct ParsedRule {
    /// Where it begins, in bytes.
    pub(super) offset: usize,
    pub(super) outcome: Outcome,
    pub(super) conditions: Conditions,
    /// One of them must match; empty for all paths.
    pub(super) paths: Vec<Glob>,
}

type Value<'a> = Spanned<DeValue<'a>>;

const TOP_KEYS: [&str; 4] = ["version", "default", "enforce", "rule"];
const RULE_KEYS: [&str; 15] = [
    "name",
    "dax",
    "prefault",
    "path",
    "size",
    "age",
    "window_free",
    "executable",
    "set_id",
    "hint",
    "capabilities",
    "read_only",
    "uid",
    "gid",
    "xattr",
];

/// # Errors
/// All mistakes but unreachable rules, in the order of the text.
pub(super) fn parse(text: &str) -> Result<Document, Vec<Mistake>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        let mistake = |error: &toml::de::Error| {
            let offset = error.span().map_or(text.len(), |span| span.start);
            Mistake::at(text, offset, Problem::Syntax(error.message().replace('\n', "; ")))
        };
        return Err(sorted(errors.iter().map(mistake).collect()));
    }
    let mut parser = Parser { text, mistakes: Vec::new(), needs: Needs::default() };
    let document = parser.document(table.get_ref());
    let Parser { mistakes, needs, .. } = parser;
    match document {
        Some(document) if mistakes.is_empty() => Ok(Document { needs, ..document }),
        _ => Err(sorted(mistakes)),
    }
}

fn sorted(mut mistakes: Vec<Mistake>) -> Vec<Mistake> {
    mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
    mistakes
}

/// Collects mistakes: a method that meets one notes it and returns nothing, or what lets the rest be looked at.
struct Parser<'t> {
    text: &'t str,
    mistakes: Vec<Mistake>,
    needs: Needs,
}

impl Parser<'_> {
    fn mistake(&mut self, span: Range<usize>, problem: Problem) {
        self.mistakes.push(Mistake::in_span(self.text, span, problem));
    }

    fn wrong(&mut self, value: &Value<'_>, key: &str, why: String) {
        self.mistake(value.span(), Problem::Value { key: key.to_owned(), why });
    }

    fn wrong_type(&mut self, value: &Value<'_>, key: &str, expected: &'static str) {
        let found = value.get_ref().type_str();
        self.mistake(value.span(), Problem::Type { key: key.to_owned(), expected, found });
    }

    fn known_keys(&mut self, what: &str, table: &DeTable<'_>, known: &[&str]) {
        for key in table.keys().filter(|key| !known.contains(&&**key.get_ref())) {
            self.mistake(key.span(), Problem::UnknownKey(unknown(what, key.get_ref(), known)));
        }
    }

    fn document(&mut self, table: &DeTable<'_>) -> Option<Document> {
        match table.get("version") {
            None => {
                self.mistake(0..0, Problem::Missing { key: "version", example: "version = 1" });
                return None;
            }
            // What another version means nobody knows, so nothing else is said.
            Some(version) if integer(version) != Some(1) => {
                self.mistake(version.span(), Problem::Version);
                return None;
            }
            Some(_) => {}
        }
        self.known_keys("key", table, &TOP_KEYS);
        let default = match table.get("default") {
            Some(value) => self.action("default", value),
            None => {
                self.mistake(0..0, Problem::Missing { key: "default", example: "default = \"auto\"" });
                None
            }
        };
        let enforce = self.boolean("enforce", table).unwrap_or(false);
        let mut rules = Vec::new();
        match table.get("rule").map(|value| (value, value.get_ref().as_array())) {
            None => {}
            Some((_, Some(array))) => {
                for value in array.iter() {
                    match value.get_ref().as_table() {
                        Some(table) => rules.extend(self.rule(value.span(), table)),
                        None => self.wrong_type(value, "rule", "tables: begin each rule with [[rule]]"),
                    }
                }
            }
            Some((value, None)) => self.wrong_type(value, "rule", "tables: begin each rule with [[rule]]"),
        }
        Some(Document { enforce, default: default?, rules, needs: Needs::default() })
    }

    fn rule(&mut self, span: Range<usize>, table: &DeTable<'_>) -> Option<ParsedRule> {
        self.known_keys("condition or key", table, &RULE_KEYS);
        let name = table.get("name").and_then(|value| {
            let name = value.get_ref().as_str().filter(|name| !name.is_empty());
            if name.is_none() {
                self.wrong_type(value, "name", "a string that is not empty");
            }
            name.map(str::to_owned)
        });
        let action = match table.get("dax") {
            Some(value) => self.action("dax", value),
            None => {
                self.mistake(span.clone(), Problem::Missing { key: "dax", example: "dax = \"allow\"" });
                None
            }
        };
        let prefault = table.get("prefault").and_then(|value| self.prefault(value, action.as_ref()));
        let paths = table.get("path").map_or(Vec::new(), |value| self.globs(value));
        let conditions = self.conditions(table);
        let line = Mistake::in_span(self.text, span.clone(), Problem::Version).line;
        let trusts_set_id = conditions.flags.mask & conditions.flags.value & Flags::SET_ID != 0;
        let texts = paths.iter().map(|glob| glob.text().to_owned()).collect();
        let outcome = Outcome { name, line, action: action?, prefault, paths: texts, trusts_set_id };
        Some(ParsedRule { offset: span.start, outcome, conditions, paths })
    }

    fn conditions(&mut self, table: &DeTable<'_>) -> Conditions {
        let mut flags = Flags::default();
        for (key, bit) in [
            ("executable", Flags::EXECUTABLE),
            ("set_id", Flags::SET_ID),
            ("hint", Flags::HINT),
            ("capabilities", Flags::CAPABILITIES),
            ("read_only", Flags::READ_ONLY),
        ] {
            if let Some(set) = self.boolean(key, table) {
                flags.require(bit, set);
            }
        }
        self.needs.hint |= flags.mask & Flags::HINT != 0;
        self.needs.capabilities |= flags.mask & Flags::CAPABILITIES != 0;
        Conditions {
            size: self.interval("size", table, "bytes: 4096, or \"32K\"", size),
            age: self.interval("age", table, "seconds: 60, or \"90s\", \"2h\", \"7d\"", seconds),
            free: self.interval("window_free", table, "percent, from 0 to 100", percent),
            flags,
            sets: self.sets(table),
        }
    }

    fn sets(&mut self, table: &DeTable<'_>) -> Option<Box<Sets>> {
        let sets = Sets {
            uid: self.ids("uid", table),
            gid: self.ids("gid", table),
            xattrs: table.get("xattr").map_or(Vec::new(), |value| self.xattrs(value)),
        };
        let any = sets.uid.is_some() || sets.gid.is_some() || !sets.xattrs.is_empty();
        any.then(|| Box::new(sets))
    }

    /// `allow`, `deny`, or the name of a policy that decides then.
    fn action(&mut self, key: &str, value: &Value<'_>) -> Option<Policy> {
        let known = ["allow", "deny", "inode", "size", "auto"];
        match value.get_ref().as_str() {
            None => self.wrong_type(value, key, "one of allow, deny, inode, size, size:BYTES, auto"),
            Some("allow") => return Some(Policy::Always),
            Some("deny") => return Some(Policy::Never),
            Some(name @ ("always" | "never")) => {
                let instead = if name == "always" { "allow" } else { "deny" };
                self.wrong(value, key, format!("`{name}` is a policy; a rule says `{instead}`"));
            }
            Some(name) => match name.parse() {
                Ok(action) => {
                    self.needs.hint |= action == Policy::Inode;
                    self.needs.capabilities |= action == Policy::Auto;
                    return Some(action);
                }
                Err(error) if name.starts_with("size:") => self.wrong(value, key, error.to_string()),
                Err(_) => self.wrong(value, key, unknown("action", name, &known)),
            },
        }
        None
    }

    /// `never`, `cached` or `all`, for a rule that can make files DAX.
    fn prefault(&mut self, value: &Value<'_>, action: Option<&Policy>) -> Option<Prefault> {
        const KEY: &str = "prefault";
        let Some(name) = value.get_ref().as_str() else {
            self.wrong_type(value, KEY, "one of never, cached, all");
            return None;
        };
        if action == Some(&Policy::Never) {
            self.wrong(value, KEY, "the rule denies DAX, so that no page is mapped: leave it out".into());
        }
        name.parse().map_err(|error: UnknownPrefault| self.wrong(value, KEY, error.to_string())).ok()
    }

    fn boolean(&mut self, key: &str, table: &DeTable<'_>) -> Option<bool> {
        let value = table.get(key)?;
        let boolean = value.get_ref().as_bool();
        if boolean.is_none() {
            self.wrong_type(value, key, "true or false");
        }
        boolean
    }

    /// A table of `min`, `max` or both.
    fn interval(
        &mut self,
        key: &str,
        table: &DeTable<'_>,
        expected: &'static str,
        parse: fn(&DeValue<'_>) -> Option<Result<u64, String>>,
    ) -> Interval {
        let Some(value) = table.get(key) else { return Interval::ALL };
        let Some(bounds) = value.get_ref().as_table() else {
            self.wrong_type(value, key, "a table of `min`, `max` or both, both included");
            return Interval::ALL;
        };
        self.known_keys(&format!("bound of `{key}`"), bounds, &["min", "max"]);
        if bounds.is_empty() {
            self.wrong(value, key, "give `min`, `max` or both".into());
        }
        let mut bound = |name: &str, default: u64| {
            let Some(value) = bounds.get(name) else { return default };
            let name = format!("{key}.{name}");
            match parse(value.get_ref()) {
                Some(Ok(number)) => return number,
                Some(Err(why)) => self.wrong(value, &name, why),
                None => self.wrong_type(value, &name, expected),
            }
            default
        };
        let interval = Interval { min: bound("min", 0), max: bound("max", u64::MAX) };
        if interval.is_empty() {
            // Dotted keys (`size.min = 1`) give the table no place of its own.
            let place = bounds.get("min").map_or(value.span(), Spanned::span);
            let why = format!("`{key}.min` is above `{key}.max`");
            self.mistake(place, Problem::Contradiction(why));
        }
        interval
    }

    /// Numbers of users or groups: one, or a list.
    fn ids(&mut self, key: &str, table: &DeTable<'_>) -> Option<Choice<u32>> {
        let mut ids = Vec::new();
        for value in self.list(key, table.get(key)?) {
            match integer(value).and_then(|id| u32::try_from(id).ok()) {
                Some(id) => ids.push(id),
                None => self.wrong_type(value, key, "a number from 0 to 4294967295, or a list of such"),
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Some(Choice::Only(ids))
    }

    fn globs(&mut self, value: &Value<'_>) -> Vec<Glob> {
        let mut globs = Vec::new();
        for value in self.list("path", value) {
            let Some(text) = value.get_ref().as_str() else {
                self.wrong_type(value, "path", "a glob such as \"*.so\" or \"lib/**\", or a list of such");
                continue;
            };
            match Glob::new(text) {
                Ok(glob) => globs.push(glob),
                Err(why) => self.mistake(value.span(), Problem::Glob { glob: text.to_owned(), why }),
            }
        }
        if globs.iter().any(Glob::matches_all) {
            return Vec::new();
        }
        self.needs.path |= !globs.is_empty();
        globs
    }

    /// The values of an array, or the value itself; an empty array matches nothing.
    fn list<'v>(&mut self, key: &str, value: &'v Value<'v>) -> Vec<&'v Value<'v>> {
        let Some(array) = value.get_ref().as_array() else { return vec![value] };
        if array.is_empty() {
            self.mistake(value.span(), Problem::Contradiction(format!("the list of `{key}` is empty")));
        }
        array.iter().collect()
    }

    /// A table from names of attributes to `true` (there is one), `false` (there is none) or its value.
    fn xattrs(&mut self, value: &Value<'_>) -> Vec<(usize, Choice<Option<Vec<u8>>>)> {
        let Some(table) = value.get_ref().as_table() else {
            self.wrong_type(value, "xattr", "a table, such as { \"user.class\" = \"hot\" }");
            return Vec::new();
        };
        if table.is_empty() {
            self.wrong(value, "xattr", "name at least one attribute".into());
        }
        let mut xattrs = Vec::new();
        for (name, value) in table {
            let key = format!("xattr.\"{}\"", name.get_ref());
            let values = match value.get_ref() {
                DeValue::Boolean(true) => Choice::Except(vec![None]),
                DeValue::Boolean(false) => Choice::Only(vec![None]),
                DeValue::String(text) => Choice::Only(vec![Some(text.as_bytes().to_vec())]),
                DeValue::Table(_) => {
                    self.wrong(value, &key, "quote the whole name, for example xattr.\"user.class\"".into());
                    continue;
                }
                _ => {
                    self.wrong_type(value, &key, "true, false or a string");
                    continue;
                }
            };
            match CString::new(name.get_ref().as_bytes()) {
                // What has no namespace no file system has (xattr(7)).
                Ok(name) if name.as_bytes().contains(&b'.') => xattrs.push((self.xattr(name), values)),
                _ => {
                    let why = "a name begins with its namespace, for example user.class".into();
                    self.mistake(name.span(), Problem::Value { key, why });
                }
            }
        }
        xattrs
    }

    /// The number of an attribute.
    fn xattr(&mut self, name: CString) -> usize {
        let known = self.needs.xattrs.iter().position(|known| *known == name);
        known.unwrap_or_else(|| {
            self.needs.xattrs.push(name);
            self.needs.xattrs.len() - 1
        })
    }
}

fn integer(value: &Value<'_>) -> Option<u64> {
    whole(value.get_ref())
}

fn whole(value: &DeValue<'_>) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn size(value: &DeValue<'_>) -> Option<Result<u64, String>> {
    whole(value).map(Ok).or_else(|| value.as_str().map(parse_size))
}

fn seconds(value: &DeValue<'_>) -> Option<Result<u64, String>> {
    let text = |text| parse_duration(text).map(|age| age.as_secs());
    whole(value).map(Ok).or_else(|| value.as_str().map(text))
}

fn percent(value: &DeValue<'_>) -> Option<Result<u64, String>> {
    let in_range = |percent| match percent {
        0..=100 => Ok(percent),
        _ => Err(format!("a window is never free by {percent} percent: write 0 to 100")),
    };
    whole(value).map(in_range)
}
