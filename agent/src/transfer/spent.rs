//! What giving out data takes of the source, told by the threads that do it.

use crate::model::units::Bytes;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What data that was given out took of the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// Processor time.
    pub cpu: Duration,
    /// Bytes that were read.
    pub read: Bytes,
    /// Bytes on the wire.
    pub wire: Bytes,
}

impl AddAssign for Spent {
    fn add_assign(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.read += other.read;
        self.wire += other.wire;
    }
}

/// Sums up what threads spend.
#[derive(Debug, Default)]
pub(super) struct Meter {
    nanos: AtomicU64,
    read: AtomicU64,
    wire: AtomicU64,
}

impl Meter {
    /// Counts this thread's time from now on.
    pub(super) fn clock(&self) -> Clock<'_> {
        Clock {
            meter: self,
            noted: thread_time(),
        }
    }

    pub(super) fn read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.wire.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn spent(&self) -> Spent {
        Spent {
            cpu: Duration::from_nanos(self.nanos.load(Ordering::Relaxed)),
            read: Bytes(self.read.load(Ordering::Relaxed)),
            wire: Bytes(self.wire.load(Ordering::Relaxed)),
        }
    }
}

/// One thread's time: what was not noted yet is when this is dropped.
#[derive(Debug)]
pub(super) struct Clock<'a> {
    meter: &'a Meter,
    noted: Duration,
}

impl Clock<'_> {
    pub(super) fn note(&mut self) {
        let now = thread_time();
        let spent = now.saturating_sub(self.noted).as_nanos();
        let spent = u64::try_from(spent).unwrap_or(u64::MAX);
        self.meter.nanos.fetch_add(spent, Ordering::Relaxed);
        self.noted = now;
    }
}

impl Drop for Clock<'_> {
    fn drop(&mut self) {
        self.note();
    }
}

/// Processor time of this thread.
#[must_use]
pub fn thread_time() -> Duration {
    // Every kernel has this clock.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
