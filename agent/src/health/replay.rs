//! A recorded device under a policy: when the verdict would have changed.

use super::policy::{Policy, Stage};
use super::recording::{RecordingEnd, RecordingError, RecordingHeader, sweeps};
use super::verdict::{Verdict, VerdictKind};
use super::{Judge, Measure, limits};
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
    let RecordingEnd { torn, .. } = sweeps(
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
    summary.torn = torn;
    summary.lasted = last.unwrap_or_default().since(first.unwrap_or_default());
    Ok(summary)
}

/// The metrics that a policy looks at.
fn metrics(policy: &Policy) -> BTreeSet<&'static str> {
    let of = |threshold: &super::Threshold| {
        let load = match threshold.measure {
            Measure::PerLoad { load, .. } => Some(load),
            _ => None,
        };
        let limit = limits::own_limit(threshold.metric);
        [Some(threshold.metric), load, limit]
            .into_iter()
            .flatten()
            .map(|metric| metric.name)
    };
    policy.thresholds.iter().flat_map(of).collect()
}
