//! A policy that has been read and checked. docs/policies.md explains every field.

use crate::model::action::Actions;
use crate::model::metric::{Metric, Per};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// How bad a failure of a threshold is. It is shown with the evidence; what makes the device degraded
/// is written under `degraded`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth a look.
    #[default]
    Warning,
    /// Data or service is at stake.
    Critical,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        })
    }
}

/// When a threshold fails and when it is over. Values are in the metric's unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Fails above `enter`, is over at or below `clear`.
    Above {
        /// Limit.
        enter: f64,
        /// Not above `enter`.
        clear: f64,
    },
    /// Fails below `enter`, is over at or above `clear`.
    Below {
        /// Limit.
        enter: f64,
        /// Not below `enter`.
        clear: f64,
    },
    /// Fails when that many events came within the span, is over when fewer did.
    Count {
        /// Number of events.
        at_least: u64,
        /// Span of time.
        within: Duration,
    },
}

/// One named signal with its limit.
#[derive(Clone, Debug, PartialEq)]
pub struct Threshold {
    /// Name in the policy.
    pub name: String,
    /// What is measured.
    pub metric: &'static Metric,
    /// What it is measured on; the threshold holds for each subject by itself, and counts as one
    /// failure of the device however many of them fail.
    pub per: Per,
    /// Limit.
    pub rule: Rule,
    /// How long without a break the limit must be passed before it is a failure.
    pub lasting: Duration,
    /// How bad it is.
    pub severity: Severity,
    /// Whether this device may lack the sensor: missing data then does not make the verdict unknown.
    pub optional: bool,
}

impl Threshold {
    /// What makes saved state of this threshold still meaningful: state of a threshold with another
    /// definition is dropped.
    pub(super) fn definition(&self) -> String {
        format!(
            "{} {:?} {:?} {:?}",
            self.metric.name, self.per, self.rule, self.lasting
        )
    }
}

/// An entry of `degraded` or `when`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// At least so many thresholds fail.
    Failures(usize),
    /// One of these thresholds fails.
    Any(Vec<String>),
    /// All of these thresholds fail.
    All(Vec<String>),
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failures(count) => write!(f, "failures: {count}"),
            Self::Any(names) => write!(f, "any: [{}]", names.join(", ")),
            Self::All(names) => write!(f, "all: [{}]", names.join(", ")),
        }
    }
}

/// An entry of `delegate`: what the paired device does when the condition holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delegation {
    /// The condition.
    pub when: Condition,
    /// The delegated actions.
    pub actions: Actions,
}

/// What to do when nobody approves in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// Give the plan up; containers stay where they are.
    #[default]
    Abort,
    /// Go on as if it had been approved.
    Proceed,
}

/// Brakes.
#[derive(Clone, Debug, PartialEq)]
pub struct Guards {
    /// Least time between two changes into or out of `degraded`. Enforced by the judge.
    pub hold: Duration,
    /// Share of the fleet's devices, in percent, that may evacuate at a time; none: no limit.
    pub fleet_max_evacuating: Option<f64>,
    /// Roles of which each must approve the plan; empty: none.
    pub approvals: Vec<String>,
    /// How long to wait for approval.
    pub approval_timeout: Duration,
    /// What to do then.
    pub on_timeout: OnTimeout,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            hold: Duration::from_mins(10),
            fleet_max_evacuating: None,
            approvals: Vec::new(),
            approval_timeout: Duration::from_mins(15),
            on_timeout: OnTimeout::default(),
        }
    }
}

/// A whole policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Name.
    pub name: String,
    /// Age at which a value counts as missing.
    pub stale_after: Duration,
    /// The thresholds, in the file's order.
    pub thresholds: Vec<Threshold>,
    /// Any of these makes the device degraded.
    pub degraded: Vec<Condition>,
    /// The first that holds chooses the delegated actions.
    pub delegate: Vec<Delegation>,
    /// Brakes.
    pub guards: Guards,
}

/// A policy cannot be used. One line for each mistake: file, line, column, field, and what would be
/// right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.lines())]
pub struct PolicyError {
    /// Name of the file.
    pub file: String,
    /// The mistakes, in the file's order; at least one.
    pub faults: Vec<crate::model::locate::Fault>,
}

impl PolicyError {
    fn lines(&self) -> String {
        let lines: Vec<String> = self
            .faults
            .iter()
            .map(|fault| fault.in_file(&self.file))
            .collect();
        lines.join("\n")
    }
}

impl Policy {
    /// Reads a policy. `file` is the name that errors show.
    ///
    /// # Errors
    /// The first mistake of form, or all mistakes of meaning.
    pub fn parse(text: &str, file: &str) -> Result<Self, PolicyError> {
        super::file::read(text).map_err(|mut faults| {
            faults.sort_by_key(|fault| fault.position);
            PolicyError {
                file: file.to_owned(),
                faults,
            }
        })
    }
}
