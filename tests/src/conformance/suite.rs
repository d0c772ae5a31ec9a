//! The suites: what each runs, and how its output reads.

use clap::ValueEnum;
use serde::Serialize;

use super::exclusions;
use super::outcome::{RUN, by_status, cases, tail};
use super::place::{MACHINE_CASES, Policy};
use super::{Outcome, Outcomes, pjdfstest, two_guests};

/// A suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Suite {
    /// POSIX semantics, call by call
    Pjdfstest,
    /// Random operations on one file, each read compared
    Fsx,
    /// stress-ng's stressors for file systems and I/O
    StressNg,
    /// A file server's load
    Dbench,
    /// Two guests that change one directory, and then run fsx beside each other
    TwoGuests,
}

/// How fsx accesses its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// By read(2) and write(2)
    Buffered,
    /// With mappings too
    Mmap,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Buffered => "buffered",
            Mode::Mmap => "mmap",
        }
    }

    /// What fsx does, but for the size of its file.
    fn configuration(self) -> String {
        match self {
            Mode::Buffered => FSX_BUFFERED.to_owned(),
            Mode::Mmap => FSX_BUFFERED
                .replace("mapread = 0", "invalidate = 1\nmapread = 10")
                .replace("mapwrite = 0", "mapwrite = 10"),
        }
    }
}

/// How much is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The guest's kernel, as scripts/fetch-kernel names it.
    pub kernel: String,
    /// Operations of each run of fsx.
    pub operations: u64,
    /// Seeds of fsx.
    pub seeds: Vec<u64>,
    /// What fsx does with each seed.
    pub modes: Vec<Mode>,
    /// Seconds of each stressor, and of dbench six times as many.
    pub seconds: u64,
    /// Rounds of what two guests do to one file.
    pub rounds: u64,
}

impl std::fmt::Display for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What fsx does: how many bytes at once, and the weights of its operations. It makes and compares them one by one, hence the
/// most. Without the least it asks for no byte now and then, which posix_fallocate(3) refuses.
const FSX_BUFFERED: &str = "\
[opsize]
min = 1
max = 16384
[weights]
mapread = 0
mapwrite = 0
read = 10
write = 10
truncate = 5
sendfile = 5
copy_file_range = 3
posix_fallocate = 2
punch_hole = 2
posix_fadvise = 2
close_open = 1
fsync = 1
fdatasync = 1
";

/// fsx's files: smaller than a chunk of the window, and of three chunks.
const FSX_SIZES: [(&str, u32); 2] = [("small", 256 << 10), ("large", 5 << 20)];

impl Suite {
    /// Its name, as it is given on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Pjdfstest => "pjdfstest",
            Suite::Fsx => "fsx",
            Suite::StressNg => "stress-ng",
            Suite::Dbench => "dbench",
            Suite::TwoGuests => "two-guests",
        }
    }

    /// Who runs it at the same time, in one directory; what they are called goes before the names of their cases.
    pub fn parties(self) -> &'static [&'static str] {
        match self {
            Suite::TwoGuests => &["first", "second"],
            _ => &[""],
        }
    }

    /// Options of the share. Two guests see each other's changes at once if they keep nothing.
    pub fn share_options(self) -> &'static str {
        match self {
            Suite::TwoGuests => ",cache=never",
            _ => "",
        }
    }

    /// Files that go beside the programs.
    pub fn files() -> Vec<(String, String)> {
        let mut files = vec![
            ("pjdfstest.toml".to_owned(), pjdfstest::configuration(false)),
            ("remount.toml".to_owned(), pjdfstest::configuration(true)),
        ];
        for (size, bytes) in FSX_SIZES {
            for mode in Mode::value_variants() {
                let configuration = format!("flen = {bytes}\n{}", mode.configuration());
                files.push((format!("fsx-{}-{size}.toml", mode.name()), configuration));
            }
        }
        files
    }

    /// A script for sh. `SUITE` is the directory of the programs, `DIR` one on the file system, `WHERE` `host` or
    /// `guest`, and `PARTY` who runs it.
    pub fn script(self, policy: Option<Policy>, settings: &Settings) -> String {
        let Settings { operations, seeds, modes, seconds, rounds, .. } = settings;
        let commands = match self {
            Suite::Pjdfstest => return pjdfstest::SCRIPT.to_owned(),
            Suite::Fsx => fsx(*operations, modes, seeds),
            Suite::StressNg => stress_ng(*seconds),
            Suite::Dbench => dbench(6 * seconds),
            Suite::TwoGuests => {
                // Each has a seed of its own.
                let fsx = |seed| fsx(operations.div_ceil(10), modes, &[seed]);
                let mapping = if policy == Some(Policy::Never) { "" } else { "--mapping" };
                format!(
                    "\"$SUITE/conformance\" peer {mapping} --rounds {rounds} \"$PARTY\" \"$DIR\"\n\
                     if [ \"$PARTY\" = first ]; then\n{}else\n{}fi\n",
                    fsx(1),
                    fsx(2)
                )
            }
        };
        format!("{RUN}{commands}")
    }

    /// Whether it knows itself what is right, so that nothing on the host excuses a guest.
    pub fn judges_itself(self) -> bool {
        matches!(self, Suite::Fsx | Suite::Dbench | Suite::TwoGuests)
    }

    /// How many cases have to pass in its guests, with those that every guest has: all that are asked for, where the suite
    /// judges itself; else somewhat fewer than have been seen to pass on each file system.
    pub fn least(self, policy: Policy, settings: &Settings) -> usize {
        let modes = settings.modes.len();
        let own = match self {
            Suite::Pjdfstest => 390,
            Suite::Fsx => modes * settings.seeds.len(),
            Suite::StressNg => 40,
            Suite::Dbench => VARIANTS.len(),
            Suite::TwoGuests => {
                self.parties().len() * (two_guests::case_count(policy != Policy::Never) + modes)
            }
        };
        own + self.parties().len() * MACHINE_CASES
    }

    /// The cases in what the script printed.
    pub fn outcomes(self, output: &str) -> Outcomes {
        match self {
            Suite::Pjdfstest => pjdfstest::outcomes(output),
            Suite::Fsx | Suite::TwoGuests => by_status(output),
            Suite::StressNg => stress_ng_outcomes(output),
            Suite::Dbench => dbench_outcomes(output),
        }
    }
}

/// Odd seeds have a small file, even ones a large one. What fsx leaves when it fails goes to /tmp.
fn fsx(operations: u64, modes: &[Mode], seeds: &[u64]) -> String {
    let mut commands = String::new();
    for mode in modes.iter().map(|mode| mode.name()) {
        for seed in seeds {
            let (size, _) = FSX_SIZES[usize::from(seed % 2 == 0)];
            let file = format!("$DIR/fsx-{mode}-{seed}");
            commands += &format!(
                "run {mode}/seed-{seed} \"$SUITE/fsx\" -N {operations} -S {seed} -f \"$SUITE/fsx-{mode}-{size}.toml\" \
                 -P /tmp \"{file}\"\nrm -f \"{file}\"*\n"
            );
        }
    }
    commands
}

/// The program says which stressors it has; some are left out.
fn stress_ng(seconds: u64) -> String {
    let left_out: Vec<_> = exclusions::left_out_of(Suite::StressNg).collect();
    format!(
        "for class in filesystem io; do \"$SUITE/stress-ng\" --class \"$class?\"; done |\n\
         sed 's/.*: //' | tr ' ' '\\n' | sort -u >/tmp/stressors.$$\n\
         for name in $(cat /tmp/stressors.$$); do\n\
         case \" {} \" in *\" $name \"*) continue;; esac\n\
         run \"$name\" \"$SUITE/stress-ng\" \"--$name\" 2 --timeout {seconds}s --verify --oomable --temp-path \"$DIR\"\n\
         done\nrm -f /tmp/stressors.$$\n",
        left_out.join(" "),
    )
}

/// It says what it cannot do in a sentence, and ends with 0, 3 (no resources) or 4 (not implemented).
fn stress_ng_outcomes(output: &str) -> Outcomes {
    let outcome = |status, output: &str| {
        let skipped = output.lines().find(|line| {
            ["skipping stress", "not supported", "not implemented", "skipped"]
                .iter()
                .any(|words| line.contains(words))
        });
        match (status, skipped) {
            (0, None) => Outcome::Passed,
            (0 | 3 | 4, Some(line)) => Outcome::Skipped(line.to_owned()),
            (3 | 4, None) => Outcome::Skipped(tail(output)),
            _ => Outcome::Failed(format!("status {status}: {}", tail(output))),
        }
    };
    cases(output).iter().map(|case| (case.name.to_owned(), outcome(case.status, case.output))).collect()
}

/// dbench's options.
const VARIANTS: [(&str, &str); 4] =
    [("plain", ""), ("fsync", "--fsync"), ("o-sync", "--sync"), ("xattr", "--xattr")];

fn dbench(seconds: u64) -> String {
    let command = |(name, option)| {
        format!(
            "run {name} \"$SUITE/dbench\" -c \"$SUITE/client.txt\" -D \"$DIR\" -t {seconds} {option} 4\nrm -rf \"$DIR/clients\"\n"
        )
    };
    VARIANTS.map(command).concat()
}

/// It prints the throughput at the end, and a line with ERROR or FAILED for what went wrong.
fn dbench_outcomes(output: &str) -> Outcomes {
    let outcome = |status, output: &str| {
        let wrong = output.lines().find(|line| line.contains("ERROR") || line.contains("FAILED"));
        match (status, wrong) {
            (0, None) if output.contains("Throughput") => Outcome::Passed,
            (status, Some(line)) => Outcome::Failed(format!("status {status}: {line}")),
            (status, None) => Outcome::Failed(format!("status {status}: {}", tail(output))),
        }
    };
    cases(output).iter().map(|case| (case.name.to_owned(), outcome(case.status, case.output))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        let modes = Mode::value_variants().to_vec();
        let seeds = (1..=4).collect();
        Settings { kernel: "6.12-cloud".into(), operations: 1000, seeds, modes, seconds: 5, rounds: 3 }
    }

    #[test]
    fn scripts_are_shell() {
        for suite in Suite::value_variants() {
            let script = suite.script(Some(Policy::Always), &settings());
            let checked = std::process::Command::new("sh").args(["-n", "-c", &script]).output().unwrap();
            assert!(checked.status.success(), "{script}\n{}", String::from_utf8_lossy(&checked.stderr));
        }
    }

    #[test]
    fn a_suite_that_judges_itself_passes_each_command() {
        for suite in [Suite::Fsx, Suite::Dbench] {
            let commands = suite.script(None, &settings()).matches("\nrun ").count();
            assert_eq!(suite.least(Policy::Always, &settings()), commands + 3, "{suite}");
        }
        // Each of the two: 14 cases, the one of mappings, fsx in two modes, the guest's own.
        assert_eq!(Suite::TwoGuests.least(Policy::Always, &settings()), 2 * (14 + 1 + 2 + 3));
        assert_eq!(Suite::TwoGuests.least(Policy::Never, &settings()), 2 * (14 + 2 + 3));
    }

    #[test]
    fn fsx_runs_each_seed_in_both_modes() {
        let script = Suite::Fsx.script(None, &settings());
        assert_eq!(script.matches("run buffered/seed-").count(), 4);
        assert_eq!(script.matches("run mmap/seed-").count(), 4);
        assert_eq!(script.matches("fsx-mmap-large.toml").count(), 2);
        let files = Suite::files();
        let text = |name: &str| &files.iter().find(|(file, _)| file == name).unwrap().1;
        assert!(text("fsx-mmap-large.toml").starts_with("flen = 5242880\n[opsize]\nmin = 1\n"));
        assert!(text("fsx-mmap-large.toml").contains("\n[weights]\ninvalidate = 1\nmapread = 10\n"));
        assert!(text("fsx-buffered-small.toml").contains("\nmapwrite = 0\n"));
    }

    #[test]
    fn stressors_pass_fail_and_are_skipped() {
        let output = "info\n\n@case access 0\nverity: verity is not supported on the file system, skipping stress test\n\
                      \n@case verity 0\nno room\n\n@case hdd 3\nfail: open\n\n@case open 2\n";
        let outcomes = stress_ng_outcomes(output);
        assert_eq!(outcomes["access"], Outcome::Passed);
        assert!(matches!(&outcomes["verity"], Outcome::Skipped(why) if why.contains("not supported")));
        assert_eq!(outcomes["hdd"], Outcome::Skipped("no room".into()));
        assert_eq!(outcomes["open"], Outcome::Failed("status 2: fail: open".into()));
    }

    #[test]
    fn dbench_passes_with_a_throughput_and_no_error() {
        let output = "Throughput 1 MB/sec\n\n@case plain 0\n[5] ERROR: handle\nThroughput 2\n\n@case fsync 0\n\n@case o-sync 1\n";
        let outcomes = dbench_outcomes(output);
        assert_eq!(outcomes["plain"], Outcome::Passed);
        assert_eq!(outcomes["fsync"], Outcome::Failed("status 0: [5] ERROR: handle".into()));
        assert_eq!(outcomes["o-sync"], Outcome::Failed("status 1: ".into()));
    }
}
