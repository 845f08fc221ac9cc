//! The verdict and what speaks for it.

use super::policy::{Severity, Stage};
use crate::model::action::Actions;
use crate::model::metric::Subject;
use crate::model::units::{UnixMillis, human_duration};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// The four verdicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictKind {
    /// All thresholds that are not optional are measured, and none fails.
    Healthy,
    /// Some threshold fails, but no entry of `degraded` holds.
    Suspect,
    /// An entry of `degraded` holds.
    Degraded,
    /// Data that the policy needs is missing or stale, and what there is does not make it degraded.
    #[default]
    Unknown,
}

impl fmt::Display for VerdictKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Healthy => "healthy",
            Self::Suspect => "suspect",
            Self::Degraded => "degraded",
            Self::Unknown => "unknown",
        })
    }
}

/// One threshold that fails on one subject.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The threshold's name.
    pub threshold: String,
    /// The metric's name.
    pub metric: String,
    /// What it was measured on.
    pub subject: Subject,
    /// How bad it is.
    pub severity: Severity,
    /// Last value, in the metric's unit; for `count`, the events within the span.
    pub value: f64,
    /// The limit, in the metric's unit; for `count`, the number of events.
    pub limit: f64,
    /// When the limit was passed first without a break since.
    pub since: UnixMillis,
    /// When the last value was measured.
    pub last_sample: UnixMillis,
    /// For a forecast: from the last sample until the value is reached, at its rate then.
    #[serde(default)]
    pub reached_in: Option<Duration>,
    /// What would end it.
    pub clears_when: String,
    /// All of it as one sentence.
    pub text: String,
}

/// Data that the policy needs and does not have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Missing {
    /// The threshold's name; empty, like the metric's, when the whole sweep or the policy is missing.
    pub threshold: String,
    /// The metric's name.
    pub metric: String,
    /// What fell silent; none when no subject was ever measured.
    pub subject: Option<Subject>,
    /// When the last value was measured, if there ever was one.
    pub last_sample: Option<UnixMillis>,
    /// Whether it was failing then.
    #[serde(default)]
    pub failing: bool,
    /// All of it as one sentence.
    pub text: String,
}

/// What the judge thinks of the device, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The verdict.
    pub kind: VerdictKind,
    /// How far the device is helped; none unless degraded.
    #[serde(default)]
    pub stage: Option<Stage>,
    /// Since when.
    pub since: UnixMillis,
    /// What fails now, most severe first.
    pub evidence: Vec<Evidence>,
    /// What is missing or stale.
    pub missing: Vec<Missing>,
    /// Entries of `degraded` that hold, as written in the policy.
    pub because: Vec<String>,
    /// The actions to delegate; empty unless degraded.
    pub delegate: Actions,
    /// When `guards.hold` ends, while it alone keeps the verdict from changing.
    pub held_until: Option<UnixMillis>,
}

impl Verdict {
    /// What is to be thought while the policy that is set cannot be used, since `since` and for the reasons `why`, one
    /// on each line.
    pub(crate) fn without_policy(since: UnixMillis, why: &str) -> Self {
        let missing = |text: String| Missing {
            threshold: String::new(),
            metric: String::new(),
            subject: None,
            last_sample: None,
            failing: false,
            text,
        };
        let what = "the policy cannot be used, so nothing is judged; mend it, and it is loaded within seconds".to_owned();
        Self {
            since,
            missing: [what]
                .into_iter()
                .chain(why.lines().map(str::to_owned))
                .map(missing)
                .collect(),
            ..Self::default()
        }
    }

    /// What is to be thought when nothing was swept for `silence` since the sweep of this verdict, at `at`.
    pub(crate) fn unseen(&self, at: UnixMillis, silence: Duration) -> Self {
        Self {
            since: at,
            missing: vec![Missing {
                threshold: String::new(),
                metric: String::new(),
                subject: None,
                last_sample: Some(at),
                failing: false,
                text: format!(
                    "no sweep for {}, after which it was {}: something on this host hangs; see the agent's log, and \
                     the kernel's for a disk or a mount",
                    human_duration(silence),
                    self.kind
                ),
            }],
            ..Self::default()
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        for entry in &self.because {
            write!(f, " ({entry})")?;
        }
        for evidence in &self.evidence {
            write!(f, "\n  {}", evidence.text)?;
        }
        for missing in &self.missing {
            write!(f, "\n  {}", missing.text)?;
        }
        Ok(())
    }
}
