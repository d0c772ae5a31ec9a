//! What the tests of this module share.

use super::{Case, DEFAULT_TIMEOUT, Expected, Flaky};

/// A case of this name, `KERNEL/COMMAND...`, that runs `true`.
pub(super) fn case(name: &str) -> Case {
    let mut parts = name.split('/').map(str::to_owned);
    let (kernel, command) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    Case {
        name: name.to_owned(),
        kernel,
        kernel_path: None,
        command,
        cpus: 1,
        memory: 64 << 20,
        env: Vec::new(),
        cmdline: String::new(),
        modules: None,
        initrd: None,
        root: None,
        rw: Vec::new(),
        shares: Vec::new(),
        disks: Vec::new(),
        rng: None,
        nested: None,
        directory: None,
        timeout: DEFAULT_TIMEOUT,
        boot_timeout: None,
        expect: vec![Expected::Status(0)],
        retries: 0,
        flaky: Flaky::Pass,
        run: vec!["true".into()],
    }
}
