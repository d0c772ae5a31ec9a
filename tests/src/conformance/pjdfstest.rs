//! pjdfstest: POSIX semantics, call by call. It prints a line for each test, and why it failed or was skipped below it.

use std::fs;

use super::{Outcome, Outcomes};

/// The features that ext4, xfs and tmpfs all have.
const FEATURES: &str = "\
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
";

/// Its configuration. Times of files come from a coarse clock of 4 to 10 ms, and must differ after a nap. `remount`: tests
/// make the file system read-only for a while, which is possible where nobody else uses it.
pub fn configuration(remount: bool) -> String {
    let users = ["nobody", "daemon"].map(|user| format!("[\"{user}\", \"{}\"]", group_of(user)));
    let users = users.join(", ");
    format!(
        "{FEATURES}[settings]\nnaptime = 0.05\nallow_remount = {remount}\n[dummy_auth]\nentries = [{users}]\n"
    )
}

/// The name of a user's group, which distributions do not agree on.
fn group_of(user: &str) -> String {
    let field = |file: &str, key: usize, value: &str, wanted: usize| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let line = lines.find(|line| line.get(key) == Some(&value))?;
        Some((*line.get(wanted)?).to_owned())
    };
    let group = field("/etc/passwd", 0, user, 3).and_then(|gid| field("/etc/group", 2, &gid, 0));
    group.unwrap_or_else(|| user.to_owned())
}

/// The tests that want to remount are run by themselves: others leave files open for writing, and a file system with such
/// files cannot become read-only.
pub const SCRIPT: &str = "\
\"$SUITE/pjdfstest\" -c \"$SUITE/pjdfstest.toml\" -p \"$DIR\" -s /dev/shm
[ \"$WHERE\" = host ] || \"$SUITE/pjdfstest\" -c \"$SUITE/remount.toml\" -p \"$DIR\" -s /dev/shm erofs
";

/// Reads its output; a test that is run twice counts as it was run last.
pub fn outcomes(output: &str) -> Outcomes {
    let mut outcomes = Outcomes::new();
    let mut last = None;
    for line in output.lines() {
        if let Some(detail) = line.strip_prefix('\t') {
            if let Some(Outcome::Failed(why) | Outcome::Skipped(why)) =
                last.as_ref().and_then(|name: &String| outcomes.get_mut(name))
            {
                *why += if why.is_empty() { "" } else { "; " };
                *why += detail.trim();
            }
            continue;
        }
        last = None;
        let Some((name, end)) = line.split_once(char::is_whitespace) else { continue };
        let outcome = match end.trim() {
            "ok" => Outcome::Passed,
            "FAILED" => Outcome::Failed(String::new()),
            "skipped" => Outcome::Skipped(String::new()),
            _ => continue,
        };
        outcomes.insert(name.to_owned(), outcome);
        last = Some(name.to_owned());
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_reasons_are_read() {
        let output = "\
unlink::erofs_named                                                      skipped
\tRemounts (allow_remount) are not allowed in the configuration file
chown::eloop                                                                  ok
link::exdev                                                               FAILED
\tassertion `left == right` failed
  left: 1
\tmore

Summary: 1 failed, 1 skipped, 1 passed, 0 expected failures, 3 total
unlink::erofs_named                                                           ok
";
        let outcomes = outcomes(output);
        assert_eq!(outcomes.len(), 3);
        assert_eq!(outcomes["unlink::erofs_named"], Outcome::Passed);
        assert_eq!(outcomes["chown::eloop"], Outcome::Passed);
        assert_eq!(outcomes["link::exdev"], Outcome::Failed("assertion `left == right` failed".into()));
    }

    #[test]
    fn the_configuration_names_two_users_with_their_groups() {
        let text = configuration(true);
        assert!(text.contains("allow_remount = true") && text.contains("[\"daemon\", \"daemon\"]"), "{text}");
    }
}
