//! From counters since the start to statistics of the interval since the last sweep. Pure.

use super::host::Value;
use crate::model::ids::ContainerName;
use crate::model::metric::{Per, Subject};
use crate::model::telemetry::{Latencies, RunQueueStats};
use lifeboat_ebpf::{Latency, latency_from_ns};
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// Remembers the counters of the last sweep.
#[derive(Default)]
pub struct Counters {
    run_queue: HashMap<u64, Latency>,
}

/// What the kernel counted between two times. A slot that went back by as much as if it had not overflowed was
/// started anew and counts from zero.
pub fn latencies(before: Option<&Latency>, now: &Latency) -> Latencies {
    let mut latencies = Latencies::default();
    for (slot, &counted) in now.slots.iter().enumerate() {
        let earlier = before.map_or(0, |before| before.slots[slot]);
        let more = Some(counted.wrapping_sub(earlier)).filter(|&more| more <= u32::MAX / 2);
        latencies.record_all(latency_from_ns(slot), more.unwrap_or(counted).into());
    }
    latencies
}

impl Counters {
    /// Run-queue latency of the interval by cgroup2 id.
    pub fn run_queue(&mut self, now: &[(u64, Latency)]) -> HashMap<u64, Latencies> {
        let interval = now
            .iter()
            .map(|(cgroup, now)| (*cgroup, latencies(self.run_queue.get(cgroup), now)))
            .collect();
        self.run_queue = now.iter().copied().collect();
        interval
    }
}

/// Adds a task to its run queue that has waited for `age_ns`. One that has waited longer than the interval
/// counts as a latency of that age: a task that never gets a CPU must not look like one that never waits.
pub fn add_waiting(stats: &mut RunQueueStats, age_ns: u64, interval: Duration) {
    stats.waiting += 1;
    if u128::from(age_ns) > interval.as_nanos() {
        stats.latency.record(age_ns);
    }
}

/// From what share of its quota periods on, in percent, a container's wait is taken for its quota's sake.
const NOTICEABLE: f64 = 10.0;

/// Whose wait is none of the device's: containers that were kept off the CPUs in a noticeable share of their quota
/// periods. Their tasks stand in the run queue then, which says nothing of how busy the device is.
pub fn throttled(values: &[Value]) -> HashSet<ContainerName> {
    let stopped = values
        .iter()
        .filter(|(metric, _, share)| *metric == "cpu.quota_throttled" && *share >= NOTICEABLE);
    let names = stopped.map(|(_, subject, _)| ContainerName(subject.name.clone()));
    names.collect()
}

/// The device's run queue: without those that their quota stopped, unless nobody else ran that could tell of it.
pub fn of_host(others: RunQueueStats, stopped: RunQueueStats) -> RunQueueStats {
    if others.latency.count() == 0 && others.waiting == 0 {
        stopped
    } else {
        others
    }
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
    use lifeboat_ebpf::{Delay, SLOTS};

    const SECOND: Duration = Duration::from_secs(1);

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
    fn a_count_that_overflows_goes_on() {
        let mut latency = Latency::EMPTY;
        latency.slots[20] = u32::MAX;
        let before = latency;
        latency.slots[20] = 2;
        assert_eq!(latencies(Some(&before), &latency).count(), 3);
    }

    #[test]
    fn slots_follow_each_other_and_are_at_most_a_quarter_wide() {
        for slot in 1..SLOTS {
            let (from, to) = (latency_from_ns(slot - 1), latency_from_ns(slot));
            assert!(from < to, "slot {slot}");
            assert!(
                from < 1024 || to - from <= from / 4,
                "slot {slot}: {from} to {to}"
            );
            let mut latency = Latency::EMPTY;
            latency.slots[slot] = 1;
            let found = latencies(None, &latency).percentile(50.0).expect("one");
            let next = latency_from_ns(slot + 1) as f64;
            assert!((to as f64..next).contains(&found), "slot {slot}: {found}");
        }
    }

    #[test]
    fn a_task_that_waits_longer_than_the_interval_counts_while_it_lasts() {
        let mut stats = RunQueueStats::default();
        add_waiting(&mut stats, 900_000_000, SECOND);
        assert_eq!((stats.waiting, stats.latency.count()), (1, 0));
        add_waiting(&mut stats, 3_000_000_000, SECOND);
        assert_eq!((stats.waiting, stats.latency.count()), (2, 1));
    }

    #[test]
    fn a_container_that_its_quota_stopped_noticeably_is_known_as_throttled() {
        let of = |metric, name: &str, share| (metric, subject(Per::Container, name), share);
        let values = [
            of("cpu.quota_throttled", "stopped", 12.5),
            of("cpu.quota_throttled", "now and then", 9.9),
            of("cpu.quota_throttled", "within", 0.0),
            of("cpu.used", "busy", 90.0),
        ];
        assert_eq!(
            throttled(&values),
            [ContainerName("stopped".to_owned())].into()
        );
    }

    #[test]
    fn where_only_stopped_containers_run_the_device_does_not_look_idle() {
        let of = |age_s: u64| {
            let mut stats = RunQueueStats::default();
            add_waiting(&mut stats, age_s * 1_000_000_000, SECOND);
            stats
        };
        assert_eq!(of_host(RunQueueStats::default(), of(9)), of(9));
        assert_eq!(of_host(of(2), of(9)), of(2));
    }

    #[test]
    fn what_a_task_waited_since_a_word_is_told_to_a_quarter_of_a_microsecond() {
        let at = 50_000_000_000;
        let word = Delay::pack(4_194_303, at);
        assert!(Delay::is_of(word, 4_194_303) && !Delay::is_of(word, 4_194_302));
        let more = Delay::until(word, at + 3_000_000_000);
        assert!((2_999_999_700..=3_000_000_300).contains(&more), "{more}");
        assert_eq!(Delay::until(word, at), 0);
        assert_eq!(Delay::until(word, 0), 0, "another thread of the same id");
    }
}
