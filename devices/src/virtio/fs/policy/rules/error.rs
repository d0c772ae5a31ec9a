//! What can be wrong with a rule file, and where.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use crate::text::{listed, position};

/// Why there is no policy in a file.
#[derive(Debug, thiserror::Error)]
pub enum RuleFileError {
    /// It cannot be read.
    #[error("Cannot read the DAX policy {}: name a file that exists and that you may read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It has mistakes. The message has a line for each, beginning with FILE:LINE:COLUMN.
    #[error("{}", listed(name, mistakes))]
    Mistakes {
        /// What the file is called.
        name: String,
        /// All that was found, in the order of the file; never empty.
        mistakes: Vec<Mistake>,
    },
}

/// A mistake in a rule file, printed as LINE:COLUMN: PROBLEM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mistake {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub problem: Problem,
}

impl Mistake {
    /// A mistake at a byte offset of `text`.
    pub(super) fn at(text: &str, offset: usize, problem: Problem) -> Mistake {
        let (line, column) = position(text, offset);
        Mistake { line, column, problem }
    }

    /// The same for a part of `text`, which is named by where it begins.
    pub(super) fn in_span(text: &str, span: Range<usize>, problem: Problem) -> Mistake {
        Mistake::at(text, span.start, problem)
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.problem)
    }
}

/// What is wrong at one place of a rule file. The messages name what to write instead.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Problem {
    /// No TOML.
    #[error("{0}")]
    Syntax(String),
    /// A version that is not known.
    #[error("this daxvm reads rule files of version 1: write `version = 1`")]
    Version,
    /// A key that must be there is not.
    #[error("`{key}` is missing: write, for example, `{example}`")]
    Missing {
        /// The key.
        key: &'static str,
        /// A line that would do.
        example: &'static str,
    },
    /// A key that is not known.
    #[error("{0}")]
    UnknownKey(String),
    /// A value of the wrong type.
    #[error("`{key}` takes {expected}, not {found}")]
    Type {
        /// The key.
        key: String,
        /// What it takes.
        expected: &'static str,
        /// What was written.
        found: &'static str,
    },
    /// A value that the key cannot have.
    #[error("`{key}`: {why}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// A glob that no path of a file can match, or that is no glob.
    #[error("the glob `{glob}` can match no file: {why}")]
    Glob {
        /// The glob as it is written.
        glob: String,
        /// What is wrong with it.
        why: String,
    },
    /// Conditions that nothing can meet.
    #[error("the rule can never match: {0}")]
    Contradiction(String),
    /// A rule that no file reaches.
    #[error("the rule can never match: {0} nothing to it; move it up, or remove it")]
    Unreachable(String),
}
