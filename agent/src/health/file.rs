//! The meaning of the policy file, each mistake with its place.

use super::form::{self, FileCondition, FileCount, FileGuards, FilePolicy, FileThreshold, Scalar};
use super::policy::{Condition, Delegation, Guards, Policy, Rule, Threshold};
use super::quantity::{quantity, span};
use crate::model::action::Actions;
use crate::model::locate::{Fault, Field};
use crate::model::metric::{METRICS, Metric, Per, Unit};
use crate::model::nearest::hint;
use std::collections::BTreeSet;
use std::time::Duration;

/// Three sweeps of the default interval, and no less than PSI's averaging window of 10 s
/// (Documentation/accounting/psi.rst).
const STALE_AFTER: Duration = Duration::from_secs(10);

/// Reads and checks a policy.
pub(super) fn read(text: &str) -> Result<Policy, Vec<Fault>> {
    let file = form::read(text).map_err(|fault| vec![fault])?;
    let mut check = Check {
        text,
        faults: Vec::new(),
    };
    let policy = check.policy(file);
    if check.faults.is_empty() {
        Ok(policy)
    } else {
        Err(check.faults)
    }
}

struct Check<'a> {
    text: &'a str,
    faults: Vec<Fault>,
}

impl Check<'_> {
    fn value(&mut self, field: &Field, message: impl Into<String>) {
        self.faults.push(Fault::in_value(self.text, field, message));
    }

    fn key(&mut self, field: &Field, message: impl Into<String>) {
        self.faults.push(Fault::in_key(self.text, field, message));
    }

    fn ok<T>(&mut self, field: &Field, result: Result<T, String>) -> Option<T> {
        result.map_err(|message| self.value(field, message)).ok()
    }

    fn span(&mut self, field: &Field, scalar: Option<&Scalar>, default: Duration) -> Duration {
        scalar
            .and_then(|scalar| self.ok(field, span(&scalar.0)))
            .unwrap_or(default)
    }

    fn policy(&mut self, file: FilePolicy) -> Policy {
        let root = Field::default();
        if file.version != 1 {
            self.value(
                &root.at("version"),
                format!(
                    "version {} is not known: this program reads version 1",
                    file.version
                ),
            );
        }
        if file.name.trim().is_empty() {
            self.value(
                &root.at("name"),
                "the name is empty: write one, it stands in every verdict",
            );
        }
        let stale = root.at("stale_after");
        let stale_after = self.span(&stale, file.stale_after.as_ref(), STALE_AFTER);
        if stale_after < Duration::from_secs(1) {
            self.value(&stale, "shorter than a sweep: write at least 1s");
        }
        let names: Vec<String> = file
            .thresholds
            .0
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        if names.is_empty() {
            self.value(&root.at("thresholds"), "no threshold: write at least one");
        }
        let below = root.at("thresholds");
        let thresholds = file
            .thresholds
            .0
            .into_iter()
            .filter_map(|(name, entry)| self.threshold(&below.at(name.as_str()), name, &entry))
            .collect();
        if file.degraded.is_empty() {
            self.value(
                &root.at("degraded"),
                "no entry: the device could never become degraded; write for instance `- failures: 1`",
            );
        }
        let below = root.at("degraded");
        let degraded = file
            .degraded
            .into_iter()
            .enumerate()
            .filter_map(|(place, entry)| self.condition(&below.at(place), entry, &names))
            .collect();
        let below = root.at("delegate");
        let delegate = file
            .delegate
            .into_iter()
            .enumerate()
            .filter_map(|(place, entry)| {
                let when = self.condition(&below.at(place).at("when"), entry.when, &names)?;
                let actions = Actions::from_iter(entry.actions);
                Some(Delegation { when, actions })
            })
            .collect();
        let guards = self.guards(&root.at("guards"), file.guards);
        Policy {
            name: file.name,
            stale_after,
            thresholds,
            degraded,
            delegate,
            guards,
        }
    }

    fn threshold(
        &mut self,
        field: &Field,
        name: String,
        entry: &FileThreshold,
    ) -> Option<Threshold> {
        let Some(metric) = METRICS.iter().find(|metric| metric.name == entry.metric) else {
            self.value(
                &field.at("metric"),
                format!(
                    "unknown metric `{}`{}",
                    entry.metric,
                    hint(&entry.metric, METRICS.iter().map(|metric| metric.name))
                ),
            );
            return None;
        };
        let per = entry.per.unwrap_or(Per::Device);
        if !metric.per.contains(&per) {
            let known: Vec<String> = metric.per.iter().map(|per| word(*per)).collect();
            self.value(
                &field.at("per"),
                format!(
                    "{} is not measured per {}: write {}",
                    metric.name,
                    word(per),
                    known.join(" or ")
                ),
            );
        }
        let before = self.faults.len();
        let lasting = self.span(&field.at("for"), entry.lasting.as_ref(), Duration::ZERO);
        let rule = self.rule(field, entry, metric);
        (self.faults.len() == before).then_some(())?;
        Some(Threshold {
            name,
            metric,
            per,
            rule: rule?,
            lasting,
            severity: entry.severity,
            optional: entry.optional,
        })
    }

    fn rule(&mut self, field: &Field, entry: &FileThreshold, metric: &Metric) -> Option<Rule> {
        match (&entry.above, &entry.below, &entry.count) {
            (Some(above), None, None) => {
                let (enter, clear) = self.limits(field, "above", above, entry, metric)?;
                Some(Rule::Above { enter, clear })
            }
            (None, Some(below), None) => {
                let (enter, clear) = self.limits(field, "below", below, entry, metric)?;
                Some(Rule::Below { enter, clear })
            }
            (None, None, Some(count)) => self.count(field, count, entry, metric),
            (None, None, None) => {
                let right = if metric.unit == Unit::Events {
                    "count: { at_least: 3, within: 10m }"
                } else {
                    "above or below"
                };
                self.key(field, format!("has no limit: write {right}"));
                None
            }
            _ => {
                self.key(field, "has several limits: write only one of above, below and count, and a threshold for each");
                None
            }
        }
    }

    fn limits(
        &mut self,
        field: &Field,
        side: &str,
        enter: &Scalar,
        entry: &FileThreshold,
        metric: &Metric,
    ) -> Option<(f64, f64)> {
        if metric.unit == Unit::Events {
            self.key(
                &field.at(side),
                format!("{} counts events: write count: {{ at_least: 3, within: 10m }} instead of {side}", metric.name),
            );
            return None;
        }
        let limit = self.ok(&field.at(side), quantity(&enter.0, metric.unit));
        let clear_field = field.at("clear");
        let clear = match &entry.clear {
            Some(clear) => self.ok(&clear_field, quantity(&clear.0, metric.unit))?,
            None => limit?,
        };
        let limit = limit?;
        let wrong_side = if side == "above" {
            clear > limit
        } else {
            clear < limit
        };
        if wrong_side {
            let right = if side == "above" {
                "at most"
            } else {
                "at least"
            };
            let clear = entry.clear.as_ref().map_or("", |clear| clear.0.as_str());
            self.value(
                &clear_field,
                format!(
                    "{clear} is not on the healthy side of {side}: write {right} {}",
                    enter.0
                ),
            );
            return None;
        }
        Some((limit, clear))
    }

    fn count(
        &mut self,
        field: &Field,
        count: &FileCount,
        entry: &FileThreshold,
        metric: &Metric,
    ) -> Option<Rule> {
        if metric.unit != Unit::Events {
            self.key(
                &field.at("count"),
                format!(
                    "{} is a level, not events: write above or below",
                    metric.name
                ),
            );
            return None;
        }
        for (set, key) in [(&entry.clear, "clear"), (&entry.lasting, "for")] {
            if set.is_some() {
                self.key(
                    &field.at(key),
                    "does not go with count: it clears when fewer events lie within the span; remove it",
                );
            }
        }
        if count.at_least == 0 {
            self.value(
                &field.at("count").at("at_least"),
                "0 would always fail: write at least 1",
            );
        }
        let within_field = field.at("count").at("within");
        let within = self.ok(&within_field, span(&count.within.0))?;
        if within.is_zero() {
            self.value(
                &within_field,
                "0 would never fail: write a span such as 10m",
            );
        }
        Some(Rule::Count {
            at_least: count.at_least,
            within,
        })
    }

    fn condition(
        &mut self,
        field: &Field,
        entry: FileCondition,
        names: &[String],
    ) -> Option<Condition> {
        match (entry.failures, entry.any, entry.all) {
            (Some(count), None, None) => {
                if count == 0 || count > names.len() {
                    self.value(
                        &field.at("failures"),
                        format!(
                            "{count} never tells a good device from a bad one with {} threshold(s): write 1 to {}",
                            names.len(),
                            names.len()
                        ),
                    );
                }
                Some(Condition::Failures(count))
            }
            (None, Some(any), None) => {
                self.known(&field.at("any"), &any, names);
                Some(Condition::Any(any))
            }
            (None, None, Some(all)) => {
                self.known(&field.at("all"), &all, names);
                Some(Condition::All(all))
            }
            _ => {
                self.value(field, "write exactly one of failures, any and all");
                None
            }
        }
    }

    fn known(&mut self, field: &Field, chosen: &[String], names: &[String]) {
        if chosen.is_empty() {
            self.value(field, "names no threshold: write at least one");
        }
        let mut seen = BTreeSet::new();
        for (place, name) in chosen.iter().enumerate() {
            if !names.contains(name) {
                self.value(
                    &field.at(place),
                    format!(
                        "unknown threshold `{name}`{}",
                        hint(name, names.iter().map(String::as_str))
                    ),
                );
            } else if !seen.insert(name) {
                self.value(
                    &field.at(place),
                    format!("`{name}` stands here twice: remove one"),
                );
            }
        }
    }

    fn guards(&mut self, field: &Field, entry: FileGuards) -> Guards {
        let default = Guards::default();
        let hold = self.span(&field.at("hold"), entry.hold.as_ref(), default.hold);
        let evacuating = field.at("fleet_max_evacuating");
        let fleet_max_evacuating = entry
            .fleet_max_evacuating
            .and_then(|share| self.ok(&evacuating, quantity(&share.0, Unit::Percent)));
        if fleet_max_evacuating == Some(0.0) {
            self.value(
                &evacuating,
                "0% would forbid every evacuation: write a share such as 30%",
            );
        }
        for (place, role) in entry.approvals.iter().enumerate() {
            if role.trim().is_empty() {
                self.value(&field.at("approvals").at(place), "the role's name is empty");
            }
        }
        let timeout = field.at("approval_timeout");
        let approval_timeout = self.span(
            &timeout,
            entry.approval_timeout.as_ref(),
            default.approval_timeout,
        );
        if approval_timeout.is_zero() {
            self.value(
                &timeout,
                "0 leaves nobody time to approve: write a span such as 15m",
            );
        }
        Guards {
            hold,
            fleet_max_evacuating,
            approvals: entry.approvals,
            approval_timeout,
            on_timeout: entry.on_timeout,
        }
    }
}

fn word(per: Per) -> String {
    format!("{per:?}").to_lowercase()
}
