//! Cases that do not count, each with a reason; docs/conformance.md lists them.

use super::place::Policy;
use super::suite::Suite;

/// A case that does not count.
#[derive(Clone, Copy, Debug)]
struct Exclusion {
    suite: Suite,
    case: &'static str,
    /// Under which policy; none: under all.
    policy: Option<Policy>,
    /// Whether it is run all the same.
    is_run: bool,
    reason: &'static str,
}

/// A stressor that is left out.
const fn left_out(case: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { suite: Suite::StressNg, case, policy: None, is_run: false, reason }
}

/// A case that cannot run in a guest, and says so.
const fn cannot(suite: Suite, case: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { suite, case, policy: None, is_run: true, reason }
}

/// A case that is run, and fails now and then wherever it is.
const fn unsteady(case: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { suite: Suite::StressNg, case, policy: None, is_run: true, reason }
}

/// A case of two guests that only files in DAX can pass.
const fn without_dax(case: &'static str) -> Exclusion {
    let reason = "without DAX what is mapped is a copy in the guest";
    Exclusion { suite: Suite::TwoGuests, case, policy: Some(Policy::Never), is_run: false, reason }
}

/// All of them.
const EXCLUSIONS: &[Exclusion] = &[
    left_out("bind-mount", "mounts, and uses no file of the share"),
    left_out("binderfs", "mounts a file system of its own"),
    left_out("dup", "descriptors of /dev/zero, no file of the share"),
    left_out("eventfd", "eventfds, no file of the share"),
    left_out("ioprio", "priorities of processes"),
    left_out("procfs", "reads /proc, no file of the share"),
    cannot(
        Suite::StressNg,
        "chattr",
        "of a file's flags a guest changes the DAX hint alone: docs/persistent-hint.md",
    ),
    cannot(Suite::StressNg, "fiemap", "FUSE has no FS_IOC_FIEMAP"),
    cannot(
        Suite::StressNg,
        "rawdev",
        "reads the block device below the file system, and below FUSE there is none",
    ),
    unsteady("io-uring", "looks at a file that its other process has removed"),
    cannot(Suite::Pjdfstest, "link::link_count_max", "the C library does not know LINK_MAX of FUSE"),
    without_dax("first/a-mapping-is-shared"),
    without_dax("second/a-mapping-is-shared"),
];

/// The cases of a suite that are not run at all.
pub fn left_out_of(suite: Suite) -> impl Iterator<Item = &'static str> {
    EXCLUSIONS
        .iter()
        .filter(move |exclusion| exclusion.suite == suite && !exclusion.is_run)
        .map(|left| left.case)
}

/// Why a case does not count, if it does not.
pub fn reason(suite: Suite, policy: Policy, case: &str) -> Option<&'static str> {
    let covers = |exclusion: &&Exclusion| {
        exclusion.suite == suite
            && exclusion.case == case
            && exclusion.policy.is_none_or(|excluded| excluded == policy)
    };
    EXCLUSIONS.iter().find(covers).map(|exclusion| exclusion.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusions_are_found_by_suite_policy_and_name() {
        let shared = "first/a-mapping-is-shared";
        assert!(reason(Suite::TwoGuests, Policy::Never, shared).is_some());
        assert_eq!(reason(Suite::TwoGuests, Policy::Always, shared), None);
        assert!(reason(Suite::StressNg, Policy::Never, "fiemap").is_some());
        assert_eq!(reason(Suite::Fsx, Policy::Never, "fiemap"), None);
        assert_eq!(reason(Suite::StressNg, Policy::Never, "access"), None);
    }

    #[test]
    fn what_is_left_out_is_no_case_that_is_run() {
        let left_out: Vec<_> = left_out_of(Suite::StressNg).collect();
        assert!(left_out.contains(&"procfs") && !left_out.contains(&"fiemap"));
        assert_eq!(left_out_of(Suite::Fsx).count(), 0);
    }
}
