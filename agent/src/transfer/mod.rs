//! Sealed records over the wire: the data plane between source, paired device and target.
//!
//! Blocking threads with one engine each (io_uring, or plain calls where it is forbidden); callers
//! from asynchronous code use `spawn_blocking`. Invariants: memory in flight is capped; every record
//! is authenticated before it is used; every block is verified by its signature and every epoch by
//! one root; a device that only transfers never has a data key. Non-goals: who may do what (the
//! fleet decides and hands out keys), when to pause a workload (the migration decides).

pub mod below;
mod building;
pub mod cipher;
mod connection;
mod deferred;
pub mod engine;
mod feed;
pub mod fetch;
mod finder;
pub mod frame;
pub mod hello;
pub mod link;
pub mod message;
mod offers;
pub mod pace;
mod packing;
pub mod payload;
mod pieces;
mod placing;
mod queue;
mod reading;
mod rebuild;
pub mod receive;
mod record;
pub mod relay;
pub mod seal;
pub mod sender;
pub mod server;
mod small;
mod source;
mod spent;
mod spool;
pub mod uring;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use engine::EngineChoice;
pub use fetch::{ProvidePlan, ProvideVolume, Sealing, Whereabouts};
pub use link::{Hop, LinkError};
pub use pace::{Limit, Pace};
pub use receive::{ReceivePlan, ReceiveProgress, ReceiveVolume};
pub use relay::RelayPlan;
pub use seal::{DataKey, LinkKey};
pub use sender::{DataPath, EpochReport, SendError, Sender};
pub use server::{BindError, DataServer, Door};
pub use spent::{Spent, thread_time};

/// How the data plane behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which engine does I/O.
    pub engine: EngineChoice,
    /// Most bytes of records that are read, wait for the target's answer, or for its acknowledgement.
    pub in_flight_cap: usize,
    /// Threads that read, sign and seal, or open, verify and write, for each epoch.
    pub workers: usize,
    /// A peer that is silent or takes nothing for this long is gone.
    pub patience: Duration,
    /// Connections tried without progress before a link is given up.
    pub retries: u32,
    /// How long a device that agreed to the plan may be unreachable: a server takes minutes to start.
    pub absence: Duration,
    /// Pause before the first reconnection; doubled each time, at most 5 s.
    pub backoff: Duration,
    /// Most data connections of admitted peers served at a time.
    pub connections_cap: usize,
    /// As target: make device nodes.
    pub device_nodes: bool,
    /// As source: how long one write of the workload may last. Its file's change time is that of its beginning.
    pub longest_write: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            engine: EngineChoice::Auto,
            in_flight_cap: 128 << 20,
            workers: 2,
            patience: Duration::from_secs(8),
            retries: 8,
            absence: Duration::from_secs(600),
            backoff: Duration::from_millis(200),
            connections_cap: 64,
            device_nodes: false,
            longest_write: Duration::from_secs(10),
        }
    }
}

/// What a running epoch has done so far; readable from any thread.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes read from the source's files.
    pub bytes_read: AtomicU64,
    /// Bytes of records sent, again-sent ones included.
    pub bytes_sent: AtomicU64,
    /// Entries looked at.
    pub entries: AtomicU64,
    /// How fast it may read.
    pub pace: Pace,
    cancelled: AtomicBool,
    interrupted: AtomicBool,
}

/// How soon a reader that waits for its turn hears that the limit is lifted.
const PACE_STEP: Duration = Duration::from_millis(100);

impl Progress {
    /// Asks the epoch to stop; it ends with an error soon.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Asks the epoch that is under way to stop, or lets later ones go on.
    pub fn interrupt(&self, interrupt: bool) {
        self.interrupted.store(interrupt, Ordering::Relaxed);
    }

    /// Counts bytes that were read, and waits as long as the pace asks for.
    fn read(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
        let now = Instant::now();
        let due = now + self.pace.take(bytes, now);
        while self.pace.rate().is_some() && !self.is_cancelled() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(PACE_STEP));
        }
    }

    /// Whether someone asked to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.interrupted.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
