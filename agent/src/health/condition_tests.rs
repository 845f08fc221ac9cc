//! Each kind of condition over time: when it fails, what it says, when it is over, when nobody knows.

use super::*;
use crate::model::metric::{Per, Sample, Subject};
use crate::model::units::UnixMillis;
use std::time::Duration;

const START: u64 = 1_750_000_000_000;

fn judge(threshold: &str) -> Judge {
    let text = format!(
        "version: 1\nname: t\nthresholds:\n  one:\n    {}\ndegraded: [any: [one]]\nguards: {{ hold: 0s }}\n",
        threshold.trim().replace('\n', "\n    ")
    );
    Judge::new(
        Policy::parse(&text, "t").unwrap_or_else(|e| panic!("{e}")),
        None,
    )
}

fn sample(metric: &str, per: Per, name: &str, value: f64, second: u64) -> Sample {
    Sample {
        metric: metric.into(),
        subject: Subject {
            per,
            name: name.into(),
        },
        value,
        at: UnixMillis(START + second * 1000),
    }
}

/// One sweep.
fn sweep(judge: &mut Judge, second: u64, values: &[(&str, Per, &str, f64)]) -> Verdict {
    let now = UnixMillis(START + second * 1000);
    let samples: Vec<Sample> = values
        .iter()
        .map(|(metric, per, name, value)| sample(metric, *per, name, *value, second))
        .collect();
    judge.observe(&samples, now);
    judge.verdict(now)
}

const DEVICE: (Per, &str) = (Per::Device, "");

fn device(judge: &mut Judge, second: u64, metric: &str, value: f64) -> Verdict {
    sweep(judge, second, &[(metric, DEVICE.0, DEVICE.1, value)])
}

const MS: f64 = 1e6;

#[test]
fn rising_fails_on_a_climb_and_not_on_a_plateau() {
    let text =
        "metric: sched.run_queue_latency_p99\nabove: 50ms\nclear: 10ms\nfor: 30s\nrising: true";
    let metric = "sched.run_queue_latency_p99";
    let mut plateau = judge(text);
    for second in 0..300 {
        let noise = [0.0, 3.0, -2.0, 1.0, -3.0][(second % 5) as usize];
        let verdict = device(&mut plateau, second, metric, (80.0 + noise) * MS);
        assert_eq!(verdict.kind, VerdictKind::Healthy, "second {second}");
    }
    let mut climb = judge(text);
    for second in 0..30 {
        let verdict = device(&mut climb, second, metric, (60.0 + second as f64) * MS);
        assert_eq!(verdict.kind, VerdictKind::Healthy, "second {second}");
    }
    let verdict = device(&mut climb, 30, metric, 90.0 * MS);
    assert_eq!(verdict.kind, VerdictKind::Degraded);
    assert!(
        verdict.evidence[0]
            .text
            .contains("above 50 ms and was rising, for 30.0 s"),
        "{verdict}"
    );
    // What stopped to rise has not got well.
    for second in 31..120 {
        assert_eq!(
            device(&mut climb, second, metric, 90.0 * MS).kind,
            VerdictKind::Degraded
        );
    }
    assert_eq!(
        device(&mut climb, 120, metric, 10.0 * MS).kind,
        VerdictKind::Healthy
    );
}

#[test]
fn a_forecast_fails_when_the_line_reaches_the_value_in_time() {
    let text = "metric: disk.used\nper: mount\nforecast: { reaches: 95%, within: 6h }\nclear: 12h";
    let fill = |judge: &mut Judge, minute: u64, used: f64| {
        sweep(
            judge,
            minute * 60,
            &[("disk.used", Per::Mount, "/srv", used)],
        )
    };
    let mut judge = judge(text);
    let mut verdict = Verdict::default();
    // 5 % an hour from 50 %: at minute 50 it is at 54.2 %, eight hours away from 95 %.
    for minute in 0..45 {
        verdict = fill(&mut judge, minute, 50.0 + minute as f64 / 12.0);
        assert_eq!(verdict.kind, VerdictKind::Unknown, "minute {minute}");
    }
    assert!(
        verdict.missing[0]
            .text
            .contains("one: disk.used of /srv: nothing can be foretold before 1 min"),
        "{verdict}"
    );
    for minute in 45..160 {
        verdict = fill(&mut judge, minute, 50.0 + minute as f64 / 12.0);
        assert_eq!(verdict.kind, VerdictKind::Healthy, "minute {minute}");
    }
    // At 65 % it is six hours away.
    for minute in 160..190 {
        verdict = fill(&mut judge, minute, 50.0 + minute as f64 / 12.0);
    }
    assert_eq!(verdict.kind, VerdictKind::Degraded);
    let text = &verdict.evidence[0].text;
    assert!(text.contains("disk.used of /srv is 65.8 % and reaches 95 % in 5 h 51 min at this rate, within 6 h 0 min"), "{text}");
    // It stops: soon no line leads there any more.
    let mut slower = false;
    for minute in 190..300 {
        verdict = fill(&mut judge, minute, 65.8);
        let was = "at this rate, and was within 6 h 0 min";
        slower |= verdict.evidence.iter().any(|one| one.text.contains(was));
    }
    assert!(slower);
    assert_eq!(verdict.kind, VerdictKind::Healthy);
    assert_eq!(
        fill(&mut judge, 301, 96.0).kind,
        VerdictKind::Degraded,
        "it is there already"
    );
}

#[test]
fn a_forecast_downwards_fails_on_a_fall_only() {
    let text = "metric: memory.available\nforecast: { falls_to: 1GiB, within: 1h, over: 10m }";
    let gib = 1_073_741_824.0;
    let (mut falls, mut climbs) = (judge(text), judge(text));
    let mut last = (Verdict::default(), Verdict::default());
    for minute in 0..12_u64 {
        let moved = minute as f64 * 0.1 * gib;
        last.0 = device(
            &mut falls,
            minute * 60,
            "memory.available",
            6.0 * gib - moved,
        );
        last.1 = device(
            &mut climbs,
            minute * 60,
            "memory.available",
            6.0 * gib + moved,
        );
    }
    assert_eq!(
        (last.0.kind, last.1.kind),
        (VerdictKind::Degraded, VerdictKind::Healthy)
    );
}

#[test]
fn a_value_is_judged_for_each_unit_of_load_and_not_while_idle() {
    let text = "metric: block.latency_p99\nper: disk\nrelative_to_load: { metric: block.iops, at_least: 50, over: 10s }\nabove: 100us";
    let mut judge = judge(text);
    let mut at = |second, ms: f64, iops: f64| {
        sweep(
            &mut judge,
            second,
            &[
                ("block.latency_p99", Per::Disk, "vda", ms * MS),
                ("block.iops", Per::Disk, "vda", iops),
            ],
        )
    };
    // 40 ms at 1000 requests a second is work, at 100 it is a sick disk, at 10 it is idle.
    for second in 0..20 {
        assert_eq!(at(second, 40.0, 1000.0).kind, VerdictKind::Healthy);
    }
    let mut verdict = Verdict::default();
    for second in 20..40 {
        verdict = at(second, 40.0, 100.0);
    }
    assert_eq!(verdict.kind, VerdictKind::Degraded);
    assert!(
        verdict.evidence[0]
            .text
            .contains("is 400 µs for each block.iops (100/s over 10.0 s), above 100 µs"),
        "{verdict}"
    );
    for second in 40..60 {
        verdict = at(second, 4.0, 100.0);
    }
    assert_eq!(verdict.kind, VerdictKind::Healthy);
    for second in 60..90 {
        let ms = if second < 70 { 4.0 } else { 40.0 };
        assert_eq!(at(second, ms, 10.0).kind, VerdictKind::Healthy);
    }
}

#[test]
fn what_failed_under_load_is_over_when_there_is_too_little_of_it_for_the_whole_span() {
    let text = "metric: block.latency_p99\nper: disk\nrelative_to_load: { metric: block.iops, at_least: 50, over: 10s }\nabove: 100us";
    let mut judge = judge(text);
    let mut at = |second, iops: f64| {
        let latency = ("block.latency_p99", Per::Disk, "vda", 40.0 * MS);
        let load = ("block.iops", Per::Disk, "vda", iops);
        sweep(&mut judge, second, &[latency, load])
    };
    let mut verdict = Verdict::default();
    for second in 0..20 {
        verdict = at(second, 100.0);
    }
    assert_eq!(verdict.kind, VerdictKind::Degraded);
    let text = &verdict.evidence[0].text;
    assert!(
        text.ends_with(
            "clears at 100 µs or less, or after 10.0 s with less than 50/s of block.iops"
        ),
        "{text}"
    );
    // Under 50/s on average from second 25 on; a burst begins the span anew.
    for second in 20..60 {
        let iops = if second == 34 { 1_000.0 } else { 0.0 };
        verdict = at(second, iops);
        let over = second >= 55;
        assert_eq!(
            verdict.kind == VerdictKind::Healthy,
            over,
            "second {second}: {verdict}"
        );
        if !over {
            let text = &verdict.evidence[0].text;
            assert!(!text.contains("(0/s"), "the load it was judged at: {text}");
        }
    }
}

#[test]
fn a_disk_that_was_slower_than_its_peers_is_well_when_all_of_them_rest() {
    let text = "metric: block.latency_p99\nrelative_to_peers: { at_least: 5ms }\nabove: 3x";
    let mut judge = judge(text);
    let mut at = |second, sick: f64, others: f64| {
        let disk = |name, ms: f64| ("block.latency_p99", Per::Disk, name, ms * MS);
        let disks = [disk("sda", sick), disk("sdb", others), disk("sdc", others)];
        sweep(&mut judge, second, &disks)
    };
    assert_eq!(at(1, 40.0, 4.0).kind, VerdictKind::Degraded);
    // Nobody to be compared with, and slow all the same.
    assert_eq!(at(2, 40.0, 0.0).kind, VerdictKind::Degraded);
    assert_eq!(at(3, 1.0, 0.0).kind, VerdictKind::Healthy);
    assert_eq!(at(4, 40.0, 4.0).kind, VerdictKind::Degraded);
    assert_eq!(at(5, 0.0, 0.0).kind, VerdictKind::Healthy);
}

#[test]
fn events_are_judged_for_each_unit_of_a_rate() {
    let text = "metric: network.retransmits\nrelative_to_load: { metric: network.bytes_per_second, over: 10s }\nabove: 0.001";
    let mut judge = judge(text);
    let mut at = |second, events: f64| {
        sweep(
            &mut judge,
            second,
            &[
                ("network.retransmits", Per::Device, "", events),
                ("network.bytes_per_second", Per::Device, "", 10_000.0),
            ],
        )
    };
    for second in 0..20 {
        assert_eq!(
            at(second, 5.0).kind,
            VerdictKind::Healthy,
            "0.0005 a byte, second {second}"
        );
    }
    assert_eq!(at(20, 200.0).kind, VerdictKind::Degraded);
    for second in 21..29 {
        assert_eq!(at(second, 0.0).kind, VerdictKind::Degraded);
    }
    assert_eq!(at(32, 0.0).kind, VerdictKind::Healthy);
}

#[test]
fn a_disk_is_compared_with_its_peers_of_the_same_kind() {
    let text = "metric: block.latency_p99\nrelative_to_peers: { at_least: 5ms }\nabove: 3x\nclear: 2x\nfor: 2s";
    let mut judge = judge(text);
    let mut at = |second, sick: f64| {
        let disk = |name, ms: f64| ("block.latency_p99", Per::Disk, name, ms * MS);
        sweep(
            &mut judge,
            second,
            &[
                disk("sda", 8.0),
                disk("sdb", sick),
                disk("sdc", 10.0),
                disk("sdd", 9.0),
            ],
        )
    };
    assert_eq!(
        at(0, 27.0).kind,
        VerdictKind::Healthy,
        "exactly three times"
    );
    assert_eq!(at(1, 28.0).kind, VerdictKind::Healthy);
    let verdict = at(3, 90.0);
    assert_eq!(verdict.kind, VerdictKind::Degraded);
    assert!(
        verdict.evidence[0]
            .text
            .contains("of sdb is 10x the median of its peers (9 ms), above 3x"),
        "{verdict}"
    );
    assert_eq!(at(4, 18.0).kind, VerdictKind::Healthy);
}

#[test]
fn a_disk_without_peers_of_its_kind_is_unknown_and_says_so() {
    let text = "metric: block.latency_p99\nrelative_to_peers: {}\nabove: 3x";
    let mut judge = judge(text);
    let disk = |name, ms: f64| ("block.latency_p99", Per::Disk, name, ms * MS);
    let verdict = sweep(
        &mut judge,
        0,
        &[disk("sda", 1.0), disk("nvme0n1", 9.0), disk("sdb", 1.0)],
    );
    assert_eq!(verdict.kind, VerdictKind::Unknown);
    let texts: Vec<&str> = verdict
        .missing
        .iter()
        .map(|one| one.text.as_str())
        .collect();
    assert_eq!(
        texts[0],
        "one: block.latency_p99: nvme0n1 has 0 peer(s) here, 2 are needed"
    );
    assert_eq!(texts.len(), 3);
    // Idle peers are peers, and nothing is judged.
    let verdict = sweep(
        &mut judge,
        1,
        &[disk("sda", 9.0), disk("sdb", 0.0), disk("sdc", 0.0)],
    );
    assert_eq!(verdict.kind, VerdictKind::Healthy);
}

#[test]
fn this_host_is_compared_with_its_fleet_and_without_figures_it_is_unknown() {
    let text = "metric: cpu.load_per_core\nrelative_to_peers: { among: fleet }\nabove: 4x";
    let mut judge = judge(text);
    let own = ("cpu.load_per_core", Per::Device, "", 2.0);
    let verdict = sweep(&mut judge, 0, &[own]);
    assert_eq!(verdict.kind, VerdictKind::Unknown);
    assert!(
        verdict.missing[0]
            .text
            .contains("no figure of 3 other live devices"),
        "{verdict}"
    );
    let fleet = ("cpu.load_per_core", Per::Fleet, "", 0.2);
    let verdict = sweep(&mut judge, 1, &[own, fleet]);
    assert_eq!(verdict.kind, VerdictKind::Degraded);
    assert!(
        verdict.evidence[0]
            .text
            .contains("of device is 10x the median of the fleet (0.2), above 4x"),
        "{verdict}"
    );
}

#[test]
fn a_limit_of_the_part_is_its_own_and_one_that_is_not_published_is_unknown() {
    let text = "metric: cpu.temperature\nabove: device-limit - 5C\nclear: device-limit - 15C";
    let mut judge = judge(text);
    let heat = |name, celsius| ("cpu.temperature", Per::Sensor, name, celsius);
    let limit = |name, celsius| ("cpu.temperature_limit", Per::Sensor, name, celsius);
    let both = [limit("cpu", 100.0), limit("ssd", 75.0)];
    let verdict = sweep(
        &mut judge,
        0,
        &[heat("cpu", 94.0), heat("ssd", 60.0), both[0], both[1]],
    );
    assert_eq!(verdict.kind, VerdictKind::Healthy);
    let verdict = sweep(
        &mut judge,
        1,
        &[heat("cpu", 94.0), heat("ssd", 71.0), both[0], both[1]],
    );
    assert_eq!(verdict.kind, VerdictKind::Degraded);
    assert_eq!(
        verdict.evidence[0].text,
        "one (warning): cpu.temperature of ssd is 71 °C, above 70 °C (its own limit is 75 °C), for 0 µs; clears at 60 °C or less"
    );
    assert_eq!(verdict.evidence.len(), 1);
    let verdict = sweep(
        &mut judge,
        2,
        &[
            heat("cpu", 50.0),
            heat("ssd", 60.0),
            heat("nic", 50.0),
            both[0],
            both[1],
        ],
    );
    assert_eq!(verdict.kind, VerdictKind::Unknown);
    assert_eq!(
        verdict.missing[0].text,
        "one: cpu.temperature: nic publishes no limit of its own"
    );
}

#[test]
fn not_holds_only_when_it_is_known() {
    let text = "\
version: 1
name: t
thresholds:
  hot: { metric: cpu.temperature, above: 90C }
  busy: { metric: cpu.used, above: 90% }
degraded:
  - all: [hot, { not: busy }]
guards: { hold: 0s }
";
    let policy = Policy::parse(text, "t").unwrap();
    let at = |values: &[(&str, f64)]| {
        let values: Vec<(&str, Per, &str, f64)> = values
            .iter()
            .map(|(metric, value)| (*metric, Per::Device, "", *value))
            .collect();
        sweep(&mut Judge::new(policy.clone(), None), 0, &values).kind
    };
    let (hot, busy) = (("cpu.temperature", 95.0), ("cpu.used", 99.0));
    assert_eq!(at(&[hot, ("cpu.used", 10.0)]), VerdictKind::Degraded);
    assert_eq!(at(&[hot, busy]), VerdictKind::Suspect);
    assert_eq!(
        at(&[hot]),
        VerdictKind::Unknown,
        "nobody knows whether it is busy"
    );
}

#[test]
fn the_stage_rises_at_once_and_falls_when_the_hold_is_over() {
    let text = "\
version: 1
name: t
thresholds:
  hot: { metric: cpu.temperature, above: 90C }
  busy: { metric: cpu.used, above: 90% }
degraded:
  - { any: [hot], stage: watch }
  - { all: [hot, busy] }
guards: { hold: 60s }
";
    let mut judge = Judge::new(Policy::parse(text, "t").unwrap(), None);
    let mut at = |second, celsius, used| {
        let verdict = sweep(
            &mut judge,
            second,
            &[
                ("cpu.temperature", Per::Device, "", celsius),
                ("cpu.used", Per::Device, "", used),
            ],
        );
        (verdict.kind, verdict.stage)
    };
    let (degraded, healthy) = (VerdictKind::Degraded, VerdictKind::Healthy);
    assert_eq!(at(0, 50.0, 5.0), (healthy, None));
    assert_eq!(at(1, 95.0, 5.0), (degraded, Some(Stage::Watch)));
    assert_eq!(at(2, 95.0, 95.0), (degraded, Some(Stage::Evacuate)));
    assert_eq!(at(30, 95.0, 5.0), (degraded, Some(Stage::Evacuate)));
    assert_eq!(at(63, 95.0, 5.0), (degraded, Some(Stage::Watch)));
    assert_eq!(at(64, 50.0, 5.0), (healthy, None));
}

#[test]
fn it_is_known_when_the_next_threshold_will_have_been_passed_for_its_time() {
    let mut judge = judge("metric: cpu.used\nabove: 50%\nfor: 90s");
    device(&mut judge, 0, "cpu.used", 10.0);
    assert_eq!(judge.due(), None, "nothing is passed");
    device(&mut judge, 1, "cpu.used", 60.0);
    assert_eq!(judge.due(), Some(Duration::from_secs(90)));
    device(&mut judge, 8, "cpu.used", 60.0);
    assert_eq!(judge.due(), Some(Duration::from_secs(83)));
    for second in (16..=91).step_by(5) {
        device(&mut judge, second, "cpu.used", 60.0);
    }
    assert_eq!(judge.due(), None, "it failed");
}

#[test]
fn too_little_load_is_not_made_much_by_a_short_first_sample() {
    let text = "metric: network.retransmits\nrelative_to_load: { metric: network.bytes_per_second, at_least: 100000, over: 10s }\nabove: 0.001";
    let mut judge = judge(text);
    let mut at = |second, rate: f64| {
        sweep(
            &mut judge,
            second,
            &[
                ("network.retransmits", Per::Device, "", 200.0),
                ("network.bytes_per_second", Per::Device, "", rate),
            ],
        )
    };
    for second in 0..20 {
        assert_eq!(at(second, 10_000.0).kind, VerdictKind::Healthy, "{second}");
    }
    for second in 20..35 {
        at(second, 110_000.0);
    }
    assert_eq!(at(35, 110_000.0).kind, VerdictKind::Degraded);
}

/// What is judged of sweeps 900 ms apart, sweep by sweep as seen from its own instant: failures, counts, climbs, a hold
/// and stages follow on each other. At sweep `set` the wall clock is set by `step` milliseconds.
fn judged_while_the_clock_is_set(set: u64, step: i64) -> Vec<String> {
    let text = "version: 1
name: t
thresholds:
  slow: { metric: block.latency_p99, above: 40ms, clear: 15ms, for: 3s }
  errors: { metric: block.errors, count: { at_least: 3, within: 10s } }
  climbs: { metric: cpu.used, above: 50%, for: 5s, rising: true }
degraded:
  - any: [slow]
  - any: [errors]
    stage: prepare
guards: { hold: 12s }
";
    let mut judge = Judge::new(Policy::parse(text, "t").unwrap(), None);
    let mut told = Vec::new();
    for sweep in 0..80 {
        let stepped = if sweep < set { 0 } else { step };
        let now = UnixMillis((START + sweep * 900).saturating_add_signed(stepped));
        let passes = |from, to| (from..to).contains(&sweep);
        let slow = passes(6, 16) || passes(40, 60);
        let error = [3, 9, 12, 30, 33, 36].contains(&sweep);
        let samples = [
            ("block.latency_p99", if slow { 50.0 * MS } else { 5.0 * MS }),
            ("block.errors", f64::from(u8::from(error))),
            (
                "cpu.used",
                if sweep < 30 {
                    30.0 + sweep as f64
                } else {
                    40.0
                },
            ),
        ]
        .map(|(metric, value)| Sample {
            at: now,
            ..sample(metric, Per::Device, "", value, 0)
        });
        if sweep > 0 {
            judge.pass(now, Duration::from_millis(900));
        }
        judge.observe(&samples, now);
        let verdict = judge.verdict(now);
        let failing = verdict.evidence.iter();
        told.push(format!(
            "{sweep}: {} {:?} since {} ms, held for {:?}, failing: {:?}, due in {:?}",
            verdict.kind,
            verdict.stage,
            now.since(verdict.since).as_millis(),
            verdict.held_until.map(|until| until.since(now)),
            failing
                .map(|one| (&one.threshold, one.value, now.since(one.since)))
                .collect::<Vec<_>>(),
            judge.due(),
        ));
    }
    told
}

#[test]
fn a_wall_clock_that_is_set_changes_no_failure_no_hold_and_no_count() {
    let steady = judged_while_the_clock_is_set(0, 0);
    let all = steady.join("\n");
    for seen in [
        "degraded Some(Prepare)",
        "degraded Some(Evacuate)",
        "suspect",
        "healthy",
        "held for Some",
        "\"slow\"",
        "\"errors\"",
        "\"climbs\"",
        "due in Some",
    ] {
        assert!(all.contains(seen), "{seen} is in no sweep:\n{all}");
    }
    for step in [
        3_600_000, 40_000, 2_000, 600, -600, -2_000, -40_000, -3_600_000,
    ] {
        for set in 1..80 {
            let stepped = judged_while_the_clock_is_set(set, step);
            for (steady, stepped) in steady.iter().zip(&stepped) {
                assert_eq!(steady, stepped, "set by {step} ms at sweep {set}");
            }
        }
    }
}

#[test]
fn the_last_container_and_the_last_link_end_their_failures_and_a_disk_does_not() {
    let cases = [
        ("memory.used_bytes", "above: 1MiB", Per::Container, true),
        ("peer.latency", "above: 10ms", Per::Peer, true),
        ("block.latency_p99", "above: 10ms", Per::Disk, false),
    ];
    for (metric, limit, per, ends) in cases {
        let text = format!(
            "metric: {metric}\nper: {}\n{limit}\noptional: true",
            per.word()
        );
        let mut judge = judge(&text);
        let other = ("cpu.used", Per::Device, "", 1.0);
        let failing = sweep(&mut judge, 0, &[(metric, per, "a", 1e12), other]);
        assert_eq!(failing.kind, VerdictKind::Degraded, "{metric}");
        assert_eq!(sweep(&mut judge, 50, &[other]).kind, VerdictKind::Unknown);
        let later = sweep(&mut judge, 101, &[other]);
        let expected = if ends {
            VerdictKind::Healthy
        } else {
            VerdictKind::Unknown
        };
        assert_eq!(later.kind, expected, "{metric}: {later}");
    }
}

#[test]
fn a_container_that_was_well_is_gone_at_once_with_its_interface_while_others_are_measured() {
    let cases = [
        ("memory.used_bytes", Per::Container, "ended", 1.0, true),
        ("memory.used_bytes", Per::Container, "ended", 1e12, false),
        ("network.link_down", Per::Interface, "veth1", 0.0, true),
        ("network.link_down", Per::Interface, "veth1", 1.0, false),
        ("network.link_down", Per::Interface, "eth1", 0.0, false),
        ("block.latency_p99", Per::Disk, "sdb", 0.0, false),
    ];
    for (metric, per, name, value, ends) in cases {
        let limit = match metric {
            "block.latency_p99" => "above: 10ms",
            "network.link_down" => "above: 0",
            _ => "above: 1MiB",
        };
        let mut judge = judge(&format!("metric: {metric}\nper: {}\n{limit}", per.word()));
        let other = (metric, per, "other", 0.0);
        sweep(&mut judge, 0, &[(metric, per, name, value), other]);
        for second in 1..30 {
            let verdict = sweep(&mut judge, second, &[other]);
            let silent = verdict.missing.iter().any(|one| one.subject.is_some());
            let waits = !ends && second > 10;
            assert_eq!(
                silent, waits,
                "{metric} {name} {value} at {second}: {verdict}"
            );
        }
    }
}

#[test]
fn the_last_link_that_was_well_is_gone_when_nothing_is_measured_of_it() {
    let mut judge = judge("metric: peer.latency\nper: peer\nabove: 10ms\noptional: false");
    let link = |ms: f64| ("peer.latency", Per::Peer, "a", ms * MS);
    assert_eq!(
        sweep(&mut judge, 0, &[link(1.0)]).kind,
        VerdictKind::Healthy
    );
    let other = ("cpu.used", Per::Device, "", 1.0);
    let subjects = |verdict: Verdict| -> Vec<bool> {
        let missing = verdict.missing.iter();
        missing.map(|one| one.subject.is_some()).collect()
    };
    assert_eq!(subjects(sweep(&mut judge, 50, &[other])), [true]);
    assert_eq!(subjects(sweep(&mut judge, 101, &[other])), [false]);
}

#[test]
fn a_container_that_is_still_measured_otherwise_has_only_lost_that_sensor() {
    let text = "metric: memory.used_bytes\nper: container\nabove: 1MiB\noptional: true";
    let mut judge = judge(text);
    let rest = ("pressure.io_some", Per::Container, "a", 1.0);
    let all = [("memory.used_bytes", Per::Container, "a", 1e12), rest];
    sweep(&mut judge, 0, &all);
    assert_eq!(sweep(&mut judge, 500, &[rest]).kind, VerdictKind::Unknown);
}

#[test]
fn what_is_measured_and_cannot_be_judged_any_more_is_not_called_silent() {
    let text = "metric: block.latency_p99\nper: disk\nrelative_to_peers: {}\nabove: 3x";
    let mut judge = judge(text);
    let disk = |name, ms: f64| ("block.latency_p99", Per::Disk, name, ms * MS);
    let all = [disk("sda", 90.0), disk("sdb", 5.0), disk("sdc", 5.0)];
    assert_eq!(sweep(&mut judge, 0, &all).kind, VerdictKind::Degraded);
    let verdict = sweep(&mut judge, 20, &all[..1]);
    let of_it = |one: &&Missing| one.subject.as_ref().is_some_and(|of| of.name == "sda");
    let missing = verdict.missing.iter().find(of_it).unwrap();
    assert!(missing.failing);
    assert!(
        missing
            .text
            .contains("has 0 peer(s) here, 2 are needed, and was failing at 18x"),
        "{}",
        missing.text
    );
    let verdict = sweep(&mut judge, 40, &[]);
    let missing = verdict.missing.iter().find(of_it).unwrap();
    assert!(missing.text.contains("silent"), "{}", missing.text);
}

#[test]
fn a_time_that_was_told_stays_as_it_is_while_the_wall_clock_is_only_kept_right() {
    let mut judge = judge("metric: block.latency_p99\nabove: 40ms");
    let first = device(&mut judge, 0, "block.latency_p99", 50.0 * MS);
    for second in 1..50 {
        let now = UnixMillis(START + second * 1000);
        judge.pass(now, Duration::from_millis(999));
        let verdict = device(&mut judge, second, "block.latency_p99", 50.0 * MS);
        assert_eq!(verdict.since, first.since);
        assert_eq!(verdict.evidence[0].since, first.evidence[0].since);
    }
}
