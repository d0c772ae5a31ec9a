//! Every mistake in a rule file is told with its line and column.

use super::*;

/// The mistakes in a text, one a line.
fn mistakes(text: &str) -> String {
    match Policy::from_rules("f", text) {
        Ok(policy) => panic!("{policy:?} has no mistake: {text}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn keys_and_values() {
    for (line, expected) in [
        ("siez.min = 1", "f:4:1: unknown condition or key `siez`; did you mean `size`?"),
        ("  size.mim = 1", "f:4:8: unknown bound of `size` `mim`; did you mean `min`?"),
        ("size = 5", "f:4:8: `size` takes a table of `min`, `max` or both, both included, not integer"),
        ("size = {}", "f:4:8: `size`: give `min`, `max` or both"),
        ("size.min = -1", "f:4:12: `size.min` takes bytes: 4096, or \"32K\", not integer"),
        (
            "size = { max = \"lots\" }",
            "f:4:16: `size.max`: `lots` is no size; write a number with K, M, G or T, for example 512M",
        ),
        ("age.min = true", "f:4:11: `age.min` takes seconds: 60, or \"90s\", \"2h\", \"7d\", not boolean"),
        (
            "age.min = \"1y\"",
            "f:4:11: `age.min`: `1y` is no duration; write a number with ms, s, m, h or d, for example 90s",
        ),
        (
            "window_free.max = 101",
            "f:4:19: `window_free.max`: a window is never free by 101 percent: write 0 to 100",
        ),
        ("window_free.max = \"5%\"", "f:4:19: `window_free.max` takes percent, from 0 to 100, not string"),
        ("executable = 1", "f:4:14: `executable` takes true or false, not integer"),
        ("uid = \"root\"", "f:4:7: `uid` takes a number from 0 to 4294967295, or a list of such, not string"),
        (
            "gid = [1, -2]",
            "f:4:11: `gid` takes a number from 0 to 4294967295, or a list of such, not integer",
        ),
        (
            "uid = 4294967296",
            "f:4:7: `uid` takes a number from 0 to 4294967295, or a list of such, not integer",
        ),
        ("name = ''", "f:4:8: `name` takes a string that is not empty, not string"),
        (
            "path = 1",
            "f:4:8: `path` takes a glob such as \"*.so\" or \"lib/**\", or a list of such, not integer",
        ),
        ("prefault = true", "f:4:12: `prefault` takes one of never, cached, all, not boolean"),
        (
            "prefault = 'cached'",
            "f:4:12: `prefault`: the rule denies DAX, so that no page is mapped: leave it out",
        ),
        ("xattr = true", "f:4:9: `xattr` takes a table, such as { \"user.class\" = \"hot\" }, not boolean"),
        ("xattr = {}", "f:4:9: `xattr`: name at least one attribute"),
        (
            "xattr.class = true",
            "f:4:7: `xattr.\"class\"`: a name begins with its namespace, for example user.class",
        ),
        ("xattr.\"user.x\" = 1", "f:4:18: `xattr.\"user.x\"` takes true, false or a string, not integer"),
        (
            "xattr.user.x = true",
            "f:4:7: `xattr.\"user\"`: quote the whole name, for example xattr.\"user.class\"",
        ),
    ] {
        assert_eq!(
            mistakes(&format!("version = 1\ndefault = 'auto'\n[[rule]]\n{line}\ndax = 'deny'\n")),
            expected
        );
    }
}

#[test]
fn a_wrong_way_to_prefault_is_told_the_right_one() {
    assert_eq!(
        mistakes("version = 1\ndefault = 'auto'\n[[rule]]\ndax = 'allow'\nprefault = 'cache'\n"),
        "f:5:12: `prefault`: unknown way to prefault `cache`; did you mean `cached`?"
    );
}

#[test]
fn impossible_globs() {
    for (glob, why) in [
        ("[a-", "unclosed character class; missing ']'"),
        ("{a,b", "unclosed alternate group; missing '}' (maybe escape '{' with '[{]'?)"),
        ("a]b}", "unopened alternate group; missing '{' (maybe escape '}' with '[}]'?)"),
        ("lib/", "it names a directory; for the files in it write `lib/**`"),
        ("", "no path in a share has a component \"\""),
        ("/", "it names a directory; for the files in it write `/**`"),
        ("a//b", "no path in a share has a component \"\""),
        ("../a", "no path in a share has a component \"..\""),
        ("./a", "no path in a share has a component \".\""),
        ("[z-a]", "invalid range; 'z' > 'a'"),
        ("*a??????????????????????", "it is too complex; use fewer wildcards"),
    ] {
        let text = format!("version = 1\ndefault = 'auto'\n[[rule]]\ndax = 'deny'\npath = ['ok', '{glob}']");
        let expected = format!("f:5:15: the glob `{glob}` can match no file: {why}");
        assert_eq!(mistakes(&text), expected);
    }
}

#[test]
fn the_top_of_the_file() {
    for (text, expected) in [
        ("", "f:1:1: `version` is missing: write, for example, `version = 1`"),
        (
            "default = 'auto'\nversion = 2\nwhatever = 1",
            "f:2:11: this daxvm reads rule files of version 1: write `version = 1`",
        ),
        ("version = '1'", "f:1:11: this daxvm reads rule files of version 1: write `version = 1`"),
        ("version = 1", "f:1:1: `default` is missing: write, for example, `default = \"auto\"`"),
        ("version = 1\ndefault = 'auot'", "f:2:11: `default`: unknown action `auot`; did you mean `auto`?"),
        ("version = 1\ndefault = 'always'", "f:2:11: `default`: `always` is a policy; a rule says `allow`"),
        (
            "version = 1\ndefault = 1",
            "f:2:11: `default` takes one of allow, deny, inode, size, size:BYTES, auto, not integer",
        ),
        (
            "version = 1\ndefault = 'size:x'",
            "f:2:11: `default`: `x` is no size; write a number with K, M, G or T, for example 512M",
        ),
        (
            "version = 1\ndefault = 'auto'\nenforce = 'yes'",
            "f:3:11: `enforce` takes true or false, not string",
        ),
        ("version = 1\ndefault = 'auto'\nrules = []", "f:3:1: unknown key `rules`; did you mean `rule`?"),
        (
            "version = 1\ndefault = 'auto'\nrule = 1",
            "f:3:8: `rule` takes tables: begin each rule with [[rule]], not integer",
        ),
        (
            "version = 1\ndefault = 'auto'\nrule = [1]",
            "f:3:9: `rule` takes tables: begin each rule with [[rule]], not integer",
        ),
        (
            "version = 1\ndefault = 'auto'\n\n [[rule]]\nuid = 1",
            "f:4:2: `dax` is missing: write, for example, `dax = \"allow\"`",
        ),
    ] {
        assert_eq!(mistakes(text), expected);
    }
    let syntax = mistakes("version = 1\nversion = 1\nx = [");
    assert!(syntax.starts_with("f:2:1: duplicate key\nf:3:"), "{syntax}");
}

#[test]
fn all_mistakes_are_told_in_the_order_of_the_file() {
    let text = "version = 1\nfoo = 1\n# é\n[[rule]]\nuid = []\npath = \"é/\"  \n[[rule]]\ndax = 'perhaps'\nsize = {min=2,max=1}\n";
    assert_eq!(
        mistakes(text),
        "f:1:1: `default` is missing: write, for example, `default = \"auto\"`\n\
         f:2:1: unknown key `foo`; known are version, default, enforce, rule\n\
         f:4:1: `dax` is missing: write, for example, `dax = \"allow\"`\n\
         f:5:7: the rule can never match: the list of `uid` is empty\n\
         f:6:8: the glob `é/` can match no file: it names a directory; for the files in it write `é/**`\n\
         f:8:7: `dax`: unknown action `perhaps`; known are allow, deny, inode, size, auto\n\
         f:9:13: the rule can never match: `size.min` is above `size.max`"
    );
    // Columns count characters.
    let text = "version = 1\ndefault = 'auto'\n[[rule]]\ndax = 'deny'\npath = ['é', 'é/']";
    assert!(mistakes(text).starts_with("f:5:14: "), "{}", mistakes(text));
}

/// The lines of unreachable rules, in a file of one rule a line.
fn unreachable(rules: &[&str]) -> Vec<usize> {
    let mut text = "version = 1\ndefault = 'auto'\nrule = [\n".to_owned();
    for rule in rules {
        let comma = if rule.is_empty() { "" } else { ", " };
        text += &format!("{{ {rule}{comma}dax = 'deny' }},\n");
    }
    match Policy::from_rules("f", &(text + "]")) {
        Ok(_) => Vec::new(),
        Err(RuleFileError::Mistakes { mistakes, .. }) => {
            let reachability = |mistake: &Mistake| {
                assert!(matches!(mistake.problem, Problem::Unreachable(_)), "{mistake}");
                assert_eq!(mistake.column, 1);
                mistake.line - 4
            };
            mistakes.iter().map(reachability).collect()
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn rules_that_can_never_match() {
    for (rules, expected) in [
        (&["", "uid = 1"][..], &[1][..]),
        (&["path = '**'", "path = 'a'", "executable = true"], &[1, 2]),
        (&["size.min = 5", "size = { min = 6, max = 9 }"], &[1]),
        (&["size.min = 5", "size = { min = 4, max = 9 }"], &[]),
        (&["size.max = 5", "size.min = 6", "uid = 0"], &[2]),
        (&["size.max = 5", "size.min = 7", "uid = 0"], &[]),
        (&["window_free.max = 50", "window_free.min = 51", ""], &[2]),
        (&["age.min = 5", "age.max = 4", ""], &[2]),
        (&["executable = true", "executable = false", ""], &[2]),
        (&["executable = true", "hint = false", "executable = false, hint = true", "uid = 1"], &[3]),
        (&["executable = true", "hint = false", "executable = false", "uid = 1"], &[3]),
        (&["executable = true", "executable = true, uid = 1"], &[1]),
        (&["executable = true, uid = 1", "executable = true"], &[]),
        (&["uid = [1, 2]", "uid = 2", "uid = 3"], &[1]),
        (&["uid = 1", "uid = 2", "uid = [1, 2]"], &[2]),
        (&["gid = 1", "gid = [1, 2]"], &[]),
        (&["xattr = { 'user.a' = true }", "xattr = { 'user.a' = '1' }"], &[1]),
        (&["xattr = { 'user.a' = '1' }", "xattr = { 'user.a' = true }"], &[]),
        (&["xattr = { 'user.a' = true }", "xattr = { 'user.a' = false }", "uid = 1"], &[2]),
        (&["xattr = { 'user.a' = true }", "xattr = { 'user.b' = true }"], &[]),
        (&["path = '*.so'", "path = 'lib/*.so'"], &[1]),
        (&["path = 'lib/*.so'", "path = '*.so'"], &[]),
        (&["path = 'lib/**'", "path = ['lib/x/*.so', 'lib/a']"], &[1]),
        (&["path = 'lib/**'", "path = ['lib/x/*.so', 'libx/a']"], &[]),
        (&["path = ['*.a', '*.b']", "path = '*.b', uid = 1"], &[1]),
        (&["path = '*.a'", "path = '*.b'", "path = ['*.b', 'x/*.a']"], &[2]),
        (&["path = '*.a'", "path = '*.b', uid = 1", "path = ['*.b', '*.a']"], &[]),
        (&["path = 'a*'", "path = 'a*', size.min = 1"], &[1]),
        (&["path = 'a*'", "path = '/abc'"], &[1]),
        (&["path = 'Makefile'", "path = 'src/Makefile'"], &[1]),
        (&["path = '*.so', size.min = 5", "path = '*.so', size.max = 4", "path = 'x.so'"], &[2]),
        (&["path = '*.so', size.min = 5", "path = '*.so', size.max = 3", "path = 'x.so'"], &[]),
        (&["path = '*.so'", "path = '*.a'", "path = '*.db'"], &[]),
    ] {
        assert_eq!(unreachable(rules), expected, "{rules:?}");
    }
    let text = "version = 1\ndefault = 'auto'\n[[rule]]\ndax = 'allow'\n\n[[rule]]\nuid = 3\ndax = 'deny'\n";
    assert_eq!(
        mistakes(text),
        "f:6:1: the rule can never match: the rule of line 3 leaves nothing to it; move it up, or remove it"
    );
}

#[test]
fn files_that_cannot_be_read() {
    let error = Policy::load("/nonexistent/p.toml".as_ref()).unwrap_err();
    assert!(error.to_string().contains("Cannot read the DAX policy /nonexistent/p.toml: name a file"));
}
