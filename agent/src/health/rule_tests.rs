//! Rule tests: series in, verdicts out, in YAML beside the policy that they test.
//!
//! Purpose: an operator writes down what a policy is meant to say, and `lifeboat policy test` says where it
//! does not. Invariants: a test sees time and samples as the agent's judge does; every mistake, in the file
//! or in the policy's verdict, has its line and column. Non-goals: reading files.

use super::policy::{Policy, Stage};
use super::quantity::{span, value_of};
use super::verdict::{Verdict, VerdictKind};
use super::{Judge, Threshold};
use crate::model::action::{Action, Actions};
use crate::model::locate::{Fault, Field, parse};
use crate::model::metric::{METRICS, Metric, Per, Sample, Subject};
use crate::model::nearest::hint;
use crate::model::units::UnixMillis;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::time::Duration;

/// When every test begins: the 1st of January 2030.
const START: UnixMillis = UnixMillis(1_893_456_000_000);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    policy: String,
    #[serde(default)]
    every: Option<String>,
    #[serde(default)]
    baseline: Vec<FileSeries>,
    tests: Vec<FileTest>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTest {
    name: String,
    #[serde(default)]
    series: Vec<FileSeries>,
    expect: Vec<Expect>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSeries {
    metric: String,
    #[serde(default)]
    per: Option<Per>,
    #[serde(default)]
    of: String,
    values: Vec<String>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    at: String,
    verdict: VerdictKind,
    #[serde(default)]
    stage: Option<Stage>,
    #[serde(default)]
    failing: Option<BTreeSet<String>>,
    #[serde(default)]
    missing: Option<BTreeSet<String>>,
    #[serde(default)]
    delegate: Option<BTreeSet<Action>>,
    #[serde(default)]
    says: Option<String>,
}

/// A part of a series: from one value to another, or silence.
#[derive(Clone, Debug, PartialEq)]
struct Segment {
    values: Option<(f64, f64)>,
    /// None: to the end of the test.
    lasts: Option<Duration>,
}

#[derive(Clone, Debug)]
struct Series {
    metric: &'static Metric,
    subject: Subject,
    segments: Vec<Segment>,
}

/// A file of rule tests.
#[derive(Clone)]
pub struct RuleTests {
    /// The policy's file, relative to this one.
    pub policy: String,
    every: Duration,
    tests: Vec<Test>,
}

#[derive(Clone)]
struct Test {
    name: String,
    field: Field,
    series: Vec<Series>,
    expect: Vec<(Duration, Expect)>,
}

/// What became of one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleTestOutcome {
    /// Its name.
    pub name: String,
    /// Where the verdict is not what was expected; empty when it passed.
    pub faults: Vec<Fault>,
}

impl RuleTests {
    /// Reads a file of rule tests.
    ///
    /// # Errors
    /// The first mistake of form, or all of meaning.
    pub fn parse(text: &str) -> Result<Self, Vec<Fault>> {
        let file: File = parse(text).map_err(|fault| vec![fault])?;
        let mut faults = Vec::new();
        let mut wrong =
            |field: &Field, message: String| faults.push(Fault::in_value(text, field, message));
        let root = Field::default();
        let every = file
            .every
            .as_deref()
            .map_or(Ok(Duration::from_secs(1)), span);
        let every = every.unwrap_or_else(|message| {
            wrong(&root.at("every"), message);
            Duration::from_secs(1)
        });
        if every < Duration::from_millis(100) {
            wrong(
                &root.at("every"),
                "no agent sweeps as often: write at least 100ms".into(),
            );
        }
        let baseline = series(&root.at("baseline"), &file.baseline, &mut wrong);
        let mut tests = Vec::new();
        for (place, test) in file.tests.into_iter().enumerate() {
            let field = root.at("tests").at(place);
            let mut own = series(&field.at("series"), &test.series, &mut wrong);
            let theirs = baseline.iter().filter(|base| {
                own.iter().all(|one| {
                    one.metric.name != base.metric.name || one.subject.per != base.subject.per
                })
            });
            own.extend(theirs.cloned().collect::<Vec<_>>());
            let mut expect = Vec::new();
            for (place, expected) in test.expect.into_iter().enumerate() {
                let field = field.at("expect").at(place).at("at");
                match span(&expected.at) {
                    Ok(at) if expect.last().is_none_or(|(before, _)| *before <= at) => {
                        expect.push((at, expected));
                    }
                    Ok(_) => wrong(
                        &field,
                        "earlier than the one before: write them in order".into(),
                    ),
                    Err(message) => wrong(&field, message),
                }
            }
            if expect.is_empty() {
                wrong(
                    &field.at("expect"),
                    "expects nothing: write for instance `- { at: 30s, verdict: healthy }`".into(),
                );
            }
            tests.push(Test {
                name: test.name,
                field,
                series: own,
                expect,
            });
        }
        if tests.is_empty() {
            wrong(&root.at("tests"), "no test: write at least one".into());
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        Ok(Self {
            policy: file.policy,
            every,
            tests,
        })
    }

    /// Runs every test on `policy`; `text` is what was parsed, for the places of faults.
    #[must_use]
    pub fn run(&self, text: &str, policy: &Policy) -> Vec<RuleTestOutcome> {
        self.tests
            .iter()
            .map(|test| RuleTestOutcome {
                name: test.name.clone(),
                faults: test.run(text, policy, self.every),
            })
            .collect()
    }

    /// Names of the policy's thresholds that no test expects to see failing.
    #[must_use]
    pub fn untested<'a>(&self, policy: &'a Policy) -> Vec<&'a Threshold> {
        let expected = || self.tests.iter().flat_map(|test| &test.expect);
        let tested = |name: &String| {
            expected()
                .any(|(_, expect)| expect.failing.iter().any(|failing| failing.contains(name)))
        };
        policy
            .thresholds
            .iter()
            .filter(|threshold| !tested(&threshold.name))
            .collect()
    }
}

impl Test {
    fn run(&self, text: &str, policy: &Policy, every: Duration) -> Vec<Fault> {
        let mut judge = Judge::new(policy.clone(), None);
        let mut faults = Vec::new();
        let mut elapsed = Duration::ZERO;
        let mut verdict = Verdict::default();
        for (place, (until, expect)) in self.expect.iter().enumerate() {
            while elapsed <= *until {
                let now = at(elapsed);
                let samples: Vec<Sample> = self
                    .series
                    .iter()
                    .filter_map(|series| series.sample(elapsed, now))
                    .collect();
                judge.observe(&samples, now);
                verdict = judge.verdict(now);
                elapsed += every;
            }
            let field = self.field.at("expect").at(place);
            for (key, message) in expect.differs(&verdict) {
                faults.push(Fault::in_value(text, &field.at(key), message));
            }
        }
        faults
    }
}

fn at(elapsed: Duration) -> UnixMillis {
    UnixMillis(START.0 + u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX / 2))
}

impl Expect {
    /// What is not as expected, by field.
    fn differs(&self, verdict: &Verdict) -> Vec<(&'static str, String)> {
        let mut wrong = Vec::new();
        if verdict.kind != self.verdict {
            wrong.push((
                "verdict",
                format!("expected {}, got {verdict}", self.verdict),
            ));
            return wrong;
        }
        let names = |set: &BTreeSet<String>| {
            let names: Vec<&str> = set.iter().map(String::as_str).collect();
            format!("[{}]", names.join(", "))
        };
        let failing: BTreeSet<String> = verdict
            .evidence
            .iter()
            .map(|one| one.threshold.clone())
            .collect();
        let missing: BTreeSet<String> = verdict
            .missing
            .iter()
            .map(|one| one.threshold.clone())
            .collect();
        for (key, wanted, got) in [
            ("failing", &self.failing, failing),
            ("missing", &self.missing, missing),
        ] {
            if let Some(wanted) = wanted.as_ref().filter(|wanted| **wanted != got) {
                wrong.push((
                    key,
                    format!("expected {}, got {}: {verdict}", names(wanted), names(&got)),
                ));
            }
        }
        if self.stage.is_some() && self.stage != verdict.stage {
            let got = verdict
                .stage
                .map_or("none".to_owned(), |stage| stage.to_string());
            wrong.push(("stage", format!("got {got}: {verdict}")));
        }
        let delegate = self
            .delegate
            .as_ref()
            .map(|actions| actions.iter().copied().collect::<Actions>());
        if delegate.is_some_and(|wanted| wanted != verdict.delegate) {
            wrong.push(("delegate", format!("got [{}]: {verdict}", verdict.delegate)));
        }
        if let Some(says) = self
            .says
            .as_ref()
            .filter(|says| !verdict.to_string().contains(says.as_str()))
        {
            wrong.push(("says", format!("`{says}` is not in: {verdict}")));
        }
        wrong
    }
}

impl Series {
    fn sample(&self, elapsed: Duration, now: UnixMillis) -> Option<Sample> {
        let mut begins = Duration::ZERO;
        for segment in &self.segments {
            let ends = segment.lasts.map(|lasts| begins + lasts);
            if let Some(ends) = ends.filter(|ends| elapsed >= *ends) {
                begins = ends;
                continue;
            }
            let (from, to) = segment.values?;
            let part = segment.lasts.map_or(0.0, |lasts| {
                (elapsed - begins).as_secs_f64() / lasts.as_secs_f64()
            });
            return Some(Sample {
                metric: self.metric.name.to_owned(),
                subject: self.subject.clone(),
                value: from + (to - from) * part,
                at: now,
            });
        }
        None
    }
}

fn series(
    field: &Field,
    entries: &[FileSeries],
    wrong: &mut impl FnMut(&Field, String),
) -> Vec<Series> {
    let mut read = Vec::new();
    for (place, entry) in entries.iter().enumerate() {
        let field = field.at(place);
        let Some(metric) = Metric::named(&entry.metric) else {
            let near = hint(&entry.metric, METRICS.iter().map(|metric| metric.name));
            wrong(
                &field.at("metric"),
                format!("unknown metric `{}`{near}", entry.metric),
            );
            continue;
        };
        let per = entry.per.unwrap_or(Per::Device);
        if !metric.per.contains(&per) && per != Per::Fleet {
            wrong(
                &field.at("per"),
                format!("{} is not measured per {}", metric.name, per.word()),
            );
        }
        let last = entry.values.len().saturating_sub(1);
        let mut segments = Vec::new();
        for (place, text) in entry.values.iter().enumerate() {
            match segment(text, metric) {
                Ok(segment) if segment.lasts.is_none() && place < last => wrong(
                    &field.at("values").at(place),
                    format!(
                        "only the last may last to the end: write for instance `{text} for 30s`"
                    ),
                ),
                Ok(segment) => segments.push(segment),
                Err(message) => wrong(&field.at("values").at(place), message),
            }
        }
        read.push(Series {
            metric,
            subject: Subject {
                per,
                name: entry.of.clone(),
            },
            segments,
        });
    }
    read
}

/// Reads `5ms for 30s`, `5ms to 40ms for 1m`, `absent for 20s`, `5ms`.
fn segment(text: &str, metric: &Metric) -> Result<Segment, String> {
    let (what, lasts) = match text.split_once(" for ") {
        Some((what, lasts)) => (what, Some(span(lasts)?)),
        None => (text, None),
    };
    if lasts.is_some_and(|lasts| lasts.is_zero()) {
        return Err("lasts for nothing: write at least 1s".into());
    }
    let value = |text: &str| value_of(text, metric);
    let values = match what.split_once(" to ") {
        _ if what.trim() == "absent" => None,
        Some(_) if lasts.is_none() => {
            return Err(format!(
                "`{text}` needs its time: write for instance `{text} for 1m`"
            ));
        }
        Some((from, to)) => Some((value(from)?, value(to)?)),
        None => Some((value(what)?, value(what)?)),
    };
    Ok(Segment { values, lasts })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "version: 1\nname: t\nthresholds:\n  busy: { metric: cpu.used, above: 90%, clear: 50%, for: 10s }\ndegraded: [any: [busy]]\nguards: { hold: 0s }\n";

    fn outcome(text: &str) -> Vec<String> {
        let tests = RuleTests::parse(text).unwrap_or_else(|faults| panic!("{faults:?}"));
        let policy = Policy::parse(POLICY, "p").unwrap();
        let outcomes = tests.run(text, &policy);
        outcomes
            .iter()
            .flat_map(|one| &one.faults)
            .map(|fault| fault.in_file("f"))
            .collect()
    }

    const TEXT: &str = "\
policy: p
tests:
  - name: one
    series:
      - { metric: cpu.used, values: [10% to 100% for 90s, 95% for 10s, absent for 20s, 40%] }
    expect:
      - { at: 80s, verdict: healthy }
      - { at: 92s, verdict: degraded, failing: [busy], stage: evacuate, delegate: [] }
      - { at: 115s, verdict: unknown, missing: [busy], says: was failing }
      - { at: 120s, verdict: healthy, failing: [] }
";

    #[test]
    fn a_test_passes_when_the_verdicts_are_as_expected() {
        assert_eq!(outcome(TEXT), Vec::<String>::new());
    }

    #[test]
    fn a_test_that_fails_says_where_and_what_was_instead() {
        let told = outcome(&TEXT.replace("80s, verdict: healthy", "80s, verdict: suspect"));
        assert_eq!(
            told,
            ["f:7:29: tests[0].expect[0].verdict: expected suspect, got healthy"]
        );
        let told = outcome(&TEXT.replace("stage: evacuate", "stage: watch"));
        assert!(
            told[0].starts_with("f:8:63: tests[0].expect[1].stage: got evacuate: degraded"),
            "{told:?}"
        );
        let told = outcome(&TEXT.replace("failing: [busy]", "failing: []"));
        assert!(
            told[0].starts_with("f:8:48: tests[0].expect[1].failing: expected [], got [busy]"),
            "{told:?}"
        );
        let told = outcome(&TEXT.replace("delegate: []", "delegate: [encrypt]"));
        assert_eq!(told.len(), 1);
        let told = outcome(&TEXT.replace("was failing", "was well"));
        assert_eq!(told.len(), 1);
    }

    #[test]
    fn a_mistake_in_a_test_has_its_place() {
        let fault = |from: &str, to: &str| {
            let faults = RuleTests::parse(&TEXT.replace(from, to)).err().unwrap();
            faults[0].in_file("f")
        };
        assert_eq!(
            fault("10% to", "10ms to"),
            "f:5:38: tests[0].series[0].values[0]: `10ms` does not fit this metric's unit: write a percentage such as 85%"
        );
        assert!(
            fault("cpu.used", "cpu.use")
                .starts_with("f:5:19: tests[0].series[0].metric: unknown metric")
        );
        assert!(
            fault("absent for 20s", "absent")
                .starts_with("f:5:72: tests[0].series[0].values[2]: only the last")
        );
        assert!(fault("at: 92s", "at: 70s").starts_with("f:8:15: tests[0].expect[1].at: earlier"));
        assert!(fault("name: one", "nam: one").contains("unknown field"));
    }
}
