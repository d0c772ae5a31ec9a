//! How long requests take: a histogram that all queues fill without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The upper bounds of the buckets, in nanoseconds: 1, 2 and 5 of each decade from 1 µs to 1 s. What takes longer has a
/// bucket of its own.
const BOUNDS: [u64; 19] = [
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
];

/// How long requests of one kind took, those that failed among them.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Requests.
    pub count: u64,
    /// The time of all of them together, in nanoseconds.
    pub sum_ns: u64,
    /// The buckets by rising bounds; those that are empty are left out.
    pub buckets: Vec<LatencyBucket>,
}

/// One bucket of a histogram.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct LatencyBucket {
    /// The longest time that counts here, in nanoseconds; the one before it is too short. None for no bound.
    pub le_ns: Option<u64>,
    /// Requests in this bucket alone.
    pub count: u64,
}

impl Latency {
    /// The bounds that buckets can have, in nanoseconds, rising; behind them comes the bucket without one.
    pub const BOUNDS: &'static [u64] = &BOUNDS;

    /// The time that a request took on average, in nanoseconds; 0 when there was none.
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count).unwrap_or(0)
    }
}

/// The living histogram.
pub(super) struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum: AtomicU64,
}

impl Histogram {
    pub(super) const fn new() -> Histogram {
        Histogram { buckets: [const { AtomicU64::new(0) }; BOUNDS.len() + 1], sum: AtomicU64::new(0) }
    }

    pub(super) fn add(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < time);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(time, Relaxed);
    }

    pub(super) fn snapshot(&self) -> Latency {
        let bounds = BOUNDS.iter().copied().map(Some).chain([None]);
        let counts = self.buckets.iter().map(|bucket| bucket.load(Relaxed));
        let buckets = bounds.zip(counts).map(|(le_ns, count)| LatencyBucket { le_ns, count });
        let buckets: Vec<_> = buckets.filter(|bucket| bucket.count > 0).collect();
        let count = buckets.iter().map(|bucket| bucket.count).sum();
        Latency { count, sum_ns: self.sum.load(Relaxed), buckets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_counts_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::new();
        for nanoseconds in [0, 999, 1_000, 1_001, 1_000_000_000, 1_000_000_001] {
            histogram.add(Duration::from_nanos(nanoseconds));
        }
        let bucket = |le_ns, count| LatencyBucket { le_ns, count };
        let latency = histogram.snapshot();
        assert_eq!(
            latency.buckets,
            [bucket(Some(1_000), 3), bucket(Some(2_000), 1), bucket(Some(1_000_000_000), 1), bucket(None, 1)]
        );
        assert_eq!((latency.count, latency.sum_ns), (6, 2_000_003_001));
        assert_eq!((latency.mean_ns(), Latency::default().mean_ns()), (333_333_833, 0));
        assert!(BOUNDS.is_sorted());
    }
}
