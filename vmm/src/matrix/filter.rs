//! Which cases are run: patterns for names.

use devices::text::nearest;
use globset::{GlobBuilder, GlobMatcher};

use super::{Case, MatrixError};

/// Patterns of `--filter`. A pattern that is the name of a case means just this one; one with `*`, `?`, `[` or `{` is a
/// glob for whole names, in which `*` matches `/` too; any other is a part of names.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    patterns: Vec<String>,
}

impl Filter {
    /// Cases that match one of `patterns`; all of them if there is none.
    pub fn new(patterns: Vec<String>) -> Filter {
        Filter { patterns }
    }

    /// The cases that are meant.
    ///
    /// # Errors
    /// A pattern is no glob, or matches no case: a run of nothing would look like success.
    pub fn select(&self, cases: &[Case]) -> Result<Vec<Case>, MatrixError> {
        if self.patterns.is_empty() {
            return Ok(cases.to_vec());
        }
        let mut chosen = vec![false; cases.len()];
        for pattern in &self.patterns {
            let matches = matcher(pattern, cases)?;
            let mut any = false;
            for (case, chosen) in cases.iter().zip(&mut chosen) {
                let matched = matches(&case.name);
                *chosen |= matched;
                any |= matched;
            }
            if !any {
                // A whole name is meant, or a part of one.
                let names = cases.iter().map(|case| &*case.name);
                let parts = names.clone().flat_map(|name| name.split('/'));
                let near = nearest(pattern, names).or_else(|| nearest(pattern, parts)).map(str::to_owned);
                return Err(MatrixError::NoCase { pattern: pattern.clone(), near });
            }
        }
        Ok(cases.iter().zip(chosen).filter(|(_, chosen)| *chosen).map(|(case, _)| case.clone()).collect())
    }
}

type Matches<'p> = Box<dyn Fn(&str) -> bool + 'p>;

fn matcher<'p>(pattern: &'p str, cases: &[Case]) -> Result<Matches<'p>, MatrixError> {
    if cases.iter().any(|case| case.name == pattern) {
        return Ok(Box::new(move |name| name == pattern));
    }
    if pattern.contains(['*', '?', '[', '{']) {
        let matcher = glob(pattern).map_err(|why| MatrixError::Glob { pattern: pattern.to_owned(), why })?;
        return Ok(Box::new(move |name| matcher.is_match(name)));
    }
    Ok(Box::new(move |name| name.contains(pattern)))
}

/// A glob for names of cases, kernels or commands; `*` matches `/` too.
///
/// # Errors
/// What is wrong with it.
pub(super) fn glob(text: &str) -> Result<GlobMatcher, String> {
    let glob = GlobBuilder::new(text).literal_separator(false).backslash_escape(true).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|error| error.kind().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::testing::case;

    fn select(patterns: &[&str]) -> Result<Vec<String>, MatrixError> {
        let cases = ["6.12/build", "6.12/build-all", "6.12/boot/cpus=4", "6.1/build"].map(case);
        let filter = Filter::new(patterns.iter().map(|pattern| (*pattern).to_owned()).collect());
        Ok(filter.select(&cases)?.into_iter().map(|case| case.name).collect())
    }

    #[test]
    fn a_filter_is_a_name_a_glob_or_a_part_of_names() {
        assert_eq!(select(&[]).unwrap().len(), 4);
        assert_eq!(select(&["6.12/build"]).unwrap(), ["6.12/build"]);
        assert_eq!(select(&["12/build"]).unwrap(), ["6.12/build", "6.12/build-all"]);
        assert_eq!(select(&["*/build"]).unwrap(), ["6.12/build", "6.1/build"]);
        assert_eq!(select(&["6.12/*"]).unwrap().len(), 3);
        assert_eq!(select(&["*cpus=?", "6.1/build"]).unwrap(), ["6.12/boot/cpus=4", "6.1/build"]);
    }

    #[test]
    fn a_filter_that_matches_nothing_is_an_error() {
        let error = select(&["6.12/biuld"]).unwrap_err().to_string();
        assert!(error.contains("did you mean `6.12/build`"), "{error}");
        let error = select(&["biuld"]).unwrap_err().to_string();
        assert!(error.contains("did you mean `build`"), "{error}");
        let error = select(&["boot", "zzzzzzzzzzzzz"]).unwrap_err().to_string();
        assert!(error.contains("--list"), "{error}");
        let error = select(&["6.[12/x"]).unwrap_err().to_string();
        assert!(error.contains("6.[12/x"), "{error}");
    }
}
