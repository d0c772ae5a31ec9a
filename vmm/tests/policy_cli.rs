//! `daxvm policy` as a user meets it: the program, real directories, what it prints and its exit status.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// The share of these tests: small, large, set-id, sparse, linked.
fn share() -> TempDir {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let file = |name: &str, size| File::create(path(name)).unwrap().set_len(size).unwrap();
    std::fs::create_dir_all(path("sub/deeper")).unwrap();
    file("empty", 0);
    file("small", 5000);
    file("threshold", 32 << 10);
    file("sub/large", (2 << 20) + 1);
    file("sub/deeper/huge", 200 << 20);
    file("set-id", 1 << 20);
    std::fs::set_permissions(path("set-id"), PermissionsExt::from_mode(0o4755)).unwrap();
    std::fs::hard_link(path("sub/large"), path("again")).unwrap();
    symlink("/etc", path("outside")).unwrap();
    symlink("..", path("sub/up")).unwrap();
    directory
}

fn daxvm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_daxvm")).arg("policy").args(arguments).output().unwrap()
}

/// Standard output, standard error and the status.
fn run(arguments: &[&str]) -> (String, String, i32) {
    let Output { stdout, stderr, status } = daxvm(arguments);
    (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap(), status.code().unwrap())
}

fn json(arguments: &[&str]) -> Value {
    let (out, err, status) = run(arguments);
    assert_eq!((&*err, status), ("", 0));
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

const RULES: &str = "version = 1\ndefault = \"size:64K\"\n\n[[rule]]\nname = \"below sub\"\npath = \"sub/**\"\n\
                     size.min = \"1M\"\ndax = \"allow\"\n\n[[rule]]\nset_id = true\ndax = \"deny\"\n";

#[test]
fn check_prints_what_was_understood() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("rules.toml");
    std::fs::write(&file, RULES).unwrap();
    let (out, err, status) = run(&["check", text(&file)]);
    assert_eq!((&*err, status), ("", 0));
    assert_eq!(
        out,
        format!(
            "{}: version 1, rules: 2\n\
             \x20 rule `below sub` (line 4): path sub/**, size at least 1 MiB -> allow\n\
             \x20 rule 2 (line 10): set-id -> deny\n\
             \x20 default: all others -> size:64K\n\
             \x20 looked up for each file, beside its attributes: path\n",
            file.display()
        )
    );
}

#[test]
fn check_prints_each_mistake_with_its_place() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("rules.toml");
    std::fs::write(
        &file,
        "version = 1\ndefault = \"auto\"\n[[rule]]\npth = \"*\"\ndax = \"allow\"\nuid = []\n",
    )
    .unwrap();
    let (out, err, status) = run(&["check", text(&file)]);
    assert_eq!((&*out, status), ("", 125));
    let name = file.display();
    assert_eq!(
        err,
        format!(
            "daxvm: {name}:4:1: unknown condition or key `pth`; did you mean `path`?\n\
             {name}:6:7: the rule can never match: the list of `uid` is empty\n"
        )
    );
    let (_, err, status) = run(&["check", "/nonexistent.toml"]);
    assert_eq!(status, 125);
    assert!(err.starts_with("daxvm: Cannot read the DAX policy /nonexistent.toml: name a file"), "{err}");
}

#[test]
fn explain_says_what_and_why() {
    let share = share();
    let explain = |policy: &str, path: &str| {
        let answer = json(&["explain", "--share", text(share.path()), "--policy", policy, "--json", path]);
        let file = answer["files"][0].clone();
        assert_eq!(file["path"], path);
        (file["dax"].as_bool().unwrap(), file["reason"].as_str().unwrap().to_owned())
    };
    for (policy, path, dax, reason) in [
        ("never", "sub/large", false, "denies every file"),
        ("always", "empty", true, "allows every file"),
        ("always", "set-id", false, "set-id: a store"),
        ("inode", "sub/large", false, "FS_XFLAG_DAX is not set"),
        ("size", "threshold", true, "32 KiB is at least 32 KiB"),
        ("size:1M", "threshold", false, "32 KiB is below 1 MiB"),
        ("auto", "threshold", false, "32 KiB of page cache, no more than 32 KiB"),
        ("auto", "sub/large", true, "64 KiB of descriptors against 2.0 MiB"),
        ("auto", "outside", false, "not a regular file"),
    ] {
        let (is, why) = explain(policy, path);
        assert!(is == dax && why.contains(reason), "{policy} {path}: {is} {why}");
    }
}

#[test]
fn explain_prints_a_line_a_file_and_a_total() {
    let share = share();
    let (out, err, status) = run(&[
        "explain",
        "--share",
        text(share.path()),
        "--window",
        "64M",
        "threshold",
        "sub/deeper",
        "again",
    ]);
    assert_eq!((&*err, status), ("", 0));
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "policy auto, window of 64 MiB: 32 chunks of 2 MiB, of which the guest uses 26 at a time; it costs the \
             guest 1 MiB, used or not",
            "DAX  HINT      SIZE CHUNKS DESCRIPTORS PAGE CACHE  FILE: REASON",
            "no   -       32 KiB      1      32 KiB     32 KiB  threshold: 32 KiB of page cache, no more than 32 KiB \
             of descriptors",
            "no   -      200 MiB    100     3.1 MiB    200 MiB  sub/deeper/huge: needs 100 of 26 usable chunks",
            "yes  -      2.0 MiB      2      64 KiB    2.0 MiB  again: 64 KiB of descriptors against 2.0 MiB of page \
             cache",
            "1 of 3 files are DAX and need 2 chunks of 26 usable ones: 64 KiB of descriptors instead of 2.0 MiB of \
             page cache. The others may take 200.0 MiB of page cache.",
        ]
    );
}

#[test]
fn explain_names_the_rule() {
    let share = share();
    let rules = TempDir::new().unwrap();
    let file = rules.path().join("rules.toml");
    std::fs::write(&file, RULES).unwrap();
    let answer = json(&[
        "explain",
        "--share",
        text(share.path()),
        "--policy",
        text(&file),
        "--json",
        "sub/large",
        "again",
        "set-id",
    ]);
    assert_eq!(answer["policy"], text(&file));
    let [large, again, set_id] = [0, 1, 2].map(|n| &answer["files"][n]);
    assert_eq!((&large["dax"], &large["rule"]["name"]), (&true.into(), &"below sub".into()));
    assert_eq!((&again["dax"], &again["rule"]["line"]), (&true.into(), &Value::Null));
    assert_eq!((&set_id["dax"], &set_id["rule"]["line"]), (&false.into(), &10.into()));
    let total = &answer["total"];
    assert_eq!((&total["files"], &total["dax_files"], &total["chunks"]), (&3.into(), &2.into(), &4.into()));
    assert_eq!(total["page_cache_bytes_saved"], 2 * ((2 << 20) + 4096));
    assert_eq!(total["page_cache_bytes_left"], 1 << 20);
}

#[test]
fn explain_reads_extended_attributes_that_rules_ask_for() {
    // In the source tree, as /tmp may be a tmpfs without attributes.
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = |name: &str| directory.path().join(name);
    for (name, class) in [("hot", "hot"), ("cold", &*"cold".repeat(100))] {
        File::create(path(name)).unwrap();
        let set = rustix::fs::XattrFlags::empty();
        match rustix::fs::setxattr(path(name), "user.class", class.as_bytes(), set) {
            Err(rustix::io::Errno::OPNOTSUPP) => return eprintln!("skipped: no extended attributes here"),
            result => result.unwrap(),
        }
    }
    File::create(path("plain")).unwrap();
    let rules = "version = 1\ndefault = \"allow\"\n[[rule]]\nxattr.\"user.class\" = \"hot\"\ndax = \"deny\"\n\
                 [[rule]]\nxattr.\"user.class\" = true\ndax = \"size\"\n";
    std::fs::write(path("rules.toml"), rules).unwrap();
    let policy = path("rules.toml");
    let share = text(directory.path());
    let answer =
        json(&["explain", "--share", share, "--policy", text(&policy), "--json", "hot", "cold", "plain"]);
    for (n, dax, line) in [(0, false, 3.into()), (1, false, 6.into()), (2, true, Value::Null)] {
        let file = &answer["files"][n];
        assert_eq!((&file["dax"], &file["rule"]["line"]), (&dax.into(), &line), "{file}");
    }
}

#[test]
fn explain_does_not_leave_the_share_and_goes_on_after_an_error() {
    let share = share();
    let (out, err, status) = run(&[
        "explain",
        "--share",
        text(share.path()),
        "--policy",
        "always",
        "missing",
        "outside/passwd",
        "sub/up/small",
    ]);
    assert_eq!(status, 125);
    assert!(err.contains("daxvm: missing: No such file") && err.contains("relative to the share"), "{err}");
    assert!(err.contains("outside/passwd is not in the share"), "{err}");
    assert!(out.contains("  small: allows every file"), "{out}");
}

#[test]
fn simulate_compares_all_policies() {
    let share = share();
    let answer = json(&["simulate", "--share", text(share.path()), "--window", "1G", "--json"]);
    // The links are no files, and the second name of a file is not counted.
    assert_eq!((&answer["files"], &answer["hard_links"]), (&6.into(), &1.into()));
    assert_eq!((&answer["window_chunks"], &answer["usable_chunks"]), (&512.into(), &410.into()));
    assert_eq!(answer["window_cost_bytes"], 16 << 20);
    let names: Vec<_> =
        answer["policies"].as_array().unwrap().iter().map(|policy| &policy["policy"]).collect();
    assert_eq!(names, ["never", "always", "inode", "size", "auto"]);
    let of = |n: usize, key: &str| answer["policies"][n][key].as_u64().unwrap();
    let all_pages = (8 << 10) + (32 << 10) + (2 << 20) + 4096 + (200 << 20) + (1 << 20);
    for (n, dax_files, chunks, window) in
        [(0, 0, 0, 0), (1, 5, 104, 258 << 20), (2, 0, 0, 0), (3, 3, 103, 256 << 20), (4, 2, 102, 254 << 20)]
    {
        assert_eq!((of(n, "dax_files"), of(n, "chunks")), (dax_files, chunks), "{}", names[n]);
        assert_eq!(of(n, "descriptor_bytes"), chunks * (32 << 10));
        assert_eq!(of(n, "page_cache_bytes_saved") + of(n, "page_cache_bytes_left"), all_pages);
        let fixed = if n == 0 { 0 } else { 16 << 20 };
        assert_eq!(of(n, "guest_memory_bytes"), fixed + of(n, "page_cache_bytes_left"));
        assert_eq!(of(n, "window_bytes_for_all"), window, "{}", names[n]);
    }
}

#[test]
fn simulate_with_a_small_window_and_chosen_policies() {
    let share = share();
    let (out, err, status) = run(&[
        "simulate",
        "--share",
        text(share.path()),
        "--window",
        "64M",
        "--policy",
        "auto",
        "--policy",
        "size:1M",
    ]);
    assert_eq!((&*err, status), ("", 0));
    let row = |name: &str| {
        let line = out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{out}"));
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(row("auto")[1..5], ["1", "2", "8", "%"]);
    assert_eq!(row("size:1M")[1..5], ["2", "102", "393", "%"]);
    assert!(out.contains("6 files, 203.0 MiB; 1 further names of them are not counted"), "{out}");
}

#[test]
fn mistakes_of_the_command_line_name_the_remedy() {
    let share = share();
    let simulate = ["simulate", "--share", text(share.path())];
    for (more, says) in [
        (&["--window", "3M"][..], "use 32M or more"),
        (&["--window", "64M", "--policy", "inodes"], "did you mean `inode`"),
        (&["--window", "64M", "--policy", "none.toml"], "Cannot read the DAX policy none.toml"),
        (&[], "--window <SIZE>"),
    ] {
        let (_, err, status) = run(&[&simulate, more].concat());
        assert!(status == 125 && err.contains(says), "{more:?}: {status} {err}");
    }
    let (_, err, status) = run(&["simulate", "--share", "/nonexistent", "--window", "64M"]);
    assert!(status == 125 && err.contains("Cannot look at the share /nonexistent: No such file"), "{err}");
}

#[test]
fn what_is_unreadable_is_left_out_and_said() {
    let share = share();
    // With one descriptor to spare, the share can be opened, and no directory in it.
    let script = "ulimit -n 4 && exec \"$0\" policy simulate --share \"$1\" --window 64M";
    let program = env!("CARGO_BIN_EXE_daxvm");
    let output = Command::new("sh").args(["-c", script, program, text(share.path())]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(125), "{err}");
    assert!(err.contains("/sub") && err.contains("Too many open files"), "{err}");
    assert!(out.contains("what could not be read is left out (1)"), "{out}");
}

#[test]
fn a_large_tree_takes_no_more_memory_than_a_small_one() {
    let directory = TempDir::new().unwrap();
    // The number of files, or nothing if the program needs more than so many KiB of address space.
    let simulate = |limit: u32| {
        let script =
            "ulimit -v $2 && exec \"$0\" policy simulate --share \"$1\" --window 64M --json 2>/dev/null";
        let program = env!("CARGO_BIN_EXE_daxvm");
        let arguments = ["-c", script, program, text(directory.path()), &limit.to_string()];
        let output = Command::new("sh").args(arguments).output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).ok()?;
        answer["files"].as_u64()
    };
    let enough = (4_000..).step_by(500).find(|limit| simulate(*limit) == Some(0)).unwrap();
    // Their names alone have 4 MB.
    let tail = "x".repeat(190);
    for number in 0..20_000 {
        File::create(directory.path().join(format!("{number:010}{tail}"))).unwrap();
    }
    assert_eq!(simulate(enough + 1_000), Some(20_000), "with {enough} KiB and 1000 more");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let share = share();
    let script = "\"$0\" policy explain --share \"$1\" --policy always $(yes sub | head -n 3000) | head -n 1; exit ${PIPESTATUS[0]}";
    let output = Command::new("bash")
        .args(["-c", script, env!("CARGO_BIN_EXE_daxvm"), text(share.path())])
        .output()
        .unwrap();
    assert_eq!((output.status.code(), &*String::from_utf8_lossy(&output.stderr)), (Some(0), ""));
}
