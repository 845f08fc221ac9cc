//! Degradation policy and verdict.
//!
//! Purpose: a [`Policy`] that operators write, and a [`Judge`] that turns samples into a [`Verdict`]
//! with its evidence. Invariants: pure, time comes in as an argument; nothing fires or clears without
//! a sample; missing or stale data is never `healthy`; a clock that steps back changes nothing; the
//! judge's whole state can be saved and goes on after a restart as if nothing had happened.
//! Non-goals: measuring (telemetry) and acting (migration).

mod file;
mod form;
mod judge;
mod limits;
mod policy;
mod quantity;
mod reading;
mod recording;
mod replay;
mod rule_tests;
mod schema;
mod series;
mod state;
mod story;
mod trend;
mod verdict;

#[cfg(test)]
mod condition_properties;
#[cfg(test)]
mod condition_tests;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod shipped;

pub use judge::Judge;
pub use limits::FLEET_PEERS;
pub use policy::{
    Among, Condition, Degraded, Delegation, Guards, Limit, Measure, OnTimeout, Policy, PolicyError,
    Rule, Severity, Stage, Threshold,
};
pub use quantity::{in_unit, rate, span};
pub(crate) use reading::median;
pub use recording::{Encoder, MAGIC, RecordingEnd, RecordingError, RecordingHeader, recorded};
pub use replay::{ReplaySummary, Replayed, replay};
pub use rule_tests::{RuleTestOutcome, RuleTests};
pub use schema::policy_schema;
pub use state::SavedState;
pub use verdict::{Evidence, Missing, Verdict, VerdictKind};
