//! What can be wrong with a matrix file, and where.

use std::io;
use std::path::PathBuf;

use devices::text::listed;

use crate::config::Mistake;

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
