//! What holds for all facts and rules.

use std::fmt::Write;

use proptest::prelude::*;

use super::*;

const GLOBS: [&str; 8] = ["*.so", "lib/**", "*.{a,so}", "a*", "/x.so", "lib/*.a", "**/y/*", "abc"];
const PATHS: [&str; 8] = ["x.so", "lib/x.so", "lib/y/z.a", "abc", "lib/abc", "y/ab.c", "lib/x.a", "z"];
const ACTIONS: [&str; 3] = ["allow", "deny", "size:40"];

/// A rule, of which the tests have their own understanding.
#[derive(Clone, Debug)]
struct Simple {
    glob: Option<usize>,
    size: Option<(u64, u64)>,
    free: Option<u64>,
    uid: Option<u32>,
    executable: Option<bool>,
    action: usize,
}

impl Simple {
    fn any() -> impl Strategy<Value = Simple> {
        let bounds = (0..100u64, 0..100u64).prop_map(|(a, b)| (a.min(b), a.max(b)));
        (
            proptest::option::of(0..GLOBS.len()),
            proptest::option::of(bounds),
            proptest::option::weighted(0.2, 0..=100u64),
            proptest::option::weighted(0.3, 0..3u32),
            proptest::option::weighted(0.3, any::<bool>()),
            0..ACTIONS.len(),
        )
            .prop_map(|(glob, size, free, uid, executable, action)| Simple {
                glob,
                size,
                free,
                uid,
                executable,
                action,
            })
    }

    fn text(&self) -> String {
        let mut text = format!("[[rule]]\ndax = \"{}\"\n", ACTIONS[self.action]);
        let mut add =
            |line: Option<String>| line.into_iter().for_each(|line| writeln!(text, "{line}").unwrap());
        add(self.glob.map(|glob| format!("path = {:?}", GLOBS[glob])));
        add(self.size.map(|(min, max)| format!("size = {{ min = {min}, max = {max} }}")));
        add(self.free.map(|free| format!("window_free.min = {free}")));
        add(self.uid.map(|uid| format!("uid = {uid}")));
        add(self.executable.map(|executable| format!("executable = {executable}")));
        text
    }

    fn matches(&self, facts: &FileFacts<'_>) -> bool {
        self.glob.is_none_or(|glob| glob_matches(GLOBS[glob], facts.path))
            && self.size.is_none_or(|(min, max)| min <= facts.size && facts.size <= max)
            && self.free.is_none_or(|free| free <= facts.window.free_percent())
            && self.uid.is_none_or(|uid| uid == facts.uid)
            && self.executable.is_none_or(|executable| executable == (facts.mode & 0o111 != 0))
    }
}

/// The library's own reading of a glob.
fn glob_matches(glob: &str, path: &[u8]) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let pattern = if glob.contains('/') { glob.trim_start_matches('/').into() } else { format!("**/{glob}") };
    let glob = globset::GlobBuilder::new(&pattern).literal_separator(true).build().unwrap();
    glob.compile_matcher().is_match(std::ffi::OsStr::from_bytes(path))
}

fn any_facts() -> impl Strategy<Value = FileFacts<'static>> {
    (0..PATHS.len(), 0..120u64, 0..=100u64, 0..4u32, any::<bool>()).prop_map(
        |(path, size, mapped, uid, executable)| FileFacts {
            mode: libc::S_IFREG | if executable { 0o755 } else { 0o644 },
            uid,
            path: PATHS[path].as_bytes(),
            window: WindowFacts { chunks: 100, mapped, promised: 0, thrash: 0 },
            ..sized(size)
        },
    )
}

/// The rules of a file in which all can match: those that the loader calls unreachable are left out, and it is an
/// error when one of the facts would have reached one.
fn load(mut simple: Vec<Simple>, facts: &[FileFacts<'_>]) -> (Vec<Simple>, Policy) {
    loop {
        let mut text = "version = 1\ndefault = \"deny\"\n".to_owned();
        let mut lines = Vec::new();
        for rule in &simple {
            lines.push(text.lines().count() + 1);
            text += &rule.text();
        }
        match Policy::from_rules("test.toml", &text) {
            Ok(policy) => return (simple, policy),
            Err(RuleFileError::Mistakes { mistakes, .. }) => {
                let mistake = &mistakes[0];
                assert!(matches!(mistake.problem, Problem::Unreachable(_)), "{mistake}\n{text}");
                let number = lines.iter().position(|line| *line == mistake.line).unwrap();
                for facts in facts {
                    let first = simple.iter().position(|rule| rule.matches(facts));
                    assert_ne!(first, Some(number), "{mistake}\n{text}{facts:?}");
                }
                simple.remove(number);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

proptest! {
    #[test]
    fn the_first_match_wins(
        simple in proptest::collection::vec(Simple::any(), 0..12),
        facts in proptest::collection::vec(any_facts(), 1..20),
    ) {
        let (simple, policy) = load(simple, &facts);
        for facts in &facts {
            let first = simple.iter().position(|rule| rule.matches(facts));
            let decision = policy.decide(facts, None);
            let by = first.map_or(DecidedBy::Default, |number| DecidedBy::Rule(number as u32));
            let dax = match first.map(|number| ACTIONS[simple[number].action]) {
                Some("allow") => true,
                Some("size:40") => facts.size >= 40,
                _ => false,
            };
            prop_assert_eq!((decision.reason.by, decision.dax), (by, dax));
            prop_assert_eq!(decision, policy.decide(facts, None));
            prop_assert_eq!(decision, policy.clone().decide(facts, None));
        }
    }

    #[test]
    fn a_decision_is_only_kept_near_facts_that_call_for_it(
        simple in proptest::collection::vec(Simple::any(), 0..8),
        facts in any_facts(),
        current: bool,
    ) {
        let (_, policy) = load(simple, &[facts]);
        let plain = policy.decide(&facts, None);
        let decision = policy.decide(&facts, Some(current));
        prop_assert_eq!(policy.decide(&facts, Some(decision.dax)).dax, decision.dax);
        if plain.dax == current {
            prop_assert_eq!(decision.dax, current);
        }
        let near = (facts.size..=facts.size + facts.size / 3).any(|size| {
            (0..=100u64).any(|mapped| {
                let window = WindowFacts { mapped, ..facts.window };
                let distance = facts.window.free_percent().abs_diff(window.free_percent());
                distance <= 5 && policy.decide(&FileFacts { size, window, ..facts }, None).dax == current
            })
        });
        // Whatever is near by decides the same way, so there is nothing to keep; else it must be kept.
        if near {
            prop_assert_eq!(decision.dax, current);
        }
    }

    #[test]
    fn a_larger_file_is_dax_where_a_smaller_one_is(
        threshold: u64, small: u64, large: u64, current: Option<bool>,
    ) {
        let (small, large) = (small.min(large), small.max(large));
        let decide = |size| Policy::Size(threshold).decide(&sized(size), current).dax;
        prop_assert!(decide(small) <= decide(large));
        prop_assert_eq!(Policy::Size(threshold).decide(&sized(small), None).dax, small >= threshold);
    }

    #[test]
    fn what_was_dax_is_given_up_later_than_what_is_new_is_taken(
        size in 0..1u64 << 30, promised in 0..70u64,
    ) {
        let window = WindowFacts { promised, ..file().window };
        let facts = FileFacts { window, ..sized(size) };
        for policy in [Policy::Auto, Policy::Size(1 << 20)] {
            let decide = |current| policy.decide(&facts, current).dax;
            prop_assert!(decide(Some(false)) == decide(None) && decide(None) <= decide(Some(true)));
        }
    }

    #[test]
    fn a_walk_within_the_band_never_flips(
        threshold in 64..1u64 << 40,
        steps in proptest::collection::vec(0.0..1.0f64, 2..200),
    ) {
        let lowest = threshold - threshold / 4 + 1;
        let walk = |steps: &[f64]| -> Vec<_> {
            steps.iter().map(|step| sized(lowest + ((threshold - lowest) as f64 * step) as u64)).collect()
        };
        let rule = |action: &str, default: &str| {
            rules(&format!("default = \"{default}\"\n[[rule]]\nsize.min = {threshold}\ndax = \"{action}\""))
        };
        for policy in [Policy::Size(threshold), rule("allow", "deny"), rule("deny", "allow")] {
            // The walk starts above the band, or below.
            for start in [threshold, 0] {
                let facts: Vec<_> = [sized(start)].into_iter().chain(walk(&steps)).collect();
                let inside = facts.iter().all(|facts| facts.size <= threshold);
                prop_assert!(inside);
                let stays_below = start == 0 && facts.iter().all(|facts| facts.size < threshold);
                if start == threshold || stays_below {
                    prop_assert_eq!(flips(&history(&policy, facts)), 0);
                } else {
                    prop_assert!(flips(&history(&policy, facts)) <= 1);
                }
            }
        }
    }

    #[test]
    fn random_data_breaks_no_promise(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        fuzzing::decide(&data);
        fuzzing::rule_file(&data);
    }

    #[test]
    fn scrambled_rule_files_break_no_promise(
        facts in proptest::array::uniform32(any::<u8>()),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), "[ -~\n]{0,3}", 0..4usize), 0..6),
    ) {
        let mut text = SAMPLE.to_owned();
        for (at, insert, remove) in edits {
            let at = at.index(text.len());
            text.replace_range(at..(at + remove).min(text.len()), &insert);
        }
        fuzzing::rule_file(&[&facts, &facts, text.as_bytes()].concat());
    }
}

/// Everything that a rule file can have.
const SAMPLE: &str = r#"version = 1
default = "auto"
enforce = true
[[rule]]
name = "one"
path = ["*.so", "lib/**/[a-c]?{x,y}"]
size = { min = "4K", max = 0x100000 }
age.min = "90s"
window_free = { min = 10, max = 90 }
executable = true
set_id = false
dax = "size:64K"
[[rule]]
hint = true
capabilities = false
read_only = false
uid = [0, 1000]
gid = 5
xattr = { "user.a" = true, "user.b" = "x" }
dax = "inode"
"#;

#[test]
fn the_sample_is_a_rule_file() {
    fuzzing::rule_file(&[&[7; 64], SAMPLE.as_bytes()].concat());
    Policy::from_rules("sample.toml", SAMPLE).unwrap();
}
