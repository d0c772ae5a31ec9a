//! What matrix files mean, and what is said of those that are wrong.

use super::*;
use crate::matrix::{Expected, Flaky};

fn parse(text: &str) -> Result<Matrix, String> {
    let matrix = Matrix::parse(Path::new("m.toml"), Path::new("/ci"), text);
    matrix.map_err(|error| error.to_string())
}

fn names(text: &str) -> Vec<String> {
    parse(text).unwrap().cases.into_iter().map(|case| case.name).collect()
}

/// Two kernels and two commands.
const FOUR: &str = r#"
version = 1
[[kernel]]
name = "6.12"
path = "kernels/6.12"
[[kernel]]
name = "6.1"
path = "kernels/6.1"
[[command]]
name = "build"
run = "make"
[[command]]
name = "boot"
run = ["true"]
"#;

#[test]
fn every_kernel_runs_every_command() {
    assert_eq!(names(FOUR), ["6.12/build", "6.12/boot", "6.1/build", "6.1/boot"]);
    let only = "version = 1\n[[command]]\nname = \"a\"\nrun = \"true\"\n";
    let matrix = parse(only).unwrap();
    assert_eq!((&*matrix.cases[0].name, &matrix.cases[0].kernel_path), ("host/a", &None));
}

#[test]
fn lists_are_axes_and_only_they_are_in_names() {
    let text = r#"
version = 1
[defaults]
cpus = [1, 4]
env = { FS = ["ext4", "xfs"], ONE = "1", TOKEN = true }
[[command]]
name = "a"
run = "true"
[[command]]
name = "b"
run = "true"
cpus = 2
memory = ["512M", "1G"]
env.FS = "tmpfs"
repeat = 2
"#;
    let expected = [
        "host/a/FS=ext4/cpus=1",
        "host/a/FS=ext4/cpus=4",
        "host/a/FS=xfs/cpus=1",
        "host/a/FS=xfs/cpus=4",
        "host/b/memory=512M/run=1",
        "host/b/memory=512M/run=2",
        "host/b/memory=1G/run=1",
        "host/b/memory=1G/run=2",
    ];
    assert_eq!(names(text), expected);
    let cases = parse(text).unwrap().cases;
    let text = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
    assert_eq!(cases[2].env, [text("FS", "xfs"), text("ONE", "1"), ("TOKEN".to_owned(), None)]);
    assert_eq!((cases[4].cpus, cases[6].memory), (2, 1 << 30));
}

#[test]
fn the_nearer_setting_wins_and_collections_grow() {
    let text = r#"
version = 1
[budget]
jobs = 3
memory = "2G"
[defaults]
timeout = 60
cmdline = "quiet"
share = "tag=a,path=."
retries = 1
[[kernel]]
name = "k"
path = "vmlinuz"
cmdline = "mitigations=off"
timeout = "2m"
expect = 7
[[command]]
name = "c"
run = "true"
share = ["tag=b,path=/b,ro"]
timeout = "90s"
boot-timeout = "1500ms"
flaky = "fail"
root = "image,ro"
[[override]]
kernel = "k*"
command = "c"
expect = ["panic", 3]
rng = false
nested = true
"#;
    let matrix = parse(text).unwrap();
    assert_eq!((matrix.jobs, matrix.memory_budget), (Some(3), Some(2 << 30)));
    let case = &matrix.cases[0];
    assert_eq!(case.expect, [Expected::Reason("panic"), Expected::Status(3)]);
    assert_eq!((case.retries, case.flaky, case.timeout.as_secs()), (1, Flaky::Fail, 90));
    let arguments: Vec<_> = case.arguments().into_iter().map(|word| word.into_string().unwrap()).collect();
    let expected = [
        "run",
        "--kernel=vmlinuz",
        "--root=image,ro",
        "--cmdline=quiet mitigations=off",
        "--cpus=1",
        "--memory=512M",
        "--share=tag=a,path=.",
        "--share=tag=b,path=/b,ro",
        "--rng=false",
        "--nested=true",
        "--timeout=90s",
        "--boot-timeout=1500ms",
        "--",
        "sh",
        "-ec",
        "true",
    ];
    assert_eq!(arguments, expected);
}

#[test]
fn cases_are_taken_out_and_added() {
    let with = |more: &str| names(&format!("{FOUR}{more}"));
    assert_eq!(
        with("[[exclude]]\nkernel = \"6.1\"\ncommand = \"bo*\"\n"),
        ["6.12/build", "6.12/boot", "6.1/build"]
    );
    let axes = "cpus = [1, 2]\n[[exclude]]\nkernel = \"6.12\"\ncpus = 2\n";
    assert_eq!(
        with(axes),
        ["6.12/build", "6.12/boot/cpus=1", "6.1/build", "6.1/boot/cpus=1", "6.1/boot/cpus=2"]
    );
    let added = with("[[include]]\nkernel = \"6.1\"\ncommand = \"boot\"\ncpus = 8\n");
    assert_eq!(added[4..], ["6.1/boot/cpus=8"]);
    let kernels = "kernels = \"6.12\"\n";
    assert_eq!(with(kernels), ["6.12/build", "6.12/boot", "6.1/build"]);
    // What was excluded can be included again, with something else to expect.
    let again =
        "[[exclude]]\ncommand = \"boot\"\n[[include]]\nkernel = \"6.1\"\ncommand = \"boot\"\nexpect = 1\n";
    assert_eq!(with(again), ["6.12/build", "6.1/build", "6.1/boot"]);
}

#[test]
fn a_guest_with_its_own_initramfs_needs_no_command() {
    let text = "version = 1\n[[command]]\nname = \"own\"\ninitrd = \"initrd.img\"\n";
    let case = &parse(text).unwrap().cases[0];
    assert_eq!(case.expect, [Expected::Reason("power-off")]);
    assert_eq!(case.arguments().last().unwrap(), "--timeout=600s");
}

#[test]
fn mistakes_have_a_place_and_a_remedy() {
    let command = "[[command]]\nname = \"a\"\nrun = \"true\"\n";
    for (text, says) in [
        ("x = 1".to_owned(), "m.toml:1:1: `version` is missing: write, for example, `version = 1`"),
        ("version = 2".to_owned(), "m.toml:1:11: this daxvm reads matrix files of version 1"),
        ("version = 1\nversion = 1".to_owned(), "m.toml:2:1: duplicate key"),
        ("version = 1\n".to_owned(), "`command` is missing"),
        (
            format!("version = 1\nkernle = 1\n{command}"),
            "m.toml:2:1: unknown key `kernle`; did you mean `kernel`?",
        ),
        (
            format!("version = 1\n{command}timout = 3"),
            "m.toml:5:1: unknown key `timout`; did you mean `timeout`?",
        ),
        (format!("version = 1\n{command}timeout = 0"), "m.toml:5:11: `timeout`: a time limit of 0"),
        (format!("version = 1\n{command}cpus = 33"), "`cpus`: write a number from 1 to 32"),
        (format!("version = 1\n{command}cpus = [1, 1]"), "m.toml:5:12: `cpus` has this value twice"),
        (format!("version = 1\n{command}cpus = []"), "the list of `cpus` is empty"),
        (format!("version = 1\n{command}memory = \"1000K\""), "64M to 512G of memory, in steps of 2M"),
        (format!("version = 1\n{command}memory = -1"), "`memory`: no size is negative"),
        (format!("version = 1\n{command}rng = \"yes\""), "`rng` takes true or false, not string"),
        (format!("version = 1\n{command}expect = 256"), "`expect`: write a number from 0 to 255"),
        (format!("version = 1\n{command}expect = \"panick\""), "did you mean `panic`?"),
        (format!("version = 1\n{command}flaky = \"fial\""), "did you mean `fail`?"),
        (format!("version = 1\n{command}env = {{ A = false }}"), "`env.A`: false says nothing"),
        (format!("version = 1\n{command}env = {{ \"A=B\" = \"1\" }}"), "a name without `=`"),
        (format!("version = 1\n{command}env.A = [\"1\", true]"), "the values of a list are strings"),
        (
            format!("version = 1\n{command}env.A = [\"a\\nb\", \"c\"]"),
            "a value of `env.A` is part of the case's name",
        ),
        (format!("version = 1\n{command}kernels = \"hots\""), "unknown kernel `hots`; did you mean `host`?"),
        (
            format!("version = 1\n{command}{command}"),
            "m.toml:6:8: a command before this one has the name `a` too",
        ),
        ("version = 1\n[[command]]\nrun = \"a\"".to_owned(), "m.toml:2:1: `name` is missing"),
        ("version = 1\n[[command]]\nname = \"a\"".to_owned(), "m.toml:2:1: `run` is missing"),
        (
            "version = 1\n[[command]]\nname = \"a/b\"\nrun = \"a\"".to_owned(),
            "m.toml:3:8: `name`: a name has 1 to 64",
        ),
        ("version = 1\n[[command]]\nname = \"a\"\nrun = []".to_owned(), "there is no program"),
        ("version = 1\n[[command]]\nname = \"a\"\nrun = [1]".to_owned(), "all of the list are strings"),
        ("version = 1\n[[command]]\nname = \"a\"\nrun = 3".to_owned(), "`run` takes a text for the shell"),
        ("version = 1\n[command]\nname = \"a\"".to_owned(), "begin each with [[command]]"),
        (format!("version = 1\ndefaults = 3\n{command}"), "write [defaults] and its keys below"),
        (format!("version = 1\n{command}[budget]\nmemory = 3"), "`memory` takes a size such as \"8G\""),
        (format!("version = 1\n{command}[[exclude]]\ncommand = \"b\""), "m.toml:6:11: unknown command `b`"),
        (format!("version = 1\n{command}[[exclude]]\ncpus = 2"), "m.toml:5:1: this excludes nothing"),
        (format!("version = 1\n{command}[[exclude]]\n"), "`kernel` is missing"),
        (format!("version = 1\n{command}[[exclude]]\ncommand = \"a\""), "there are no cases"),
        (format!("version = 1\n{command}[[override]]\ncpus = 2"), "`kernel` or `command` is missing"),
        (format!("version = 1\n{command}[[include]]\ncommand = \"a\"\n"), "there is a case `host/a` already"),
        (format!("version = 1\n{command}[[exclude]]\nkernel = \"[\""), "`kernel`: unclosed character class"),
        (
            format!(
                "version = 1\n{command}repeat = 1000\nmemory = [\"64M\", \"66M\", \"68M\", \"70M\", \"72M\", \"74M\"]\ncpus = [1, 2]"
            ),
            "more than 10000 cases",
        ),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.contains(says), "{text}\n{error}");
    }
}

#[test]
fn all_mistakes_are_named_in_their_order() {
    let error = parse("version = 1\nbudgte = 1\n[[command]]\nname = \"a\"\nrun = 1\nrng = 2\n").unwrap_err();
    let places: Vec<_> = error.lines().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(places, ["m.toml:2:1", "m.toml:5:7", "m.toml:6:7"]);
}

#[test]
fn the_example_is_right() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/ci/daxvm.toml");
    let matrix = Matrix::load(Path::new(example)).unwrap();
    assert!(matrix.cases.len() > 4, "{matrix:?}");
    let missing = Matrix::load(Path::new("/nonexistent/daxvm.toml")).unwrap_err().to_string();
    assert!(missing.contains("name one that exists"), "{missing}");
}

#[test]
fn logs_have_safe_names_of_their_own() {
    let text = r#"
version = 1
[[command]]
name = "a"
run = "true"
env.DIR = ["/etc", "../x", "b c", ".."]
"#;
    let paths: Vec<_> = parse(text).unwrap().cases.iter().map(|case| case.log_path()).collect();
    let expected =
        ["host/a/DIR=/etc.log", "host/a/DIR=../x.log", "host/a/DIR=b%20c.log", "host/a/DIR=...log"];
    assert_eq!(paths, expected.map(PathBuf::from));
}
