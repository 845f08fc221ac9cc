//! The meaning of the policy file, each mistake with its place.

use super::form::{self, FileCondition, FileDegraded, FileGuards, FilePolicy, FileTerm, Scalar};
use super::policy::{Condition, Degraded, Delegation, Guards, Policy};
use super::quantity::{quantity, rate, span};
use crate::model::action::Actions;
use crate::model::locate::{Fault, Field};
use crate::model::metric::Unit;
use crate::model::nearest::hint;
use std::collections::BTreeSet;
use std::time::Duration;

/// Eleven sweeps, and PSI's averaging window of 10 s
/// (Documentation/accounting/psi.rst).
const STALE_AFTER: Duration = Duration::from_secs(10);

/// Reads and checks a policy.
pub(super) fn read(text: &str) -> Result<Policy, Vec<Fault>> {
    // Editors of other systems put a byte order mark in front, which the parser takes for a part of the first key.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (file, unknown) = form::read(text);
    let Some(file) = file else {
        return Err(unknown);
    };
    let mut check = Check {
        text,
        faults: Vec::new(),
    };
    let policy = check.policy(file);
    let faults = form::without_followers(check.faults, unknown);
    if faults.is_empty() {
        Ok(policy)
    } else {
        Err(faults)
    }
}

pub(super) struct Check<'a> {
    text: &'a str,
    pub(super) faults: Vec<Fault>,
}

impl Check<'_> {
    pub(super) fn value(&mut self, field: &Field, message: impl Into<String>) {
        self.faults.push(Fault::in_value(self.text, field, message));
    }

    pub(super) fn key(&mut self, field: &Field, message: impl Into<String>) {
        self.faults.push(Fault::in_key(self.text, field, message));
    }

    pub(super) fn ok<T>(&mut self, field: &Field, result: Result<T, String>) -> Option<T> {
        result.map_err(|message| self.value(field, message)).ok()
    }

    pub(super) fn span(
        &mut self,
        field: &Field,
        scalar: Option<&Scalar>,
        default: Duration,
    ) -> Duration {
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
            .filter_map(|(place, entry)| self.degraded(&below.at(place), entry, &names))
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

    fn degraded(
        &mut self,
        field: &Field,
        entry: FileDegraded,
        names: &[String],
    ) -> Option<Degraded> {
        let condition = FileCondition {
            failures: entry.failures,
            any: entry.any,
            all: entry.all,
            not: entry.not,
        };
        let when = self.condition(field, condition, names)?;
        let nothing = BTreeSet::new();
        if when.holds(&nothing, &nothing) == Some(true) {
            self.value(
                field,
                "holds while no threshold fails, so every good device would be degraded: write `all` with a threshold beside `not`",
            );
        }
        Some(Degraded {
            when,
            stage: entry.stage,
        })
    }

    fn condition(
        &mut self,
        field: &Field,
        entry: FileCondition,
        names: &[String],
    ) -> Option<Condition> {
        match (entry.failures, entry.any, entry.all, entry.not) {
            (Some(count), None, None, None) => {
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
            (None, Some(any), None, None) => {
                Some(Condition::Any(self.terms(&field.at("any"), any, names)))
            }
            (None, None, Some(all), None) => {
                Some(Condition::All(self.terms(&field.at("all"), all, names)))
            }
            (None, None, None, Some(not)) => {
                let inner = self.term(&field.at("not"), *not, names)?;
                Some(Condition::Not(Box::new(inner)))
            }
            _ => {
                self.value(field, "write exactly one of failures, any, all and not");
                None
            }
        }
    }

    fn terms(&mut self, field: &Field, terms: Vec<FileTerm>, names: &[String]) -> Vec<Condition> {
        if terms.is_empty() {
            self.value(field, "names no threshold: write at least one");
        }
        let mut read = Vec::new();
        for (place, term) in terms.into_iter().enumerate() {
            let field = field.at(place);
            if let Some(term) = self.term(&field, term, names) {
                if read.contains(&term) {
                    self.value(&field, format!("`{term}` stands here twice: remove one"));
                }
                read.push(term);
            }
        }
        read
    }

    fn term(&mut self, field: &Field, term: FileTerm, names: &[String]) -> Option<Condition> {
        let name = match term {
            FileTerm::Holds(condition) => return self.condition(field, condition, names),
            FileTerm::Fails(name) => name,
        };
        if !names.contains(&name) {
            self.value(
                field,
                format!(
                    "unknown threshold `{name}`{}",
                    hint(&name, names.iter().map(String::as_str))
                ),
            );
            return None;
        }
        Some(Condition::Fails(name))
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
            let at = field.at("approvals").at(place);
            if role.trim().is_empty() {
                self.value(&at, "the role's name is empty");
            } else if entry.approvals[..place].contains(role) {
                self.value(&at, format!("`{role}` stands here twice: remove one"));
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
        let limit = entry
            .limit
            .and_then(|limit| self.ok(&field.at("limit"), rate(&limit.0)));
        Guards {
            limit,
            hold,
            fleet_max_evacuating,
            approvals: entry.approvals,
            approval_timeout,
            on_timeout: entry.on_timeout,
        }
    }
}
