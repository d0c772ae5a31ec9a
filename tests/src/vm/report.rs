//! The report that `daxvm run --report` leaves. Its names are known here and nowhere else in the tests.

use std::collections::BTreeMap;
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
    #[serde(default)]
    requests: BTreeMap<String, u64>,
    #[serde(flatten)]
    dax: DaxCounts,
}

/// What the device counted about the decisions on a share's files, over the whole run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DaxCounts {
    /// Times that the guest got to know a file as DAX.
    pub dax_granted: u64,
    /// Times that it got to know one as not DAX.
    pub dax_denied: u64,
    /// Those of both that changed a file which it knew.
    pub reincarnations: u64,
    /// Questions to the host for a hint.
    pub hint_queries: u64,
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
    /// Times that pages were put in the guest's reach as they were mapped.
    #[serde(default)]
    pub prefaults: u64,
    /// Bytes of these pages.
    #[serde(default)]
    pub prefault_bytes: u64,
    /// Files that became shorter while they were mapped.
    #[serde(default)]
    pub lost_files: u64,
    /// Pages that went so.
    #[serde(default)]
    pub lost_pages: u64,
    /// Those that came back.
    #[serde(default)]
    pub restored_pages: u64,
    /// Pages that the host could not provide.
    #[serde(default)]
    pub failed_pages: u64,
}

impl Report {
    /// Reads a report; none is an empty one, and so is a file in which nothing was written before the end.
    ///
    /// # Errors
    /// It is no report.
    pub fn parse(bytes: Option<&[u8]>) -> io::Result<Report> {
        let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) else { return Ok(Report::default()) };
        let all: Value = serde_json::from_slice(bytes)?;
        Ok(Report { all: all.clone(), ..serde_json::from_value(all)? })
    }

    /// The tags of the shares.
    pub fn tags(&self) -> impl Iterator<Item = &str> {
        self.shares.iter().map(|share| share.tag.as_str())
    }

    /// How many requests of an operation a share was asked for.
    pub fn requests(&self, tag: &str, operation: &str) -> u64 {
        let share = self.shares.iter().find(|share| share.tag == tag);
        share.and_then(|share| share.requests.get(operation)).copied().unwrap_or(0)
    }

    /// What was decided about the files of a share.
    pub fn dax(&self, tag: &str) -> Option<DaxCounts> {
        Some(self.shares.iter().find(|share| share.tag == tag)?.dax)
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
             "cleared_chunks": 31}, "requests": {"OPEN": 3}, "dax_granted": 4, "dax_denied": 3, "reincarnations": 2,
             "hint_queries": 1}]}"#;
        let report = Report::parse(Some(text))?;
        assert_eq!(report.reason, "power-off");
        assert_eq!(report.window("t").map(|counts| counts.setup_mappings), Some(33));
        let dax = DaxCounts { dax_granted: 4, dax_denied: 3, reincarnations: 2, hint_queries: 1 };
        assert_eq!((report.dax("t"), report.dax("none")), (Some(dax), Some(DaxCounts::default())));
        assert_eq!((report.requests("t", "OPEN"), report.requests("t", "READ")), (3, 0));
        assert_eq!(report.tags().collect::<Vec<_>>(), ["none", "t"]);
        assert_eq!(report.window("none"), None);
        assert_eq!(report.window("other"), None);
        Ok(())
    }
}
