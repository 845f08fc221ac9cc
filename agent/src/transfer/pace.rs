//! How fast the background class reads: the least of its limits, kept where bytes are read.
//!
//! Invariants: a limit that is lifted or changed holds at once, also for readers that wait; waiting gives no
//! right to a burst afterwards. Non-goals: choosing the limits.

use super::queue::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Who limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// An operator or the policy.
    Cap,
    /// The copy in advance must not hurt.
    Advance,
    /// The workload that runs on the source must not lose more than its share.
    Workload,
}

/// Limits on reading.
#[derive(Debug, Default)]
pub struct Pace {
    /// Bytes a second; 0: none.
    limits: [AtomicU64; 3],
    /// When the next bytes may be read, while there is a limit.
    due: Mutex<Option<Instant>>,
}

impl Pace {
    /// Sets a limit in bytes a second; none lifts it.
    pub fn set(&self, limit: Limit, bytes_a_second: Option<u64>) {
        let value = bytes_a_second.map_or(0, |rate| rate.max(1));
        self.limits[limit as usize].store(value, Ordering::Relaxed);
    }

    /// A limit in bytes a second, if it is set.
    #[must_use]
    pub fn get(&self, limit: Limit) -> Option<u64> {
        Some(self.limits[limit as usize].load(Ordering::Relaxed)).filter(|&rate| rate > 0)
    }

    /// The least limit in bytes a second, if any is set.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        [Limit::Cap, Limit::Advance, Limit::Workload]
            .into_iter()
            .filter_map(|limit| self.get(limit))
            .min()
    }

    /// Takes the turn of so many bytes; how long from `now` whoever read them must wait.
    #[must_use]
    pub fn take(&self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate() else {
            return Duration::ZERO;
        };
        let mut due = lock(&self.due);
        let from = due.map_or(now, |due| due.max(now));
        let next = from + Duration::from_secs_f64(bytes as f64 / rate as f64);
        *due = Some(next);
        next - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_counts_and_none_costs_nothing() {
        let (pace, now) = (Pace::default(), Instant::now());
        assert_eq!(pace.take(1 << 30, now), Duration::ZERO);
        pace.set(Limit::Cap, Some(1000));
        pace.set(Limit::Workload, Some(100));
        assert_eq!(pace.rate(), Some(100));
        assert_eq!(pace.take(200, now), Duration::from_secs(2));
        // A second reader queues behind the first.
        assert_eq!(pace.take(100, now), Duration::from_secs(3));
        pace.set(Limit::Workload, None);
        assert_eq!(pace.rate(), Some(1000));
    }

    #[test]
    fn idle_time_is_not_saved_up_for_a_burst() {
        let (pace, now) = (Pace::default(), Instant::now());
        pace.set(Limit::Cap, Some(100));
        assert_eq!(pace.take(100, now), Duration::from_secs(1));
        let later = now + Duration::from_secs(60);
        assert_eq!(pace.take(100, later), Duration::from_secs(1));
    }
}
