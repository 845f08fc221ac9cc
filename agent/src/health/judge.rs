//! The judge: samples in, verdicts out.

use super::policy::{Degraded, Policy, Stage, Threshold};
use super::quantity::in_unit;
use super::reading::{Reading, mounted, readings};
use super::series::{Series, Ticks};
use super::state::{Remembered, SavedState};
use super::story::{Story, story};
use super::verdict::{Evidence, Missing, Verdict, VerdictKind};
use crate::model::action::Actions;
use crate::model::metric::{Per, Sample, Subject};
use crate::model::units::{UnixMillis, human_duration};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

/// A subject other than the device that is silent for this many times `stale_after`, while another
/// subject of the same threshold is measured, is taken as removed (a container that ended, a disk
/// that was pulled) and no longer makes the verdict unknown. So is a container or peer of which nothing
/// at all is measured any more, and, without that wait, a container or its interface that was well while others are
/// measured.
const REMOVED_AFTER: u32 = 10;

/// How the interfaces that runtimes make for containers are called.
const OF_CONTAINERS: &str = "veth";

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

    /// Tells how much time truly passed from the sweep before to the one at `now`, also where the wall clock was
    /// set in between. Call it before [`Self::observe`]; without it the wall clock counts.
    pub fn pass(&mut self, now: UnixMillis, passed: Duration) {
        self.state.pass(now, passed);
    }

    /// Takes in the samples of one sweep. Samples of metrics or subjects that no threshold names, not
    /// newer than the last of their kind, or that are no number, change nothing.
    pub fn observe(&mut self, samples: &[Sample], now: UnixMillis) {
        let tick = self.state.advance(now);
        let stale = self.policy.stale_after;
        let mounted = mounted(samples);
        for threshold in &self.policy.thresholds {
            let readings = readings(threshold, samples);
            if let Some(mounted) = mounted.as_ref().filter(|_| threshold.per == Per::Mount) {
                let measured =
                    |name: &String| readings.iter().any(|(of, _)| of.subject.name == *name);
                let series = &mut self.state.of(threshold).series;
                series.retain(|name, _| mounted.contains(name.as_str()) || measured(name));
            }
            if readings.is_empty() {
                if let Some(remembered) = self.state.thresholds.get_mut(&threshold.name) {
                    // Why it could not be judged while it was measured.
                    let series = &remembered.series;
                    remembered
                        .blind
                        .retain(|name, _| !series.contains_key(name));
                    forget_removed(threshold, remembered, samples, tick, stale);
                }
                continue;
            }
            let times: Vec<Ticks> = readings
                .iter()
                .map(|(sample, _)| self.state.tick_of(sample.at))
                .collect();
            let remembered = self.state.of(threshold);
            remembered.blind.clear();
            for ((sample, reading), at) in readings.into_iter().zip(times) {
                let subject = &sample.subject.name;
                if let Reading::Blind(why) = reading {
                    remembered.blind.insert(subject.clone(), why);
                    continue;
                }
                if !remembered.series.contains_key(subject) {
                    remembered.series.insert(subject.clone(), Series::default());
                }
                if let Some(series) = remembered.series.get_mut(subject) {
                    series.take(threshold, stale, &reading, at);
                }
            }
            forget_removed(threshold, remembered, samples, tick, stale);
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
        let blind = self.blind(&failing, &missing, tick);
        let holding: Vec<&Degraded> = self
            .policy
            .degraded
            .iter()
            .filter(|entry| entry.when.holds(&failing, &blind) == Some(true))
            .collect();
        let because: Vec<String> = holding.iter().map(|entry| entry.when.to_string()).collect();
        let stage = holding.iter().map(|entry| entry.stage).max();

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
                .find(|entry| entry.when.holds(&failing, &blind) == Some(true))
                .map_or_else(Actions::default, |entry| entry.actions.clone());
        }
        let (kind, held) = self.hold(wanted, !missing.is_empty(), tick);
        let stage = self.stage(kind, stage, tick);
        if kind != self.state.kind || self.state.since == 0 {
            self.state.kind = kind;
            self.state.since = tick;
        }
        Verdict {
            kind,
            stage,
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

    /// How long after the last samples the next threshold that is passed now has been passed for its time;
    /// none when none waits for that.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        let waits = |threshold: &Threshold, series: &Series| {
            let since = series.beyond_since.filter(|_| !series.failed)?;
            let passed = Duration::from_millis(series.last_at.saturating_sub(since));
            let rest = threshold.lasting.checked_sub(passed)?;
            (!rest.is_zero()).then_some(rest)
        };
        self.policy
            .thresholds
            .iter()
            .filter_map(|threshold| Some((threshold, self.state.thresholds.get(&threshold.name)?)))
            .flat_map(|(threshold, state)| {
                let series = state.series.values();
                series.filter_map(move |series| waits(threshold, series))
            })
            .min()
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

    /// How far a degraded device is helped: more at once, less only when the hold is over.
    fn stage(&mut self, kind: VerdictKind, wanted: Option<Stage>, tick: Ticks) -> Option<Stage> {
        if kind != VerdictKind::Degraded {
            self.state.stage = None;
            return None;
        }
        let before = self.state.stage.map(|(stage, _)| stage);
        if self.state.stage.is_none_or(|(stage, since)| {
            wanted > Some(stage) || !within(self.policy.guards.hold, since, tick)
        }) && let Some(wanted) = wanted
            && Some(wanted) != before
        {
            self.state.stage = Some((wanted, tick));
        }
        self.state.stage.map(|(stage, _)| stage)
    }

    /// Thresholds of which it is not known whether they fail.
    fn blind(&self, failing: &BTreeSet<&str>, missing: &[Missing], tick: Ticks) -> BTreeSet<&str> {
        let stale = self.policy.stale_after;
        let fresh = |threshold: &Threshold| {
            let remembered = self.state.thresholds.get(&threshold.name);
            remembered.is_some_and(|state| {
                state.series.values().any(|series| {
                    series.is_fresh(tick, stale) && series.learns_for(&threshold.rule).is_none()
                })
            })
        };
        self.policy
            .thresholds
            .iter()
            .filter(|threshold| !failing.contains(threshold.name.as_str()))
            .filter(|threshold| {
                missing.iter().any(|one| one.threshold == threshold.name) || !fresh(threshold)
            })
            .map(|threshold| threshold.name.as_str())
            .collect()
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
                } else if let Some(rest) = series.learns_for(&threshold.rule)
                    && !threshold.optional
                {
                    let why = format!(
                        "nothing can be foretold before {} more",
                        human_duration(rest)
                    );
                    missing.push(self.unjudged(threshold, Some(subject), &why));
                }
            } else if series.failed || !threshold.optional {
                // A sensor that fails and then falls silent has not got well, optional or not.
                let blind = remembered.and_then(|state| state.blind.get(name));
                missing.push(self.silent(threshold, subject, series, blind, tick));
            }
        }
        if threshold.optional {
            return;
        }
        for (name, why) in remembered.iter().flat_map(|state| &state.blind) {
            if remembered.is_some_and(|state| state.series.contains_key(name)) {
                continue;
            }
            measured = true;
            let subject = Subject {
                per: threshold.per,
                name: name.clone(),
            };
            missing.push(self.unjudged(threshold, Some(subject), why));
        }
        if !measured {
            let why = "has not been measured; if this device lacks it, set `optional: true`";
            missing.push(self.unjudged(threshold, None, why));
        }
    }

    fn unjudged(&self, threshold: &Threshold, subject: Option<Subject>, why: &str) -> Missing {
        let of = subject.as_ref().map_or(String::new(), |subject| {
            let name = subject.to_string();
            if why.starts_with(&name) {
                ":".to_owned()
            } else {
                format!(" of {name}:")
            }
        });
        let series = subject.as_ref().and_then(|subject| {
            self.state
                .thresholds
                .get(&threshold.name)?
                .series
                .get(&subject.name)
        });
        Missing {
            threshold: threshold.name.clone(),
            metric: threshold.metric.name.to_owned(),
            last_sample: series.map(|series| self.state.wall_time(series.last_at)),
            subject,
            failing: false,
            text: format!("{}: {}{of} {why}", threshold.name, threshold.metric.name),
        }
    }

    fn evidence(
        &self,
        threshold: &Threshold,
        subject: Subject,
        series: &Series,
        tick: Ticks,
    ) -> Evidence {
        let since = series.beyond_since.unwrap_or(series.last_at);
        let lasting = human_duration(Duration::from_millis(tick.saturating_sub(since)));
        let Story {
            limit,
            passed,
            clears_when,
        } = story(threshold, series);
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
            reached_in: series.reached_in(&threshold.rule),
            clears_when,
        }
    }

    fn silent(
        &self,
        threshold: &Threshold,
        subject: Subject,
        series: &Series,
        blind: Option<&String>,
        tick: Ticks,
    ) -> Missing {
        let age = human_duration(Duration::from_millis(tick.saturating_sub(series.last_at)));
        let failed = if series.failed {
            format!(
                ", and was failing at {}",
                in_unit(series.value, threshold.unit)
            )
        } else {
            String::new()
        };
        let text = match blind {
            // It is measured, and something else that it is judged by is missing.
            Some(why) => self.unjudged(threshold, Some(subject.clone()), why).text + &failed,
            None => format!(
                "{}: {} of {subject} has been silent for {age}{failed}",
                threshold.name, threshold.metric.name
            ),
        };
        Missing {
            text,
            failing: series.failed,
            threshold: threshold.name.clone(),
            metric: threshold.metric.name.to_owned(),
            subject: Some(subject),
            last_sample: Some(self.state.wall_time(series.last_at)),
        }
    }
}

/// Whether less than `hold` has passed since `since`.
fn within(hold: Duration, since: Ticks, tick: Ticks) -> bool {
    u128::from(tick.saturating_sub(since)) < hold.as_millis()
}

fn forget_removed(
    threshold: &Threshold,
    state: &mut Remembered,
    samples: &[Sample],
    tick: Ticks,
    stale: Duration,
) {
    let per = threshold.per;
    let samples = samples.iter().map(|sample| &sample.subject);
    let all: BTreeSet<&str> = samples
        .filter(|subject| subject.per == per)
        .map(|subject| subject.name.as_str())
        .collect();
    // Containers end and links are closed, the last one too: then nothing at all is measured of them.
    let gone = |name: &str| matches!(per, Per::Container | Per::Peer) && !all.contains(name);
    // An everyday end: who measures them works, for it measures others; a container takes its interface along.
    let ended = |name: &str, one: &Series| {
        let everyday =
            per == Per::Container || per == Per::Interface && name.starts_with(OF_CONTAINERS);
        let others = !all.is_empty() && !all.contains(name);
        everyday && others && one.is_well() && !one.is_fresh(tick, stale)
    };
    state.blind.retain(|name, _| !gone(name));
    let series = &mut state.series;
    let measured = per != Per::Device && series.values().any(|one| one.is_fresh(tick, stale));
    // A failing part that falls silent may be dead rather than gone; only a container's end is
    // ordinary enough to be taken as the end of its failure, and that of a link, on which nothing is
    // measured once a plan is over.
    series.retain(|name, one| {
        !ended(name, one)
            && (one.is_fresh(tick, stale * REMOVED_AFTER)
                || !(gone(name) || measured && (!one.failed || per == Per::Container)))
    });
}
