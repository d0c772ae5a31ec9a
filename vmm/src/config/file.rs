//! Configuration files: TOML, of which [`schema`] is the schema.

use std::io;
use std::path::{Path, PathBuf};

use devices::text::listed;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::document::{Document, Mistake};
use super::{Problem, RunConfig};

/// Why there is no configuration in a file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("Cannot read the configuration {}: name a file that exists and that you may read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It has mistakes. The message has a line for each, beginning with FILE:LINE:COLUMN.
    #[error("{}", listed(path.display(), mistakes))]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// All that was found, in the order of the file; never empty.
        mistakes: Vec<Mistake>,
    },
}

impl RunConfig {
    /// Reads a configuration file. Relative paths in it are relative to its directory.
    ///
    /// # Errors
    /// The file cannot be read, or has mistakes: all of them but those that [`RunConfig::problems`] finds.
    pub fn load(path: &Path) -> Result<RunConfig, ConfigFileError> {
        let text = read(path)?;
        let config = RunConfig::parse(&text, path);
        config.map_err(|mistakes| ConfigFileError::Mistakes { path: path.to_owned(), mistakes })
    }

    /// Like [`RunConfig::load`], and looks for everything that is wrong. A file without a command and an initramfs is
    /// taken for one to which the command line gives the command.
    ///
    /// # Errors
    /// As for `load`, and what is wrong with the configuration as a whole, at its place in the file.
    pub fn check_file(path: &Path) -> Result<RunConfig, ConfigFileError> {
        let text = read(path)?;
        let wrong = |mistakes| ConfigFileError::Mistakes { path: path.to_owned(), mistakes };
        let config = RunConfig::parse(&text, path).map_err(wrong)?;
        let mut whole = config.clone();
        if whole.command.is_empty() && whole.initrd.is_none() {
            // The command is one for the command line.
            whole.command.push("true".into());
        }
        let problems = whole.problems();
        if problems.is_empty() {
            return Ok(config);
        }
        let mut document = Document::parse(&text).map_err(wrong)?;
        for Problem { path, message } in problems {
            document.mistake_at(&path.iter().map(String::as_str).collect::<Vec<_>>(), message);
        }
        Err(wrong(document.into_mistakes()))
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<RunConfig, Vec<Mistake>> {
        let mut config: RunConfig = Document::parse(text)?.read()?;
        let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        config.resolve_paths(file.parent().unwrap_or(Path::new("/")));
        Ok(config)
    }

    /// The configuration as the text of a file.
    ///
    /// # Errors
    /// A path or an argument is not UTF-8, which a file must be.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        Ok(format!("version = 1\n{}", toml::to_string(self)?))
    }
}

fn read(path: &Path) -> Result<String, ConfigFileError> {
    std::fs::read_to_string(path).map_err(|source| ConfigFileError::Read { path: path.to_owned(), source })
}

/// The JSON schema (draft 2020-12) of configuration files.
pub fn schema() -> Value {
    let mut schema =
        SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<RunConfig>().to_value();
    without_null(&mut schema);
    schema["title"] = json!("A configuration of daxvm run");
    schema["properties"]["version"] = json!({ "const": 1, "description": "The version of the format." });
    schema["required"] = json!(["version"]);
    schema
}

/// TOML has no null: what schemars allows to be null is what can be missing.
fn without_null(schema: &mut Value) {
    match schema {
        Value::Array(values) => {
            values.retain(|value| *value != json!({ "type": "null" }));
            values.iter_mut().for_each(without_null);
        }
        Value::Object(object) => {
            if object.get("default").is_some_and(Value::is_null) {
                object.remove("default");
            }
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|name| name != "null");
                if let [single] = &types[..] {
                    object["type"] = single.clone();
                }
            }
            object.values_mut().for_each(without_null);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use devices::virtio::fs::policy::Prefault;

    use super::super::{DaxConfig, DiskConfig, RootConfig, SandboxMode, ShareConfig};
    use super::*;
    use crate::guest::protocol::RootMode;

    const ALL: &str = r#"
version = 1
kernel = "bzImage"
modules = "/lib/modules/6.12"
cmdline = "quiet"
cpus = 2
memory = "1G"
rw = ["target"]
rng = false
nested = true
large-windows = true
chdir = "/work"
timeout = "5m"
boot-timeout = 20
console = "stderr"
report = "out/report.json"
metrics-file = "out/daxvm.prom"
metrics-interval = "500ms"
api-socket = "/run/vm.sock"
sandbox = "off"
command = ["make", "test"]
root = { path = "debian", mode = "ro", dax = "auto", window = "64M", prefault = "never" }
env = { RUST_LOG = "debug", HOME = true }

[[share]]
tag = "src"
path = "../src"
read-only = true
window = 0
dax = "rules.toml"
prefault = "all"
cache = "none"

[[disk]]
path = "disk.img"
read-only = true
"#;

    fn parse(text: &str) -> Result<RunConfig, Vec<String>> {
        RunConfig::parse(text, Path::new("/etc/vm/run.toml"))
            .map_err(|mistakes| mistakes.iter().map(Mistake::to_string).collect())
    }

    fn everything() -> RunConfig {
        RunConfig {
            kernel: Some("/etc/vm/bzImage".into()),
            modules: Some("/lib/modules/6.12".into()),
            initrd: None,
            cmdline: "quiet".into(),
            cpus: Some(2),
            memory: Some(1 << 30),
            root: RootConfig {
                path: "/etc/vm/debian".into(),
                mode: RootMode::Ro,
                dax: Some("auto".parse().unwrap()),
                window: Some(64 << 20),
                prefault: Some(Prefault::Never),
            },
            rw: vec!["/etc/vm/target".into()],
            shares: vec![ShareConfig {
                tag: "src".into(),
                path: "/etc/vm/../src".into(),
                read_only: true,
                window: Some(0),
                dax: DaxConfig::File("/etc/vm/rules.toml".into()),
                prefault: Prefault::All,
                cache: "none".parse().unwrap(),
            }],
            disks: vec![DiskConfig { path: "/etc/vm/disk.img".into(), read_only: true }],
            rng: Some(false),
            nested: Some(true),
            large_windows: Some(true),
            env: vec![("HOME".into(), None), ("RUST_LOG".into(), Some("debug".into()))],
            directory: Some("/work".into()),
            timeout: Some(Duration::from_secs(300)),
            boot_timeout: Some(Duration::from_secs(20)),
            console: Some("stderr".into()),
            report: Some("/etc/vm/out/report.json".into()),
            metrics_file: Some("/etc/vm/out/daxvm.prom".into()),
            metrics_interval: Some(Duration::from_millis(500)),
            api_socket: Some("/run/vm.sock".into()),
            sandbox: Some(SandboxMode::Off),
            command: vec!["make".into(), "test".into()],
        }
    }

    #[test]
    fn a_file_can_say_everything_and_paths_are_relative_to_it() {
        assert_eq!(parse(ALL), Ok(everything()));
        assert_eq!(parse("version = 1"), Ok(RunConfig::default()));
    }

    #[test]
    fn what_is_printed_is_read_again() {
        for config in [everything(), RunConfig::default()] {
            let text = config.to_toml().unwrap();
            assert_eq!(parse(&text), Ok(config), "{text}");
        }
        assert_eq!(RunConfig::default().to_toml().unwrap(), "version = 1\n");
    }

    #[test]
    fn each_mistake_has_its_place_and_the_remedy() {
        let text = "version = 1\ncpus = 64\nmemory = \"100\"\nkernal = \"x\"\ntimeout = \"soon\"\ncommand = \"ls\"\n\
                    root.mode = \"rww\"\nroot.window = \"33M\"\nenv.HOME = false\nenv.A = \"b\"\n\
                    [[share]]\npath = \"/\"\nread_only = true\n\
                    [[share]]\ntag = \"\"\npath = \"/\"\ndax = \"alway\"\n[[shares]]\n";
        assert_eq!(
            parse(text).unwrap_err(),
            [
                "2:8: `cpus`: a guest has 1 to 32 vCPUs",
                "3:10: `memory`: a guest has 64 MiB to 512 GiB of memory, in steps of 2 MiB; the nearest is 64M; did you mean 100M?",
                "4:1: unknown key `kernal`; did you mean `kernel`?",
                "5:11: `timeout`: `soon` is no duration; write a number with ms, s, m, h or d, for example 90s",
                "6:11: `command` takes an array of a program and its arguments, as in [\"sh\", \"-c\", \"make test\"], \
                 not the string \"ls\"",
                "7:13: `mode`: unknown value `rww`; did you mean `rw`?",
                "8:15: `window`: A DAX window is a multiple of 2 MiB, which 34603008 bytes are not: use 32M or 34M",
                "9:12: `HOME`: a string, or true for the value that daxvm has itself",
                "11:1: `tag` is missing",
                "13:1: unknown key `read_only`; did you mean `read-only`?",
                "15:7: `tag`: The tag \"\" of a share must have 1 to 36 bytes and no NUL: choose another one",
                "17:7: `dax`: unknown DAX policy `alway`; did you mean `always`?",
                "18:3: unknown key `shares`; did you mean `share`?",
            ]
        );
    }

    #[test]
    fn the_schema_knows_what_a_file_can_say() {
        let schema = schema();
        let properties = schema["properties"].as_object().unwrap();
        let file: toml::Table = ALL.parse().unwrap();
        assert!(file.keys().all(|key| properties.contains_key(key)), "{properties:?}");
        // All but `initrd`, which is for guests without a command.
        assert_eq!(properties.len(), file.len() + 1);
        assert!(properties.values().all(|value| value.get("description").is_some()), "{properties:?}");
        assert_eq!(schema["additionalProperties"], json!(false));
        assert!(!schema.to_string().contains("null"), "{schema}");
    }
}
