//! What one sweep of the senses yields.
//!
//! Invariants: a source that is absent yields no value, never a zero; statistics are over the interval
//! since the sweep before, edges accumulate; what was lost is counted beside what was seen.

use super::edge::{Edge, Protocol};
use super::ids::ContainerName;
use super::metric::Sample;
use super::units::{Bytes, UnixMillis};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// A histogram of whole numbers. Each power of two has `STEPS` slots of the same width: slot `STEPS · n` is the first
/// of those that count values in [2^n, 2^(n+1)), slot 0 also counts zero.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram<const STEPS: usize> {
    slots: Vec<u64>,
}

/// Of bytes.
pub type Sizes = Histogram<1>;

/// Of nanoseconds.
pub type Latencies = Histogram<4>;

impl<const STEPS: usize> Histogram<STEPS> {
    /// A histogram of slot counts, lowest slot first; slots beyond 2^64 are none.
    #[must_use]
    pub fn from_slots(slots: &[u64]) -> Self {
        let used = slots
            .iter()
            .take(64 * STEPS)
            .rposition(|&count| count > 0)
            .map_or(0, |last| last + 1);
        Self {
            slots: slots[..used].to_vec(),
        }
    }

    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        self.record_all(value, 1);
    }

    /// Counts a value so many times.
    pub fn record_all(&mut self, value: u64, count: u64) {
        if count == 0 {
            return;
        }
        let power = value.checked_ilog2().unwrap_or(0);
        let steps = (u128::from(value) * STEPS as u128) >> power;
        let slot = power as usize * STEPS + steps as usize % STEPS;
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, 0);
        }
        self.slots[slot] += count;
    }

    /// The least value that a slot counts but for zero; past the last slot the end of it.
    fn low(slot: usize) -> f64 {
        let step = (slot % STEPS) as f64 / STEPS as f64;
        2f64.powi((slot / STEPS) as i32) * (1.0 + step)
    }

    /// Adds what `other` counted.
    pub fn merge(&mut self, other: &Self) {
        if self.slots.len() < other.slots.len() {
            self.slots.resize(other.slots.len(), 0);
        }
        for (mine, theirs) in self.slots.iter_mut().zip(&other.slots) {
            *mine += theirs;
        }
    }

    /// What was counted since `before`, an earlier state of the same histogram. A counter that went
    /// back was started anew and counts from zero.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let slots: Vec<u64> = self
            .slots
            .iter()
            .enumerate()
            .map(|(slot, &count)| {
                let earlier = before.slots.get(slot).copied().unwrap_or(0);
                count.checked_sub(earlier).unwrap_or(count)
            })
            .collect();
        Self::from_slots(&slots)
    }

    /// Values counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.slots.iter().sum()
    }

    /// About the sum of the counted values: each as the middle of its slot.
    #[must_use]
    pub fn sum(&self) -> f64 {
        let slots = self.slots.iter().enumerate();
        slots
            .map(|(slot, &count)| count as f64 * (Self::low(slot) + Self::low(slot + 1)) / 2.0)
            .sum()
    }

    /// The value below which `percent` (0–100) of the counted values lie; none when nothing was counted. Exact to its
    /// slot (of latencies at most 25 % wide), interpolated within it.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let wanted = (count as f64 * percent.clamp(0.0, 100.0) / 100.0).max(f64::MIN_POSITIVE);
        let mut below = 0.0;
        for (slot, &here) in self.slots.iter().enumerate() {
            let here = here as f64;
            if here > 0.0 && below + here >= wanted {
                let low = if slot == 0 { 0.0 } else { Self::low(slot) };
                let high = Self::low(slot + 1);
                return Some(low + (high - low) * (wanted - below) / here);
            }
            below += here;
        }
        Some(Self::low(self.slots.len()))
    }
}

/// Run-queue latency over the interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunQueueStats {
    /// Wait between becoming runnable and running.
    pub latency: Latencies,
    /// Tasks that wait now.
    pub waiting: u64,
}

/// Block requests of one kind over the interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlockOps {
    /// Time from issue to completion, ns.
    pub latency: Latencies,
    /// Requests issued, by size in bytes.
    pub sizes: Sizes,
    /// Requests issued that begin where the one before them, of the same cgroup on the same disk, ended.
    pub sequential: u64,
    /// Completed requests a second.
    pub iops: f64,
    /// Completed bytes a second.
    pub bytes_per_second: f64,
}

/// Requests that completed with an error, by what the block layer calls the reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockErrors {
    /// The medium lost the data.
    pub media: u64,
    /// No answer in time.
    pub timeout: u64,
    /// The path to the device failed, or the device is gone.
    pub transport: u64,
    /// Integrity data do not match.
    pub protection: u64,
    /// The device refused the command.
    pub target: u64,
    /// No space left, on thin devices.
    pub no_space: u64,
    /// Any other.
    pub other: u64,
}

impl BlockErrors {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.media
            + self.timeout
            + self.transport
            + self.protection
            + self.target
            + self.no_space
            + self.other
    }
}

impl fmt::Display for BlockErrors {
    /// The total, and the classes that occurred.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let classes = [
            ("media", self.media),
            ("timeout", self.timeout),
            ("transport", self.transport),
            ("protection", self.protection),
            ("target", self.target),
            ("no space", self.no_space),
            ("other", self.other),
        ];
        let occurred: Vec<String> = classes
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(class, count)| format!("{class} {count}"))
            .collect();
        write!(f, "{}", self.total())?;
        if !occurred.is_empty() {
            write!(f, " ({})", occurred.join(", "))?;
        }
        Ok(())
    }
}

/// Block I/O over the interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlockIo {
    /// Reads.
    pub reads: BlockOps,
    /// Writes.
    pub writes: BlockOps,
    /// Discards, secure erasures and zeroing: bytes that are not transferred.
    pub discards: BlockOps,
    /// Flushes completed a second. A flush is a barrier and slow by nature: it has no latency here.
    pub flushes_per_second: f64,
    /// Requests at the device at a time, on average.
    pub queue_depth: f64,
    /// What failed.
    pub errors: BlockErrors,
}

impl BlockIo {
    /// Time from issue to completion of reads and writes.
    #[must_use]
    pub fn latency(&self) -> Latencies {
        let mut latency = self.reads.latency.clone();
        latency.merge(&self.writes.latency);
        latency
    }

    /// Completed requests a second, of any kind.
    #[must_use]
    pub fn iops(&self) -> f64 {
        self.reads.iops + self.writes.iops + self.discards.iops + self.flushes_per_second
    }

    /// Share of the reads and writes issued that were sequential, 0–100; none when none was issued.
    #[must_use]
    pub fn sequential_percent(&self) -> Option<f64> {
        let issued = self.reads.sizes.count() + self.writes.sizes.count();
        let sequential = self.reads.sequential + self.writes.sequential;
        (issued > 0).then(|| sequential as f64 * 100.0 / issued as f64)
    }
}

/// What the kernel showed of one container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerStats {
    /// Name.
    pub name: ContainerName,
    /// Run-queue latency; none while the sched programs are disabled.
    pub run_queue: Option<RunQueueStats>,
    /// Block I/O; none while the block programs are disabled.
    pub block: Option<BlockIo>,
}

/// What the kernel showed of one disk, whoever caused it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskStats {
    /// Name (`vda`), or `major:minor` where sysfs does not know it.
    pub name: String,
    /// Block I/O.
    pub block: BlockIo,
}

/// Facts of the whole host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Run-queue latency of everything in scope; none while the sched programs are disabled.
    pub run_queue: Option<RunQueueStats>,
    /// Block I/O of everything in scope; none while the block programs are disabled.
    pub block: Option<BlockIo>,
    /// 1-minute load average.
    pub load1: Option<f64>,
    /// Online CPUs.
    pub cpus: Option<u32>,
    /// Installed memory.
    pub memory_total: Option<Bytes>,
    /// Memory that can be had without swapping.
    pub memory_available: Option<Bytes>,
}

/// A kind of connection with a peer that is no container of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// The container.
    pub container: ContainerName,
    /// Address of the peer; its port when the container connected, else 0.
    pub peer: SocketAddr,
    /// Transport.
    pub protocol: Protocol,
    /// The container's service port when the peer connected, else 0.
    pub port: u16,
    /// Connections seen since the agent started.
    pub connections: u64,
    /// Bytes from the container to the peer; none where they are not counted.
    pub sent: Option<Bytes>,
    /// Bytes from the peer to the container; none where they are not counted.
    pub received: Option<Bytes>,
    /// Last time it was seen.
    pub last_seen: UnixMillis,
}

/// Facts that did not fit into a map or queue, since the programs were loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The map or queue.
    pub map: String,
    /// Failed inserts.
    pub lost: u64,
}

/// What one kernel program cost, by the kernel's own counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramCost {
    /// Program.
    pub name: String,
    /// Runs while measured.
    pub runs: u64,
    /// Time of those runs, nanoseconds.
    pub run_time_ns: u64,
    /// Events since the start for which it did not run, because it was interrupted on its CPU by the next
    /// one (told since Linux 5.12).
    #[serde(default)]
    pub missed: u64,
}

/// A program or source that does not work here, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disabled {
    /// Program or source.
    pub what: String,
    /// Reason, naming the missing field or feature.
    pub why: String,
}

/// One sweep of the senses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// When.
    pub at: UnixMillis,
    /// Every metric that has a value now.
    pub samples: Vec<Sample>,
    /// Who depends on whom, since the agent started.
    pub edges: Vec<Edge>,
    /// Connections with peers that are no container of this host.
    pub external: Vec<External>,
    /// Service ports that containers listen on.
    pub listening: BTreeMap<ContainerName, BTreeSet<u16>>,
    /// Per container.
    pub containers: Vec<ContainerStats>,
    /// Per disk.
    pub devices: Vec<DiskStats>,
    /// The whole host.
    pub host: HostFacts,
    /// Addresses of the host itself.
    pub addresses: Vec<IpAddr>,
    /// What was lost.
    pub losses: Vec<Loss>,
    /// What the kernel programs cost.
    pub programs: Vec<ProgramCost>,
    /// Kernel memory of all their maps; none when there are none or the kernel does not say.
    #[serde(default)]
    pub map_memory: Option<Bytes>,
    /// What does not work here.
    pub disabled: Vec<Disabled>,
    /// Metrics that have no value now, and why.
    #[serde(default)]
    pub absent: Vec<Disabled>,
    /// What containers did in the last moments of their life that no sweep saw them alive in; of those that
    /// ended lately.
    #[serde(default)]
    pub ended: Vec<Sample>,
    /// Share of the time in which run-queue latency was watched, 0–100; none when always.
    #[serde(default)]
    pub watched_percent: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[u64]) -> Latencies {
        let mut histogram = Latencies::default();
        for &value in values {
            histogram.record(value);
        }
        histogram
    }

    #[test]
    fn an_empty_histogram_has_no_percentile() {
        assert_eq!(Latencies::default().percentile(50.0), None);
        assert_eq!(Latencies::from_slots(&[0; 40]), Latencies::default());
    }

    #[test]
    fn a_counter_that_went_back_counts_from_zero() {
        let before = of(&[8, 8, 8]);
        let after = of(&[8]);
        assert_eq!(after.since(&before), after);
    }

    proptest! {
        #[test]
        fn a_percentile_lies_in_the_slot_of_the_exact_one(
            mut values in prop::collection::vec(0u64..1 << 45, 1..200),
            percent in 0.1f64..100.0,
        ) {
            let found = of(&values).percentile(percent).expect("values were counted");
            values.sort_unstable();
            let rank = ((values.len() as f64 * percent / 100.0).ceil() as usize).clamp(1, values.len());
            let exact = values[rank - 1] as f64;
            prop_assert!(found >= exact / 1.25 - 1.0 && found <= exact * 1.25 + 2.0, "{found} against {exact}");
        }

        #[test]
        fn a_value_lies_in_its_slot(value in prop_oneof![0..20u64, any::<u64>()]) {
            let slots = |latencies: Latencies| latencies.slots.len() - 1;
            let slot = slots(of(&[value]));
            prop_assert!(slot == 0 || Latencies::low(slot) <= value as f64);
            prop_assert!(value as f64 <= Latencies::low(slot + 1));
        }

        #[test]
        fn the_interval_and_what_was_before_make_the_whole(
            first in prop::collection::vec(0u64..1 << 45, 0..50),
            second in prop::collection::vec(0u64..1 << 45, 0..50),
        ) {
            let before = of(&first);
            let mut whole = before.clone();
            whole.merge(&of(&second));
            prop_assert_eq!(whole.since(&before), of(&second));
        }

        #[test]
        fn a_higher_percentile_is_never_lower(
            values in prop::collection::vec(0u64..1 << 45, 1..50),
            a in 0.0f64..100.0, b in 0.0f64..100.0,
        ) {
            let histogram = of(&values);
            prop_assert!(histogram.percentile(a.min(b)) <= histogram.percentile(a.max(b)));
        }
    }
}
