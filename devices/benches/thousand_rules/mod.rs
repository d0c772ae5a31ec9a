//! Rule files of 1,000 rules and files to decide about, for the benchmark and for the test that counts allocations.

use std::fmt::Write;
use std::time::Duration;

use devices::virtio::fs::policy::{FileFacts, Policy, WindowFacts};

/// Rules of the sort that people write: extensions, names, directories, globs in the middle, sizes, owners.
pub fn mixed() -> Policy {
    from(|n| match n % 8 {
        0 => format!("path = \"*.e{n}\""),
        1 => format!("path = \"name{n}\"\nsize.min = \"{n}K\""),
        2 => format!("path = \"srv/data{n}/**\""),
        3 => format!("path = [\"srv/*/x{n}-*.db\", \"var/lib{n}/*.db\"]"),
        4 => format!("uid = {n}\nexecutable = true"),
        5 => format!("size = {{ min = {}, max = {} }}", n * 4096, n * 4096 + 1000),
        6 => format!("path = \"**/v{n}.*/*.so\"\nage.min = \"{n}s\""),
        _ => format!("window_free.max = 20\nsize.min = \"{n}M\"\nuid = {n}"),
    })
}

/// Rules that no index helps with, as each must be looked at for each file.
pub fn without_paths() -> Policy {
    from(|n| format!("size = {{ min = {}, max = {} }}\nage.min = {n}\nuid = {n}", n * 4096, n * 4096 + 9999))
}

/// Rules for one extension each with a glob of its own, which is the worst that an index can have.
pub fn alike_globs() -> Policy {
    from(|n| format!("path = \"data/*/part-{n}-*.bin\""))
}

fn from(condition: impl Fn(usize) -> String) -> Policy {
    let mut text = "version = 1\ndefault = \"auto\"\n".to_owned();
    for n in 0..1000 {
        writeln!(text, "[[rule]]\n{}\ndax = \"{}\"", condition(n), ["allow", "deny", "auto"][n % 3]).unwrap();
    }
    Policy::from_rules("bench.toml", &text).unwrap()
}

/// Files of which some match a rule early, some late, some none.
pub fn files() -> Vec<FileFacts<'static>> {
    let paths: [&[u8]; 8] = [
        b"usr/lib/x86_64-linux-gnu/libc.so.6",
        b"srv/data2/tables/7/index",
        b"srv/backup/x3-2024-11.db",
        b"home/user/project/src/main.e800",
        b"home/user/project/target/debug/v998.0/deps/libproject.so",
        b"etc/name993",
        b"data/17/part-999-a.bin",
        b"data/17/none.bin",
    ];
    let files = paths.iter().enumerate().map(|(n, path)| FileFacts {
        mode: libc::S_IFREG | if n % 2 == 0 { 0o755 } else { 0o644 },
        size: [0, 5000, 40 << 10, 1 << 20, 3 << 20, 8 << 20, 1 << 30, 4095 << 10][n],
        uid: n as u32 * 100,
        age: Duration::from_secs(n as u64 * 500),
        window: WindowFacts { chunks: 128, mapped: 40 + n as u64 * 8, promised: n as u64 * 10, thrash: 0 },
        path,
        ..FileFacts::default()
    });
    files.collect()
}
