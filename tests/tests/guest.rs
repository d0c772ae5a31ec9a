//! The guest tests: stock kernels under `daxvm`, on a host with KVM.
//!
//! They run where `scripts/lab exec` runs programs: there the environment names scratch directories on the file systems
//! to share from (LAB_EXT4, LAB_TMPFS, LAB_XFS). Elsewhere every test is skipped and says why; a lab that lacks one has failed. One boot serves many checks, one
//! after another; each check is a test of its own, called KERNEL/CPUS/FILE-SYSTEM/CHECK.

#[path = "guest/attributes.rs"]
mod attributes;
#[path = "guest/dax.rs"]
mod dax;
#[path = "guest/faults.rs"]
mod faults;
#[path = "guest/faults_of_host.rs"]
mod faults_of_host;
#[path = "guest/harness.rs"]
mod harness;
#[path = "guest/hints.rs"]
mod hints;
#[path = "guest/host_changes.rs"]
mod host_changes;
#[path = "guest/host_file_systems.rs"]
mod host_file_systems;
#[path = "guest/hostile.rs"]
mod hostile;
#[path = "guest/io.rs"]
mod io;
#[path = "guest/ledger.rs"]
mod ledger;
#[path = "guest/lifecycle.rs"]
mod lifecycle;
#[path = "guest/machine.rs"]
mod machine;
#[path = "guest/matrix.rs"]
mod matrix;
#[path = "guest/negotiation.rs"]
mod negotiation;
#[path = "guest/per_file.rs"]
mod per_file;
#[path = "guest/per_file_life.rs"]
mod per_file_life;
#[path = "guest/per_file_room.rs"]
mod per_file_room;
#[path = "guest/per_file_table.rs"]
mod per_file_table;
#[path = "guest/prefault.rs"]
mod prefault;
#[path = "guest/pressure.rs"]
mod pressure;
#[path = "guest/room.rs"]
mod room;
#[path = "guest/runner.rs"]
mod runner;
#[path = "guest/runner_disks.rs"]
mod runner_disks;
#[path = "guest/runner_ends.rs"]
mod runner_ends;
#[path = "guest/runner_jobs.rs"]
mod runner_jobs;
#[path = "guest/runner_terminal.rs"]
mod runner_terminal;
#[path = "guest/sandbox.rs"]
mod sandbox;
#[path = "guest/seen.rs"]
mod seen;
#[path = "guest/terminal.rs"]
mod terminal;
#[path = "guest/trapped.rs"]
mod trapped;
#[path = "guest/tree.rs"]
mod tree;

use std::process::ExitCode;

use harness::{Boot, Checks, Places, Scope};
use libtest_mimic::{Arguments, Trial};

const KERNELS: [&str; 2] = ["6.12-cloud", "6.1-cloud"];

/// Kernels with other drivers built in, on which the runner depends.
const RUNNER_KERNELS: [&str; 3] = ["6.12-cloud", "6.1-cloud", "6.12-generic"];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Checks of one boot share a guest, and emulated processors are few.
    arguments.test_threads = Some(1);
    let places = Places::find();
    let mut has_failed = places.is_err() && std::env::var_os("LAB_TMPFS").is_some();
    if let Err(why) = &places {
        eprintln!("\nSKIPPING EVERY GUEST TEST: {why}\n");
    }
    let conclusion = libtest_mimic::run(&arguments, trials(&places));
    harness::end_current();
    harness::print_slowest();
    if places.is_ok() && !arguments.list && conclusion.num_passed + conclusion.num_failed == 0 {
        let (other, ignored) = (conclusion.num_filtered_out, conclusion.num_ignored);
        eprintln!(
            "no test ran: {other} have other names, {ignored} are ignored, as the long ones are without --ignored"
        );
        has_failed = true;
    }
    if let Ok(places) = places
        && let Err(error) = places.remove()
    {
        eprintln!("scratch files are left behind: {error}");
    }
    // In the lab there is no excuse.
    match has_failed && !arguments.list {
        true => ExitCode::FAILURE,
        false => conclusion.exit_code(),
    }
}

fn trials(places: &Result<Places, String>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (kernel, cpus, scope) in [
        (KERNELS[0], 1, Scope::Full),
        (KERNELS[1], 1, Scope::Full),
        (KERNELS[0], 4, Scope::Light),
        (KERNELS[1], 4, Scope::Light),
    ] {
        let boot = Boot { kernel, cpus, scope };
        for place in harness::PLACES {
            boot.trials(places, place, place_checks(&boot), &mut trials);
        }
        boot.last_trials(places, lifecycle::last_checks(), &mut trials);
    }
    for kernel in KERNELS {
        let boot = Boot { kernel, cpus: 1, scope: Scope::Long };
        for place in harness::PLACES {
            boot.trials(places, place, tree::long_checks(), &mut trials);
        }
    }
    for kernel in KERNELS {
        for place in harness::PLACES.into_iter().chain(harness::MORE_PLACES) {
            for (cpus, scope, checks) in [
                (1, Scope::PerFile(place), per_file::checks()),
                (4, Scope::PerFileAgain(place), per_file::checks_after_reboot()),
            ] {
                let boot = Boot { kernel, cpus, scope };
                boot.trials(places, place, checks, &mut trials);
                boot.last_trials(places, per_file::last_checks(place), &mut trials);
            }
        }
    }
    for kernel in KERNELS {
        machine::trials(places, kernel, &mut trials);
        host_changes::trials(places, kernel, &mut trials);
        hostile::trials(places, kernel, &mut trials);
        room::trials(places, kernel, &mut trials);
        prefault::trials(places, kernel, &mut trials);
        faults::trials(places, kernel, &mut trials);
    }
    for kernel in RUNNER_KERNELS {
        runner::trials(places, kernel, &mut trials);
    }
    matrix::trials(places, &mut trials);
    trials
}

/// What is checked on every file system of a boot, in this order.
fn place_checks(boot: &Boot) -> Checks {
    let mut checks = [dax::checks(), io::checks(), pressure::checks()].concat();
    if boot.scope == Scope::Full {
        checks.extend([tree::checks(), attributes::checks()].concat());
    }
    checks.extend(lifecycle::checks());
    checks
}
