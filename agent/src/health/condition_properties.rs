//! Properties of every kind of condition together: signals that flap and vanish, clocks that step, restarts.

use super::*;
use crate::model::metric::{Per, Sample, Subject};
use crate::model::units::UnixMillis;
use proptest::prelude::*;

const START: u64 = 1_750_000_000_000;
const HOLD: u64 = 30;

const POLICY: &str = "\
version: 1
name: all
thresholds:
  climbs:
    metric: sched.run_queue_latency_p99
    above: 50ms
    clear: 10ms
    for: 5s
    rising: true
  fills:
    metric: disk.used
    per: mount
    forecast: { reaches: 95%, within: 4m, over: 1m }
    clear: 8m
  for-its-load:
    metric: block.latency_p99
    relative_to_load: { metric: block.iops, over: 10s }
    above: 1ms
  among-disks:
    metric: block.latency_p99
    per: disk
    relative_to_peers: {}
    above: 3x
    for: 2s
  in-the-fleet:
    metric: cpu.load_per_core
    relative_to_peers: { among: fleet }
    above: 4x
  errors:
    metric: block.errors
    count: { at_least: 3, within: 20s }
degraded:
  - failures: 3
  - { any: [fills, errors], stage: prepare }
  - { all: [among-disks, { not: in-the-fleet }], stage: watch }
guards:
  hold: 30s
";

const THRESHOLDS: usize = 6;

fn judge() -> Judge {
    Judge::new(Policy::parse(POLICY, "all").unwrap(), None)
}

fn at(second: u64) -> UnixMillis {
    UnixMillis(START + second * 1000)
}

/// One sweep: seconds since the one before, and each signal's level of 0 to 3, or its silence.
type Beat = (u64, Vec<Option<u8>>);

/// The signals: metric, subject, values of their levels.
const SIGNALS: [(&str, Per, &str, [f64; 4]); 10] = [
    (
        "sched.run_queue_latency_p99",
        Per::Device,
        "",
        [1e6, 20e6, 60e6, 90e6],
    ),
    ("disk.used", Per::Mount, "/srv", [50.0, 70.0, 90.0, 96.0]),
    (
        "block.latency_p99",
        Per::Device,
        "",
        [1e6, 5e6, 50e6, 500e6],
    ),
    ("block.iops", Per::Device, "", [0.0, 1.0, 100.0, 1000.0]),
    ("block.latency_p99", Per::Disk, "sda", [1e6, 2e6, 9e6, 90e6]),
    ("block.latency_p99", Per::Disk, "sdb", [0.0, 2e6, 3e6, 4e6]),
    ("block.latency_p99", Per::Disk, "sdc", [1e6, 2e6, 3e6, 4e6]),
    ("cpu.load_per_core", Per::Device, "", [0.1, 0.5, 2.0, 9.0]),
    ("cpu.load_per_core", Per::Fleet, "", [0.0, 0.5, 0.5, 1.0]),
    ("block.errors", Per::Device, "", [0.0, 0.0, 1.0, 2.0]),
];

fn beats() -> impl Strategy<Value = Vec<Beat>> {
    let level = prop::option::weighted(0.9, 0_u8..4);
    let signals = prop::collection::vec(level, SIGNALS.len());
    prop::collection::vec((1_u64..4, signals), 1..80)
}

fn play(judge: &mut Judge, beats: &[Beat], mut second: u64) -> (Vec<Verdict>, u64) {
    let mut verdicts = Vec::new();
    for (pause, levels) in beats {
        second += pause;
        let samples: Vec<Sample> = SIGNALS
            .iter()
            .zip(levels)
            .filter_map(|((metric, per, name, values), level)| {
                Some(Sample {
                    metric: (*metric).to_owned(),
                    subject: Subject::new(*per, *name),
                    value: values[usize::from((*level)?)],
                    at: at(second),
                })
            })
            .collect();
        judge.observe(&samples, at(second));
        verdicts.push(judge.verdict(at(second)));
    }
    (verdicts, second)
}

fn failing(verdict: &Verdict) -> Vec<(&str, &str)> {
    let mut names: Vec<_> = verdict
        .evidence
        .iter()
        .map(|one| (one.threshold.as_str(), one.subject.name.as_str()))
        .collect();
    names.sort_unstable();
    names
}

proptest! {
    #[test]
    fn a_restart_at_any_moment_changes_no_verdict_and_no_stage(beats in beats(), cut in 0_usize..80) {
        let cut = cut.min(beats.len());
        let (expected, _) = play(&mut judge(), &beats, 0);
        let mut before = judge();
        let (mut got, second) = play(&mut before, &beats[..cut], 0);
        let saved = serde_json::to_string(before.saved()).unwrap();
        let policy = Policy::parse(POLICY, "all").unwrap();
        let mut after = Judge::new(policy, Some(serde_json::from_str(&saved).unwrap()));
        got.extend(play(&mut after, &beats[cut..], second).0);
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn silence_of_all_is_never_healthy_and_ends_as_unknown_without_a_stage(beats in beats()) {
        let mut judge = judge();
        let (_, second) = play(&mut judge, &beats, 0);
        for silence in 11..2 * HOLD + 11 {
            let verdict = judge.verdict(at(second + silence));
            prop_assert!(matches!(verdict.kind, VerdictKind::Unknown | VerdictKind::Degraded));
            prop_assert!(verdict.evidence.is_empty(), "{}", verdict);
        }
        let verdict = judge.verdict(at(second + 2 * HOLD + 11));
        prop_assert_eq!(verdict.kind, VerdictKind::Unknown);
        prop_assert_eq!(verdict.stage, None);
        let mut missing: Vec<&str> = verdict.missing.iter().map(|one| one.threshold.as_str()).collect();
        missing.dedup();
        prop_assert_eq!(missing.len(), THRESHOLDS);
    }

    #[test]
    fn a_clock_that_steps_fires_and_clears_nothing_by_itself(
        beats in beats(), back in 1_u64..100_000, ahead in 1_u64..100_000,
    ) {
        let mut judge = judge();
        let (verdicts, second) = play(&mut judge, &beats, 200_000);
        let before = verdicts.last().unwrap();
        // The least that the judge's own clock moves, in which a sample may become too old.
        let expected = judge.clone().verdict(UnixMillis(at(second).0 + 1));
        let stepped = judge.verdict(at(second - back));
        prop_assert_eq!(stepped.kind, expected.kind);
        prop_assert_eq!(stepped.stage, expected.stage);
        prop_assert_eq!(failing(&stepped), failing(&expected));
        let jumped = judge.verdict(at(second - back + ahead));
        for one in failing(&jumped) {
            prop_assert!(failing(before).contains(&one), "{:?} fired by the clock alone", one);
        }
    }

    #[test]
    fn a_stage_sinks_no_sooner_than_the_hold_and_stands_only_on_a_degraded_device(beats in beats()) {
        let mut judge = judge();
        let mut second = 0;
        let mut risen: Option<(Stage, u64)> = None;
        for beat in &beats {
            let (verdicts, now) = play(&mut judge, std::slice::from_ref(beat), second);
            second = now;
            let verdict = &verdicts[0];
            prop_assert_eq!(verdict.stage.is_some(), verdict.kind == VerdictKind::Degraded);
            if let (Some((stage, since)), Some(is)) = (risen, verdict.stage) {
                prop_assert!(is >= stage || second - since >= HOLD, "{} sank to {}", stage, is);
            }
            risen = match (risen, verdict.stage) {
                (_, None) => None,
                (Some((stage, since)), Some(is)) if is == stage => Some((stage, since)),
                (_, Some(is)) => Some((is, second)),
            };
        }
    }
}
