//! What can be wrong with a matrix file, and where.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use devices::text::position;

/// Why there is no matrix in a file.
#[derive(Debug, thiserror::Error)]
pub enum MatrixFileError {
    /// It cannot be read.
    #[error("Cannot read the matrix file {}: name one that exists and that you may read, as in `daxvm test ci/daxvm.toml`", path.display())]
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

fn listed(name: &str, mistakes: &[Mistake]) -> String {
    let lines: Vec<_> = mistakes.iter().map(|mistake| format!("{name}:{mistake}")).collect();
    lines.join("\n")
}

/// A mistake in a matrix file, printed as LINE:COLUMN: PROBLEM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mistake {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What is wrong, and what to write instead.
    pub problem: String,
}

impl Mistake {
    /// A mistake in a part of `text`, which is named by where it begins.
    pub(super) fn in_span(text: &str, span: Range<usize>, problem: String) -> Mistake {
        let (line, column) = position(text, span.start);
        Mistake { line, column, problem }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.problem)
    }
}
