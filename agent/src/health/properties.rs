//! The judge over time: single stories, then properties that hold for every signal.

use super::*;
use crate::model::metric::{METRICS, Per, Sample, Subject};
use crate::model::units::UnixMillis;
use proptest::prelude::*;

const START: u64 = 1_750_000_000_000;

const POLICY: &str = "\
version: 1
name: test
thresholds:
  slow:
    metric: block.latency_p99
    per: disk
    above: 40ms
    clear: 15ms
    for: 5s
  errors:
    metric: block.errors
    count: { at_least: 3, within: 60s }
    severity: critical
degraded:
  - any: [errors]
  - failures: 2
delegate:
  - when: { failures: 2 }
    actions: [encrypt, transfer]
  - when: { failures: 1 }
    actions: [encrypt]
guards:
  hold: 30s
";

fn judge() -> Judge {
    Judge::new(Policy::parse(POLICY, "test").unwrap(), None)
}

fn at(second: u64) -> UnixMillis {
    UnixMillis(START + second * 1000)
}

fn slow(disk: &str, ms: f64, when: UnixMillis) -> Sample {
    Sample {
        metric: "block.latency_p99".into(),
        subject: Subject {
            per: Per::Disk,
            name: disk.into(),
        },
        value: ms * 1e6,
        at: when,
    }
}

fn errors(count: f64, when: UnixMillis) -> Sample {
    Sample {
        metric: "block.errors".into(),
        subject: Subject::device(),
        value: count,
        at: when,
    }
}

/// One sweep: a latency of one disk and a number of errors, and the verdict after it.
fn sweep(judge: &mut Judge, second: u64, ms: f64, count: f64) -> Verdict {
    let now = at(second);
    judge.observe(&[slow("vda", ms, now), errors(count, now)], now);
    judge.verdict(now)
}

#[test]
fn nothing_measured_is_unknown_and_says_what_is_missing() {
    let verdict = judge().verdict(at(0));
    assert_eq!(verdict.kind, VerdictKind::Unknown);
    let missing: Vec<&str> = verdict
        .missing
        .iter()
        .map(|m| m.threshold.as_str())
        .collect();
    assert_eq!(missing, ["slow", "errors"]);
}

#[test]
fn a_limit_passed_for_its_time_makes_suspect_with_evidence_and_clears_below_its_clear_value() {
    let mut judge = judge();
    assert_eq!(sweep(&mut judge, 0, 5.0, 0.0).kind, VerdictKind::Healthy);
    assert_eq!(sweep(&mut judge, 2, 61.0, 0.0).kind, VerdictKind::Healthy);
    assert_eq!(sweep(&mut judge, 6, 61.0, 0.0).kind, VerdictKind::Healthy);
    let verdict = sweep(&mut judge, 8, 61.0, 0.0);
    assert_eq!((verdict.kind, verdict.since), (VerdictKind::Suspect, at(8)));
    let evidence = &verdict.evidence[0];
    assert_eq!((evidence.since, evidence.last_sample), (at(2), at(8)));
    assert_eq!(
        evidence.text,
        "slow (warning): block.latency_p99 of vda is 61 ms, above 40 ms, for 6.0 s; clears at 15 ms or less"
    );
    assert!(verdict.delegate.is_empty());
    let better = sweep(&mut judge, 9, 20.0, 0.0);
    assert_eq!(better.kind, VerdictKind::Suspect);
    assert_eq!(
        better.evidence[0].text,
        "slow (warning): block.latency_p99 of vda is 20 ms, and was above 40 ms, for 7.0 s; clears at 15 ms or less"
    );
    assert_eq!(sweep(&mut judge, 10, 15.0, 0.0).kind, VerdictKind::Healthy);
}

#[test]
fn several_bad_disks_are_one_failure_of_the_device() {
    let mut judge = judge();
    let mut verdict = Verdict::default();
    for second in 0..10 {
        let now = at(second);
        judge.observe(
            &[
                slow("vda", 90.0, now),
                slow("vdb", 90.0, now),
                errors(0.0, now),
            ],
            now,
        );
        verdict = judge.verdict(now);
    }
    assert_eq!(
        (verdict.kind, verdict.evidence.len()),
        (VerdictKind::Suspect, 2)
    );
}

#[test]
fn degraded_says_why_and_chooses_what_to_delegate() {
    let mut judge = judge();
    let verdict = sweep(&mut judge, 0, 5.0, 3.0);
    assert_eq!(
        (verdict.kind, verdict.because),
        (VerdictKind::Degraded, vec!["any: [errors]".to_owned()])
    );
    assert_eq!(verdict.delegate.to_string(), "encrypt");
    assert_eq!(verdict.evidence[0].severity, Severity::Critical);
    for second in 1..7 {
        sweep(&mut judge, second, 50.0, 0.0);
    }
    let verdict = sweep(&mut judge, 7, 50.0, 0.0);
    assert_eq!(verdict.delegate.to_string(), "encrypt, transfer");
    assert_eq!(verdict.because.len(), 2);
}

#[test]
fn degraded_on_what_is_left_stays_degraded_when_other_data_vanishes() {
    let mut judge = judge();
    sweep(&mut judge, 0, 5.0, 3.0);
    let mut verdict = Verdict::default();
    for second in 1..50 {
        judge.observe(&[errors(0.0, at(second))], at(second));
        verdict = judge.verdict(at(second));
    }
    assert_eq!(
        (verdict.kind, verdict.held_until),
        (VerdictKind::Degraded, None)
    );
    assert_eq!(verdict.missing[0].threshold, "slow");
}

#[test]
fn a_failing_signal_that_falls_silent_is_unknown_once_the_hold_is_over() {
    let mut judge = judge();
    sweep(&mut judge, 0, 5.0, 3.0);
    let held = judge.verdict(at(15));
    assert_eq!(
        (held.kind, held.held_until),
        (VerdictKind::Degraded, Some(at(30)))
    );
    let verdict = judge.verdict(at(31));
    assert_eq!(verdict.kind, VerdictKind::Unknown);
    assert!(
        verdict.missing[1].text.contains("was failing"),
        "{:?}",
        verdict.missing
    );
    assert_eq!(
        sweep(&mut judge, 32, 5.0, 0.0).kind,
        VerdictKind::Degraded,
        "it still fails"
    );
}

#[test]
fn the_hold_delays_the_second_change_of_degraded_and_says_until_when() {
    let mut judge = judge();
    sweep(&mut judge, 0, 5.0, 0.0);
    let mut policy = Policy::parse(&POLICY.replace("within: 60s", "within: 5s"), "t").unwrap();
    policy.guards.hold = std::time::Duration::from_secs(30);
    judge.replace_policy(policy);
    assert_eq!(sweep(&mut judge, 1, 5.0, 3.0).kind, VerdictKind::Degraded);
    let verdict = sweep(&mut judge, 10, 5.0, 0.0);
    assert_eq!(
        (verdict.kind, verdict.held_until),
        (VerdictKind::Degraded, Some(at(31)))
    );
    assert_eq!(
        verdict.delegate.to_string(),
        "encrypt",
        "what was chosen stays chosen"
    );
    assert_eq!(sweep(&mut judge, 31, 5.0, 0.0).kind, VerdictKind::Healthy);
    let verdict = sweep(&mut judge, 32, 5.0, 9.0);
    assert_eq!(
        (verdict.kind, verdict.held_until),
        (VerdictKind::Suspect, Some(at(61)))
    );
}

#[test]
fn an_optional_threshold_without_a_sensor_leaves_the_verdict_healthy() {
    let text = POLICY.replace("    for: 5s\n", "    for: 5s\n    optional: true\n");
    let mut judge = Judge::new(Policy::parse(&text, "t").unwrap(), None);
    judge.observe(&[errors(0.0, at(0))], at(0));
    assert_eq!(judge.verdict(at(0)).kind, VerdictKind::Healthy);
}

#[test]
fn an_unmounted_file_system_is_gone_and_one_that_does_not_answer_is_not() {
    let text = "version: 1\nname: test\nthresholds:\n  full: { metric: disk.used, per: mount, above: 90% }\ndegraded: [{ any: [full] }]\nguards: { hold: 0s }";
    let mut judge = Judge::new(Policy::parse(text, "test").unwrap(), None);
    let mut sweep = |second: u64, values: &[(&str, &str, f64)]| {
        let now = at(second);
        let sample = |&(metric, name, value): &(&str, &str, f64)| Sample {
            metric: metric.into(),
            subject: Subject::new(Per::Mount, name),
            value,
            at: now,
        };
        let samples: Vec<Sample> = values.iter().map(sample).collect();
        judge.observe(&samples, now);
        judge.verdict(now).kind
    };
    let (root, of_root) = (("disk.used", "/", 10.0), ("filesystem.mounted", "/", 1.0));
    let of_data = ("filesystem.mounted", "/data", 1.0);
    let full = ("disk.used", "/data", 95.0);
    let all = [root, of_root, full, of_data];
    assert_eq!(sweep(0, &all), VerdictKind::Degraded);
    let unanswered = [root, of_root, of_data];
    for second in [11, 200] {
        assert_eq!(sweep(second, &unanswered), VerdictKind::Unknown);
    }
    // Where the table cannot be read, nothing is known of it.
    assert_eq!(sweep(201, &[root]), VerdictKind::Unknown);
    assert_eq!(sweep(202, &[root, of_root]), VerdictKind::Healthy);
}

#[test]
fn an_optional_sensor_that_fails_and_falls_silent_has_not_got_well() {
    let text = POLICY.replace("    for: 5s\n", "    optional: true\n");
    let mut judge = Judge::new(Policy::parse(&text, "t").unwrap(), None);
    assert_eq!(sweep(&mut judge, 0, 90.0, 0.0).kind, VerdictKind::Suspect);
    for second in 1..200 {
        judge.observe(&[errors(0.0, at(second))], at(second));
    }
    assert_eq!(judge.verdict(at(199)).kind, VerdictKind::Unknown);
}

#[test]
fn a_disk_that_was_pulled_is_forgotten_but_a_failing_one_is_not() {
    let mut judge = judge();
    for second in 0..10 {
        let now = at(second);
        judge.observe(
            &[
                slow("vda", 1.0, now),
                slow("good", 1.0, now),
                slow("bad", 90.0, now),
                errors(0.0, now),
            ],
            now,
        );
    }
    let mut verdict = Verdict::default();
    for second in 10..150 {
        verdict = sweep(&mut judge, second, 1.0, 0.0);
    }
    let silent: Vec<String> = verdict
        .missing
        .iter()
        .flat_map(|m| &m.subject)
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        (verdict.kind, silent),
        (VerdictKind::Unknown, vec!["bad".to_owned()])
    );
}

#[test]
fn a_clock_that_steps_neither_fires_nor_clears_anything() {
    let mut judge = judge();
    sweep(&mut judge, 1000, 5.0, 0.0);
    assert_eq!(
        sweep(&mut judge, 1001, 50.0, 0.0).kind,
        VerdictKind::Healthy
    );
    // An hour forward: the limit was not seen to be passed in between.
    assert_eq!(
        sweep(&mut judge, 4600, 50.0, 0.0).kind,
        VerdictKind::Healthy
    );
    // An hour and more back.
    assert_eq!(sweep(&mut judge, 500, 50.0, 0.0).kind, VerdictKind::Healthy);
    for second in 501..505 {
        assert_eq!(
            sweep(&mut judge, second, 50.0, 0.0).kind,
            VerdictKind::Healthy
        );
    }
    assert_eq!(sweep(&mut judge, 505, 50.0, 0.0).kind, VerdictKind::Suspect);
    let verdict = sweep(&mut judge, 100, 50.0, 0.0);
    assert_eq!(verdict.kind, VerdictKind::Suspect);
    assert!(verdict.missing.is_empty());
}

#[test]
fn a_policy_with_another_limit_forgets_and_with_the_same_remembers() {
    let mut judge = judge();
    sweep(&mut judge, 0, 5.0, 3.0);
    let mut kept = judge.clone();
    kept.replace_policy(
        Policy::parse(
            &POLICY.replace("severity: critical", "severity: warning"),
            "t",
        )
        .unwrap(),
    );
    assert_eq!(sweep(&mut kept, 1, 5.0, 0.0).evidence.len(), 1);
    judge
        .replace_policy(Policy::parse(&POLICY.replace("at_least: 3", "at_least: 4"), "t").unwrap());
    assert_eq!(sweep(&mut judge, 1, 5.0, 0.0).evidence.len(), 0);
}

#[test]
fn values_that_are_no_numbers_count_as_missing() {
    let mut judge = judge();
    assert_eq!(
        sweep(&mut judge, 0, f64::NAN, 0.0).kind,
        VerdictKind::Unknown
    );
}

#[test]
fn every_metric_has_one_name_and_something_to_be_measured_on() {
    for (place, metric) in METRICS.iter().enumerate() {
        assert!(!metric.per.is_empty(), "{}", metric.name);
        assert!(
            METRICS[..place]
                .iter()
                .all(|other| other.name != metric.name)
        );
    }
}

/// A sweep of the generated signals: seconds since the one before, latency, errors; none is silence.
type Beat = (u64, Option<f64>, Option<u64>);

fn beats() -> impl Strategy<Value = Vec<Beat>> {
    let latency =
        prop::option::weighted(0.9, prop::sample::select(vec![1.0, 14.0, 20.0, 41.0, 90.0]));
    let count = prop::option::weighted(0.9, prop::sample::select(vec![0_u64, 0, 0, 1, 2]));
    prop::collection::vec((1_u64..4, latency, count), 1..120)
}

fn play(judge: &mut Judge, beats: &[Beat], mut second: u64) -> (Vec<Verdict>, u64) {
    let mut verdicts = Vec::new();
    for (pause, ms, count) in beats {
        second += pause;
        let now = at(second);
        let mut samples = Vec::new();
        samples.extend(ms.map(|ms| slow("vda", ms, now)));
        samples.extend(count.map(|count| errors(count as f64, now)));
        judge.observe(&samples, now);
        verdicts.push(judge.verdict(now));
    }
    (verdicts, second)
}

proptest! {
    #[test]
    fn a_square_wave_changes_the_verdict_no_more_than_hold_and_for_allow(
        period in 1_u64..40, second in 100_u64..600,
    ) {
        let mut judge = judge();
        let (mut turns, mut failures) = (0, 0);
        let (mut was, mut failed) = (false, false);
        for now in 0..second {
            let high = (now / period) % 2 == 1;
            let verdict = sweep(&mut judge, now, if high { 90.0 } else { 1.0 }, if high { 1.0 } else { 0.0 });
            let is = verdict.kind == VerdictKind::Degraded;
            turns += u64::from(is != was);
            was = is;
            let fails = verdict.evidence.iter().any(|one| one.threshold == "slow");
            failures += u64::from(fails && !failed);
            failed = fails;
        }
        prop_assert!(turns <= second / 30 + 1, "{} turns in {} s", turns, second);
        // `for: 5s` needs six samples a second apart.
        prop_assert!(period > 5 || failures == 0, "{} failures", failures);
    }

    #[test]
    fn whatever_was_before_silence_is_never_healthy_and_ends_as_unknown(beats in beats()) {
        let mut judge = judge();
        let (_, second) = play(&mut judge, &beats, 0);
        for silence in 11..80 {
            let verdict = judge.verdict(at(second + silence));
            prop_assert!(matches!(verdict.kind, VerdictKind::Unknown | VerdictKind::Degraded));
            prop_assert_eq!(verdict.missing.len(), 2);
        }
        prop_assert_eq!(judge.verdict(at(second + 80)).kind, VerdictKind::Unknown);
    }

    #[test]
    fn healthy_is_said_only_when_everything_is_measured_and_nothing_fails(beats in beats()) {
        for verdict in play(&mut judge(), &beats, 0).0 {
            let clean = verdict.missing.is_empty() && verdict.evidence.is_empty();
            prop_assert!(clean || verdict.kind != VerdictKind::Healthy);
            prop_assert!(verdict.kind != VerdictKind::Suspect || !verdict.evidence.is_empty());
            prop_assert!(verdict.delegate.is_empty() || verdict.kind == VerdictKind::Degraded);
        }
    }

    #[test]
    fn a_count_fails_exactly_when_that_many_events_lie_within_the_span(
        counts in prop::collection::vec((1_u64..30, 0_u64..3), 1..60),
    ) {
        let mut judge = judge();
        let mut second = 0;
        let mut seen: Vec<(u64, u64)> = Vec::new();
        for (pause, count) in counts {
            second += pause;
            seen.push((second, count));
            let verdict = sweep(&mut judge, second, 1.0, count as f64);
            let within: u64 = seen.iter().filter(|(when, _)| second - when <= 60).map(|(_, n)| n).sum();
            let failing = verdict.evidence.iter().find(|one| one.threshold == "errors");
            prop_assert_eq!(failing.is_some(), within >= 3);
            prop_assert!(failing.is_none_or(|one| one.value == within as f64));
        }
    }

    #[test]
    fn a_restart_in_the_middle_changes_no_verdict(beats in beats(), cut in 0_usize..120) {
        let cut = cut.min(beats.len());
        let mut whole = judge();
        let (expected, _) = play(&mut whole, &beats, 0);
        let mut before = judge();
        let (mut got, second) = play(&mut before, &beats[..cut], 0);
        let saved = serde_json::to_string(before.saved()).unwrap();
        let mut after = Judge::new(
            Policy::parse(POLICY, "test").unwrap(),
            Some(serde_json::from_str(&saved).unwrap()),
        );
        got.extend(play(&mut after, &beats[cut..], second).0);
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn a_step_back_of_the_clock_leaves_the_verdict_as_it_was(beats in beats(), back in 1_u64..100_000) {
        let mut judge = judge();
        let (verdicts, second) = play(&mut judge, &beats, 200_000);
        let before = verdicts.last().unwrap();
        let after = judge.verdict(at(second - back));
        prop_assert_eq!(after.kind, before.kind);
        prop_assert_eq!(after.evidence.len(), before.evidence.len());
        prop_assert_eq!(after.missing.len(), before.missing.len());
    }
}
