//! `daxvm run`, `config`, `completions` and `man` as a user meets them: the program, what it prints, its exit status.
//! Nothing is booted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// Standard output, standard error and the status.
fn daxvm(directory: &Path, arguments: &[&str]) -> (String, String, i32) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_daxvm"));
    let Output { stdout, stderr, status } = command.current_dir(directory).args(arguments).output().unwrap();
    (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap(), status.code().unwrap())
}

/// What is looked at of a kernel before it is booted: the magic number of a bzImage.
fn kernel() -> Vec<u8> {
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image
}

/// A directory with a kernel, an initramfs, a disk and a directory to share.
fn scene() -> TempDir {
    let scene = TempDir::new().unwrap();
    fs::write(scene.path().join("bzImage"), kernel()).unwrap();
    for file in ["initrd.img", "disk.img"] {
        fs::write(scene.path().join(file), "").unwrap();
    }
    fs::create_dir(scene.path().join("data")).unwrap();
    scene
}

#[test]
fn mistakes_on_the_command_line_are_named_with_the_remedy() {
    let scene = scene();
    let long_tag = format!("tag={},path=data", "t".repeat(37));
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["There is nothing to run", "`daxvm run -- uname -a`"]),
        (&["--kernal", "bzImage"], &["'--kernal'", "'--kernel'"]),
        (&["uname", "-a"], &["'uname'", "daxvm run [OPTIONS] -- uname"]),
        (&["--cpus", "0"], &["--cpus", "1 to 32 vCPUs"]),
        (&["--cpus", "64"], &["--cpus", "1 to 32 vCPUs"]),
        (&["--memory", "63M"], &["--memory", "the nearest is 64M"]),
        (&["--memory", "much"], &["--memory", "for example 512M"]),
        (&["--timeout", "0"], &["--timeout", "leave it out for no limit"]),
        (&["--rng=yes"], &["--rng", "true, false"]),
        (&["--env", "=x"], &["--env", "write NAME=VALUE or NAME"]),
        (&["--share", &long_tag], &["--share", "1 to 36 bytes"]),
        (&["--share", "tag=a,path=data,window=33M"], &["--share", "use 32M or 34M"]),
        (&["--share", "tag=a,pth=data"], &["--share", "did you mean `path`"]),
        (&["--share", "tag=a,path=a,b"], &["--share", "written twice (`,,`)"]),
        (
            &["--share", "tag=a,path=none", "--kernel", "bzImage"],
            &["Share `a`", "give a directory that exists"],
        ),
        (&["--root", "data,rww"], &["--root", "did you mean `rw`"]),
        (&["--root", "none", "--", "ls"], &["--root", "/none: No such file", "give a directory that exists"]),
        (
            &["--root", "data,ro", "--rw", "disk.img", "--", "ls"],
            &["--rw", "has no such place", "/data,overlay"],
        ),
        (
            &["--disk", "data", "--kernel", "bzImage"],
            &["--disk", "neither a file nor a block device", "--share"],
        ),
        (&["--initrd", "initrd.img", "--", "ls"], &["--initrd", "leave the command out"]),
        (
            &["--kernel", "none"],
            &["--kernel", "/none: No such file", "/boot/vmlinuz-", "scripts/fetch-kernel"],
        ),
        (&["--kernel", "bzImage", "--chdir", "/"], &["--chdir", "give one after `--`"]),
        (&["--report", "none/report.json", "--", "ls"], &["--report", "make it first"]),
        (&["--config", "none.toml"], &["none.toml", "name a file that exists"]),
    ];
    for (arguments, expected) in cases {
        let (out, err, status) = daxvm(scene.path(), &[&["run"], *arguments].concat());
        assert_eq!((&*out, status), ("", 125), "{arguments:?}: {err}");
        for part in *expected {
            assert!(err.contains(part), "{arguments:?}: `{part}` is not in {err}");
        }
    }
}

#[test]
fn a_dry_run_prints_the_configuration_and_the_machine() {
    let scene = scene();
    let here = fs::canonicalize(scene.path()).unwrap();
    let arguments = [
        "run",
        "--dry-run",
        "--kernel",
        "bzImage",
        "--initrd=initrd.img",
        "--cmdline=quiet",
        "--memory=1G",
        "--disk=disk.img,ro",
        "--share=tag=data,path=data,ro,dax=auto,window=64M",
        "--share=tag=plain,path=data,dax=never",
        "--timeout=90s",
    ];
    let (out, err, status) = daxvm(&here, &arguments);
    assert_eq!((&*err, status), ("", 0));
    let expected = r#"version = 1
kernel = "HERE/bzImage"
initrd = "HERE/initrd.img"
cmdline = "quiet"
cpus = 1
memory = "1G"
rng = true
timeout = "90s"

[[share]]
tag = "data"
path = "HERE/data"
read-only = true
window = "64M"
dax = "auto"
prefault = "cached"
cache = "auto"

[[share]]
tag = "plain"
path = "HERE/data"
read-only = false
dax = "never"
prefault = "cached"
cache = "auto"

[[disk]]
path = "HERE/disk.img"
read-only = true

# The machine that comes of it:
#   kernel: HERE/bzImage
#   initramfs: HERE/initrd.img
#   kernel parameters: console=ttyS0 panic=-1 reboot=a quiet
#   vCPUs: 1
#   RAM: 1 GiB, of which DAX windows take 1 MiB, used or not
#   share data: HERE/data, read-only, DAX auto, window of 64 MiB for 1 MiB of RAM, prefault cached
#   share plain: HERE/data, writable, no DAX window
#   disk vda: HERE/disk.img, read-only
#   virtio-rng
"#;
    let (machine, sandbox) = out.split_once("\n# Sandbox").unwrap();
    assert_eq!(machine, expected.replace("HERE", here.to_str().unwrap()));
    for layer in ["shares", "limits", "mounts", "no-new-privileges", "capabilities", "landlock", "seccomp"] {
        assert!(sandbox.contains(&format!("\n#   {layer}: ")), "{layer}: {sandbox}");
    }
    fs::write(here.join("again.toml"), &out).unwrap();
    let (again, err, status) =
        daxvm(Path::new("/"), &["run", "--dry-run", "--config", here.join("again.toml").to_str().unwrap()]);
    assert_eq!((again, &*err, status), (out, "", 0));
    let (out, _, status) = daxvm(&here, &[&arguments[..], &["--sandbox=off"]].concat());
    let (_, sandbox) = out.split_once("\n# Sandbox").unwrap();
    assert!(status == 0 && sandbox.contains("off") && !sandbox.contains("seccomp"), "{sandbox}");
}

#[test]
fn the_command_line_wins_over_the_file() {
    let scene = scene();
    let text = "version = 1\nkernel = \"bzImage\"\ncpus = 3\nmemory = \"128M\"\ntimeout = 60\ncommand = [\"make\"]\nroot = { path = \"data\", mode = \"rw\" }\n";
    fs::write(scene.path().join("run.toml"), text).unwrap();
    let dry_run = |more: &[&str]| -> toml::Table {
        let (out, err, status) =
            daxvm(scene.path(), &[&["run", "--config", "run.toml", "--dry-run"], more].concat());
        assert_eq!((&*err, status), ("", 0));
        out.parse().unwrap()
    };
    let file = dry_run(&[]);
    assert_eq!((file["cpus"].as_integer(), file["timeout"].as_str()), (Some(3), Some("60s")));
    assert_eq!(file["root"]["mode"].as_str(), Some("rw"));
    let both = dry_run(&["--cpus", "2", "--root", "/", "--env", "A=1", "--", "ls", "-l"]);
    assert_eq!((both["cpus"].as_integer(), both["memory"].as_str()), (Some(2), Some("128M")));
    assert_eq!(both["command"].as_array().unwrap().len(), 2);
    assert_eq!(both["env"]["A"].as_str(), Some("1"));
    assert!(!both.contains_key("root"), "the host's root is the default: {both}");
}

#[test]
fn config_check_names_each_mistake_with_its_place() {
    let scene = scene();
    let check = |text: &str| {
        fs::write(scene.path().join("run.toml"), text).unwrap();
        daxvm(scene.path(), &["config", "check", "run.toml"])
    };
    let (out, err, status) = check("version = 1\nkernel = \"bzImage\"\ncpus = 0\n\n[[shares]]\n");
    assert_eq!((&*out, status), ("", 125));
    assert_eq!(
        err,
        "daxvm: run.toml:3:8: `cpus`: a guest has 1 to 32 vCPUs\n\
         run.toml:5:3: unknown key `shares`; did you mean `share`?\n"
    );
    // What is wrong as a whole is found when each value is right.
    let (_, err, status) = check(
        "version = 1\ncommand = [\"ls\"]\ninitrd = \"initrd.img\"\n\n[[share]]\ntag = \"a\"\npath = \"data\"\n\n\
         [[share]]\ntag = \"a\"\npath = \"none\"\n",
    );
    assert_eq!(status, 125);
    let places: Vec<_> = err.lines().map(|line| line.split(": ").collect::<Vec<_>>()).collect();
    assert_eq!(places[0][..2], ["daxvm", "run.toml:3:10"], "{err}");
    assert_eq!((places[1][0], places[2][0]), ("run.toml:10:7", "run.toml:11:8"), "{err}");
    let (out, err, status) = check("version = 1\nkernel = \"bzImage\"\n");
    assert_eq!((&*out, &*err, status), ("", "", 0));
}

/// The examples in `resources/`, in a place with all the files that they name.
fn examples() -> (TempDir, Vec<PathBuf>) {
    let scene = TempDir::new().unwrap();
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources");
    for directory in ["config", "policies"] {
        fs::create_dir(scene.path().join(directory)).unwrap();
        for file in fs::read_dir(resources.join(directory)).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), scene.path().join(directory).join(file.file_name())).unwrap();
        }
    }
    let config = scene.path().join("config");
    let mut examples: Vec<_> = fs::read_dir(&config).unwrap().map(|file| file.unwrap().path()).collect();
    examples.sort();
    fs::write(config.join("vmlinuz"), kernel()).unwrap();
    for file in ["initrd.img", "state.img"] {
        fs::write(config.join(file), "").unwrap();
    }
    for directory in ["build", "packages", "system", "config"] {
        fs::create_dir(config.join(directory)).unwrap();
    }
    (scene, examples)
}

#[test]
fn the_examples_are_right() {
    let (scene, examples) = examples();
    let names: Vec<_> = examples.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["appliance", "ci", "test-guest"]);
    for (path, command) in examples.iter().zip([&[][..], &[], &["--", "./run-tests"]]) {
        let file = path.to_str().unwrap();
        let arguments = ["run", "--dry-run", "--config", file, "--kernel", "config/vmlinuz"];
        let (out, err, status) = daxvm(scene.path(), &[&arguments[..], command].concat());
        assert_eq!((&*err, status), ("", 0), "{file}");
        assert!(out.starts_with("version = 1\n"), "{file}: {out}");
        let (out, err, status) = daxvm(scene.path(), &["config", "check", file]);
        assert_eq!((&*out, &*err, status), ("", "", 0), "{file}");
    }
}

#[test]
fn the_schema_is_printed_and_has_the_keys_of_the_examples() {
    let (scene, examples) = examples();
    let (out, err, status) = daxvm(scene.path(), &["config", "schema"]);
    assert_eq!((&*err, status), ("", 0));
    let schema: serde_json::Value = serde_json::from_str(&out).unwrap();
    for path in examples {
        let table: toml::Table = fs::read_to_string(path).unwrap().parse().unwrap();
        for key in table.keys() {
            assert!(schema["properties"].get(key).is_some(), "{key}");
        }
    }
}

#[test]
fn help_and_manual_say_the_same_and_completions_know_the_flags() {
    let directory = TempDir::new().unwrap();
    let (help, _, status) = daxvm(directory.path(), &["run", "--help"]);
    assert_eq!(status, 0);
    let (page, err, status) = daxvm(directory.path(), &["man", "run"]);
    assert_eq!((&*err, status), ("", 0));
    let page = page.replace("\\-", "-").replace("\\*(Aq", "'");
    for text in [
        "The time was over (--timeout).",
        "daxvm run --config ci.toml --dry-run",
        "Must be there, readable and writable: usually for the group `kvm`.",
        "The guest's kernel panicked.",
    ] {
        assert!(help.contains(text) && page.contains(text), "{text}\n{help}\n{page}");
    }
    for section in ["NAME", "SYNOPSIS", "OPTIONS", "EXIT STATUS", "EXAMPLES", "FILES"] {
        assert!(
            page.contains(&format!(".SH {section}\n")) || page.contains(&format!(".SH \"{section}\"\n")),
            "{page}"
        );
    }
    let (out, err, status) = daxvm(directory.path(), &["man", "--dir", "."]);
    assert_eq!((&*out, &*err, status), ("", "", 0));
    for name in
        ["daxvm", "daxvm-run", "daxvm-config", "daxvm-config-check", "daxvm-policy-explain", "daxvm-man"]
    {
        assert!(directory.path().join(format!("{name}.1")).is_file(), "{name}");
    }
    let (_, err, status) = daxvm(directory.path(), &["man", "rnu"]);
    assert_eq!((&*err, status), ("daxvm: unknown subcommand `rnu`; did you mean `run`?\n", 125));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (out, err, status) = daxvm(directory.path(), &["completions", shell]);
        assert_eq!((&*err, status), ("", 0));
        assert!(out.contains("boot-timeout") && out.contains("explain"), "{shell}");
    }
}
