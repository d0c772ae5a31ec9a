mod built_in;
mod mistakes;
mod properties;
mod rules;

use super::*;

/// A regular file that anyone would map: 1 MiB in an idle window of 64 chunks, 52 of them usable.
fn file() -> FileFacts<'static> {
    FileFacts {
        mode: libc::S_IFREG | 0o644,
        size: 1 << 20,
        window: WindowFacts { chunks: 64, ..WindowFacts::default() },
        path: b"dir/file.txt",
        ..FileFacts::default()
    }
}

fn sized(size: u64) -> FileFacts<'static> {
    FileFacts { size, ..file() }
}

fn rules(text: &str) -> Policy {
    let text = format!("version = 1\n{text}");
    Policy::from_rules("test.toml", &text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn dax(policy: &Policy, facts: &FileFacts<'_>) -> bool {
    policy.decide(facts, None).dax
}

/// The states that a policy gives a file that comes by these facts, one after the other.
fn history<'a>(policy: &Policy, facts: impl IntoIterator<Item = FileFacts<'a>>) -> Vec<bool> {
    let mut current = None;
    let states = facts.into_iter().map(|facts| {
        current = Some(policy.decide(&facts, current).dax);
        current == Some(true)
    });
    states.collect()
}

fn flips(states: &[bool]) -> usize {
    states.windows(2).filter(|pair| pair[0] != pair[1]).count()
}
