//! No dependency, the tests' and the fuzz targets' included, has a known vulnerability, is unsound or is given up.
//!
//! `tests/advisories` is the part of RustSec's database that is about the crates that we depend on;
//! `scripts/update-advisories` makes it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rustsec::advisory::Informational;
use rustsec::platforms::target::{Arch, OS};
use rustsec::report::Settings;
use rustsec::{Database, Lockfile, Report};

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn lock_files() -> [Lockfile; 2] {
    ["../Cargo.lock", "../fuzz/Cargo.lock"].map(|path| Lockfile::load(here(path)).unwrap())
}

/// The advisories that concern a lock file, with the crate and its version.
fn advisories(lock: &Lockfile) -> Vec<String> {
    let database = Database::open(&here("advisories")).unwrap();
    let settings = Settings {
        target_arch: vec![Arch::X86_64],
        target_os: vec![OS::Linux],
        informational_warnings: vec![
            Informational::Notice,
            Informational::Unmaintained,
            Informational::Unsound,
        ],
        ..Settings::default()
    };
    let report = Report::generate(&database, lock, &settings);
    let vulnerable = report.vulnerabilities.list.into_iter().map(|found| (found.advisory.id, found.package));
    let warnings = report.warnings.into_values().flatten();
    let warned = warnings.map(|warning| (warning.advisory.unwrap().id, warning.package));
    vulnerable
        .chain(warned)
        .map(|(id, package)| format!("{id}: {} {}", package.name, package.version))
        .collect()
}

#[test]
fn no_dependency_has_an_advisory() {
    for lock in lock_files() {
        assert_eq!(advisories(&lock), Vec::<String>::new(), "update the crate, or replace it");
    }
}

#[test]
fn an_advisory_is_noticed() {
    let package = |name: &str, version: &str| {
        let source = "registry+https://github.com/rust-lang/crates.io-index";
        format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\nsource = \"{source}\"\n")
    };
    let lock = |packages: &[String]| format!("version = 4\n{}", packages.concat()).parse().unwrap();
    // A vulnerability, and a crate that is unsound.
    let old = lock(&[package("quick-xml", "0.37.0"), package("lru", "0.12.0")]);
    let found = advisories(&old);
    for id in ["RUSTSEC-2026-0194: quick-xml 0.37.0", "RUSTSEC-2026-0002: lru 0.12.0"] {
        assert!(found.iter().any(|line| line == id), "{id}: {found:?}");
    }
    assert_eq!(advisories(&lock(&[package("quick-xml", "0.41.0")])), Vec::<String>::new());
}

#[test]
fn each_dependency_has_been_looked_up() {
    let names = fs::read_to_string(here("advisories/names")).unwrap();
    let names: BTreeSet<_> = names.lines().collect();
    for lock in lock_files() {
        let ours = lock.packages.iter().filter(|package| package.source.is_some());
        let new: Vec<_> =
            ours.map(|package| package.name.as_str()).filter(|name| !names.contains(name)).collect();
        assert!(new.is_empty(), "{new:?}: run scripts/update-advisories");
    }
}
