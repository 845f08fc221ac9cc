//! A recorded device under a policy: when the verdict would have changed.

use super::policy::{Policy, Stage};
use super::reading::MOUNTED;
use super::recording::{RecordingEnd, RecordingError, RecordingHeader, sweeps};
use super::verdict::{Verdict, VerdictKind};
use super::{Judge, Measure, limits};
use crate::model::metric::{METRICS, Metric, Per};
use crate::model::units::UnixMillis;
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::Duration;

/// What a replay tells, in the order of the recording.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Replayed {
    /// The recorder started.
    Started {
        /// Device.
        device: String,
        /// When.
        at: UnixMillis,
    },
    /// Nothing was recorded for longer than the policy's `stale_after`.
    Gap {
        /// First sweep after it.
        at: UnixMillis,
        /// How long.
        lasted: Duration,
    },
    /// The verdict or its stage changed.
    Verdict {
        /// When.
        at: UnixMillis,
        /// Whether the agent would have started to evacuate.
        acts: bool,
        /// With its evidence.
        verdict: Box<Verdict>,
    },
}

/// What a replay comes to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ReplaySummary {
    /// Sweeps.
    pub sweeps: u64,
    /// From the first to the last.
    pub lasted: Duration,
    /// Changes of the verdict.
    pub changes: u64,
    /// Times that the agent would have started to evacuate.
    pub acts: u64,
    /// Bytes at the end that are no whole frame, as after a crash of the recorder.
    pub torn: usize,
    /// Whether these are more than one frame that a crash cut: they were altered, and nothing behind them was judged.
    pub altered: bool,
}

/// Judges a recording from its beginning, with nothing remembered. The same recording and policy always
/// tell the same.
///
/// # Errors
/// The recording cannot be read.
pub fn replay(
    recording: &[u8],
    policy: Policy,
    mut tell: impl FnMut(Replayed),
) -> Result<ReplaySummary, RecordingError> {
    let wanted = metrics(&policy);
    let stale = policy.stale_after;
    let mut judge = Judge::new(policy, None);
    let mut summary = ReplaySummary::default();
    let mut first = None;
    let mut last: Option<UnixMillis> = None;
    let mut was: Option<(VerdictKind, Option<Stage>)> = None;
    // Both closures tell.
    let tell = std::cell::RefCell::new(&mut tell);
    let start = |header: RecordingHeader| {
        (tell.borrow_mut())(Replayed::Started {
            device: header.device,
            at: header.at,
        });
    };
    let RecordingEnd { torn, altered, .. } = sweeps(
        recording,
        |metric| wanted.contains(metric),
        start,
        |at, samples| {
            let gap = last.map(|last| at.since(last)).filter(|gap| *gap > stale);
            if let Some(lasted) = gap {
                (tell.borrow_mut())(Replayed::Gap { at, lasted });
            }
            first.get_or_insert(at);
            last = Some(at);
            summary.sweeps += 1;
            judge.observe(samples, at);
            let verdict = judge.verdict(at);
            let is = (verdict.kind, verdict.stage);
            if was != Some(is) {
                let acts = verdict.stage == Some(Stage::Evacuate);
                summary.acts += u64::from(acts);
                summary.changes += u64::from(was.is_some());
                was = Some(is);
                (tell.borrow_mut())(Replayed::Verdict {
                    at,
                    acts,
                    verdict: Box::new(verdict),
                });
            }
        },
    )?;
    (summary.torn, summary.altered) = (torn, altered);
    summary.lasted = last.unwrap_or_default().since(first.unwrap_or_default());
    Ok(summary)
}

/// The metrics that the judge looks at under a policy.
fn metrics(policy: &Policy) -> BTreeSet<&'static str> {
    let of = |threshold: &super::Threshold| {
        let load = match threshold.measure {
            Measure::PerLoad { load, .. } => Some(load),
            _ => None,
        };
        let limit = limits::own_limit(threshold.metric);
        let mounted = (threshold.per == Per::Mount).then_some(MOUNTED);
        // One of these is gone once nothing at all is measured of it.
        let per = threshold.per;
        let gone = move |metric: &&'static Metric| {
            matches!(per, Per::Container | Per::Interface | Per::Peer) && metric.per.contains(&per)
        };
        let metrics = [Some(threshold.metric), load, limit].into_iter().flatten();
        let metrics = metrics.chain(METRICS.iter().filter(gone));
        metrics.map(|metric| metric.name).chain(mounted)
    };
    policy.thresholds.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Encoder, MAGIC};
    use super::*;
    use crate::model::metric::{Sample, Subject};

    const START: u64 = 1_893_456_000_000;

    fn policy() -> Policy {
        Policy::parse(include_str!("../../../policies/default.yaml"), "default").unwrap()
    }

    /// A host whose every device metric has a value each second; it is starved now and then.
    fn samples(second: u64) -> Vec<Sample> {
        let starved = second / 200 % 2 == 1;
        let sample = |(place, metric): (usize, &Metric)| Sample {
            metric: metric.name.to_owned(),
            subject: Subject::device(),
            value: match metric.name {
                "block.errors" => 0.0,
                "sched.run_queue_latency_p99" | "block.latency_p99" if starved => 90e6,
                // Some change with each sweep and some never.
                _ => {
                    1.0 + if place % 2 == 0 {
                        (second % 97) as f64 / 7.0
                    } else {
                        0.0
                    }
                }
            },
            at: UnixMillis(START + second * 1000),
        };
        METRICS.iter().enumerate().map(sample).collect()
    }

    fn recording(seconds: u64) -> Vec<u8> {
        let header = RecordingHeader {
            device: "box1".into(),
            version: "0".into(),
            at: UnixMillis(START),
        };
        let (mut encoder, start) = Encoder::start(&header).unwrap();
        let mut bytes = [MAGIC, &start].concat();
        for second in 0..seconds {
            bytes.extend(encoder.sweep(UnixMillis(START + second * 1000), &samples(second)));
        }
        bytes
    }

    #[test]
    fn a_replay_tells_what_the_judge_told_live_and_the_same_again() {
        let mut live = Vec::new();
        let mut judge = Judge::new(policy(), None);
        for second in 0..1500 {
            let now = UnixMillis(START + second * 1000);
            judge.observe(&samples(second), now);
            let verdict = judge.verdict(now);
            let is = (verdict.kind, verdict.stage);
            if live
                .last()
                .is_none_or(|before: &Verdict| (before.kind, before.stage) != is)
            {
                live.push(verdict);
            }
        }
        let bytes = recording(1500);
        let told = || {
            let mut told = Vec::new();
            let summary = replay(&bytes, policy(), |event| told.push(event)).unwrap();
            (told, summary)
        };
        let (events, summary) = told();
        let verdicts: Vec<Verdict> = events
            .iter()
            .filter_map(|event| match event {
                Replayed::Verdict { verdict, .. } => Some((**verdict).clone()),
                _ => None,
            })
            .collect();
        assert!(live.len() > 3, "{live:?}");
        assert_eq!(verdicts, live);
        assert_eq!(
            (summary.sweeps, summary.changes),
            (1500, live.len() as u64 - 1)
        );
        assert_eq!(told(), (events, summary));
    }

    #[test]
    fn a_container_that_has_lost_a_sensor_is_not_gone_in_a_replay_either() {
        let text = "version: 1
name: t
thresholds:
  much: { metric: memory.used_bytes, per: container, above: 1MiB, optional: true }
degraded: [any: [much]]
guards: { hold: 0s }
";
        let policy = || Policy::parse(text, "t").unwrap();
        let header = RecordingHeader {
            device: "box1".into(),
            version: "0".into(),
            at: UnixMillis(START),
        };
        let (mut encoder, start) = Encoder::start(&header).unwrap();
        let mut bytes = [MAGIC, &start].concat();
        let mut judge = Judge::new(policy(), None);
        let mut live = VerdictKind::default();
        for second in 0..300 {
            let at = UnixMillis(START + second * 1000);
            let of = |metric: &str| Sample {
                metric: metric.into(),
                subject: Subject::new(Per::Container, "a"),
                value: 1e12,
                at,
            };
            let mut samples = vec![of("pressure.io_some")];
            if second < 5 {
                samples.push(of("memory.used_bytes"));
            }
            judge.observe(&samples, at);
            live = judge.verdict(at).kind;
            bytes.extend(encoder.sweep(at, &samples));
        }
        let mut replayed = VerdictKind::default();
        replay(&bytes, policy(), |event| {
            if let Replayed::Verdict { verdict, .. } = event {
                replayed = verdict.kind;
            }
        })
        .unwrap();
        assert_eq!(
            (live, replayed),
            (VerdictKind::Unknown, VerdictKind::Unknown)
        );
    }

    #[test]
    fn a_gap_is_told_and_a_limit_passed_before_and_after_it_is_not_taken_as_passed_within() {
        let header = RecordingHeader {
            device: "box1".into(),
            version: "0".into(),
            at: UnixMillis(START),
        };
        let (mut encoder, start) = Encoder::start(&header).unwrap();
        let mut bytes = [MAGIC, &start].concat();
        for second in (380..400).chain(590..600) {
            bytes.extend(encoder.sweep(UnixMillis(START + second * 1000), &samples(second)));
        }
        let mut gaps = Vec::new();
        let mut kinds = Vec::new();
        replay(&bytes, policy(), |event| match event {
            Replayed::Gap { lasted, .. } => gaps.push(lasted),
            Replayed::Verdict { verdict, .. } => kinds.push(verdict.kind),
            Replayed::Started { .. } => {}
        })
        .unwrap();
        assert_eq!(gaps, [Duration::from_secs(191)]);
        assert_eq!(kinds, [VerdictKind::Healthy]);
    }
}
