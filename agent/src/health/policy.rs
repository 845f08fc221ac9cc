//! A policy that has been read and checked. docs/policies.md explains every field.

use crate::model::action::Actions;
use crate::model::metric::{Metric, Per, Unit};
use crate::model::units::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// How bad a failure of a threshold is. It is shown with the evidence; what makes the device degraded
/// is written under `degraded`.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
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

/// A limit as a number, or as a distance from the limit that the part itself publishes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// The number, or what is added to the part's own limit.
    pub number: f64,
    /// Whether the part's own limit is meant.
    pub of_device: bool,
}

impl Limit {
    /// A plain number.
    #[must_use]
    pub const fn of(number: f64) -> Self {
        Self {
            number,
            of_device: false,
        }
    }

    /// The limit for a part that publishes `own`.
    #[must_use]
    pub fn at(self, own: Option<f64>) -> f64 {
        if self.of_device {
            own.unwrap_or(f64::NAN) + self.number
        } else {
            self.number
        }
    }
}

/// Among whom a subject is compared.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Among {
    /// The other disks, interfaces, … of this host.
    #[default]
    Host,
    /// The other devices of the fleet.
    Fleet,
}

/// What of the samples is held against the limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measure {
    /// The value itself.
    Value,
    /// The value divided by a load, both over a span.
    PerLoad {
        /// The load.
        load: &'static Metric,
        /// Less load than this over the span is idle: nothing is judged. For events their number, else
        /// the mean.
        at_least: f64,
        /// The span.
        over: Duration,
    },
    /// The value divided by the median of its peers.
    ToPeers {
        /// Who they are.
        among: Among,
        /// A smaller value is no failure, however it compares.
        at_least: f64,
        /// Fewer peers than this say nothing.
        peers: usize,
    },
}

/// When a threshold fails and when it is over. Values are in the threshold's unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Fails above `enter`, is over at or below `clear`.
    Above {
        /// Limit.
        enter: Limit,
        /// Not above `enter`.
        clear: Limit,
        /// Whether it must also have risen while it was above.
        rising: bool,
    },
    /// Fails below `enter`, is over at or above `clear`.
    Below {
        /// Limit.
        enter: Limit,
        /// Not below `enter`.
        clear: Limit,
    },
    /// Fails when a straight line through the last samples reaches a value soon.
    Forecast {
        /// The value.
        reaches: Limit,
        /// Whether it is reached from above.
        falling: bool,
        /// Fails when it is reached within this time.
        within: Duration,
        /// Is over when it takes longer than this; at least `within`.
        clear: Duration,
        /// Span of the samples.
        over: Duration,
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
    /// What of the samples is judged.
    pub measure: Measure,
    /// Limit.
    pub rule: Rule,
    /// Unit of the limit and of the judged value.
    pub unit: Unit,
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
        let measure = match self.measure {
            Measure::PerLoad {
                load,
                at_least,
                over,
            } => format!("per {} {at_least} {over:?}", load.name),
            other => format!("{other:?}"),
        };
        // What is remembered of sensors by other names than today's would be missing for good.
        let names = match self.per {
            Per::Sensor => " by device",
            _ => "",
        };
        format!(
            "{} {:?}{names} {measure} {:?} {:?}",
            self.metric.name, self.per, self.rule, self.lasting
        )
    }

    /// Whether the limit is relative to the part's own.
    pub(super) fn needs_own_limit(&self) -> bool {
        match self.rule {
            Rule::Above { enter, .. } | Rule::Below { enter, .. } => enter.of_device,
            Rule::Forecast { reaches, .. } => reaches.of_device,
            Rule::Count { .. } => false,
        }
    }
}

/// How far a degraded device is helped.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// It is shown; nothing moves.
    Watch,
    /// The data of its containers is copied to a target in advance; they run on where they are.
    Prepare,
    /// Its containers and their data leave it.
    #[default]
    Evacuate,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Watch => "watch",
            Self::Prepare => "prepare",
            Self::Evacuate => "evacuate",
        })
    }
}

/// What must hold, over the thresholds that fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// At least so many thresholds fail.
    Failures(usize),
    /// This threshold fails.
    Fails(String),
    /// One of these holds.
    Any(Vec<Condition>),
    /// All of these hold.
    All(Vec<Condition>),
    /// This does not hold.
    Not(Box<Condition>),
}

impl Condition {
    /// Whether it holds; none when that depends on thresholds of which nothing is known (`blind`).
    pub(super) fn holds(&self, failing: &BTreeSet<&str>, blind: &BTreeSet<&str>) -> Option<bool> {
        match self {
            Self::Failures(count) if failing.len() >= *count => Some(true),
            Self::Failures(count) => {
                let perhaps = failing.union(blind).count();
                (perhaps < *count).then_some(false)
            }
            Self::Fails(name) if failing.contains(name.as_str()) => Some(true),
            Self::Fails(name) => (!blind.contains(name.as_str())).then_some(false),
            Self::Any(parts) => some(parts, true, failing, blind),
            Self::All(parts) => some(parts, false, failing, blind),
            Self::Not(part) => part.holds(failing, blind).map(|holds| !holds),
        }
    }
}

/// `wanted` when one part is so; else its opposite, unless one part is not known.
fn some(
    parts: &[Condition],
    wanted: bool,
    failing: &BTreeSet<&str>,
    blind: &BTreeSet<&str>,
) -> Option<bool> {
    let mut known = true;
    for part in parts {
        match part.holds(failing, blind) {
            Some(holds) if holds == wanted => return Some(wanted),
            Some(_) => {}
            None => known = false,
        }
    }
    known.then_some(!wanted)
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = |part: &Self| match part {
            Self::Fails(name) => name.clone(),
            other => format!("{{ {other} }}"),
        };
        let list = |parts: &[Self]| parts.iter().map(inner).collect::<Vec<_>>().join(", ");
        match self {
            Self::Failures(count) => write!(f, "failures: {count}"),
            Self::Fails(name) => f.write_str(name),
            Self::Any(parts) => write!(f, "any: [{}]", list(parts)),
            Self::All(parts) => write!(f, "all: [{}]", list(parts)),
            Self::Not(part) => write!(f, "not: {}", inner(part)),
        }
    }
}

/// An entry of `degraded`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Degraded {
    /// The condition.
    pub when: Condition,
    /// How far the device is then helped.
    pub stage: Stage,
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
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
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
    /// Most bytes a second that a copy may read; none: no limit.
    pub limit: Option<Bytes>,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            hold: Duration::from_mins(10),
            fleet_max_evacuating: None,
            approvals: Vec::new(),
            approval_timeout: Duration::from_mins(15),
            on_timeout: OnTimeout::default(),
            limit: None,
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
    pub degraded: Vec<Degraded>,
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
    /// Metrics of this device that are compared with its fleet.
    #[must_use]
    pub fn compared_with_fleet(&self) -> BTreeSet<String> {
        let compared = |threshold: &&Threshold| {
            matches!(
                threshold.measure,
                Measure::ToPeers {
                    among: Among::Fleet,
                    ..
                }
            )
        };
        let compared = self.thresholds.iter().filter(compared);
        compared
            .map(|threshold| threshold.metric.name.to_owned())
            .collect()
    }

    /// Reads a policy. `file` is the name that errors show.
    ///
    /// # Errors
    /// Every unknown field, and the first other mistake of form or all mistakes of meaning.
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
