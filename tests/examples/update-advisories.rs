//! Writes `tests/advisories`: what RustSec's database says of the crates that we depend on, in the database's own layout, so
//! that `tests/tests/advisories.rs` needs no network. Only facts are kept: number, crate, dates and versions.
//!
//! `scripts/update-advisories DATABASE` runs it.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use rustsec::advisory::{Advisory, Informational, Versions};
use rustsec::platforms::target::{Arch, OS};
use rustsec::{Database, Lockfile};
use serde::Serialize;

/// The front matter of an advisory.
#[derive(Serialize)]
struct Kept<'a> {
    advisory: Facts<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    affected: Option<Systems<'a>>,
    versions: &'a Versions,
}

#[derive(Serialize)]
struct Facts<'a> {
    id: &'a str,
    package: &'a str,
    date: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    informational: Option<&'a Informational>,
}

/// Where it applies; nothing is everywhere.
#[derive(Serialize)]
struct Systems<'a> {
    arch: &'a [Arch],
    os: &'a [OS],
}

fn main() -> Result<(), Box<dyn Error>> {
    let database = env::args_os().nth(1).map(PathBuf::from).ok_or("usage: update-advisories DATABASE")?;
    let database = Database::open(&database)?;
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ours = tests.join("advisories");
    if ours.exists() {
        fs::remove_dir_all(&ours)?;
    }
    let mut names = BTreeSet::new();
    for lock in ["../Cargo.lock", "../fuzz/Cargo.lock"] {
        let packages = Lockfile::load(tests.join(lock))?.packages;
        names.extend(
            packages.into_iter().filter(|package| package.source.is_some()).map(|package| package.name),
        );
    }
    let crates = ours.join("crates");
    let mut kept = 0;
    for name in &names {
        // A query would leave out the unsound and the unmaintained.
        let about = |advisory: &&Advisory| advisory.metadata.package == *name && !advisory.withdrawn();
        for advisory in database.iter().filter(about) {
            let dir = crates.join(name.as_str());
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(format!("{}.md", advisory.id())), text(advisory)?)?;
            kept += 1;
        }
    }
    let names: String = names.iter().map(|name| format!("{name}\n")).collect();
    fs::write(ours.join("names"), names)?;
    println!("{kept} of {} advisories", database.iter().count());
    Ok(())
}

fn text(advisory: &Advisory) -> Result<String, toml::ser::Error> {
    let id = advisory.id().as_str();
    let systems =
        advisory.affected.as_ref().map(|affected| Systems { arch: &affected.arch, os: &affected.os });
    let affected = systems.filter(|systems| !systems.arch.is_empty() || !systems.os.is_empty());
    let kept = Kept {
        advisory: Facts {
            id,
            package: advisory.metadata.package.as_str(),
            date: advisory.date().as_str(),
            informational: advisory.metadata.informational.as_ref(),
        },
        affected,
        versions: &advisory.versions,
    };
    Ok(format!(
        "```toml\n{}```\n\n# {id}\n\nhttps://rustsec.org/advisories/{id}.html\n",
        toml::to_string(&kept)?
    ))
}
