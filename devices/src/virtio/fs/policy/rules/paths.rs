//! Globs that paths are matched with.

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
    pub(super) matcher: Matcher,
    /// What all paths that match have in common.
    pub(super) common: Common,
}

/// What a path must be to match.
#[derive(Clone)]
pub(super) enum Matcher {
    /// Anything.
    All,
    /// This path.
    Path(String),
    /// A path whose last component is this.
    Name(String),
    /// A path whose last component ends with a dot and this, which has no dot.
    Extension(String),
    /// A path below this one.
    Directory(String),
    /// What the automaton accepts. It is complete before the first path comes, so that no match allocates.
    Automaton(Arc<GlobAutomaton>),
}

pub(super) type GlobAutomaton = dense::DFA<Vec<u32>>;

#[derive(Clone, Debug, Default)]
pub(super) struct Common {
    directory: Option<String>,
    name: Option<String>,
    extension: Option<String>,
    /// The longest part that is in each of them.
    pub(super) literal: String,
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
            return Err(format!("it names a directory; for the files in it write `{text}**`"));
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
        let common = Common::of(&anchored);
        let matcher = match common.simple_matcher(&anchored) {
            Some(matcher) => matcher,
            None => Matcher::Automaton(Arc::new(automaton(glob.regex())?)),
        };
        Ok(Glob { text: text.to_owned(), matcher, common })
    }

    /// The glob as it is written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether every path matches.
    pub(super) fn matches_all(&self) -> bool {
        matches!(self.matcher, Matcher::All)
    }

    fn matches(&self, path: &[u8]) -> bool {
        match &self.matcher {
            Matcher::All => true,
            Matcher::Path(only) => path == only.as_bytes(),
            Matcher::Name(name) => split(path).1 == name.as_bytes(),
            Matcher::Extension(extension) => split(path).2 == Some(extension.as_bytes()),
            Matcher::Directory(directory) => {
                path.strip_prefix(directory.as_bytes()).is_some_and(|rest| rest.starts_with(b"/"))
            }
            Matcher::Automaton(automaton) => accepts(automaton, path),
        }
    }

    /// Whether each path that matches `other` matches this one too. Where that is hard to say, it is no.
    pub(super) fn covers(&self, other: &Glob) -> bool {
        let common = &other.common;
        self.text == other.text
            || matches!(&other.matcher, Matcher::Path(path) if self.matches(path.as_bytes()))
            || match &self.matcher {
                Matcher::All => true,
                Matcher::Path(_) | Matcher::Automaton(_) => false,
                Matcher::Name(name) => common.name.as_ref() == Some(name),
                Matcher::Extension(extension) => common.extension.as_ref() == Some(extension),
                Matcher::Directory(parent) => {
                    common.directory.as_deref().is_some_and(|directory| is_in(directory, parent))
                }
            }
    }
}

fn automaton(regex: &str) -> Result<GlobAutomaton, String> {
    let limits = dense::Config::new()
        .start_kind(StartKind::Anchored)
        .dfa_size_limit(Some(AUTOMATON_LIMIT))
        .determinize_size_limit(Some(AUTOMATON_LIMIT));
    dense::Builder::new()
        .configure(limits)
        .syntax(syntax::Config::new().utf8(false).dot_matches_new_line(true))
        .thompson(thompson::Config::new().utf8(false))
        .build(regex)
        .map_err(|_| "it is too complex; use fewer wildcards".to_owned())
}

pub(super) fn accepts(automaton: &GlobAutomaton, path: &[u8]) -> bool {
    // It fails for bytes at which the automaton is told to give up, and it is told so for none.
    automaton.try_search_fwd(&Input::new(path).anchored(Anchored::Yes)).is_ok_and(|end| end.is_some())
}

impl fmt::Debug for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

/// A path's directory, its last component, and what follows the last dot in that.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8], Option<&[u8]>) {
    let slash = path.iter().rposition(|byte| *byte == b'/');
    let (directory, name) = slash.map_or((&path[..0], path), |at| (&path[..at], &path[at + 1..]));
    let dot = name.iter().rposition(|byte| *byte == b'.');
    (directory, name, dot.map(|at| &name[at + 1..]))
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
            literal: longest_literal(anchored),
        }
    }

    /// How to match a glob without an automaton, if it is of the kind.
    fn simple_matcher(&self, anchored: &str) -> Option<Matcher> {
        let Common { directory, name, extension, .. } = self;
        if matches!(anchored, "**" | "**/*" | "**/**") {
            return Some(Matcher::All);
        }
        if !anchored.contains(SPECIAL) {
            return Some(Matcher::Path(anchored.to_owned()));
        }
        let rest = |prefix: &Option<String>| anchored.strip_prefix(prefix.as_deref()?);
        let after = |prefix| anchored.strip_prefix(prefix);
        match (name, extension) {
            (Some(name), _) if after("**/") == Some(name) => Some(Matcher::Name(name.clone())),
            (_, Some(extension)) if after("**/*.") == Some(extension) => {
                Some(Matcher::Extension(extension.clone()))
            }
            _ if matches!(rest(directory), Some("/**" | "/**/*")) => {
                directory.clone().map(Matcher::Directory)
            }
            _ => None,
        }
    }
}

/// The longest part of a glob that stands in each path that matches.
fn longest_literal(anchored: &str) -> String {
    // `**/` at the start may stand for nothing, slash included.
    let mut rest = anchored.strip_prefix("**/").unwrap_or(anchored);
    let mut longest = "";
    while !rest.is_empty() {
        let end = rest.find(SPECIAL).unwrap_or(rest.len());
        if end > longest.len() {
            longest = &rest[..end];
        }
        rest = &rest[end..];
        // Alternatives and classes hold nothing that must be there. They may be nested and have their own escapes, so
        // what comes behind them is left alone too.
        rest = if rest.starts_with(['*', '?']) { &rest[1..] } else { "" };
    }
    longest.to_owned()
}
