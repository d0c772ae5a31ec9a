//! What can be said of cases, for all of them, for those of a kernel, of a command, or of both: [`Settings`].

use std::collections::BTreeMap;
use std::time::Duration;

use devices::text::unknown;
use toml::de::{DeTable, DeValue};

use super::reader::{Parsed, Reader, boolean, duration, number, size, text};
use crate::arch::x86_64::MAX_VCPUS;
use crate::config::{MAX_MEMORY, MIN_MEMORY};
use crate::layout::HUGE_PAGE;
use crate::matrix::{Expected, Flaky};

/// The keys of [`Settings`]: those of `daxvm run`'s options that a test can have, and those that are about testing.
pub(super) const KEYS: [&str; 20] = [
    "cpus",
    "memory",
    "env",
    "cmdline",
    "modules",
    "initrd",
    "root",
    "rw",
    "share",
    "disk",
    "rng",
    "nested",
    "chdir",
    "timeout",
    "boot-timeout",
    "expect",
    "retries",
    "repeat",
    "flaky",
    "run",
];

const EXPECT: &str = "an exit status from 0 to 255, a reason such as \"panic\", or a list of such";
const ENV: &str = "a string, true for the caller's value, or a list of strings";

/// What a key `env.NAME` says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum EnvValue {
    Text(String),
    /// What the variable is where `daxvm test` runs.
    Caller,
}

/// Settings; what is not given is empty or `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Settings {
    /// Several make an axis, as with `memory` and each variable of `env`.
    pub(super) cpus: Vec<u8>,
    /// Bytes.
    pub(super) memory: Vec<u64>,
    pub(super) env: BTreeMap<String, Vec<EnvValue>>,
    pub(super) cmdline: Vec<String>,
    pub(super) modules: Option<String>,
    pub(super) initrd: Option<String>,
    pub(super) root: Option<String>,
    pub(super) rw: Vec<String>,
    pub(super) shares: Vec<String>,
    pub(super) disks: Vec<String>,
    pub(super) rng: Option<bool>,
    pub(super) nested: Option<bool>,
    pub(super) directory: Option<String>,
    pub(super) timeout: Option<Duration>,
    pub(super) boot_timeout: Option<Duration>,
    pub(super) expect: Vec<Expected>,
    pub(super) retries: Option<u32>,
    pub(super) repeat: Option<u32>,
    pub(super) flaky: Option<Flaky>,
    /// Program and arguments.
    pub(super) run: Vec<String>,
}

impl Settings {
    /// Reads what `table` says; other keys of it are the caller's business.
    pub(super) fn read(reader: &mut Reader<'_>, table: &DeTable<'_>) -> Settings {
        let small = |max| move |value: &DeValue<'_>| number(0, max)(value).map(|n| n.map(|n| n as u32));
        Settings {
            cpus: reader.list(table, "cpus", "a number, or a list of numbers", |value| {
                number(1, MAX_VCPUS.into())(value).map(|cpus| cpus.map(|cpus| cpus as u8))
            }),
            memory: reader.list(table, "memory", "a size such as \"512M\", or a list of sizes", memory),
            env: env(reader, table),
            cmdline: reader.value(table, "cmdline", "a string", text).into_iter().collect(),
            modules: reader.value(table, "modules", "a directory", text),
            initrd: reader.value(table, "initrd", "a file", text),
            root: reader.value(table, "root", "a string such as \"DIR,ro\", as --root takes it", text),
            rw: reader.list(table, "rw", "a path, or a list of paths", text),
            shares: reader.list(table, "share", "a string such as \"tag=src,path=.\", or a list", text),
            disks: reader.list(table, "disk", "a string such as \"disk.img,ro\", or a list", text),
            rng: reader.value(table, "rng", "true or false", boolean),
            nested: reader.value(table, "nested", "true or false", boolean),
            directory: reader.value(table, "chdir", "a directory", text),
            timeout: reader.value(table, "timeout", "a time such as \"90s\"", duration),
            boot_timeout: reader.value(table, "boot-timeout", "a time such as \"20s\"", duration),
            expect: reader.list(table, "expect", EXPECT, expected),
            retries: reader.value(table, "retries", "a number", small(100)),
            repeat: reader.value(table, "repeat", "a number", |value| {
                number(1, 1000)(value).map(|n| n.map(|n| n as u32))
            }),
            flaky: reader.value(table, "flaky", "\"pass\" or \"fail\"", |value| {
                value.as_str().map(|text| text.parse())
            }),
            run: run(reader, table),
        }
    }

    /// These settings where `above` says nothing: what is one thing is replaced, what is many is added to.
    pub(super) fn below(&self, above: &Settings) -> Settings {
        fn either<T: Clone>(above: &[T], below: &[T]) -> Vec<T> {
            if above.is_empty() { below.to_vec() } else { above.to_vec() }
        }
        fn both<T: Clone>(below: &[T], above: &[T]) -> Vec<T> {
            [below, above].concat()
        }
        let option = |above: &Option<String>, below: &Option<String>| above.clone().or_else(|| below.clone());
        let mut env = self.env.clone();
        env.extend(above.env.clone());
        Settings {
            cpus: either(&above.cpus, &self.cpus),
            memory: either(&above.memory, &self.memory),
            env,
            cmdline: both(&self.cmdline, &above.cmdline),
            modules: option(&above.modules, &self.modules),
            initrd: option(&above.initrd, &self.initrd),
            root: option(&above.root, &self.root),
            rw: both(&self.rw, &above.rw),
            shares: both(&self.shares, &above.shares),
            disks: both(&self.disks, &above.disks),
            rng: above.rng.or(self.rng),
            nested: above.nested.or(self.nested),
            directory: option(&above.directory, &self.directory),
            timeout: above.timeout.or(self.timeout),
            boot_timeout: above.boot_timeout.or(self.boot_timeout),
            expect: either(&above.expect, &self.expect),
            retries: above.retries.or(self.retries),
            repeat: above.repeat.or(self.repeat),
            flaky: above.flaky.or(self.flaky),
            run: either(&above.run, &self.run),
        }
    }
}

pub(super) fn memory(value: &DeValue<'_>) -> Parsed<u64> {
    let in_range = |bytes: u64| {
        let fits = (MIN_MEMORY..=MAX_MEMORY).contains(&bytes) && bytes.is_multiple_of(HUGE_PAGE);
        let most = MAX_MEMORY >> 30;
        fits.then_some(bytes).ok_or_else(|| format!("a guest has 64M to {most}G of memory, in steps of 2M"))
    };
    size(value).map(|bytes| bytes.and_then(in_range))
}

fn expected(value: &DeValue<'_>) -> Parsed<Expected> {
    match value.as_str() {
        Some(reason) => Some(Expected::from_reason(reason)),
        None => number(0, 255)(value).map(|status| status.map(|status| Expected::Status(status as u8))),
    }
}

fn env(reader: &mut Reader<'_>, table: &DeTable<'_>) -> BTreeMap<String, Vec<EnvValue>> {
    let mut env = BTreeMap::new();
    let Some(variables) = reader.table(table, "env") else { return env };
    for (name, value) in variables {
        let text = |value: &DeValue<'_>| match value {
            DeValue::Boolean(true) => Some(Ok(EnvValue::Caller)),
            DeValue::Boolean(false) => Some(Err(
                "false says nothing; leave the variable out, as the caller's are not passed on".into(),
            )),
            _ => value.as_str().map(|text| match text.contains('\0') {
                true => Err("no variable holds a NUL character".into()),
                false => Ok(EnvValue::Text(text.to_owned())),
            }),
        };
        let key = format!("env.{}", name.get_ref());
        let values = reader.values(value, &key, ENV, text);
        if values.len() > 1 && values.contains(&EnvValue::Caller) {
            reader.mistake(value.span(), format!("`{key}`: the values of a list are strings"));
        }
        if name.get_ref().is_empty() || name.get_ref().contains(['=', '\0']) {
            reader.mistake(name.span(), "a variable has a name without `=`".into());
        }
        env.insert(name.get_ref().to_string(), values);
    }
    env
}

/// A text for the shell, which stops at the first command that fails, or a program and its arguments.
fn run(reader: &mut Reader<'_>, table: &DeTable<'_>) -> Vec<String> {
    let Some(value) = table.get("run") else { return Vec::new() };
    let expected = "a text for the shell, or a list of a program and its arguments";
    let Some(array) = value.get_ref().as_array() else {
        let script = reader.value(table, "run", expected, text);
        return script.map_or(Vec::new(), |script| vec!["sh".into(), "-ec".into(), script]);
    };
    let strings: Option<Vec<_>> =
        array.iter().map(|value| value.get_ref().as_str().map(str::to_owned)).collect();
    match strings {
        Some(argv) if argv.first().is_some_and(|program| !program.is_empty()) => argv,
        Some(_) => {
            reader.mistake(value.span(), format!("`run` takes {expected}; there is no program"));
            Vec::new()
        }
        None => {
            reader.mistake(value.span(), format!("`run` takes {expected}; all of the list are strings"));
            Vec::new()
        }
    }
}

impl std::str::FromStr for Flaky {
    type Err = String;

    fn from_str(text: &str) -> Result<Flaky, String> {
        match text {
            "pass" => Ok(Flaky::Pass),
            "fail" => Ok(Flaky::Fail),
            _ => Err(unknown("value", text, &["pass", "fail"])),
        }
    }
}
