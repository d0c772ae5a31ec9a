//! From the parts of a matrix file to its cases: each kernel with each command, once for each value of the axes.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use devices::text::exact_size;

use super::{Command, Document, EnvValue, Kernel, Pattern, Reader, Selected, Settings};
use crate::matrix::case::{Case, Expected};

/// More cases than this are a mistake, and not wanted.
const MAX_CASES: usize = 10_000;
/// What an axis adds to the name of a case, at most.
const MAX_VALUE: usize = 64;

/// The cases of a file; what is wrong with them goes to `reader`.
pub(super) fn cases(document: &Document, reader: &mut Reader<'_>) -> Vec<Case> {
    let mut expansion = Expansion { reader, cases: Vec::new(), names: HashSet::new() };
    for (kernel, command) in
        pairs(document).filter(|(kernel, command)| Pattern::any(&command.kernels, &kernel.name))
    {
        let settings = settings(document, kernel, command);
        let axes = Axes::of(&settings, |values| values > 1);
        expansion.add(kernel, command, &settings, &axes, command.span.clone());
    }
    expansion.exclude(document);
    for include in &document.includes {
        let selected = |(kernel, command): &(&Kernel, &Command)| selects(include, kernel, command);
        for (kernel, command) in pairs(document).filter(selected) {
            let settings = settings(document, kernel, command).below(&include.settings);
            // What an inclusion names tells its case from those that are there.
            let named = Axes::of(&include.settings, |values| values > 0);
            let axes = Axes::of(&settings, |values| values > 1).and(named);
            expansion.add(kernel, command, &settings, &axes, include.span.clone());
        }
    }
    let cases = expansion.cases;
    if cases.is_empty() && reader.mistakes.is_empty() {
        reader.mistake(
            0..0,
            "there are no cases: all are excluded, or no command is for a kernel that is here".into(),
        );
    }
    cases
}

fn pairs(document: &Document) -> impl Iterator<Item = (&Kernel, &Command)> {
    document.kernels.iter().flat_map(|kernel| document.commands.iter().map(move |command| (kernel, command)))
}

fn selects(selected: &Selected, kernel: &Kernel, command: &Command) -> bool {
    Pattern::any(&selected.kernels, &kernel.name) && Pattern::any(&selected.commands, &command.name)
}

/// What holds for a kernel and a command. The later says more than the earlier: defaults, kernel, command, overrides.
fn settings(document: &Document, kernel: &Kernel, command: &Command) -> Settings {
    let overrides = document.overrides.iter().filter(|over| selects(over, kernel, command));
    let settings = document.defaults.below(&kernel.settings).below(&command.settings);
    overrides.fold(settings, |settings, over| settings.below(&over.settings))
}

/// The settings whose values are in the names of cases.
struct Axes {
    cpus: bool,
    memory: bool,
    env: Vec<String>,
}

impl Axes {
    fn of(settings: &Settings, named: impl Fn(usize) -> bool) -> Axes {
        let env = settings.env.iter().filter(|(_, values)| named(values.len()));
        Axes {
            cpus: named(settings.cpus.len()),
            memory: named(settings.memory.len()),
            env: env.map(|(name, _)| name.clone()).collect(),
        }
    }

    fn and(mut self, other: Axes) -> Axes {
        self.cpus |= other.cpus;
        self.memory |= other.memory;
        self.env.extend(other.env);
        self
    }
}

struct Expansion<'r, 't> {
    reader: &'r mut Reader<'t>,
    cases: Vec<Case>,
    names: HashSet<String>,
}

impl Expansion<'_, '_> {
    /// Adds a case for each combination of values.
    fn add(
        &mut self,
        kernel: &Kernel,
        command: &Command,
        settings: &Settings,
        axes: &Axes,
        span: Range<usize>,
    ) {
        if settings.run.is_empty() && settings.initrd.is_none() {
            self.reader.missing(span, "run", "run = \"make check\"");
            return;
        }
        let cpus = if settings.cpus.is_empty() { &[1][..] } else { &settings.cpus };
        let memory =
            if settings.memory.is_empty() { &[crate::config::DEFAULT_MEMORY][..] } else { &settings.memory };
        let environments = environments(&settings.env);
        let runs = settings.repeat.unwrap_or(1);
        let count = cpus.len() * memory.len() * environments.len() * runs as usize;
        if self.cases.len() + count > MAX_CASES {
            let problem =
                format!("with this there are more than {MAX_CASES} cases; divide the file, or the lists");
            self.reader.mistake(span, problem);
            return;
        }
        for env in &environments {
            for cpus in cpus {
                for memory in memory {
                    for run in 1..=runs {
                        let repeated = (runs > 1).then_some(run);
                        let name = self.name(kernel, command, axes, (*cpus, *memory, env), repeated, &span);
                        let case = case((kernel, command), settings, (*cpus, *memory, env));
                        self.cases.push(Case { name, ..case });
                    }
                }
            }
        }
    }

    /// The name of a case, which no other has.
    fn name(
        &mut self,
        kernel: &Kernel,
        command: &Command,
        axes: &Axes,
        (cpus, memory, env): Values<'_>,
        run: Option<u32>,
        span: &Range<usize>,
    ) -> String {
        let mut name = format!("{}/{}", kernel.name, command.name);
        for (variable, value) in
            env.iter().filter(|(variable, _)| axes.env.iter().any(|axis| axis == variable))
        {
            let EnvValue::Text(value) = value else { continue };
            if value.len() > MAX_VALUE || value.contains(char::is_control) {
                let why = format!("is part of the case's name: at most {MAX_VALUE} bytes, in one line");
                self.reader.mistake(span.clone(), format!("a value of `env.{variable}` {why}"));
            }
            name += &format!("/{variable}={value}");
        }
        if axes.cpus {
            name += &format!("/cpus={cpus}");
        }
        if axes.memory {
            name += &format!("/memory={}", exact_size(memory));
        }
        if let Some(run) = run {
            name += &format!("/run={run}");
        }
        if !self.names.insert(name.clone()) {
            let problem = format!("there is a case `{name}` already; change it with [[override]]");
            self.reader.mistake(span.clone(), problem);
        }
        name
    }

    /// Takes out what the file excludes. An exclusion without a case is a mistake of spelling.
    fn exclude(&mut self, document: &Document) {
        let mut used = vec![false; document.excludes.len()];
        let excluded = |case: &Case| {
            let mut any = false;
            for (exclude, used) in document.excludes.iter().zip(&mut used) {
                let settings = &exclude.settings;
                let matches = Pattern::any(&exclude.kernels, &case.kernel)
                    && Pattern::any(&exclude.commands, &case.command)
                    && (settings.cpus.is_empty() || settings.cpus.contains(&case.cpus))
                    && (settings.memory.is_empty() || settings.memory.contains(&case.memory))
                    && settings.env.iter().all(|(name, values)| {
                        case.env
                            .iter()
                            .any(|(variable, value)| variable == name && values.contains(&env_value(value)))
                    });
                *used |= matches;
                any |= matches;
            }
            any
        };
        let mut excluded = excluded;
        self.cases.retain(|case| !excluded(case));
        self.names = self.cases.iter().map(|case| case.name.clone()).collect();
        for (exclude, used) in document.excludes.iter().zip(used) {
            if !used {
                self.reader
                    .mistake(exclude.span.clone(), "this excludes nothing: no case has all of it".into());
            }
        }
    }
}

fn env_value(value: &Option<String>) -> EnvValue {
    value.clone().map_or(EnvValue::Caller, EnvValue::Text)
}

/// Each combination of the variables' values.
fn environments(env: &BTreeMap<String, Vec<EnvValue>>) -> Vec<Vec<(&str, &EnvValue)>> {
    env.iter().fold(vec![Vec::new()], |environments, (name, values)| {
        let longer = |env: &Vec<_>, value| [&env[..], &[(&**name, value)]].concat();
        environments.iter().flat_map(|env| values.iter().map(|value| longer(env, value))).collect()
    })
}

/// What is chosen of the axes: vCPUs, memory, environment.
type Values<'v> = (u8, u64, &'v [(&'v str, &'v EnvValue)]);

/// A case, but for its name.
fn case(
    (kernel, command): (&Kernel, &Command),
    settings: &Settings,
    (cpus, memory, env): Values<'_>,
) -> Case {
    let text = |value: &EnvValue| match value {
        EnvValue::Text(text) => Some(text.clone()),
        EnvValue::Caller => None,
    };
    let expect = match &settings.expect[..] {
        [] if settings.run.is_empty() => vec![Expected::POWER_OFF],
        [] => vec![Expected::Status(0)],
        expect => expect.to_vec(),
    };
    Case {
        name: String::new(),
        kernel: kernel.name.clone(),
        kernel_path: kernel.path.as_ref().map(Into::into),
        command: command.name.clone(),
        cpus,
        memory,
        env: env.iter().map(|(name, value)| ((*name).to_owned(), text(value))).collect(),
        cmdline: settings.cmdline.join(" "),
        modules: settings.modules.clone(),
        initrd: settings.initrd.clone(),
        root: settings.root.clone(),
        rw: settings.rw.clone(),
        shares: settings.shares.clone(),
        disks: settings.disks.clone(),
        rng: settings.rng,
        nested: settings.nested,
        directory: settings.directory.clone(),
        timeout: settings.timeout.unwrap_or(crate::matrix::DEFAULT_TIMEOUT),
        boot_timeout: settings.boot_timeout,
        expect,
        retries: settings.retries.unwrap_or(0),
        flaky: settings.flaky.unwrap_or_default(),
        run: settings.run.clone(),
    }
}
