//! The judge: samples in, verdicts out.

use super::policy::{Condition, Policy, Rule, Threshold};
use super::quantity::in_unit;
use super::series::{Series, Ticks};
use super::state::SavedState;
use super::verdict::{Evidence, Missing, Verdict, VerdictKind};
use crate::model::action::Actions;
use crate::model::metric::{Per, Sample, Subject};
use crate::model::units::{UnixMillis, human_duration};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

/// A subject other than the device that is silent for this many times `stale_after`, while another
/// subject of the same threshold is measured, is taken as removed (a container that ended, a disk
/// that was pulled) and no longer makes the verdict unknown.
const REMOVED_AFTER: u32 = 10;

/// Applies a policy to samples.
#[derive(Clone, Debug)]
pub struct Judge {
    policy: Policy,
    state: SavedState,
}

impl Judge {
    /// A judge with this policy, which goes on from `saved` where that still fits the policy.
    #[must_use]
    pub fn new(policy: Policy, saved: Option<SavedState>) -> Self {
        let mut state = saved.unwrap_or_default();
        state.fit(&policy);
        Self { policy, state }
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Puts another policy in force. State of thresholds whose definition (metric, per, limit, `for`)
    /// is unchanged is kept, and so is the verdict.
    pub fn replace_policy(&mut self, policy: Policy) {
        self.state.fit(&policy);
        self.policy = policy;
    }

    /// What must be kept over a restart. Save it after each verdict that changed, and at the end.
    #[must_use]
    pub fn saved(&self) -> &SavedState {
        &self.state
    }

    /// Takes in the samples of one sweep. Samples of metrics or subjects that no threshold names, not
    /// newer than the last of their kind, or that are no number, change nothing.
    pub fn observe(&mut self, samples: &[Sample], now: UnixMillis) {
        let tick = self.state.advance(now);
        let stale = self.policy.stale_after;
        for threshold in &self.policy.thresholds {
            let mut taken = samples
                .iter()
                .filter(|s| s.metric == threshold.metric.name && s.subject.per == threshold.per)
                .peekable();
            if taken.peek().is_none() {
                continue;
            }
            for sample in taken {
                let at = self.state.tick_of(sample.at);
                self.state
                    .of(threshold)
                    .series
                    .entry(sample.subject.name.clone())
                    .or_default()
                    .take(threshold, stale, sample.value, at);
            }
            forget_removed(threshold, &mut self.state, tick, stale);
        }
    }

    /// The verdict at `now`. Call it after [`Self::observe`] of the same sweep.
    pub fn verdict(&mut self, now: UnixMillis) -> Verdict {
        let tick = self.state.advance(now);
        let mut evidence = Vec::new();
        let mut missing = Vec::new();
        for threshold in &self.policy.thresholds {
            self.survey(threshold, tick, &mut evidence, &mut missing);
        }
        evidence.sort_by_key(|one| Reverse(one.severity));
        let failing: BTreeSet<&str> = evidence.iter().map(|one| one.threshold.as_str()).collect();
        let because: Vec<String> = self
            .policy
            .degraded
            .iter()
            .filter(|condition| holds(condition, &failing))
            .map(ToString::to_string)
            .collect();

        let wanted = if !because.is_empty() {
            VerdictKind::Degraded
        } else if !missing.is_empty() {
            VerdictKind::Unknown
        } else if !evidence.is_empty() {
            VerdictKind::Suspect
        } else {
            VerdictKind::Healthy
        };
        if wanted == VerdictKind::Degraded {
            self.state.delegate = self
                .policy
                .delegate
                .iter()
                .find(|entry| holds(&entry.when, &failing))
                .map_or_else(Actions::default, |entry| entry.actions.clone());
        }
        let (kind, held) = self.hold(wanted, !missing.is_empty(), tick);
        if kind != self.state.kind || self.state.since == 0 {
            self.state.kind = kind;
            self.state.since = tick;
        }
        Verdict {
            kind,
            since: self.state.wall_time(self.state.since),
            delegate: if kind == VerdictKind::Degraded {
                self.state.delegate.clone()
            } else {
                Actions::default()
            },
            evidence,
            missing,
            because,
            held_until: held.map(|rest| UnixMillis(now.0 + rest)),
        }
    }

    /// Applies `guards.hold`: the verdict does not turn from degraded to another, nor back, within
    /// the hold after such a turn. Losing sight in between is no turn. Also gives the milliseconds
    /// that are left, when the hold is what decided.
    fn hold(
        &mut self,
        wanted: VerdictKind,
        blind: bool,
        tick: Ticks,
    ) -> (VerdictKind, Option<u64>) {
        let hold_ms = u64::try_from(self.policy.guards.hold.as_millis()).unwrap_or(u64::MAX);
        let rest = self
            .state
            .turned
            .map(|turned| turned.saturating_add(hold_ms).saturating_sub(tick))
            .filter(|rest| *rest > 0);
        let was = self.state.degraded;
        let wants = wanted == VerdictKind::Degraded;
        if was == wants {
            return (wanted, None);
        }
        if let Some(rest) = rest {
            let kind = match (was, blind) {
                (true, _) => VerdictKind::Degraded,
                (false, true) => VerdictKind::Unknown,
                (false, false) => VerdictKind::Suspect,
            };
            return (kind, Some(rest));
        }
        if wanted != VerdictKind::Unknown {
            self.state.degraded = wants;
            self.state.turned = Some(tick);
        }
        (wanted, None)
    }

    /// Sorts the subjects of one threshold into failing and missing ones.
    fn survey(
        &self,
        threshold: &Threshold,
        tick: Ticks,
        evidence: &mut Vec<Evidence>,
        missing: &mut Vec<Missing>,
    ) {
        let stale = self.policy.stale_after;
        let remembered = self.state.thresholds.get(&threshold.name);
        let mut measured = false;
        for (name, series) in remembered.iter().flat_map(|state| &state.series) {
            measured = true;
            let subject = Subject {
                per: threshold.per,
                name: name.clone(),
            };
            if series.is_fresh(tick, stale) {
                if series.failed {
                    evidence.push(self.evidence(threshold, subject, series, tick));
                }
            } else if series.failed || !threshold.optional {
                // A sensor that fails and then falls silent has not got well, optional or not.
                missing.push(self.silent(threshold, subject, series, tick));
            }
        }
        if !measured && !threshold.optional {
            missing.push(Missing {
                threshold: threshold.name.clone(),
                metric: threshold.metric.name.to_owned(),
                subject: None,
                last_sample: None,
                text: format!(
                    "{}: {} has not been measured; if this device lacks it, set `optional: true`",
                    threshold.name, threshold.metric.name
                ),
            });
        }
    }

    fn evidence(
        &self,
        threshold: &Threshold,
        subject: Subject,
        series: &Series,
        tick: Ticks,
    ) -> Evidence {
        let unit = threshold.metric.unit;
        let show = |value| in_unit(value, unit);
        let since = series.beyond_since.unwrap_or(series.last_at);
        let lasting = human_duration(Duration::from_millis(tick.saturating_sub(since)));
        let (limit, passed, clears_when) = match threshold.rule {
            Rule::Above { enter, clear } => (
                enter,
                format!("{}, above {}", show(series.value), show(enter)),
                format!("{} or less", show(clear)),
            ),
            Rule::Below { enter, clear } => (
                enter,
                format!("{}, below {}", show(series.value), show(enter)),
                format!("{} or more", show(clear)),
            ),
            Rule::Count { at_least, within } => {
                let within = human_duration(within);
                (
                    at_least as f64,
                    format!(
                        "{} within {within}, at least {at_least}",
                        show(series.value)
                    ),
                    format!("fewer than {at_least} within {within}"),
                )
            }
        };
        Evidence {
            text: format!(
                "{} ({}): {} of {subject} is {passed}, for {lasting}; clears at {clears_when}",
                threshold.name, threshold.severity, threshold.metric.name
            ),
            threshold: threshold.name.clone(),
            metric: threshold.metric.name.to_owned(),
            subject,
            severity: threshold.severity,
            value: series.value,
            limit,
            since: self.state.wall_time(since),
            last_sample: self.state.wall_time(series.last_at),
            clears_when,
        }
    }

    fn silent(
        &self,
        threshold: &Threshold,
        subject: Subject,
        series: &Series,
        tick: Ticks,
    ) -> Missing {
        let age = human_duration(Duration::from_millis(tick.saturating_sub(series.last_at)));
        let failed = if series.failed {
            format!(
                ", and was failing at {}",
                in_unit(series.value, threshold.metric.unit)
            )
        } else {
            String::new()
        };
        Missing {
            text: format!(
                "{}: {} of {subject} has been silent for {age}{failed}",
                threshold.name, threshold.metric.name
            ),
            threshold: threshold.name.clone(),
            metric: threshold.metric.name.to_owned(),
            subject: Some(subject),
            last_sample: Some(self.state.wall_time(series.last_at)),
        }
    }
}

fn holds(condition: &Condition, failing: &BTreeSet<&str>) -> bool {
    match condition {
        Condition::Failures(count) => failing.len() >= *count,
        Condition::Any(names) => names.iter().any(|name| failing.contains(name.as_str())),
        Condition::All(names) => names.iter().all(|name| failing.contains(name.as_str())),
    }
}

fn forget_removed(threshold: &Threshold, state: &mut SavedState, tick: Ticks, stale: Duration) {
    let series = &mut state.of(threshold).series;
    if threshold.per == Per::Device || !series.values().any(|one| one.is_fresh(tick, stale)) {
        return;
    }
    // A failing part that falls silent may be dead rather than gone; only a container's end is
    // ordinary enough to be taken as the end of its failure.
    series.retain(|_, one| {
        one.is_fresh(tick, stale * REMOVED_AFTER) || (one.failed && threshold.per != Per::Container)
    });
}
