//! Block I/O: from counters since the start to statistics of the interval since the last sweep. Pure.

use super::host::Value;
use super::interval::latencies;
use crate::model::metric::Subject;
use crate::model::telemetry::{BlockErrors, BlockIo, BlockOps, Latencies, Sizes};
use lifeboat_ebpf::{BlockKey, BlockStats, SECTOR_SHIFT, error, op};
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// A request between issue and completion.
#[derive(Clone, Copy)]
pub struct Request {
    /// Where its completion will be counted.
    pub key: BlockKey,
    /// When it was issued, ns of the monotonic clock; 0 while it waits in the kernel's I/O scheduler.
    pub since_ns: u64,
    /// What stands for it, and where in the map.
    pub number: u64,
    /// Its place in the map.
    pub place: usize,
}

/// Requests that a disk has under way, by the kernel's own count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnderWay {
    /// So many, without those that wait to be tried again.
    Count(u64),
    /// So many, also of those.
    All(u64),
    /// The kernel does not count them.
    Unknown,
    /// The disk is gone.
    Gone,
}

/// No driver lets a request wait for so long at a disk that answers others.
const ANCIENT: Duration = Duration::from_secs(300);

/// Remembers the counters of the last sweep.
#[derive(Default)]
pub struct Counters {
    before: HashMap<BlockKey, Seen>,
}

/// Counters at a sweep.
#[derive(Clone, Copy)]
struct Seen {
    stats: BlockStats,
    /// Time that requests have spent at the device up to the sweep, ns.
    busy_ns: u64,
}

/// Block I/O of one (cgroup, disk, op) in an interval.
#[derive(Clone, Debug, PartialEq)]
pub struct Interval {
    ops: BlockOps,
    requests: u64,
    bytes: u64,
    busy_ns: u64,
    errors: BlockErrors,
}

impl Counters {
    /// Whether a disk has done a request since the last sweep: one that it fails says that it is there, not that it
    /// does what it is asked.
    #[must_use]
    pub fn answers(&self, device: u32, now: &[(BlockKey, BlockStats)]) -> bool {
        let done = |stats: &BlockStats| {
            let ended: i64 = stats.latency.slots.iter().copied().map(i64::from).sum();
            let failed: u64 = stats.errors.iter().sum();
            ended.saturating_sub_unsigned(failed)
        };
        let mut of_disk = now.iter().filter(|(key, _)| key.device == device);
        of_disk.any(|(key, stats)| {
            let before = self.before.get(key).map_or(0, |seen| done(&seen.stats));
            done(stats) > before
        })
    }

    /// Block I/O of the interval by (cgroup, disk, op).
    pub fn interval(
        &mut self,
        now: &[(BlockKey, BlockStats)],
        in_flight: &[Request],
        now_ns: u64,
    ) -> Vec<(BlockKey, Interval)> {
        let mut under_way: HashMap<BlockKey, u64> = HashMap::new();
        for request in in_flight {
            *under_way.entry(request.key).or_default() += age(request, now_ns);
        }
        let now: HashMap<BlockKey, Seen> = now
            .iter()
            .map(|(key, stats)| {
                let busy_ns = stats.busy_ns + under_way.get(key).copied().unwrap_or(0);
                let stats = *stats;
                (*key, Seen { stats, busy_ns })
            })
            .collect();
        let nothing = Seen {
            stats: BlockStats::EMPTY,
            busy_ns: 0,
        };
        let interval = now
            .iter()
            .map(|(key, seen)| {
                let before = self.before.get(key).unwrap_or(&nothing);
                (*key, since(seen, before))
            })
            .collect();
        self.before = now;
        interval
    }
}

fn since(now: &Seen, before: &Seen) -> Interval {
    let count = |of: fn(&BlockStats) -> u64| of(&now.stats).saturating_sub(of(&before.stats));
    let failed = |class: usize| now.stats.errors[class].saturating_sub(before.stats.errors[class]);
    let latency = latencies(Some(&before.stats.latency), &now.stats.latency);
    Interval {
        requests: latency.count() + count(|stats| stats.unissued),
        ops: BlockOps {
            latency,
            sizes: sizes(&now.stats).since(&sizes(&before.stats)),
            sequential: count(|stats| stats.sequential),
            iops: 0.0,
            bytes_per_second: 0.0,
        },
        bytes: count(|stats| stats.bytes),
        busy_ns: now.busy_ns.saturating_sub(before.busy_ns),
        errors: BlockErrors {
            media: failed(error::MEDIA),
            timeout: failed(error::TIMEOUT),
            transport: failed(error::TRANSPORT),
            protection: failed(error::PROTECTION),
            target: failed(error::TARGET),
            no_space: failed(error::NO_SPACE),
            other: failed(error::OTHER),
        },
    }
}

/// By bytes; the kernel counts by sectors.
fn sizes(stats: &BlockStats) -> Sizes {
    let mut slots = vec![0; SECTOR_SHIFT as usize];
    slots.extend(stats.sizes);
    Sizes::from_slots(&slots)
}

/// How long a request has been at the device; 0 while it waits in the kernel's I/O scheduler.
fn age(request: &Request, now_ns: u64) -> u64 {
    match request.since_ns {
        0 => 0,
        since => now_ns.saturating_sub(since),
    }
}

fn ops(io: &mut BlockIo, operation: u32) -> Option<&mut BlockOps> {
    match operation {
        op::READ => Some(&mut io.reads),
        op::FLUSH => None,
        op::DISCARD | op::SECURE_ERASE | op::WRITE_ZEROES => Some(&mut io.discards),
        _ => Some(&mut io.writes),
    }
}

/// Those of the requests under way whose end was missed. The kernel leaves a program out that another one interrupted,
/// and some requests are given up without an end.
///
/// Of what is older than the interval these are, on a disk that answers others: the oldest, as far as the disk says that
/// it has fewer under way, and what is older than any request becomes. A disk that answers nothing may have taken its
/// requests back for a later try, and Linux before 6.10 does not count these: they wait, and age. Where these are counted
/// too the count is believed of every disk: one that has nothing to do any more answers nothing either.
pub fn ended_unseen(
    in_flight: &[Request],
    now_ns: u64,
    interval: Duration,
    answers: impl Fn(u32) -> bool,
    under_way: impl Fn(u32) -> UnderWay,
) -> Vec<Request> {
    let older =
        |request: &Request, than: Duration| u128::from(age(request, now_ns)) > than.as_nanos();
    let mut old: Vec<Request> = in_flight
        .iter()
        .filter(|request| older(request, interval))
        .copied()
        .collect();
    old.sort_by_key(|request| request.since_ns);
    let disks: HashSet<u32> = old.iter().map(|request| request.key.device).collect();
    let mut ended = Vec::new();
    for device in disks {
        let of_disk = old.iter().filter(|one| one.key.device == device);
        let under_way = under_way(device);
        let count = match under_way {
            UnderWay::Gone => {
                ended.extend(of_disk);
                continue;
            }
            UnderWay::Count(count) | UnderWay::All(count) => Some(count),
            UnderWay::Unknown => None,
        };
        let answers = answers(device);
        if !answers && !matches!(under_way, UnderWay::All(_)) {
            continue;
        }
        let (ancient, others): (Vec<Request>, Vec<Request>) =
            of_disk.partition(|one| answers && older(one, ANCIENT));
        ended.extend(ancient);
        // The kernel does not count flushes among what is under way; nor do they have a latency.
        let counted = others.iter().filter(|one| one.key.op != op::FLUSH);
        let known = count.and_then(|count| usize::try_from(count).ok());
        let more = known.map_or(0, |count| counted.clone().count().saturating_sub(count));
        ended.extend(counted.take(more));
    }
    ended
}

/// Adds a request under way; a disk that answers nothing any more must not look idle.
pub fn add_in_flight(io: &mut BlockIo, request: &Request, now_ns: u64, interval: Duration) {
    let age = age(request, now_ns);
    if u128::from(age) > interval.as_nanos()
        && let Some(ops) = ops(io, request.key.op)
    {
        ops.latency.record(age);
    }
}

/// Adds the interval of one (cgroup, disk, op).
pub fn add(io: &mut BlockIo, key: &BlockKey, more: &Interval, interval: Duration) {
    let seconds = interval.as_secs_f64().max(0.001);
    let iops = more.requests as f64 / seconds;
    io.queue_depth += more.busy_ns as f64 / 1e9 / seconds;
    let (errors, failed) = (&mut io.errors, &more.errors);
    errors.media += failed.media;
    errors.timeout += failed.timeout;
    errors.transport += failed.transport;
    errors.protection += failed.protection;
    errors.target += failed.target;
    errors.no_space += failed.no_space;
    errors.other += failed.other;
    let Some(ops) = ops(io, key.op) else {
        io.flushes_per_second += iops;
        return;
    };
    ops.latency.merge(&more.ops.latency);
    ops.sizes.merge(&more.ops.sizes);
    ops.sequential += more.ops.sequential;
    ops.iops += iops;
    ops.bytes_per_second += more.bytes as f64 / seconds;
}

/// The metrics of block I/O. No request is a latency of zero: the programs run and saw none under way.
pub fn values(subject: &Subject, io: &BlockIo) -> Vec<Value> {
    let at = |latency: &Latencies, percent| latency.percentile(percent).unwrap_or(0.0);
    let latency = io.latency();
    let bytes = io.reads.bytes_per_second + io.writes.bytes_per_second;
    let errors = &io.errors;
    let values = [
        ("block.latency_p50", Some(at(&latency, 50.0))),
        ("block.latency_p99", Some(at(&latency, 99.0))),
        ("block.read_latency_p99", Some(at(&io.reads.latency, 99.0))),
        (
            "block.write_latency_p99",
            Some(at(&io.writes.latency, 99.0)),
        ),
        ("block.iops", Some(io.iops())),
        ("block.bytes_per_second", Some(bytes)),
        ("block.sequential", io.sequential_percent()),
        ("block.errors", Some(errors.total() as f64)),
        ("block.media_errors", Some(errors.media as f64)),
        ("block.timeout_errors", Some(errors.timeout as f64)),
        ("block.transport_errors", Some(errors.transport as f64)),
        ("block.protection_errors", Some(errors.protection as f64)),
        ("block.target_errors", Some(errors.target as f64)),
        ("block.no_space_errors", Some(errors.no_space as f64)),
    ];
    values
        .into_iter()
        .filter_map(|(metric, value)| Some((metric, subject.clone(), value?)))
        .collect()
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

    fn stats(slot: usize, requests: u32, bytes: u64) -> BlockStats {
        let mut stats = BlockStats::EMPTY;
        stats.latency.slots[slot] = requests;
        stats.bytes = bytes;
        stats
    }

    fn request(key: BlockKey, since_ns: u64) -> Request {
        Request {
            key,
            since_ns,
            number: since_ns + 1,
            place: 0,
        }
    }

    /// At 1000.5 s, of a disk that says `under_way`: when those were issued that are given up, in s.
    fn given_up(issued: &[(u32, u64)], answers: bool, under_way: UnderWay) -> Vec<u64> {
        let requests: Vec<Request> = issued
            .iter()
            .map(|&(op, since)| request(BlockKey { op, ..KEY }, since * 1_000_000_000))
            .collect();
        let now_ns = 1_000_500_000_000;
        let ended = ended_unseen(&requests, now_ns, SECOND, |_| answers, |_| under_way);
        let mut since: Vec<u64> = ended
            .iter()
            .map(|one| one.since_ns / 1_000_000_000)
            .collect();
        since.sort_unstable();
        since
    }

    #[test]
    fn a_request_whose_end_was_missed_does_not_age_for_ever() {
        let issued = [
            (op::READ, 950),
            (op::READ, 920),
            (op::WRITE, 930),
            (op::READ, 1000),
            (op::READ, 0),
            (op::FLUSH, 910),
        ];
        let of = |under_way| given_up(&issued, true, under_way);
        assert_eq!(of(UnderWay::Count(3)), [0; 0]);
        assert_eq!(
            of(UnderWay::Count(2)),
            [920],
            "the oldest; what waits and what is young is none"
        );
        assert_eq!(of(UnderWay::Count(0)), [920, 930, 950]);
        assert_eq!(of(UnderWay::Unknown), [0; 0]);
        assert_eq!(of(UnderWay::Gone), [910, 920, 930, 950]);
    }

    #[test]
    fn a_disk_that_answers_nothing_is_slow_and_not_idle_whatever_the_kernel_counts() {
        let issued = [(op::READ, 990), (op::WRITE, 600), (op::FLUSH, 600)];
        assert_eq!(given_up(&issued, false, UnderWay::Count(0)), [0; 0]);
    }

    #[test]
    fn a_disk_without_anything_to_do_has_nothing_under_way_where_the_kernel_counts_all_of_it() {
        let issued = [(op::READ, 990), (op::WRITE, 920), (op::WRITE, 600)];
        let of = |count| given_up(&issued, false, UnderWay::All(count));
        assert_eq!(of(3), [0; 0], "it hangs");
        assert_eq!(of(2), [600]);
        assert_eq!(of(0), [600, 920, 990]);
    }

    #[test]
    fn on_a_busy_disk_no_request_is_five_minutes_old() {
        let issued = [(op::READ, 990), (op::WRITE, 600), (op::FLUSH, 601)];
        for under_way in [UnderWay::Count(50), UnderWay::Unknown] {
            assert_eq!(given_up(&issued, true, under_way), [600, 601]);
        }
        assert_eq!(
            given_up(&issued, true, UnderWay::Count(1)),
            [600, 601],
            "the ancient one is none of those that the kernel counts"
        );
    }

    #[test]
    fn a_disk_answers_while_requests_end_without_an_error() {
        let mut counters = Counters::default();
        let mut now = stats(30, 5, 4096);
        counters.interval(&[(KEY, now)], &[], 0);
        let answers = |now| counters.answers(KEY.device, &[(KEY, now)]);
        assert!(!answers(now));
        now.latency.slots[30] += 1;
        assert!(answers(now));
        now.errors[error::TRANSPORT] += 1;
        assert!(!answers(now), "it failed");
        now.errors[error::TRANSPORT] += 1;
        assert!(!answers(now), "it failed before it was issued");
        now.latency.slots[20] += 2;
        assert!(answers(now));
        assert!(!counters.answers(KEY.device + 16, &[(KEY, now)]));
    }

    #[test]
    fn block_io_is_that_of_the_interval_and_not_since_the_start() {
        let mut counters = Counters::default();
        let mut first = stats(30, 100, 4096);
        (first.sizes[3], first.sequential) = (100, 90);
        first.errors[error::MEDIA] = 3;
        counters.interval(&[(KEY, first)], &[], 0);
        let mut second = first;
        (second.latency.slots[30], second.bytes) = (104, 12_288);
        (second.sizes[3], second.sequential) = (104, 91);
        second.errors[error::PROTECTION] = 1;
        let second = counters.interval(&[(KEY, second)], &[], 0);
        let mut io = BlockIo::default();
        add(&mut io, &second[0].0, &second[0].1, Duration::from_secs(2));
        assert_eq!((io.iops(), io.reads.bytes_per_second), (2.0, 4096.0));
        assert_eq!(io.latency().count(), 4);
        assert_eq!(io.sequential_percent(), Some(25.0));
        let p50 = io.reads.sizes.percentile(50.0).expect("four sizes");
        assert!((4096.0..=8192.0).contains(&p50), "{p50}");
        assert_eq!((io.errors.total(), io.errors.protection), (1, 1));
    }

    #[test]
    fn a_request_that_never_completes_is_slow_and_not_idle() {
        let mut counters = Counters::default();
        let request = request(KEY, 1_000_000_000);
        let issued = [(KEY, BlockStats::EMPTY)];
        counters.interval(&issued, &[], 1_000_000_000);
        let mut now_ns = 1_000_000_000;
        for _ in 0..3 {
            now_ns += 1_000_000_000;
            let interval = counters.interval(&issued, &[request], now_ns);
            let mut io = BlockIo::default();
            add(&mut io, &KEY, &interval[0].1, SECOND);
            assert!((io.queue_depth - 1.0).abs() < 1e-9, "{}", io.queue_depth);
        }
        let mut io = BlockIo::default();
        add_in_flight(&mut io, &request, now_ns, SECOND);
        let p99 = values(&Subject::device(), &io)
            .into_iter()
            .find(|(metric, ..)| *metric == "block.latency_p99");
        assert!(p99.is_some_and(|(_, _, value)| value > 2e9));
        let mut young = BlockIo::default();
        add_in_flight(&mut young, &request, request.since_ns + 1_000, SECOND);
        assert_eq!(young.latency().count(), 0);
    }

    #[test]
    fn a_flush_is_a_request_without_a_latency() {
        let mut io = BlockIo::default();
        let flush = BlockKey {
            op: op::FLUSH,
            ..KEY
        };
        let interval = Counters::default().interval(&[(flush, stats(33, 2, 0))], &[], 0);
        add(&mut io, &flush, &interval[0].1, SECOND);
        assert_eq!((io.iops(), io.latency().count()), (2.0, 0));
    }

    #[test]
    fn zeroing_is_no_transfer() {
        let mut io = BlockIo::default();
        let zeroes = BlockKey {
            op: op::WRITE_ZEROES,
            ..KEY
        };
        let interval = Counters::default().interval(&[(zeroes, stats(20, 1, 1 << 30))], &[], 0);
        add(&mut io, &zeroes, &interval[0].1, SECOND);
        assert_eq!(io.writes, BlockOps::default());
        assert!(io.discards.bytes_per_second > 0.0);
    }
}
