//! What the fuzz targets call (fuzz/), and the unit tests with random data of their own. Both panic where a promise of
//! the policy is broken.

use std::time::Duration;

use super::{DecidedBy, FileFacts, Policy, RuleFileError, WindowFacts};

/// Any bytes are either a rule file, which then decides, or have mistakes that name places in them.
pub fn rule_file(data: &[u8]) {
    let (facts, text) = data.split_at(data.len().min(64));
    let text = String::from_utf8_lossy(text);
    match Policy::from_rules("fuzz.toml", &text) {
        Ok(policy) => check_decisions(&policy, &mut Bytes(facts)),
        Err(RuleFileError::Mistakes { mistakes, .. }) => {
            assert!(!mistakes.is_empty());
            for mistake in mistakes {
                assert!((1..=text.lines().count() + 1).contains(&mistake.line), "{mistake}");
                assert!(mistake.column >= 1 && !mistake.problem.to_string().is_empty());
            }
        }
        Err(error) => panic!("{error}"),
    }
}

/// Any facts are decided alike each time, and what was decided stands when asked again.
pub fn decide(data: &[u8]) {
    let mut bytes = Bytes(data);
    let policy = match bytes.next() % 7 {
        0 => Policy::Never,
        1 => Policy::Always,
        2 => Policy::Inode,
        3 => Policy::Size(bytes.number()),
        4 => Policy::Auto,
        _ => rules(&mut bytes),
    };
    check_decisions(&policy, &mut bytes);
}

/// A rule file whose numbers are random.
fn rules(bytes: &mut Bytes<'_>) -> Policy {
    let mut text = "version = 1\ndefault = \"auto\"\n".to_owned();
    let bound = |bytes: &mut Bytes<'_>| bytes.number() >> 1;
    for _ in 0..bytes.next() % 8 {
        let action = ["allow", "deny", "auto", "inode", "size:64K"][usize::from(bytes.next() % 5)];
        text += &format!("[[rule]]\ndax = \"{action}\"\n");
        let (a, b) = (bound(bytes), bound(bytes));
        let (percent, path) = (bytes.next() % 101, bytes.next() % 4);
        for (bit, condition) in [
            format!("size = {{ min = {}, max = {} }}", a.min(b), a.max(b)),
            format!("window_free.min = {percent}"),
            format!("executable = {}", a > b),
            format!("path = [\"{path}*\", \"a/**/?{path}\"]"),
            format!("uid = [{path}, {percent}]"),
            format!("age.max = {percent}"),
            format!("xattr.\"user.{path}\" = true"),
        ]
        .iter()
        .enumerate()
        {
            if a >> bit & 1 == 1 {
                text += &format!("{condition}\n");
            }
        }
    }
    // Some rules take everything from others.
    Policy::from_rules("fuzz.toml", &text).unwrap_or(Policy::Auto)
}

fn check_decisions(policy: &Policy, bytes: &mut Bytes<'_>) {
    while !bytes.0.is_empty() {
        let xattrs = vec![Some(vec![bytes.next()]); policy.needs().xattrs.len()];
        let kinds = [libc::S_IFREG, libc::S_IFREG, libc::S_IFREG, libc::S_IFDIR];
        let mode = kinds[usize::from(bytes.next() % 4)] | bytes.number() as u32 & 0o7777;
        let window = WindowFacts {
            chunks: bytes.number(),
            mapped: bytes.number(),
            promised: bytes.number(),
            thrash: bytes.number() as u8 % (super::MAX_THRASH_LEVEL + 1),
        };
        let facts = FileFacts {
            mode,
            size: bytes.number(),
            uid: bytes.next().into(),
            gid: bytes.next().into(),
            age: Duration::from_secs(bytes.number()),
            read_only: bytes.next() & 1 == 1,
            window,
            path: b"a/b/12",
            hint: bytes.next() & 1 == 1,
            capabilities: bytes.next() & 1 == 1,
            xattrs: &xattrs,
        };
        let current = [None, Some(false), Some(true)][usize::from(bytes.next() % 3)];
        let decision = policy.decide(&facts, current);
        assert_eq!(decision, policy.decide(&facts, current));
        assert!(!decision.dax || mode & libc::S_IFMT == libc::S_IFREG);
        assert_eq!(policy.decide(&facts, Some(decision.dax)).dax, decision.dax, "{policy:?} {facts:?}");
        assert!(!decision.reason.kept || current == Some(decision.dax));
        assert!(!decision.dax || policy.may_grant());
        assert!(decision.dax <= policy.allows_mapping(&facts) || decision.reason.kept);
        assert!(!policy.explain(&decision, &facts).to_string().is_empty());
        assert!(policy.decide(&facts, None).reason.by != DecidedBy::Policy || !facts_need_rule(policy, mode));
    }
}

fn facts_need_rule(policy: &Policy, mode: u32) -> bool {
    matches!(policy, Policy::Rules(_)) && mode & libc::S_IFMT == libc::S_IFREG
}

/// Random data, taken from the front; zeros when it is used up.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number of any magnitude: a byte or two, shifted.
    fn number(&mut self) -> u64 {
        let (shift, low) = (self.next() % 64, self.next());
        (u64::from(self.next()) << 8 | u64::from(low)) << shift
    }
}
