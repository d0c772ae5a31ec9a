//! What rule files decide: each condition, from both sides of its threshold, and the order of rules.

use std::ffi::CString;
use std::time::Duration;

use super::*;

/// Whether a file meets a condition.
fn meets(condition: &str, facts: FileFacts<'_>) -> bool {
    dax(&rules(&format!("default = \"deny\"\n[[rule]]\n{condition}\ndax = \"allow\"")), &facts)
}

#[test]
fn sizes() {
    for (condition, size, met) in [
        ("size.min = 4096", 4095, false),
        ("size.min = 4096", 4096, true),
        ("size.max = \"4K\"", 4096, true),
        ("size.max = \"4K\"", 4097, false),
        ("size = { min = \"1M\", max = 0x20_0000 }", (1 << 20) - 1, false),
        ("size = { min = \"1M\", max = 0x20_0000 }", 2 << 20, true),
        ("size = { min = 5, max = 5 }", 5, true),
        ("size.max = 0", 0, true),
        ("size.max = 0", 1, false),
    ] {
        assert_eq!(meets(condition, sized(size)), met, "{condition} {size}");
    }
}

#[test]
fn paths() {
    for (glob, path, met) in [
        ("*.so", "libc.so", true),
        ("*.so", "usr/lib/libc.so", true),
        ("*.so", "libc.so.6", false),
        ("*.so", "a.so/b", false),
        ("*.so", ".so", true),
        ("/*.so", "libc.so", true),
        ("/*.so", "lib/libc.so", false),
        ("Makefile", "Makefile", true),
        ("Makefile", "src/Makefile", true),
        ("Makefile", "src/GMakefile", false),
        ("/Makefile", "src/Makefile", false),
        ("lib/*.so", "lib/a.so", true),
        ("lib/*.so", "usr/lib/a.so", false),
        ("lib/*.so", "lib/x/a.so", false),
        ("lib/**", "lib/a", true),
        ("lib/**", "lib/x/a", true),
        ("lib/**", "libx/a", false),
        ("lib/**", "lib", false),
        ("lib/**/*.so", "lib/a.so", true),
        ("lib/**/*.so", "lib/x/y/a.so", true),
        ("**/cache/*", "cache/a", true),
        ("**/cache/*", "x/cache/a", true),
        ("**/cache/*", "x/cache/y/a", false),
        ("a/b/c.txt", "a/b/c.txt", true),
        ("a/b/c.txt", "b/c.txt", false),
        ("*.{db,sqlite}", "x/y.sqlite", true),
        ("{lib,usr/lib}/*", "usr/lib/a", true),
        ("{lib,usr/lib}/*", "usr/a", false),
        ("[a-c]?.txt", "x/b1.txt", true),
        ("[!a-c]?.txt", "b1.txt", false),
        ("[ab]", "/", false),
        ("?", "é", false),
        ("??", "é", true),
        ("a\\*b", "a*b", true),
        ("a\\*b", "axb", false),
        ("*", "any/thing", true),
        ("*", "line\nbreak", true),
        ("**", "any/thing", true),
        ("é*", "x/é1", true),
        ("*.tar.gz", "a/x.tar.gz", true),
        ("*.tar.gz", "a/x.gz", false),
        ("a*/b/**", "ax/b/c/d", true),
        ("a*/b/**", "x/ax/b/c", false),
    ] {
        let condition = format!("path = {}", toml_string(glob));
        assert_eq!(meets(&condition, FileFacts { path: path.as_bytes(), ..file() }), met, "{glob} {path}");
    }
    let not_utf8 = FileFacts { path: b"dir/\xff\xfe.bin", ..file() };
    assert!(meets("path = \"dir/*.bin\"", not_utf8));
    let list = "path = [\"*.a\", \"*.txt\"]";
    assert!(meets(list, file()) && !meets("path = [\"*.a\", \"*.b\"]", file()));
}

fn toml_string(text: &str) -> String {
    format!("'{text}'")
}

#[test]
fn modes_and_marks() {
    let mode = |mode| FileFacts { mode: libc::S_IFREG | mode, ..file() };
    for (condition, facts, met) in [
        ("executable = true", mode(0o755), true),
        ("executable = true", mode(0o601), true),
        ("executable = true", mode(0o644), false),
        ("executable = false", mode(0o644), true),
        ("set_id = false", mode(0o4755), false),
        ("hint = true", FileFacts { hint: true, ..file() }, true),
        ("hint = true", file(), false),
        ("hint = false", file(), true),
        ("capabilities = true", FileFacts { capabilities: true, ..file() }, true),
        ("capabilities = false", FileFacts { capabilities: true, ..file() }, false),
        ("read_only = true", FileFacts { read_only: true, ..file() }, true),
        ("read_only = true", file(), false),
        ("uid = 7", FileFacts { uid: 7, ..file() }, true),
        ("uid = 7", FileFacts { uid: 8, gid: 7, ..file() }, false),
        ("gid = [9, 7]", FileFacts { gid: 7, ..file() }, true),
        ("gid = [9, 7]", FileFacts { gid: 8, ..file() }, false),
    ] {
        assert_eq!(meets(condition, facts), met, "{condition}");
    }
}

#[test]
fn set_id_files_need_a_rule_that_speaks_of_them() {
    let set_id = FileFacts { mode: libc::S_IFREG | 0o4755, ..file() };
    assert!(!meets("executable = true", set_id));
    assert!(!dax(&rules("default = \"allow\""), &set_id));
    assert!(meets("set_id = true", set_id));
    let decision = rules("default = \"allow\"").decide(&set_id, None);
    assert_eq!((decision.reason.by, decision.reason.fact), (DecidedBy::Default, Fact::SetId));
}

#[test]
fn ages_and_the_windows_pressure() {
    let aged = |secs| FileFacts { age: Duration::from_secs(secs), ..file() };
    let free = |free: u64| FileFacts {
        window: WindowFacts { chunks: 100, mapped: 100 - free, ..WindowFacts::default() },
        ..file()
    };
    for (condition, facts, met) in [
        ("age.min = \"2h\"", aged(7199), false),
        ("age.min = \"2h\"", aged(7200), true),
        ("age.max = 60", aged(60), true),
        ("age.max = 60", aged(61), false),
        ("age = { min = \"1d\", max = \"7d\" }", aged(86_400), true),
        ("window_free.min = 30", free(30), true),
        ("window_free.min = 30", free(29), false),
        ("window_free.max = 30", free(30), true),
        ("window_free.max = 30", free(31), false),
        ("window_free = { min = 0, max = 100 }", free(100), true),
    ] {
        assert_eq!(meets(condition, facts), met, "{condition}");
    }
}

#[test]
fn extended_attributes() {
    let with = |condition: &str, values: &[Option<&str>]| {
        let xattrs: Vec<_> =
            values.iter().map(|value| value.map(|value| value.as_bytes().to_vec())).collect();
        meets(condition, FileFacts { xattrs: &xattrs, ..file() })
    };
    let present = "xattr.\"user.class\" = true";
    assert!(with(present, &[Some("")]) && !with(present, &[None]) && !with(present, &[]));
    let absent = "xattr = { \"user.class\" = false }";
    assert!(!with(absent, &[Some("")]) && with(absent, &[None]) && with(absent, &[]));
    let equal = "xattr.\"user.class\" = \"hot\"";
    assert!(with(equal, &[Some("hot")]) && !with(equal, &[Some("ho")]) && !with(equal, &[None]));
    let both = "xattr = { \"user.b\" = \"1\", \"user.a\" = false }";
    assert!(with(both, &[None, Some("1")]) && !with(both, &[Some("x"), Some("1")]));
}

#[test]
fn a_policy_asks_for_what_its_rules_look_at() {
    let needs = |text: &str| rules(text).needs().clone();
    let nothing = Needs::default();
    assert_eq!(needs("default = \"size\"\n[[rule]]\nuid = 1\npath = \"**\"\ndax = \"deny\""), nothing);
    for (text, expected) in [
        ("default = \"auto\"", Needs { capabilities: true, ..nothing.clone() }),
        ("default = \"inode\"", Needs { hint: true, ..nothing.clone() }),
        (
            "default = \"deny\"\n[[rule]]\nhint = false\ndax = \"allow\"",
            Needs { hint: true, ..nothing.clone() },
        ),
        (
            "default = \"deny\"\n[[rule]]\npath = \"a\"\ndax = \"allow\"",
            Needs { path: true, ..nothing.clone() },
        ),
        (
            "default = \"deny\"\n[[rule]]\nxattr.\"user.b\" = true\ncapabilities = true\ndax = \"deny\"\n\
             [[rule]]\nxattr = { \"user.a\" = \"1\", \"user.b\" = \"2\" }\ndax = \"deny\"",
            Needs {
                capabilities: true,
                xattrs: vec![CString::from(c"user.b"), CString::from(c"user.a")],
                ..nothing.clone()
            },
        ),
    ] {
        assert_eq!(needs(text), expected, "{text}");
    }
    assert_eq!(Policy::Inode.needs(), &Needs { hint: true, ..nothing.clone() });
    assert_eq!(Policy::Auto.needs(), &Needs { capabilities: true, ..nothing.clone() });
    assert_eq!(Policy::Size(1).needs(), &nothing);
}

#[test]
fn the_first_rule_that_matches_decides() {
    let policy = rules(
        "default = \"size:2M\"\n\
         [[rule]]\nname = \"logs\"\npath = \"*.log\"\ndax = \"deny\"\n\
         [[rule]]\npath = \"hot/**\"\ndax = \"allow\"\n\
         [[rule]]\nname = \"marked\"\npath = [\"*.log\", \"*.db\"]\nuid = 5\ndax = \"inode\"\n",
    );
    for (path, uid, dax, by) in [
        ("hot/x.log", 5, false, DecidedBy::Rule(0)),
        ("hot/x.db", 5, true, DecidedBy::Rule(1)),
        ("cold/x.db", 5, false, DecidedBy::Rule(2)),
        ("cold/x.db", 6, false, DecidedBy::Default),
    ] {
        let decision = policy.decide(&FileFacts { path: path.as_bytes(), uid, ..file() }, None);
        assert_eq!((decision.dax, decision.reason.by), (dax, by), "{path} {uid}");
    }
    assert!(dax(&policy, &FileFacts { size: 2 << 20, path: b"x", ..file() }));
}

#[test]
fn only_enforced_rules_keep_others_from_mapping() {
    let text = |enforce| {
        format!("default = \"allow\"\nenforce = {enforce}\n[[rule]]\npath = \"*.txt\"\ndax = \"deny\"")
    };
    let other = FileFacts { path: b"other", ..file() };
    assert!(rules(&text(false)).allows_mapping(&file()));
    assert!(!rules(&text(true)).allows_mapping(&file()));
    assert!(rules(&text(true)).allows_mapping(&other));
}

#[test]
fn a_policy_that_grants_nothing_needs_no_window() {
    assert!(!Policy::Never.may_grant() && Policy::Inode.may_grant());
    assert!(!rules("default = \"deny\"\n[[rule]]\nuid = 1\ndax = \"deny\"").may_grant());
    assert!(rules("default = \"deny\"\n[[rule]]\nuid = 1\ndax = \"inode\"").may_grant());
    assert!(rules("default = \"auto\"").may_grant());
}

#[test]
fn pressure_is_crossed_five_points_beyond_its_threshold() {
    let policy = rules("default = \"deny\"\n[[rule]]\nwindow_free.min = 30\ndax = \"allow\"");
    let free = |free: u64| FileFacts {
        window: WindowFacts { chunks: 100, mapped: 100 - free, ..WindowFacts::default() },
        ..file()
    };
    let decide = |percent, current| policy.decide(&free(percent), Some(current)).dax;
    assert!(decide(30, true) && decide(25, true) && !decide(24, true));
    assert!(!decide(30, false) && !decide(34, false) && decide(35, false));
    let swinging = (0..1000).map(|step| free(26 + step * 7 % 8));
    assert_eq!(flips(&history(&policy, swinging)), 0);
    // At the ends there is no room for the band.
    let full = rules("default = \"deny\"\n[[rule]]\nwindow_free.min = 97\ndax = \"allow\"");
    assert!(full.decide(&free(100), Some(true)).dax && !full.decide(&free(0), Some(true)).dax);
}

#[test]
fn what_is_kept_is_told_with_the_rule_that_keeps_it() {
    let policy = rules("default = \"deny\"\n[[rule]]\nname = \"big\"\nsize.min = \"1M\"\ndax = \"allow\"");
    let decision = policy.decide(&sized(1_000_000), Some(true));
    assert!(decision.dax && decision.reason.kept && decision.reason.by == DecidedBy::Rule(0));
    // Growing, a file takes on at once what the next rule says.
    let policy = rules("default = \"allow\"\n[[rule]]\nsize.max = \"1M\"\ndax = \"deny\"");
    assert!(policy.decide(&sized((1 << 20) + 1), Some(false)).dax);
    let kept = policy.decide(&sized(1 << 20), Some(true));
    assert!(kept.dax && kept.reason.by == DecidedBy::Default);
}

#[test]
fn conditions_are_told_as_they_were_understood() {
    let told =
        |condition: &str| match rules(&format!("default = 'deny'\n[[rule]]\n{condition}\ndax = 'auto'")) {
            Policy::Rules(rules) => rules.conditions(DecidedBy::Rule(0)),
            other => panic!("{other}"),
        };
    for (condition, expected) in [
        ("", ""),
        ("path = '**'", ""),
        ("path = ['*.so', 'lib/**']", "path *.so or lib/**"),
        ("size.min = '32K'", "size at least 32 KiB"),
        ("size = { min = 1, max = '2M' }", "size 1 B to 2 MiB"),
        ("age.max = '2m'", "age at most 120 s"),
        ("window_free.min = 10", "window free at least 10 %"),
        ("executable = true\nset_id = false\nhint = true", "executable, not set-id, hint set"),
        ("capabilities = false\nread_only = true", "no capabilities, share read-only"),
        ("uid = [5, 0]\ngid = 7", "uid 0 or 5, gid 7"),
        (
            "xattr = { 'user.a' = true, 'user.b' = false, 'user.c' = 'x' }",
            "has user.a, no user.b, user.c = \"x\"",
        ),
    ] {
        assert_eq!(told(condition), expected);
    }
}

#[test]
fn the_policies_that_come_with_daxvm_do_what_they_say() {
    let load = |name: &str| {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/policies");
        Policy::load(&root.join(name)).unwrap_or_else(|error| panic!("{error}"))
    };
    let old = Duration::from_secs(90_000);
    let of = |path: &'static str, size| FileFacts { path: path.as_bytes(), age: old, ..sized(size) };
    let full = WindowFacts { chunks: 64, mapped: 60, ..WindowFacts::default() };
    let hot = [Some(b"hot".to_vec())];
    for (name, facts, dax, rule) in [
        ("test-guest.toml", of("usr/lib/libc.so.6", 2 << 20), true, Some("programs")),
        ("test-guest.toml", of("bin/true", 20_000), false, Some("programs")),
        ("test-guest.toml", FileFacts { age: Duration::ZERO, ..file() }, false, Some("being written")),
        ("test-guest.toml", of("lib/modules/6.12/x.ko.xz", 1 << 20), false, Some("read once")),
        ("test-guest.toml", FileFacts { window: full, ..of("data", 40_000) }, false, Some("pressure")),
        ("test-guest.toml", of("data", 40_000), true, None),
        ("ci.toml", FileFacts { read_only: true, ..of("x", 40_000) }, true, Some("common to all jobs")),
        ("ci.toml", of(".git/objects/pack/a.pack", 1 << 20), true, Some("packs")),
        ("ci.toml", of("logs/build/1", 1 << 20), false, Some("appended to")),
        ("ci.toml", FileFacts { age: Duration::ZERO, ..of("target/a", 1 << 20) }, false, Some("outputs")),
        ("ci.toml", of("target/a", 1 << 20), true, None),
        (
            "appliance.toml",
            FileFacts { capabilities: true, ..file() },
            false,
            Some("privileged by capabilities"),
        ),
        ("appliance.toml", FileFacts { xattrs: &hot, ..sized(1) }, true, Some("marked hot")),
        ("appliance.toml", of("var/x.db", 4 << 20), true, Some("databases")),
        ("appliance.toml", of("media/film", 4 << 20), false, Some("media")),
        ("appliance.toml", FileFacts { window: full, ..of("x", 4 << 20) }, false, Some("pressure")),
        ("appliance.toml", of("x", 4 << 20), true, Some("at rest")),
        ("appliance.toml", FileFacts { hint: true, ..file() }, true, None),
    ] {
        let policy = load(name);
        let decision = policy.decide(&facts, None);
        let Policy::Rules(rules) = &policy else { panic!("{policy}") };
        assert_eq!((decision.dax, rules.rule_name(decision.reason.by)), (dax, rule), "{name} {facts:?}");
    }
    assert!(!load("appliance.toml").allows_mapping(&of("media/film", 1)));
}

#[test]
fn a_rule_says_which_pages_are_prefaulted_and_others_leave_it_to_the_share() {
    let policy = rules(
        "default = \"auto\"
        [[rule]]
        path = \"*.db\"
        dax = \"allow\"
        prefault = \"all\"
        [[rule]]
        path = \"*.idx\"
        dax = \"size:1M\"
        prefault = \"never\"
        [[rule]]
        path = \"*.log\"
        dax = \"deny\"",
    );
    for (path, prefault) in
        [("a.db", Some(Prefault::All)), ("a.idx", Some(Prefault::Never)), ("a.log", None), ("a.txt", None)]
    {
        let decision = policy.decide(&FileFacts { path: path.as_bytes(), ..file() }, None);
        assert_eq!(decision.prefault, prefault, "{path}");
    }
    assert_eq!(Policy::Always.decide(&file(), None).prefault, None);
}

#[test]
fn whether_anything_may_be_prefaulted_is_known_beforehand() {
    let allowing =
        |prefault: &str| rules(&format!("default = \"deny\"\n[[rule]]\ndax = \"allow\"\n{prefault}"));
    for (policy, by_default, never_by_default) in [
        (Policy::Always, true, false),
        (Policy::Never, false, false),
        (allowing(""), true, false),
        (allowing("prefault = \"never\""), false, false),
        (allowing("prefault = \"all\""), true, true),
    ] {
        assert_eq!(policy.may_prefault(Prefault::Cached), by_default, "{policy:?}");
        assert_eq!(policy.may_prefault(Prefault::Never), never_by_default, "{policy:?}");
    }
}
