//! The attempts, by what they lie about. Each has its answers, so that one which is answered otherwise is found.

mod bars;
mod chains;
mod configuration;
mod kinds;
mod mappings;
mod midway;
mod names;
mod nodes;
mod privileges;
mod registers;
mod rings;
mod sessions;

use super::Rogue;
use crate::guest::Failure;

/// What an attempt does. An error is what kept it from being made.
type Run = Box<dyn Fn(&mut Rogue) -> Result<(), Failure>>;

/// The same without anything to remember.
type Act = fn(&mut Rogue) -> Result<(), Failure>;

/// One attempt.
pub struct Attempt {
    /// GROUP/WHAT
    pub name: String,
    pub run: Run,
}

impl Attempt {
    fn new(group: &str, what: &str, run: impl Fn(&mut Rogue) -> Result<(), Failure> + 'static) -> Attempt {
        let what = what.replace(',', "").replace(' ', "-").to_lowercase();
        Attempt { name: format!("{group}/{what}"), run: Box::new(run) }
    }
}

/// All attempts, in the order in which they are made.
pub fn all() -> Vec<Attempt> {
    let groups = [
        names::attempts(),
        nodes::attempts(),
        kinds::attempts(),
        privileges::attempts(),
        mappings::attempts(),
        sessions::attempts(),
        chains::attempts(),
        rings::attempts(),
        registers::attempts(),
        configuration::attempts(),
        bars::attempts(),
        midway::attempts(),
    ];
    groups.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_attempt_has_a_name_of_its_own() {
        let attempts = all();
        let names: HashSet<_> = attempts.iter().map(|attempt| attempt.name.as_str()).collect();
        assert_eq!(names.len(), attempts.len());
        assert!(names.iter().all(|name| !name.contains(' ')), "{names:?}");
    }
}
