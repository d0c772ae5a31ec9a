//! The report that `daxvm run --report` leaves. Its names are known here and nowhere else in the tests.

use std::io;

use serde::Deserialize;
use serde_json::Value;

/// What the program says about a run at its end.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Report {
    /// Why it ended: `power-off`, `reset`, `crash`, `panic`, `timeout`. Empty if there was no report.
    #[serde(default)]
    pub reason: String,
    /// What it says of each share.
    #[serde(default)]
    shares: Vec<ShareReport>,
    /// Everything, as it stands in the file.
    #[serde(skip)]
    pub all: Value,
}

#[derive(Clone, Debug, Deserialize)]
struct ShareReport {
    tag: String,
    #[serde(default)]
    window: Option<WindowCounts>,
}

/// What the device counted about a share's DAX window, over the whole run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct WindowCounts {
    /// Chunks of 2 MiB mapped at the end.
    pub mapped_chunks: u64,
    /// The most chunks that were mapped at a time.
    pub peak_mapped_chunks: u64,
    /// Bytes mapped at the end.
    pub mapped_bytes: u64,
    /// FUSE_SETUPMAPPING requests that were carried out.
    pub setup_mappings: u64,
    /// FUSE_SETUPMAPPING requests that were refused.
    pub failed_setup_mappings: u64,
    /// Ranges given back by FUSE_REMOVEMAPPING.
    pub remove_mappings: u64,
    /// Chunks that became writable in place.
    pub upgraded_chunks: u64,
    /// Chunks that were unmapped because a session ended.
    pub cleared_chunks: u64,
}

impl Report {
    /// Reads a report; none is an empty one.
    pub(super) fn parse(bytes: Option<&[u8]>) -> io::Result<Report> {
        let Some(bytes) = bytes else { return Ok(Report::default()) };
        let all: Value = serde_json::from_slice(bytes)?;
        Ok(Report { all: all.clone(), ..serde_json::from_value(all)? })
    }

    /// The window counts of a share.
    pub fn window(&self, tag: &str) -> Option<WindowCounts> {
        self.shares.iter().find(|share| share.tag == tag)?.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_found_by_tag() -> io::Result<()> {
        let text = br#"{"reason": "power-off", "status": 0, "timing": {}, "shares": [{"tag": "none"},
            {"tag": "t", "window": {"size": 1, "mapped_chunks": 0, "peak_mapped_chunks": 32, "setup_mappings": 33,
             "mapped_bytes": 0, "failed_setup_mappings": 0, "remove_mappings": 1, "upgraded_chunks": 2,
             "cleared_chunks": 31}}]}"#;
        let report = Report::parse(Some(text))?;
        assert_eq!(report.reason, "power-off");
        assert_eq!(report.window("t").map(|counts| counts.setup_mappings), Some(33));
        assert_eq!(report.window("none"), None);
        assert_eq!(report.window("other"), None);
        Ok(())
    }
}
