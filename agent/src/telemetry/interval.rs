//! From counters since the start to statistics of the interval since the last sweep. Pure.

use super::host::Value;
use crate::model::metric::{Per, Subject};
use crate::model::telemetry::{BlockIo, Histogram, RunQueueStats};
use lifeboat_ebpf::{BlockKey, BlockStats, InFlight, Latency, Waiting, op};
use std::collections::HashMap;
use std::time::Duration;

/// Remembers the counters of the last sweep.
#[derive(Default)]
pub struct Counters {
    run_queue: HashMap<u64, Histogram>,
    block: HashMap<BlockKey, BlockStats>,
}

impl Counters {
    /// Run-queue latency of the interval by cgroup2 id.
    pub fn run_queue(&mut self, now: &[(u64, Latency)]) -> HashMap<u64, Histogram> {
        let now: HashMap<u64, Histogram> = now
            .iter()
            .map(|(cgroup, latency)| (*cgroup, Histogram::from_slots(&latency.slots)))
            .collect();
        let interval = now
            .iter()
            .map(|(cgroup, histogram)| {
                let interval = match self.run_queue.get(cgroup) {
                    Some(before) => histogram.since(before),
                    None => histogram.clone(),
                };
                (*cgroup, interval)
            })
            .collect();
        self.run_queue = now;
        interval
    }

    /// Block I/O of the interval by (cgroup, disk, op).
    pub fn block(&mut self, now: &[(BlockKey, BlockStats)]) -> Vec<(BlockKey, BlockInterval)> {
        let interval = now
            .iter()
            .map(|(key, stats)| {
                let before = self.block.get(key).unwrap_or(&BlockStats::EMPTY);
                let histogram = Histogram::from_slots(&stats.latency.slots);
                let interval = BlockInterval {
                    latency: histogram.since(&Histogram::from_slots(&before.latency.slots)),
                    bytes: stats.bytes.saturating_sub(before.bytes),
                    requests: stats.requests.saturating_sub(before.requests),
                    errors: stats.errors.saturating_sub(before.errors),
                };
                (*key, interval)
            })
            .collect();
        self.block = now.iter().copied().collect();
        interval
    }
}

/// Block I/O of one (cgroup, disk, op) in an interval.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockInterval {
    latency: Histogram,
    bytes: u64,
    requests: u64,
    errors: u64,
}

/// Adds a waiting task to its run queue. One that has waited longer than the interval counts as a
/// latency of that age: a task that never gets a CPU must not look like one that never waits.
pub fn add_waiting(stats: &mut RunQueueStats, waiting: &Waiting, now_ns: u64, interval: Duration) {
    stats.waiting += 1;
    let age = Waiting::age(waiting.task, now_ns);
    if u128::from(age) > interval.as_nanos() {
        stats.latency.record(age);
    }
}

/// Adds a request under way; a disk that answers nothing any more must not look idle.
pub fn add_in_flight(io: &mut BlockIo, request: &InFlight, now_ns: u64, interval: Duration) {
    let age = now_ns.saturating_sub(request.since_ns);
    if matches!(request.key.op, op::READ | op::WRITE) && u128::from(age) > interval.as_nanos() {
        io.latency.record(age);
    }
}

/// Adds the interval of one (cgroup, disk, op). A flush is a barrier and slow by nature: it counts as a
/// request and not in the latency.
pub fn add_block(io: &mut BlockIo, key: &BlockKey, more: &BlockInterval, interval: Duration) {
    let seconds = interval.as_secs_f64().max(0.001);
    io.iops += more.requests as f64 / seconds;
    io.errors += more.errors;
    match key.op {
        op::READ => io.read_bytes_per_second += more.bytes as f64 / seconds,
        op::WRITE => io.write_bytes_per_second += more.bytes as f64 / seconds,
        _ => return,
    }
    io.latency.merge(&more.latency);
}

/// The metrics of a run queue. Nobody who waited is a latency of zero: the programs run and saw it.
pub fn run_queue_values(subject: &Subject, stats: &RunQueueStats) -> [Value; 3] {
    let percentile = |percent| stats.latency.percentile(percent).unwrap_or(0.0);
    [
        (
            "sched.run_queue_latency_p50",
            subject.clone(),
            percentile(50.0),
        ),
        (
            "sched.run_queue_latency_p99",
            subject.clone(),
            percentile(99.0),
        ),
        ("sched.waiting", subject.clone(), stats.waiting as f64),
    ]
}

/// The metrics of block I/O. No request is a latency of zero: the programs run and saw none under way.
pub fn block_values(subject: &Subject, io: &BlockIo) -> [Value; 5] {
    let percentile = |percent| io.latency.percentile(percent).unwrap_or(0.0);
    let bytes = io.read_bytes_per_second + io.write_bytes_per_second;
    [
        ("block.latency_p50", subject.clone(), percentile(50.0)),
        ("block.latency_p99", subject.clone(), percentile(99.0)),
        ("block.iops", subject.clone(), io.iops),
        ("block.bytes_per_second", subject.clone(), bytes),
        ("block.errors", subject.clone(), io.errors as f64),
    ]
}

/// A subject by kind and name.
#[must_use]
pub fn subject(per: Per, name: &str) -> Subject {
    Subject {
        per,
        name: name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: BlockKey = BlockKey {
        cgroup: 7,
        device: 8 << 20,
        op: op::READ,
    };
    const SECOND: Duration = Duration::from_secs(1);

    fn stats(slot: usize, requests: u64, bytes: u64) -> BlockStats {
        let mut stats = BlockStats::EMPTY;
        stats.latency.slots[slot] = requests;
        stats.requests = requests;
        stats.bytes = bytes;
        stats
    }

    #[test]
    fn block_io_is_that_of_the_interval_and_not_since_the_start() {
        let mut counters = Counters::default();
        counters.block(&[(KEY, stats(30, 100, 4096))]);
        let second = counters.block(&[(KEY, stats(30, 104, 12_288))]);
        let mut io = BlockIo::default();
        add_block(&mut io, &second[0].0, &second[0].1, Duration::from_secs(2));
        assert_eq!((io.iops, io.read_bytes_per_second), (2.0, 4096.0));
        assert_eq!(io.latency.count(), 4);
    }

    #[test]
    fn a_cgroup_that_came_back_with_the_same_id_counts_from_zero() {
        let mut counters = Counters::default();
        let latency = |count| {
            let mut latency = Latency::EMPTY;
            latency.slots[20] = count;
            latency
        };
        counters.run_queue(&[(7, latency(50))]);
        counters.run_queue(&[]);
        let back = counters.run_queue(&[(7, latency(3))]);
        assert_eq!(back[&7].count(), 3);
    }

    #[test]
    fn a_request_that_never_completes_is_slow_and_not_idle() {
        let mut io = BlockIo::default();
        let request = InFlight {
            key: KEY,
            since_ns: 1_000,
        };
        add_in_flight(&mut io, &request, 1_000 + 5_000_000_000, SECOND);
        let values = block_values(&Subject::device(), &io);
        assert!(values[1].2 > 4e9, "{values:?}");
        let mut young = BlockIo::default();
        add_in_flight(&mut young, &request, 2_000, SECOND);
        assert_eq!(young.latency.count(), 0);
    }

    #[test]
    fn a_task_that_began_to_wait_after_the_clock_was_read_has_not_waited() {
        let at = 50_000_000_000;
        let waiting = |since| Waiting {
            task: Waiting::pack(4_194_303, since),
            row: 0,
            padding: 0,
        };
        let mut stats = RunQueueStats::default();
        add_waiting(&mut stats, &waiting(at + 3_000_000), at, SECOND);
        assert_eq!((stats.waiting, stats.latency.count()), (1, 0));
        add_waiting(&mut stats, &waiting(at - 3_000_000_000), at, SECOND);
        assert_eq!((stats.waiting, stats.latency.count()), (2, 1));
        let age = Waiting::age(waiting(at - 3_000_000_000).task, at);
        assert!((2_999_999_000..=3_000_001_000).contains(&age), "{age}");
        assert!(Waiting::is_of(waiting(at).task, 4_194_303));
    }

    #[test]
    fn a_flush_is_a_request_without_a_latency() {
        let mut io = BlockIo::default();
        let flush = BlockKey {
            op: op::FLUSH,
            ..KEY
        };
        let interval = Counters::default().block(&[(flush, stats(33, 2, 0))]);
        add_block(&mut io, &flush, &interval[0].1, SECOND);
        assert_eq!((io.iops, io.latency.count()), (2.0, 0));
    }
}
