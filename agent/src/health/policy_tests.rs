//! Policies that are right, and the message for each way to be wrong.

use super::*;
use crate::model::action::Action;
use crate::model::metric::Unit;
use std::time::Duration;

const GOOD: &str = "\
version: 1
name: test
thresholds:
  disk-slow:
    metric: block.latency_p99
    per: disk
    above: 40ms
    clear: 15ms
    for: 20s
  disk-errors:
    metric: block.errors
    count: { at_least: 3, within: 10m }
    severity: critical
  memory-low:
    metric: memory.available
    below: 3GiB
    optional: true
degraded:
  - failures: 2
  - any: [disk-errors]
delegate:
  - when: { all: [disk-slow, disk-errors] }
    actions: [encrypt, transfer]
guards:
  hold: 1h30m
  fleet_max_evacuating: 30%
  approvals: [oncall]
  approval_timeout: 15m
  on_timeout: proceed
";

#[test]
fn a_policy_is_read_into_the_units_of_its_metrics() {
    let policy = Policy::parse(GOOD, "f").unwrap();
    let names: Vec<&str> = policy.thresholds.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["disk-slow", "disk-errors", "memory-low"]);
    let slow = &policy.thresholds[0];
    assert_eq!(
        slow.rule,
        Rule::Above {
            enter: Limit::of(40e6),
            clear: Limit::of(15e6),
            rising: false
        }
    );
    assert_eq!(
        (slow.lasting, slow.severity),
        (Duration::from_secs(20), Severity::Warning)
    );
    let low = 3.0 * 1_073_741_824.0;
    assert_eq!(
        policy.thresholds[2].rule,
        Rule::Below {
            enter: Limit::of(low),
            clear: Limit::of(low)
        }
    );
    assert!(policy.thresholds[2].optional);
    assert!(policy.delegate[0].actions.contains(Action::Transfer));
    assert_eq!(policy.guards.hold, Duration::from_secs(5400));
    assert_eq!(policy.guards.fleet_max_evacuating, Some(30.0));
    assert_eq!(policy.guards.on_timeout, OnTimeout::Proceed);
    assert_eq!(policy.stale_after, Duration::from_secs(10));
}

/// The good policy with one line changed must give exactly one fault, which starts so.
fn wrong(from: &str, to: &str, expected: &str) {
    assert!(GOOD.contains(from), "{from}");
    let error = Policy::parse(&GOOD.replacen(from, to, 1), "f").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(expected), "\n  {text}\n  {expected}");
    assert_eq!(error.faults.len(), 1, "{text}");
}

#[test]
fn a_mistake_names_file_line_column_field_and_what_would_be_right() {
    wrong(
        "clear: 15ms",
        "clear: 50ms",
        "f:8:12: thresholds.disk-slow.clear: 50ms is not on the healthy side of above: write at most 40ms",
    );
    wrong(
        "block.latency_p99",
        "block.latencyp99",
        "f:5:13: thresholds.disk-slow.metric: unknown metric `block.latencyp99`; did you mean block.latency_p99",
    );
    wrong(
        "above: 40ms",
        "above: 40",
        "f:7:12: thresholds.disk-slow.above: `40` does not fit this metric's unit: write a time such as 40ms",
    );
    wrong(
        "above: 40ms",
        "above: device-limit - 5ms",
        "f:7:12: thresholds.disk-slow.above: device-limit is known of the plain values of cpu.temperature, sensor.temperature, disk.temperature only",
    );
    wrong(
        "for: 20s",
        "for: 20",
        "f:9:10: thresholds.disk-slow.for: `20` is not a span of time",
    );
    wrong(
        "per: disk",
        "per: sensor",
        "f:6:10: thresholds.disk-slow.per: block.latency_p99 is not measured per sensor: write device or disk or container",
    );
    wrong(
        "any: [disk-errors]",
        "any: [disk-erors]",
        "f:20:11: degraded[1].any[0]: unknown threshold `disk-erors`; did you mean disk-errors?",
    );
    wrong(
        "failures: 2",
        "failures: 4",
        "f:19:15: degraded[0].failures: 4 never",
    );
    wrong(
        "fleet_max_evacuating: 30%",
        "fleet_max_evacuating: 130%",
        "f:26:25: guards.fleet_max_evacuating: `130%` is more than 100%",
    );
    wrong(
        "below: 3GiB",
        "below: 100000000000000000000000GiB",
        "f:16:12: thresholds.memory-low.below: `100000000000000000000000GiB` is beyond anything there is: write less than 8388608TiB",
    );
    wrong(
        "fleet_max_evacuating: 30%",
        "limit: 100000000000000000000000GiB",
        "f:26:10: guards.limit: `100000000000000000000000GiB` is beyond anything there is",
    );
    wrong(
        "version: 1",
        "version: 2",
        "f:1:10: version: version 2 is not known",
    );
    wrong(
        "within: 10m",
        "within: 0s",
        "f:12:35: thresholds.disk-errors.count.within: 0 would never fail",
    );
    wrong(
        "at_least: 3",
        "at_least: 0",
        "f:12:24: thresholds.disk-errors.count.at_least: 0 would always fail",
    );
}

#[test]
fn a_mistake_of_form_is_told_in_the_same_way() {
    wrong(
        "    for: 20s",
        "    fo: 20s",
        "f:9:5: thresholds.disk-slow.fo: unknown field; did you mean for?",
    );
    wrong(
        "    for: 20s",
        "    20: 20s",
        "f:9:5: thresholds.disk-slow.20: unknown field",
    );
    wrong("    for: 20s", "    for: [20s", "f:");
    wrong(
        "severity: critical",
        "severity: fatal",
        "f:13:15: thresholds.disk-errors.severity: `fatal` is not known: write warning or critical",
    );
    wrong(
        "    metric: memory.available\n",
        "",
        "f:14:3: thresholds.memory-low: `metric` is missing: write it",
    );
    wrong(
        "[encrypt, transfer]",
        "[encrypt, move]",
        "f:23:24: delegate[0].actions[1]: `move` is not known: write encrypt or transfer or serve",
    );
    wrong(
        "  disk-errors:",
        "  disk-slow:",
        "f:10:3: thresholds.disk-slow: duplicate name",
    );
    wrong(
        "at_least: 3",
        "at_least: -3",
        "f:12:24: thresholds.disk-errors.count.at_least: ",
    );
}

/// Every fault of the good policy with some lines changed.
fn all_wrong(changes: &[(&str, &str)]) -> Vec<String> {
    let text = changes.iter().fold(GOOD.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1)
    });
    let faults = Policy::parse(&text, "f").unwrap_err().faults;
    faults.iter().map(|fault| fault.in_file("f")).collect()
}

#[test]
fn an_unknown_field_hides_no_other_mistake_and_brings_none_of_its_own() {
    let told = all_wrong(&[
        ("above: 40ms", "abvoe: 40ms"),
        ("below: 3GiB", "below: 3ms"),
        ("  hold: 1h30m", "  holt: 1h30m"),
        ("any: [disk-errors]", "any: [{ nott: disk-slow }, gone]"),
    ]);
    let expected = [
        "f:7:5: thresholds.disk-slow.abvoe: unknown field; did you mean above?",
        "f:16:12: thresholds.memory-low.below: `3ms` does not fit",
        "f:20:13: degraded[1].any[0].nott: unknown field; did you mean not?",
        "f:20:32: degraded[1].any[1]: unknown threshold `gone`",
        "f:25:3: guards.holt: unknown field; did you mean hold?",
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(expected), "{told}\n{expected}");
    }
    let told = all_wrong(&[("metric: memory.available", "metrik: memory.available")]);
    assert_eq!(told.len(), 1, "{told:#?}");
    // Twice the same, of which neither is read.
    let told = all_wrong(&[(
        "    severity: critical",
        "    colour: red\n    colour: blue",
    )]);
    assert!(told[0].contains("colour"), "{told:#?}");
}

#[test]
fn what_can_never_be_or_is_no_wish_is_refused_where_it_stands() {
    let flag = |metric: &str, rest: &str| {
        let text = format!("metric: {metric}\n    {rest}");
        GOOD.replacen("metric: memory.available\n    below: 3GiB", &text, 1)
    };
    let told = |text: &str| Policy::parse(text, "f").map_err(|error| error.to_string());
    let refused = told(&flag("raid.failed", "per: array\n    above: 1"));
    assert_eq!(
        refused.unwrap_err(),
        "f:17:12: thresholds.memory-low.above: raid.failed is never above 1 per array: write a smaller limit"
    );
    // Of the device it is how many.
    assert!(told(&flag("raid.failed", "above: 1")).is_ok());
    assert!(told(&flag("raid.failed", "per: array\n    above: 0")).is_ok());
    assert!(told(&flag("filesystem.mounted", "per: mount\n    below: 2")).is_ok());
    // A default that does not fit is told at what it is the default of.
    let refused = told(&flag("disk.capacity", "below: 3GiB")).unwrap_err();
    assert!(
        refused.starts_with(
            "f:14:3: thresholds.memory-low.per: disk.capacity is not measured per device"
        ),
        "{refused}"
    );
    wrong(
        "approvals: [oncall]",
        "approvals: [oncall, oncall]",
        "f:27:23: guards.approvals[1]: `oncall` stands here twice: remove one",
    );
    wrong(
        "below: 3GiB",
        "below: 8388608TiB",
        "f:16:12: thresholds.memory-low.below: `8388608TiB` is beyond anything there is: write less than 8388608TiB",
    );
    wrong(
        "above: 40ms",
        "above: 36525d",
        "f:7:12: thresholds.disk-slow.above: `36525d` is beyond anything there is: write less than 36525d",
    );
}

#[test]
fn a_byte_order_mark_in_front_of_a_policy_is_no_part_of_it() {
    let marked = format!("\u{feff}{GOOD}");
    assert_eq!(
        Policy::parse(&marked, "f").unwrap(),
        Policy::parse(GOOD, "f").unwrap()
    );
    let wrong = Policy::parse(&marked.replace("version: 1", "version: 9"), "f");
    assert!(
        wrong
            .unwrap_err()
            .to_string()
            .starts_with("f:1:10: version: ")
    );
}

#[test]
fn what_is_no_policy_is_told_in_words_of_the_file() {
    let error = Policy::parse("- a\n", "f").unwrap_err().to_string();
    assert!(
        error.contains("a list does not fit here: write a policy: `version`"),
        "{error}"
    );
}

#[test]
fn a_share_that_is_never_passed_is_refused() {
    wrong(
        "block.latency_p99\n    per: disk\n    above: 40ms\n    clear: 15ms",
        "memory.used\n    above: 100%",
        "f:6:12: thresholds.disk-slow.above: memory.used is never above 100%",
    );
    let worn = GOOD.replace(
        "block.latency_p99\n    per: disk\n    above: 40ms\n    clear: 15ms",
        "disk.wear\n    above: 100%",
    );
    assert!(Policy::parse(&worn, "f").is_ok());
}

#[test]
fn a_unit_that_is_not_the_metrics_is_refused_with_the_right_one() {
    wrong(
        "block.latency_p99\n    per: disk\n    above: 40ms\n    clear: 15ms",
        "memory.used\n    above: 40ms",
        "f:6:12: thresholds.disk-slow.above: `40ms` does not fit this metric's unit: write a percentage such as 85%",
    );
    wrong(
        "    clear: 15ms",
        "    relative_to_peers: { at_least: 5ms }",
        "f:7:12: thresholds.disk-slow.above: `40ms` does not fit this metric's unit: write a multiple such as 3x",
    );
}

#[test]
fn conditions_that_do_not_fit_are_refused_at_their_place() {
    let cases = [
        (
            "rising: true",
            "f:9:5: thresholds.disk-slow.rising: needs a span",
        ),
        (
            "forecast: { reaches: 1s, within: 6h }",
            "f:5:5: thresholds.disk-slow: has several limits",
        ),
        (
            "relative_to_load: { metric: block.iop }",
            "f:9:33: thresholds.disk-slow.relative_to_load.metric: unknown metric `block.iop`; did you mean block.iops",
        ),
        (
            "relative_to_load: { metric: memory.used }",
            "f:9:33: thresholds.disk-slow.relative_to_load.metric: memory.used is not measured per disk",
        ),
        (
            "relative_to_load: { metric: block.iops, at_least: 5ms }",
            "f:9:55: thresholds.disk-slow.relative_to_load.at_least: `5ms` does not fit this metric's unit: write a number a second",
        ),
    ];
    for (key, expected) in cases {
        let expected = expected.replace(
            "f:5:5: thresholds.disk-slow: has",
            "f:4:3: thresholds.disk-slow: has",
        );
        wrong("    for: 20s", &format!("    {key}"), &expected);
    }
    wrong(
        "below: 3GiB",
        "below: 3GiB\n    for: 1m\n    rising: true",
        "f:18:5: thresholds.memory-low.rising: goes with `above` only",
    );
    wrong(
        "below: 3GiB",
        "forecast: { within: 6h }",
        "f:16:5: thresholds.memory-low.forecast: write exactly one of reaches",
    );
    wrong(
        "below: 3GiB",
        "forecast: { falls_to: 3GiB, within: 6h }\n    clear: 1h",
        "f:17:12: thresholds.memory-low.clear: is not on the healthy side of the forecast: write at least 6h",
    );
    wrong(
        "below: 3GiB",
        "forecast: { falls_to: 3GiB, within: 2m }",
        "f:16:41: thresholds.memory-low.forecast.within: a quarter of it is too short",
    );
}

#[test]
fn not_and_stages_are_checked_at_their_place() {
    wrong(
        "- failures: 2",
        "- not: disk-slow",
        "f:19:5: degraded[0]: holds while no threshold fails",
    );
    wrong(
        "- failures: 2",
        "- all: [disk-slow, { not: disk-fast }]",
        "f:19:29: degraded[0].all[1].not: unknown threshold `disk-fast`",
    );
    wrong(
        "- failures: 2",
        "- all: [disk-slow, { nott: disk-errors }]",
        "f:19:24: degraded[0].all[1].nott: unknown field; did you mean not?",
    );
    wrong(
        "- failures: 2",
        "- { failures: 2, stage: later }",
        "f:19:27: degraded[0].stage: `later` is not known: write watch or prepare or evacuate",
    );
    let text = GOOD.replace(
        "- failures: 2",
        "- { all: [disk-slow, { not: disk-errors }], stage: watch }\n  - { failures: 1, stage: prepare }",
    );
    let policy = Policy::parse(&text, "f").unwrap();
    assert_eq!(policy.degraded[0].stage, Stage::Watch);
    assert_eq!(policy.degraded[1].stage, Stage::Prepare);
    assert_eq!(policy.degraded[2].stage, Stage::Evacuate);
    assert_eq!(
        policy.degraded[0].when.to_string(),
        "all: [disk-slow, { not: disk-errors }]"
    );
}

#[test]
fn limits_of_the_wrong_kind_are_refused() {
    wrong(
        "count: { at_least: 3, within: 10m }",
        "above: 3",
        "f:12:5: thresholds.disk-errors.above: block.errors counts events: write count:",
    );
    wrong(
        "below: 3GiB",
        "count: { at_least: 3, within: 10m }",
        "f:16:5: thresholds.memory-low.count: memory.available is a level",
    );
    wrong(
        "    below: 3GiB\n",
        "",
        "f:14:3: thresholds.memory-low: has no limit",
    );
    wrong(
        "    below: 3GiB",
        "    below: 3GiB\n    above: 4GiB",
        "f:14:3: thresholds.memory-low: has several limits",
    );
    wrong(
        "severity: critical",
        "for: 3s",
        "f:13:5: thresholds.disk-errors.for: does not go with count",
    );
    wrong(
        "- failures: 2",
        "- { failures: 2, any: [disk-slow] }",
        "f:19:5: degraded[0]: write exactly one",
    );
}

#[test]
fn all_mistakes_of_meaning_are_told_at_once_in_the_files_order() {
    let text = GOOD
        .replace("clear: 15ms", "clear: 50ms")
        .replace("hold: 1h30m", "hold: soon");
    let error = Policy::parse(&text, "f").unwrap_err();
    let fields: Vec<String> = error
        .faults
        .iter()
        .map(|fault| fault.field.to_string())
        .collect();
    assert_eq!(fields, ["thresholds.disk-slow.clear", "guards.hold"]);
}

#[test]
fn values_are_shown_in_the_units_of_policies() {
    assert_eq!(in_unit(61.4e6, Unit::Nanoseconds), "61.4 ms");
    assert_eq!(in_unit(3e9, Unit::Nanoseconds), "3.0 s");
    assert_eq!(in_unit(85.0, Unit::Percent), "85 %");
    assert_eq!(in_unit(3.0 * 1_073_741_824.0, Unit::Bytes), "3.0 GiB");
}

#[test]
fn a_key_without_a_value_is_refused_at_its_place_and_by_the_schema() {
    let cases = [
        ("    for: 20s", "    for:", "f:9:"),
        ("    per: disk", "    per:", "f:6:"),
        ("    clear: 15ms", "    clear: ~", "f:8:"),
        (
            "    count: { at_least: 3, within: 10m }",
            "    count:",
            "f:12:",
        ),
        ("    optional: true", "    optional:", "f:17:"),
        ("    severity: critical", "    severity:", "f:13:"),
        ("  - failures: 2", "  - failures:", "f:19:"),
        ("  - any: [disk-errors]", "  - any:", "f:20:"),
        ("  hold: 1h30m", "  hold:", "f:25:"),
        (
            "  fleet_max_evacuating: 30%",
            "  fleet_max_evacuating:",
            "f:26:",
        ),
        ("  approvals: [oncall]", "  approvals:", "f:27:"),
        ("  on_timeout: proceed", "  on_timeout:", "f:29:"),
        ("  on_timeout: proceed", "  limit:", "f:29:"),
        ("    actions: [encrypt, transfer]", "    actions:", "f:23:"),
        (&GOOD[GOOD.find("guards:").unwrap()..], "guards:", "f:24:"),
        (
            "delegate:\n  - when: { all: [disk-slow, disk-errors] }\n    actions: [encrypt, transfer]",
            "delegate:",
            "f:21:",
        ),
    ];
    for (from, to, place) in cases {
        wrong(from, to, place);
    }
    assert!(!policy_schema().to_string().contains("null"));
}

#[test]
fn a_limit_that_can_never_be_passed_is_refused_and_one_that_can_is_not() {
    let level = "block.latency_p99\n    per: disk\n    above: 40ms\n    clear: 15ms\n    for: 20s";
    let may = |to: &str| Policy::parse(&GOOD.replacen(level, to, 1), "f").map(|_| ());
    wrong(
        level,
        "memory.available\n    below: 0B",
        "f:6:12: thresholds.disk-slow.below: memory.available is never below 0",
    );
    wrong(
        "    for: 20s",
        "    for: 4s\n    rising: true",
        "f:10:5: thresholds.disk-slow.rising: needs a span",
    );
    assert_eq!(may("cpu.temperature\n    below: 0C"), Ok(()));
    assert_eq!(may("disk.spare_margin\n    below: 0%"), Ok(()));
    assert_eq!(may("disk.wear\n    above: 150%"), Ok(()));
    assert_eq!(
        may("disk.power_on\n    per: disk\n    above: 1826d"),
        Ok(())
    );
    let share =
        "block.iops\n    relative_to_load: { metric: block.bytes_per_second }\n    above: 250%";
    assert_eq!(may(share), Ok(()));
}
