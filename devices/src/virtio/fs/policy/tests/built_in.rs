//! The policies with names: every threshold, from both sides.

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn fact(policy: &Policy, facts: &FileFacts<'_>) -> (bool, Fact) {
    let decision = policy.decide(facts, None);
    (decision.dax, decision.reason.fact)
}

fn all() -> [Policy; 5] {
    [Policy::Never, Policy::Always, Policy::Inode, Policy::Size(BREAK_EVEN), Policy::Auto]
}

#[test]
fn only_regular_files_are_dax() {
    for kind in [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK] {
        let facts = FileFacts { mode: kind | 0o777, hint: true, ..file() };
        for policy in all().into_iter().chain([rules("default = \"allow\"\nenforce = true")]) {
            assert_eq!(fact(&policy, &facts), (false, Fact::NotRegular));
            assert!(!policy.allows_mapping(&facts));
        }
    }
}

#[test]
fn set_id_files_are_never_dax_and_may_still_be_mapped() {
    for mode in [0o4755, 0o4644, 0o2755, 0o6755, 0o2010] {
        let facts = FileFacts { mode: libc::S_IFREG | mode, hint: true, ..file() };
        for policy in [Policy::Always, Policy::Inode, Policy::Size(0), Policy::Auto] {
            assert_eq!(fact(&policy, &facts), (false, Fact::SetId));
            assert!(policy.allows_mapping(&facts));
        }
        assert!(!Policy::Never.allows_mapping(&facts));
    }
    for mode in [0, 0o644, 0o755, 0o1777, 0o2644] {
        let facts = FileFacts { mode: libc::S_IFREG | mode, ..file() };
        assert_eq!(fact(&Policy::Always, &facts), (true, Fact::Alike));
        assert_eq!(fact(&Policy::Never, &facts), (false, Fact::Alike));
    }
}

#[test]
fn inode_follows_the_hint_alone() {
    for hint in [false, true] {
        assert_eq!(fact(&Policy::Inode, &FileFacts { hint, ..sized(0) }), (hint, Fact::Hint));
    }
}

#[test]
fn size_grants_from_its_threshold_on() {
    for (threshold, size, dax) in [
        (BREAK_EVEN, 0, false),
        (BREAK_EVEN, 32 * KIB - 1, false),
        (BREAK_EVEN, 32 * KIB, true),
        (BREAK_EVEN, u64::MAX, true),
        (0, 0, true),
        (1, 0, false),
        (1, 1, true),
        (2 * MIB, 2 * MIB - 1, false),
        (2 * MIB, 2 * MIB, true),
        (u64::MAX, u64::MAX - 1, false),
        (u64::MAX, u64::MAX, true),
    ] {
        assert_eq!(fact(&Policy::Size(threshold), &sized(size)), (dax, Fact::Size), "{threshold} {size}");
    }
}

#[test]
fn costs_are_those_of_whole_chunks_and_whole_pages() {
    for (size, chunks, page_cache) in [
        (0, 0, 0),
        (1, 1, 4 * KIB),
        (4 * KIB, 1, 4 * KIB),
        (4 * KIB + 1, 1, 8 * KIB),
        (2 * MIB, 1, 2 * MIB),
        (2 * MIB + 1, 2, 2 * MIB + 4 * KIB),
        (4 * MIB, 2, 4 * MIB),
    ] {
        assert_eq!(Cost::of(size), Cost { chunks, descriptors: chunks * 32 * KIB, page_cache }, "{size}");
    }
    assert_eq!(CHUNK_COST, 32 * KIB);
    assert_eq!(WindowFacts::fixed_cost(1 << 30), 16 * MIB);
}

#[test]
fn auto_grants_what_pays() {
    for (size, dax) in [
        (0, false),
        (1, false),
        (28 * KIB, false),
        (32 * KIB, false),
        (32 * KIB + 1, true),
        (2 * MIB, true),
        (2 * MIB + 1, true),
    ] {
        assert_eq!(fact(&Policy::Auto, &sized(size)), (dax, Fact::Cost), "{size}");
    }
    let capable = FileFacts { capabilities: true, ..file() };
    assert_eq!(fact(&Policy::Auto, &capable), (false, Fact::Capabilities));
    assert!(dax(&Policy::Always, &capable) && Policy::Auto.allows_mapping(&capable));
}

#[test]
fn the_guest_keeps_a_fifth_of_the_window_free() {
    for (chunks, usable) in [(0, 0), (1, 0), (4, 3), (5, 4), (9, 8), (10, 8), (16, 13), (64, 52), (100, 80)] {
        assert_eq!(WindowFacts { chunks, ..WindowFacts::default() }.usable(), usable, "{chunks}");
    }
    let free = |chunks, mapped| WindowFacts { chunks, mapped, ..WindowFacts::default() }.free_percent();
    assert_eq!([free(0, 0), free(64, 0), free(64, 63), free(64, 64), free(64, 99)], [0, 100, 1, 0, 0]);
    assert_eq!(free(u64::MAX, 1), 99);
    assert_eq!(WindowFacts::idle(5 * MIB).chunks, 2);
}

#[test]
fn auto_stays_within_the_windows_budget() {
    for (promised, size, granted) in [
        (0, 104 * MIB, true),
        (0, 104 * MIB + 1, false),
        (51, 2 * MIB, true),
        (51, 2 * MIB + 1, false),
        (52, MIB, false),
        (u64::MAX, MIB, false),
    ] {
        let window = WindowFacts { promised, ..file().window };
        let facts = FileFacts { window, ..sized(size) };
        let fact_of = if granted { Fact::Cost } else { Fact::Window };
        assert_eq!(fact(&Policy::Auto, &facts), (granted, fact_of), "{promised} {size}");
        assert!(Policy::Auto.allows_mapping(&facts) && dax(&Policy::Always, &facts));
    }
    let none = FileFacts { window: WindowFacts::default(), ..file() };
    assert_eq!(fact(&Policy::Auto, &none), (false, Fact::Window));
}

#[test]
fn what_profits_least_waits_while_the_window_thrashes() {
    let sizes = [200 * KIB, 300 * KIB, MIB, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 104 * MIB, 104 * MIB + 1];
    for (thrash, granted) in [
        (0, [true; 8]),
        (1, [false, true, true, true, true, true, true, true]),
        (2, [false, false, true, true, true, true, true, true]),
        (3, [false, false, false, false, true, true, true, true]),
        (4, [false, false, false, false, true, true, true, false]),
        (MAX_THRASH_LEVEL, [false; 8]),
    ] {
        for (size, granted) in sizes.into_iter().zip(granted) {
            let facts = |thrash| FileFacts { window: WindowFacts { thrash, ..file().window }, ..sized(size) };
            let by = if granted { Fact::Size } else { Fact::Thrash };
            assert_eq!(fact(&Policy::Size(4096), &facts(thrash)), (granted, by), "{size} {thrash}");
            // What is DAX already goes one level later, but at the last.
            if thrash + 1 < MAX_THRASH_LEVEL {
                let kept = Policy::Size(4096).decide(&facts(thrash + 1), Some(true)).dax;
                assert_eq!(kept, granted, "{size} {thrash}");
            }
            // Who asks for DAX by name gets it.
            assert!(dax(&Policy::Always, &facts(thrash)), "{size} {thrash}");
            assert!(dax(&Policy::Inode, &FileFacts { hint: true, ..facts(thrash) }));
        }
        let small = FileFacts { window: WindowFacts { thrash, ..file().window }, ..sized(200 * KIB) };
        let by = if thrash == 0 { Fact::Cost } else { Fact::Thrash };
        assert_eq!(fact(&Policy::Auto, &small), (thrash == 0, by));
    }
    let gone = Policy::Auto
        .decide(&FileFacts { window: WindowFacts { thrash: 5, ..file().window }, ..file() }, Some(true));
    assert_eq!((gone.dax, gone.reason.fact), (false, Fact::Thrash));
}

#[test]
fn a_size_threshold_is_crossed_downwards_a_quarter_below() {
    for (policy, threshold) in [(Policy::Size(4000), 4000), (Policy::Auto, 32 * KIB + 1)] {
        let kept = |size, current| {
            let decision = policy.decide(&sized(size), current);
            (decision.dax, decision.reason.kept)
        };
        let lowest = threshold - threshold / 4;
        assert_eq!(kept(threshold, Some(true)), (true, false));
        assert_eq!(kept(threshold - 1, Some(true)), (true, true));
        assert_eq!(kept(lowest, Some(true)), (true, true));
        assert_eq!(kept(lowest - 2, Some(true)), (false, false));
        // Upwards there is no band: a file that grows is DAX as soon as it qualifies.
        assert_eq!(kept(threshold - 1, Some(false)), (false, false));
        assert_eq!(kept(threshold, Some(false)), (true, false));
    }
}

#[test]
fn a_promise_holds_until_the_window_could_not_carry_it() {
    let decide = |promised, current| {
        let window = WindowFacts { promised, ..file().window };
        let decision = Policy::Auto.decide(&FileFacts { window, ..file() }, current);
        (decision.dax, decision.reason.kept)
    };
    for (promised, new, known) in [(51, true, true), (52, false, true), (63, false, true), (64, false, false)]
    {
        assert_eq!(decide(promised, None).0, new);
        assert_eq!(decide(promised, Some(false)).0, new);
        assert_eq!(decide(promised, Some(true)), (known, known && !new), "{promised}");
    }
}

#[test]
fn a_file_appended_to_in_1000_steps_flips_once_at_most() {
    let policies = [
        Policy::Auto,
        Policy::Size(BREAK_EVEN),
        Policy::Size(500_000),
        rules("default = \"deny\"\n[[rule]]\nsize.min = \"300K\"\ndax = \"allow\""),
        rules("default = \"allow\"\n[[rule]]\nsize.min = \"300K\"\ndax = \"deny\""),
        rules("default = \"auto\"\n[[rule]]\nsize.max = \"100K\"\ndax = \"deny\""),
    ];
    for policy in policies {
        let growing: Vec<_> = (0..=1000).map(|step| sized(step * 1000)).collect();
        let states = history(&policy, growing.clone());
        assert_eq!(flips(&states), 1, "{policy:?}");
        // It becomes what it would be if it were new, at the same size.
        let new: Vec<_> = growing.iter().map(|facts| dax(&policy, facts)).collect();
        assert_eq!(states, new, "{policy:?}");
        assert_eq!(flips(&history(&policy, growing.into_iter().rev())), 1, "{policy:?}");
    }
}

#[test]
fn names_are_parsed_as_they_are_printed() {
    for (name, policy) in [
        ("never", Policy::Never),
        ("always", Policy::Always),
        ("inode", Policy::Inode),
        ("size", Policy::Size(32 << 10)),
        ("size:2M", Policy::Size(2 << 20)),
        ("size:0", Policy::Size(0)),
        ("size:4097", Policy::Size(4097)),
        ("auto", Policy::Auto),
    ] {
        assert_eq!(name.parse(), Ok(policy.clone()));
        assert_eq!(policy.to_string(), name);
    }
    assert_eq!("size:32K".parse(), Ok(Policy::Size(BREAK_EVEN)));
    for (name, says) in [
        ("Always", "did you mean `always`"),
        ("", "known are never, always"),
        ("size:", "`` is no size"),
        ("size:many", "`many` is no size"),
        ("size;5", "unknown DAX policy"),
        ("auto:5", "did you mean `auto`"),
    ] {
        let error = name.parse::<Policy>().unwrap_err().to_string();
        assert!(error.contains(says), "{name}: {error}");
    }
}

#[test]
fn reasons_are_told_with_their_numbers() {
    let told = |policy: Policy, facts: FileFacts<'_>, current| {
        policy.explain(&policy.decide(&facts, current), &facts).to_string()
    };
    let promised = |promised| FileFacts { window: WindowFacts { promised, ..file().window }, ..file() };
    for (text, expected) in [
        (told(Policy::Always, file(), None), "allows every file"),
        (told(Policy::Never, file(), None), "denies every file"),
        (told(Policy::Inode, file(), None), "the hint FS_XFLAG_DAX is not set"),
        (told(Policy::Size(2 << 20), file(), None), "1 MiB is below 2 MiB"),
        (
            told(Policy::Size(5 << 18), file(), Some(true)),
            "1 MiB is below 1.2 MiB (kept: not clearly past a threshold)",
        ),
        (told(Policy::Auto, file(), None), "32 KiB of descriptors against 1 MiB of page cache"),
        (told(Policy::Auto, sized(5000), None), "8 KiB of page cache, no more than 32 KiB of descriptors"),
        (told(Policy::Auto, promised(60), None), "needs 1 of 52 usable chunks, 60 of which are promised"),
        (
            told(rules("default = \"auto\"\n[[rule]]\nname = \"a\"\ndax = \"deny\""), file(), None),
            "rule `a` (line 3): denies every file",
        ),
        (
            told(rules("default = \"auto\"\n\n[[rule]]\nuid = 1\ndax = \"deny\""), file(), None),
            "default: 32 KiB of descriptors against 1 MiB of page cache",
        ),
        (
            told(rules("default = \"auto\"\n\n[[rule]]\nuid = 0\ndax = \"size:2M\""), file(), None),
            "rule 1 (line 4): 1 MiB is below 2 MiB",
        ),
    ] {
        assert_eq!(text, expected);
    }
}
