//! The DAX windows of a machine's shares, and what they cost the guest together.

use devices::text::Bytes;
use devices::virtio::fs::policy::{Policy, Prefault, RuleFileError, WindowFacts};
use devices::virtio::fs::window::{CHUNK_SIZE, MIN_WINDOW_SIZE, default_window_size};

use super::{ShareConfig, VmConfig};

/// The part of its RAM that a guest gives to page descriptors of windows at most, unless the user insists: an eighth.
const COST_LIMIT: u64 = 8;

/// What was made of a share's `dax` and `window`.
#[derive(Debug, Clone, PartialEq)]
pub struct ShareWindow {
    /// Which files are DAX.
    pub policy: Policy,
    /// Bytes of the window; 0 for none.
    pub size: u64,
    /// Which pages of DAX files are put in the guest's reach, where no rule says it.
    pub prefault: Prefault,
}

impl ShareWindow {
    /// Whether any page could be put in the guest's reach.
    pub fn may_prefault(&self) -> bool {
        self.size > 0 && self.policy.may_prefault(self.prefault)
    }
}

/// Why shares cannot have their windows.
#[derive(Debug, thiserror::Error)]
pub enum WindowsError {
    /// A share's policy.
    #[error("Share `{tag}`")]
    Policy {
        /// Its tag.
        tag: String,
        /// What is wrong with the rule file.
        #[source]
        source: RuleFileError,
    },
    /// The guest would have little RAM left.
    #[error(
        "The DAX windows take {} of the guest's {} of RAM for page descriptors, more than an eighth, used or not: give share \
         `{tag}` {remedy}, or more --memory, or insist with --large-windows",
        Bytes(*cost), Bytes(*memory)
    )]
    TooCostly {
        /// Bytes of page descriptors of all windows.
        cost: u64,
        /// Bytes of RAM.
        memory: u64,
        /// The share with the largest window.
        tag: String,
        /// A window for it that fits beside the others, as a key of `--share`.
        remedy: String,
    },
}

impl VmConfig {
    /// The windows of all shares, in their order. Those that have no size given share what costs the guest about 2 % of its
    /// RAM; a window that no file could use would only cost it memory. Rule files are read.
    ///
    /// # Errors
    /// A rule file cannot be read or has mistakes; or the windows take more than an eighth of the guest's RAM, and
    /// [`VmConfig::large_windows`] is not set.
    pub fn windows(&self) -> Result<Vec<ShareWindow>, WindowsError> {
        let load = |share: &ShareConfig| {
            share.dax.load().map_err(|source| WindowsError::Policy { tag: share.tag.clone(), source })
        };
        let policies = self.shares.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        let by_default =
            |(share, policy): (&ShareConfig, &Policy)| share.window.is_none() && policy.may_grant();
        let defaults = self.shares.iter().zip(&policies).filter(|both| by_default(*both)).count() as u64;
        let default = default_window_size(self.memory / defaults.max(1));
        let windows: Vec<_> = self
            .shares
            .iter()
            .zip(policies)
            .map(|(share, policy)| {
                let default = if policy.may_grant() { default } else { 0 };
                ShareWindow { size: share.window.unwrap_or(default), policy, prefault: share.prefault }
            })
            .collect();
        match self.too_costly(&windows) {
            Some(error) if !self.large_windows => Err(error),
            _ => Ok(windows),
        }
    }

    fn too_costly(&self, windows: &[ShareWindow]) -> Option<WindowsError> {
        let cost = |window: &ShareWindow| WindowFacts::fixed_cost(window.size);
        let total = windows.iter().map(cost).sum::<u64>();
        let limit = self.memory / COST_LIMIT;
        let (share, largest) = self.shares.iter().zip(windows).max_by_key(|(_, window)| window.size)?;
        (total > limit).then(|| {
            let left = (limit + cost(largest)).saturating_sub(total);
            let fits = left / WindowFacts::fixed_cost(CHUNK_SIZE) * CHUNK_SIZE;
            let remedy = match fits {
                ..MIN_WINDOW_SIZE => "no window (window=0)".to_owned(),
                _ => format!("window={}M or less", fits >> 20),
            };
            WindowsError::TooCostly { cost: total, memory: self.memory, tag: share.tag.clone(), remedy }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DaxConfig;

    fn machine(memory: u64, windows: &[Option<u64>]) -> VmConfig {
        let share = |(i, window): (usize, &Option<u64>)| ShareConfig {
            window: *window,
            dax: DaxConfig::Named(Policy::Always),
            ..ShareConfig::new(&format!("share{i}"), "/")
        };
        VmConfig { memory, shares: windows.iter().enumerate().map(share).collect(), ..VmConfig::default() }
    }

    #[test]
    fn windows_without_a_size_share_what_one_would_have() {
        let sizes = |windows: &[Option<u64>]| -> Vec<u64> {
            machine(1 << 30, windows).windows().unwrap().iter().map(|window| window.size).collect()
        };
        let one = sizes(&[None])[0];
        assert_eq!(sizes(&[None, Some(0), Some(64 << 20)]), [one, 0, 64 << 20]);
        let two = sizes(&[None, None]);
        assert!(two[0] == two[1] && (one - 2 * CHUNK_SIZE..=one).contains(&(two[0] + two[1])), "{two:?}");
        let mut never = machine(1 << 30, &[None, None]);
        never.shares[0].dax = DaxConfig::Named(Policy::Never);
        let sizes: Vec<_> = never.windows().unwrap().iter().map(|window| window.size).collect();
        assert_eq!(sizes, [0, one]);
    }

    #[test]
    fn windows_beyond_an_eighth_of_the_memory_are_refused_with_the_largest_that_fits() {
        // 512 MiB: an eighth is 64 MiB, which is a window of 4 GiB.
        assert!(machine(512 << 20, &[Some(4 << 30)]).windows().is_ok());
        let error = |windows: &[Option<u64>]| machine(512 << 20, windows).windows().unwrap_err().to_string();
        let said = error(&[Some(8 << 30)]);
        assert!(
            said.contains("128 MiB of the guest's 512 MiB") && said.contains("window=4096M or less"),
            "{said}"
        );
        let said = error(&[Some(1 << 30), Some(4 << 30)]);
        assert!(said.contains("`share1` window=3072M or less") && said.contains("--large-windows"), "{said}");
        let said = error(&[Some(4 << 30), Some(4 << 30)]);
        assert!(said.contains("window=0"), "{said}");
        let insisting = VmConfig { large_windows: true, ..machine(512 << 20, &[Some(8 << 30)]) };
        assert_eq!(insisting.windows().unwrap()[0].size, 8 << 30);
    }

    #[test]
    fn many_shares_fit_without_being_asked() {
        assert!(machine(512 << 20, &[None; 24]).windows().is_ok());
    }
}
