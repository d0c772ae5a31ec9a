//! An index of globs: which rules a path could match, without a look at the others.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use aho_corasick::AhoCorasick;

use super::conditions::{Conditions, Flags, Interval};
use super::parse::ParsedRule;
use super::paths::{GlobAutomaton, Matcher, accepts, split};

/// Which rules a path could match.
#[derive(Debug, Default)]
pub(super) struct PathIndex {
    any: Vec<Entry>,
    paths: Buckets,
    names: Buckets,
    extensions: Buckets,
    directories: Buckets,
    /// Globs that need a look, by a part that paths must have, and the search for all these parts at once.
    literals: Vec<Vec<Entry>>,
    search: Option<AhoCorasick>,
}

type Buckets = HashMap<Box<[u8]>, Vec<Entry>>;

/// A rule in a bucket: all paths of the bucket match it, or those that match the glob.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) rule: u32,
    /// Two of the rule's conditions. They are here too, so that a pass over 1,000 rules stays within 32 KiB of memory,
    /// which is what the fastest cache of a processor holds.
    pub(super) flags: Flags,
    pub(super) size: Interval,
    glob: Option<Arc<GlobAutomaton>>,
}

impl Entry {
    pub(super) fn matches(&self, path: &[u8]) -> bool {
        self.glob.as_ref().is_none_or(|glob| accepts(glob, path))
    }
}

impl PathIndex {
    /// An index of rules by number, each of which matches the paths that match one of its globs, or all paths if it
    /// has none.
    pub(super) fn new(rules: &[ParsedRule]) -> PathIndex {
        let mut index = PathIndex::default();
        let mut literals: BTreeMap<&str, Vec<Entry>> = BTreeMap::new();
        for (number, rule) in (0..).zip(rules) {
            let Conditions { size, flags, .. } = rule.conditions;
            let entry = Entry { rule: number, flags, size, glob: None };
            if rule.paths.is_empty() {
                index.any.push(entry.clone());
            }
            for glob in &rule.paths {
                let (buckets, key) = match &glob.matcher {
                    Matcher::All => {
                        index.any.push(entry.clone());
                        continue;
                    }
                    Matcher::Path(key) => (&mut index.paths, key),
                    Matcher::Name(key) => (&mut index.names, key),
                    Matcher::Extension(key) => (&mut index.extensions, key),
                    Matcher::Directory(key) => (&mut index.directories, key),
                    Matcher::Automaton(automaton) => {
                        let entry = Entry { glob: Some(Arc::clone(automaton)), ..entry.clone() };
                        match &*glob.common.literal {
                            "" => index.any.push(entry),
                            literal => literals.entry(literal).or_default().push(entry),
                        }
                        continue;
                    }
                };
                buckets.entry(key.as_bytes().into()).or_default().push(entry.clone());
            }
        }
        if !literals.is_empty() {
            let search = AhoCorasick::new(literals.keys());
            index.search = Some(search.expect("a rule file has fewer than 2^31 bytes"));
            index.literals = literals.into_values().collect();
        }
        index
    }

    /// The buckets that the path is in, each with its rules in order.
    pub(super) fn buckets<'a>(&'a self, path: &'a [u8]) -> impl Iterator<Item = &'a [Entry]> {
        let (_, name, extension) = split(path);
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let directories = slashes.filter_map(|(at, _)| self.directories.get(&path[..at]));
        let others = [
            Some(&self.any),
            self.paths.get(path),
            self.names.get(name),
            extension.and_then(|extension| self.extensions.get(extension)),
        ];
        let found = self.search.iter().flat_map(move |search| search.find_overlapping_iter(path));
        let found = found.map(|found| &self.literals[found.pattern().as_usize()]);
        others.into_iter().flatten().chain(directories).chain(found).map(Vec::as_slice)
    }
}
