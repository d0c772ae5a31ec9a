//! The matrix file: TOML of version 1, read into cases. docs/ci.md describes it.

mod error;
mod expand;
mod reader;
mod settings;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::{Path, PathBuf};

use devices::text::{parse_size, unknown};
use globset::GlobMatcher;
use toml::de::{DeTable, DeValue};

pub use error::MatrixFileError;
use reader::{Parsed, Reader, number, text};
use settings::{EnvValue, KEYS, Settings};

use super::Case;
use super::filter::glob;
use crate::config::Mistake;

/// What a matrix file says, as cases.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// The file, as it was named.
    pub path: PathBuf,
    /// The directory of the file; the relative paths of cases begin here.
    pub directory: PathBuf,
    /// The cases, in the order of the file: for each kernel its commands. Their names are unique.
    pub cases: Vec<Case>,
    /// vCPUs that may run at the same time, if the file says so.
    pub jobs: Option<u32>,
    /// Bytes of memory for all guests together, if the file says so.
    pub memory_budget: Option<u64>,
}

impl Matrix {
    /// Reads a matrix file.
    ///
    /// # Errors
    /// It cannot be read, or has mistakes: all of them are returned.
    pub fn load(path: &Path) -> Result<Matrix, MatrixFileError> {
        let failed = |source| MatrixFileError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let full = std::path::absolute(path).map_err(failed)?;
        let directory = full.parent().unwrap_or(Path::new("/")).to_owned();
        Matrix::parse(path, &directory, &text)
    }

    pub(crate) fn parse(path: &Path, directory: &Path, text: &str) -> Result<Matrix, MatrixFileError> {
        let mistakes = |mistakes| MatrixFileError::Mistakes {
            name: path.display().to_string(),
            mistakes: sorted(mistakes),
        };
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            let mistake = |error: &toml::de::Error| {
                let span = error.span().unwrap_or(text.len()..text.len());
                Mistake::at(text, span.start, error.message().replace('\n', "; "))
            };
            return Err(mistakes(errors.iter().map(mistake).collect()));
        }
        let mut reader = Reader::new(text);
        let document = document(&mut reader, table.get_ref());
        let cases = match &document {
            // What is wrong in the parts would be wrong in each case again.
            Some(document) if reader.mistakes.is_empty() => expand::cases(document, &mut reader),
            _ => Vec::new(),
        };
        match document {
            Some(Document { jobs, memory_budget, .. }) if reader.mistakes.is_empty() => Ok(Matrix {
                path: path.to_owned(),
                directory: directory.to_owned(),
                cases,
                jobs,
                memory_budget,
            }),
            _ => Err(mistakes(reader.mistakes)),
        }
    }
}

fn sorted(mut mistakes: Vec<Mistake>) -> Vec<Mistake> {
    mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
    mistakes
}

/// The file's parts.
struct Document {
    jobs: Option<u32>,
    memory_budget: Option<u64>,
    defaults: Settings,
    kernels: Vec<Kernel>,
    commands: Vec<Command>,
    overrides: Vec<Selected>,
    excludes: Vec<Exclude>,
    includes: Vec<Selected>,
}

struct Kernel {
    name: String,
    /// None for the kernel that the host runs.
    path: Option<String>,
    settings: Settings,
}

struct Command {
    span: Range<usize>,
    name: String,
    /// The kernels it is for; empty for all.
    kernels: Vec<Pattern>,
    settings: Settings,
}

/// Settings for some kernels and commands.
struct Selected {
    span: Range<usize>,
    kernels: Vec<Pattern>,
    commands: Vec<Pattern>,
    settings: Settings,
}

/// What has none of the cases that it describes: all that is given must agree.
struct Exclude {
    span: Range<usize>,
    kernels: Vec<Pattern>,
    commands: Vec<Pattern>,
    /// Of these only the axes are used.
    settings: Settings,
}

/// A name, or a glob for names.
#[derive(Clone)]
struct Pattern {
    text: String,
    matcher: GlobMatcher,
    span: Range<usize>,
}

impl Pattern {
    /// Whether one of `patterns` matches, or there is none.
    fn any(patterns: &[Pattern], name: &str) -> bool {
        patterns.is_empty() || patterns.iter().any(|pattern| pattern.matcher.is_match(name))
    }
}

const TOP_KEYS: [&str; 8] =
    ["version", "budget", "defaults", "kernel", "command", "override", "exclude", "include"];

fn document(reader: &mut Reader<'_>, table: &DeTable<'_>) -> Option<Document> {
    match table.get("version") {
        None => {
            reader.missing(0..0, "version", "version = 1");
            return None;
        }
        // What another version means nobody knows, so nothing else is said.
        Some(version) if !matches!(number(1, 1)(version.get_ref()), Some(Ok(1))) => {
            reader.mistake(
                version.span(),
                "this daxvm reads matrix files of version 1: write `version = 1`".into(),
            );
            return None;
        }
        Some(_) => {}
    }
    reader.known_keys(table, &TOP_KEYS);
    let (jobs, memory_budget) = budget(reader, table);
    let defaults = match reader.table(table, "defaults") {
        Some(table) => {
            reader.known_keys(table, &KEYS);
            Settings::read(reader, table)
        }
        None => Settings::default(),
    };
    let mut kernels: Vec<Kernel> = reader
        .tables(table, "kernel")
        .into_iter()
        .filter_map(|(span, table)| kernel(reader, span, table))
        .collect();
    if !table.contains_key("kernel") {
        kernels.push(Kernel { name: "host".into(), path: None, settings: Settings::default() });
    }
    let commands: Vec<Command> = reader
        .tables(table, "command")
        .into_iter()
        .filter_map(|(span, table)| command(reader, span, table))
        .collect();
    if !table.contains_key("command") {
        reader.missing(0..0, "command", "[[command]]");
    }
    unique(reader, "kernel", table, kernels.iter().map(|kernel| &*kernel.name));
    unique(reader, "command", table, commands.iter().map(|command| &*command.name));
    let names = Names {
        kernels: kernels.iter().map(|kernel| kernel.name.clone()).collect(),
        commands: commands.iter().map(|command| command.name.clone()).collect(),
    };
    for command in &commands {
        names.check(reader, "kernel", &command.kernels);
    }
    let mut selected = |key: &str| -> Vec<Selected> {
        let tables = reader.tables(table, key);
        tables.into_iter().map(|(span, table)| names.selected(reader, span, table)).collect()
    };
    let (overrides, includes) = (selected("override"), selected("include"));
    let excludes = reader.tables(table, "exclude");
    let excludes = excludes.into_iter().map(|(span, table)| names.exclude(reader, span, table)).collect();
    Some(Document { jobs, memory_budget, defaults, kernels, commands, overrides, excludes, includes })
}

fn budget(reader: &mut Reader<'_>, table: &DeTable<'_>) -> (Option<u32>, Option<u64>) {
    let Some(budget) = reader.table(table, "budget") else { return (None, None) };
    reader.known_keys(budget, &["jobs", "memory"]);
    let jobs = reader.value(budget, "jobs", "a number", number(1, 4096));
    let memory =
        reader.value(budget, "memory", "a size such as \"8G\"", |value| value.as_str().map(parse_size));
    (jobs.map(|jobs| jobs as u32), memory)
}

fn kernel(reader: &mut Reader<'_>, span: Range<usize>, table: &DeTable<'_>) -> Option<Kernel> {
    reader.known_keys(table, &[&["name", "path"], &KEYS[..]].concat());
    let settings = Settings::read(reader, table);
    let path = reader.value(table, "path", "a file or a directory, as --kernel takes it", text);
    let name = name(reader, span, table, "name = \"6.12\"")?;
    Some(Kernel { name, path, settings })
}

fn command(reader: &mut Reader<'_>, span: Range<usize>, table: &DeTable<'_>) -> Option<Command> {
    reader.known_keys(table, &[&["name", "kernels"], &KEYS[..]].concat());
    let settings = Settings::read(reader, table);
    let kernels = patterns(reader, table, "kernels");
    let name = name(reader, span.clone(), table, "name = \"build\"")?;
    Some(Command { span, name, kernels, settings })
}

/// A name of which names of cases and of files can be made.
fn name(reader: &mut Reader<'_>, span: Range<usize>, table: &DeTable<'_>, example: &str) -> Option<String> {
    if !table.contains_key("name") {
        reader.missing(span, "name", example);
        return None;
    }
    reader.value(table, "name", "a string", |value| {
        let name = value.as_str()?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
        let good = name.len() <= 64
            && name.chars().all(plain)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric());
        let why =
            || "a name has 1 to 64 letters, digits and `._+-`, and begins with a letter or digit".to_owned();
        Some(good.then(|| name.to_owned()).ok_or_else(why))
    })
}

fn unique<'n>(reader: &mut Reader<'_>, key: &str, table: &DeTable<'_>, names: impl Iterator<Item = &'n str>) {
    let mut seen = std::collections::HashSet::new();
    let twice: Vec<_> = names.filter(|name| !seen.insert(*name)).collect();
    let tables = reader.tables(table, key);
    for name in twice {
        let named =
            |table: &&DeTable<'_>| table.get("name").and_then(|value| value.get_ref().as_str()) == Some(name);
        let last = tables.iter().map(|(_, table)| *table).rfind(named);
        if let Some(value) = last.and_then(|table| table.get("name")) {
            reader.mistake(value.span(), format!("a {key} before this one has the name `{name}` too"));
        }
    }
}

fn patterns(reader: &mut Reader<'_>, table: &DeTable<'_>, key: &str) -> Vec<Pattern> {
    let parse = |value: &DeValue<'_>| -> Parsed<(String, GlobMatcher)> {
        let text = value.as_str()?;
        Some(glob(text).map(|matcher| (text.to_owned(), matcher)))
    };
    let Some(value) = table.get(key) else { return Vec::new() };
    let span = value.span();
    let same = |value: &DeValue<'_>| parse(value).map(|parsed| parsed.map(|(text, _)| text));
    let texts = reader.values(value, key, "a name, a glob for names, or a list of such", same);
    let matcher =
        |text: String| glob(&text).ok().map(|matcher| Pattern { text, matcher, span: span.clone() });
    texts.into_iter().filter_map(matcher).collect()
}

/// The names that patterns can match.
struct Names {
    kernels: Vec<String>,
    commands: Vec<String>,
}

impl Names {
    /// Notes patterns that match nothing, which are mistakes of spelling.
    fn check(&self, reader: &mut Reader<'_>, what: &str, patterns: &[Pattern]) {
        let names = if what == "kernel" { &self.kernels } else { &self.commands };
        for pattern in patterns {
            if !names.iter().any(|name| pattern.matcher.is_match(name)) {
                let known: Vec<_> = names.iter().map(|name| &**name).collect();
                reader.mistake(pattern.span.clone(), unknown(what, &pattern.text, &known));
            }
        }
    }

    fn both(&self, reader: &mut Reader<'_>, table: &DeTable<'_>) -> (Vec<Pattern>, Vec<Pattern>) {
        let (kernels, commands) = (patterns(reader, table, "kernel"), patterns(reader, table, "command"));
        self.check(reader, "kernel", &kernels);
        self.check(reader, "command", &commands);
        (kernels, commands)
    }

    fn selected(&self, reader: &mut Reader<'_>, span: Range<usize>, table: &DeTable<'_>) -> Selected {
        reader.known_keys(table, &[&["kernel", "command"], &KEYS[..]].concat());
        let (kernels, commands) = self.both(reader, table);
        if !table.contains_key("kernel") && !table.contains_key("command") {
            reader.missing(span.clone(), "kernel` or `command", "kernel = \"6.*\"");
        }
        Selected { span, kernels, commands, settings: Settings::read(reader, table) }
    }

    fn exclude(&self, reader: &mut Reader<'_>, span: Range<usize>, table: &DeTable<'_>) -> Exclude {
        reader.known_keys(table, &["kernel", "command", "cpus", "memory", "env"]);
        let (kernels, commands) = self.both(reader, table);
        if table.is_empty() {
            reader.missing(span.clone(), "kernel", "kernel = \"6.*\"");
        }
        Exclude { span, kernels, commands, settings: Settings::read(reader, table) }
    }
}
