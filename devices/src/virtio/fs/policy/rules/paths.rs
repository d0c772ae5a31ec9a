//! Globs, and an index of them: which rules a path could match, without a look at the others.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use globset::GlobBuilder;
use regex_automata::dfa::{Automaton, StartKind, dense};
use regex_automata::nfa::thompson;
use regex_automata::util::syntax;
use regex_automata::{Anchored, Input};

/// Characters that make a part of a glob more than a name.
const SPECIAL: [char; 7] = ['*', '?', '[', ']', '{', '}', '\\'];
/// The most memory for one glob's automaton, in bytes.
const AUTOMATON_LIMIT: usize = 1 << 20;

/// A glob that paths relative to the share are matched with.
///
/// One without a slash is matched with the file's name; one with a slash, be it the first character, with the whole
/// path. `*` and `?` (one byte) do not match a slash, `**` as a whole component matches any number of components.
#[derive(Clone)]
pub(super) struct Glob {
    /// As it was written.
    text: String,
    /// Where it stands in the index, and whether what is found there needs no further look.
    key: Key,
    exact: bool,
    /// What all paths that match have in common.
    common: Common,
    automaton: Arc<GlobAutomaton>,
}

/// Complete before the first path comes, so that no match allocates.
type GlobAutomaton = dense::DFA<Vec<u32>>;

/// A bucket of the index. What matches a glob is found in the glob's bucket.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Key {
    Any,
    Path(String),
    Name(String),
    Extension(String),
    Directory(String),
}

#[derive(Clone, Debug, Default)]
struct Common {
    directory: Option<String>,
    name: Option<String>,
    extension: Option<String>,
}

impl Glob {
    /// Understands a glob.
    ///
    /// # Errors
    /// Why no file's path can match it.
    pub(super) fn new(text: &str) -> Result<Glob, String> {
        let whole = text.strip_prefix('/').unwrap_or(text);
        let impossible = |part: &str| matches!(part, "" | "." | "..") || part.contains('\0');
        if text.ends_with('/') {
            return Err(format!("it names a directory; for the files in it write `{}**`", text));
        }
        if let Some(part) = whole.split('/').find(|part| impossible(part)) {
            return Err(format!("no path in a share has a component {part:?}"));
        }
        let anchored = if text.contains('/') { whole.to_owned() } else { format!("**/{text}") };
        let glob = GlobBuilder::new(&anchored)
            .literal_separator(true)
            .backslash_escape(true)
            .build()
            .map_err(|error| error.kind().to_string())?;
        let automaton = dense::Builder::new()
            .configure(
                dense::Config::new()
                    .start_kind(StartKind::Anchored)
                    .dfa_size_limit(Some(AUTOMATON_LIMIT))
                    .determinize_size_limit(Some(AUTOMATON_LIMIT)),
            )
            .syntax(syntax::Config::new().utf8(false).dot_matches_new_line(true))
            .thompson(thompson::Config::new().utf8(false))
            .build(glob.regex())
            .map_err(|_| "it is too complex; use fewer wildcards".to_owned())?;
        let common = Common::of(&anchored);
        let (key, exact) = common.key(&anchored);
        Ok(Glob { text: text.to_owned(), key, exact, common, automaton: Arc::new(automaton) })
    }

    /// Whether every path matches.
    pub(super) fn matches_all(&self) -> bool {
        self.key == Key::Any && self.exact
    }

    pub(super) fn matches(&self, path: &[u8]) -> bool {
        accepts(&self.automaton, path)
    }

    /// Whether each path that matches `other` matches this one too. Where that is hard to say, it is no.
    pub(super) fn covers(&self, other: &Glob) -> bool {
        self.text == other.text
            || matches!(&other.key, Key::Path(path) if self.matches(path.as_bytes()))
            || self.exact
                && match &self.key {
                    Key::Any => true,
                    Key::Path(_) => false,
                    Key::Name(name) => other.common.name.as_ref() == Some(name),
                    Key::Extension(extension) => other.common.extension.as_ref() == Some(extension),
                    Key::Directory(directory) => {
                        other.common.directory.as_deref().is_some_and(|other| is_in(other, directory))
                    }
                }
    }

    /// Whether no path matches both. Where that is hard to say, it is no.
    pub(super) fn excludes(&self, other: &Glob) -> bool {
        let differ = |a: &Option<String>, b: &Option<String>| a.is_some() && b.is_some() && a != b;
        let directories = (&self.common.directory, &other.common.directory);
        differ(&self.common.name, &other.common.name)
            || differ(&self.common.extension, &other.common.extension)
            || matches!(directories, (Some(a), Some(b)) if !is_in(a, b) && !is_in(b, a))
    }
}

fn accepts(automaton: &GlobAutomaton, path: &[u8]) -> bool {
    // It fails for bytes at which the automaton is told to give up, and it is told so for none.
    automaton.try_search_fwd(&Input::new(path).anchored(Anchored::Yes)).is_ok_and(|end| end.is_some())
}

impl fmt::Debug for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

/// Whether the directory is `parent` or lies in it.
fn is_in(directory: &str, parent: &str) -> bool {
    directory.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Common {
    /// A component that a slash within braces or brackets cuts off has one of the special characters left in it, and
    /// so is never taken for a name.
    fn of(anchored: &str) -> Common {
        let plain = |part: &&str| !part.contains(SPECIAL);
        let components: Vec<&str> = anchored.split('/').collect();
        let last = components[components.len() - 1];
        let directories = components[..components.len() - 1].iter().take_while(|part| plain(part));
        let directory = directories.copied().collect::<Vec<_>>().join("/");
        let extension = last.rsplit_once('.').map(|(_, extension)| extension).filter(plain);
        Common {
            directory: Some(directory).filter(|directory| !directory.is_empty()),
            name: Some(last).filter(plain).map(str::to_owned),
            extension: extension.map(str::to_owned),
        }
    }

    /// The narrowest bucket, and whether nothing else lies in it.
    fn key(&self, anchored: &str) -> (Key, bool) {
        let Common { directory, name, extension } = self;
        match (directory, name, extension) {
            _ if matches!(anchored, "**" | "**/*" | "**/**") => (Key::Any, true),
            _ if !anchored.contains(SPECIAL) => (Key::Path(anchored.to_owned()), true),
            (_, Some(name), _) => (Key::Name(name.clone()), anchored.strip_prefix("**/") == Some(name)),
            (_, _, Some(extension)) => {
                let exact = anchored.strip_prefix("**/*.") == Some(extension);
                (Key::Extension(extension.clone()), exact)
            }
            (Some(directory), ..) => {
                let rest = &anchored[directory.len()..];
                (Key::Directory(directory.clone()), matches!(rest, "/**" | "/**/*"))
            }
            _ => (Key::Any, false),
        }
    }
}

/// Which rules a path could match.
#[derive(Debug, Default)]
pub(super) struct PathIndex {
    any: Vec<Entry>,
    paths: Buckets,
    names: Buckets,
    extensions: Buckets,
    directories: Buckets,
}

type Buckets = HashMap<Box<[u8]>, Vec<Entry>>;

/// A rule in a bucket: all paths of the bucket match it, or those that match the glob.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) rule: u32,
    glob: Option<Arc<GlobAutomaton>>,
}

impl Entry {
    pub(super) fn matches(&self, path: &[u8]) -> bool {
        self.glob.as_ref().is_none_or(|glob| accepts(glob, path))
    }
}

impl PathIndex {
    /// Adds a rule, with a number above those of all before. It matches the paths that match one of `globs`, or all
    /// paths if there are none.
    pub(super) fn add(&mut self, rule: u32, globs: &[Glob]) {
        if globs.is_empty() {
            self.any.push(Entry { rule, glob: None });
        }
        for glob in globs {
            let (buckets, key) = match &glob.key {
                Key::Any => {
                    self.any.push(Entry { rule, glob: Some(Arc::clone(&glob.automaton)) });
                    continue;
                }
                Key::Path(key) => (&mut self.paths, key),
                Key::Name(key) => (&mut self.names, key),
                Key::Extension(key) => (&mut self.extensions, key),
                Key::Directory(key) => (&mut self.directories, key),
            };
            let entry = Entry { rule, glob: (!glob.exact).then(|| Arc::clone(&glob.automaton)) };
            buckets.entry(key.as_bytes().into()).or_default().push(entry);
        }
    }

    /// The buckets that the path is in, each with its rules in order.
    pub(super) fn buckets<'a>(&'a self, path: &'a [u8]) -> impl Iterator<Item = &'a [Entry]> {
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let name = &path[slash.map_or(0, |at| at + 1)..];
        let dot = name.iter().rposition(|byte| *byte == b'.');
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let directories = slashes.filter_map(|(at, _)| self.directories.get(&path[..at]));
        let others = [
            Some(&self.any),
            self.paths.get(path),
            self.names.get(name),
            dot.and_then(|at| self.extensions.get(&name[at + 1..])),
        ];
        others.into_iter().flatten().chain(directories).map(Vec::as_slice)
    }
}
