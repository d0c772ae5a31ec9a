//! What the fuzz targets call (fuzz/), and the unit tests with inputs of their own. All panic where a promise is broken.

mod mappings;
mod requests;
mod rings;

pub use mappings::mappings;
pub use requests::requests;
pub use rings::rings;

use arbitrary::Unstructured;
use tempfile::TempDir;

use super::testing::FakeGuest;
use super::{FileSystemConfig, policy::Policy};

/// A guest whose share is beside a file that it must not touch. In memory, if there is such a directory.
fn guest(change: impl FnOnce(&mut FileSystemConfig)) -> FakeGuest {
    let outer = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap();
    let share = outer.path().join("share");
    std::fs::create_dir(&share).unwrap();
    std::fs::write(outer.path().join("secret"), SECRET).unwrap();
    let mut guest = FakeGuest::on(outer, |config| {
        config.path = share;
        config.policy = Policy::Always;
        config.descriptors = 64;
        change(config);
    });
    guest.reply_room = 16 << 10;
    guest
}

const SECRET: &[u8] = b"a secret of the host";

/// Whether there is nothing but the share and the secret, as it was.
fn is_untouched(guest: &FakeGuest) -> bool {
    let directory = guest.directory.path();
    std::fs::read_dir(directory).unwrap().count() == 2
        && std::fs::read(directory.join("secret")).unwrap() == SECRET
}

/// A number from `source`, or zero when it is used up.
fn take<'a, T: arbitrary::Arbitrary<'a> + Default>(source: &mut Unstructured<'a>) -> T {
    source.arbitrary().unwrap_or_default()
}

/// One of `choices`.
fn choose<T: Copy>(source: &mut Unstructured<'_>, choices: &[T]) -> T {
    choices[usize::from(take::<u8>(source)) % choices.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::exercise;

    #[test]
    fn any_requests_are_answered_and_stay_in_the_share() {
        exercise("requests", 300, requests);
    }

    #[test]
    fn any_mappings_are_those_of_the_model() {
        exercise("mappings", 300, mappings);
    }

    #[test]
    fn any_rings_are_served_or_refused() {
        exercise("rings", 1000, rings);
    }
}
