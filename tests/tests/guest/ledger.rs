//! What the checks of a boot expect the device to have counted when it ends.

use std::collections::BTreeMap;

/// What is expected of each share, by its tag.
pub type Ledger = BTreeMap<String, Expected>;

/// What the device should have counted about a share; `None` is anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// FUSE_SETUPMAPPING requests that were carried out.
    pub setups: Option<u64>,
    /// FUSE_SETUPMAPPING requests that were refused.
    pub failed_setups: Option<u64>,
    /// Ranges given back by FUSE_REMOVEMAPPING.
    pub removes: Option<u64>,
    /// Times that the guest got to know a file as DAX.
    pub granted: Option<u64>,
    /// Times that the guest got to know a file as not DAX.
    pub denied: Option<u64>,
    /// Those of both that changed a file.
    pub reincarnations: Option<u64>,
    /// Questions to the host for a hint.
    pub hint_queries: Option<u64>,
    /// As many of these are not asked when the host stalls: a hint is kept that was read 50 ms after the file's last
    /// change.
    pub saved_queries: u64,
}

impl Expected {
    /// Whether this can have been counted.
    ///
    /// To change a file the guest looks it up twice, and may have forgotten it in between, so that it then gets to know
    /// it anew: that depends on which queue is served first.
    pub fn allows(&self, found: &Expected) -> bool {
        let more = found.reincarnations.unwrap_or(0);
        let is = |found: Option<u64>, expected: Option<u64>, more: u64| {
            expected.zip(found).is_none_or(|(expected, found)| (expected..=expected + more).contains(&found))
        };
        let asked = if self.hint_queries == Some(0) { 0 } else { more };
        is(found.setups, self.setups, 0)
            && is(found.failed_setups, self.failed_setups, 0)
            && is(found.removes, self.removes, 0)
            && is(found.reincarnations, self.reincarnations, 0)
            && is(found.granted, self.granted, more)
            && is(found.denied, self.denied, more)
            && is(
                found.hint_queries,
                self.hint_queries.map(|count| count - self.saved_queries),
                self.saved_queries + asked,
            )
    }
}

/// Nothing at all: that is expected of shares that no check has used.
impl Default for Expected {
    fn default() -> Expected {
        let none = Some(0);
        Expected {
            setups: none,
            failed_setups: none,
            removes: none,
            granted: none,
            denied: none,
            reincarnations: none,
            hint_queries: none,
            saved_queries: 0,
        }
    }
}
