//! The delegator: plan, phases, journal, twin start-up, cut-over, report.
//!
//! Invariants: ownership rules 1–5 of the design (§9). The release is the commit point: before it every
//! failure rolls the source back to how it was, after it every failure is retried until the target has
//! what it owns. Non-goals: deciding when to move (health) and who may help (fleet).

pub mod access;
mod active;
mod admission;
mod allocation;
mod changes;
mod choosing;
mod clearance;
pub mod delegator;
mod devices;
mod dismissal;
mod draft;
pub mod events;
mod faults;
mod fenced;
mod foreground;
mod forwarding;
mod freezing;
mod guard;
mod images;
pub mod journal;
mod keys;
mod later;
mod leftovers;
mod loss;
mod moving;
mod opening;
pub mod paired;
pub mod pause;
mod places;
pub mod planner;
#[cfg(test)]
mod protocol_tests;
pub mod provide;
pub mod refusal;
mod rehearsal;
mod replica;
pub mod report;
mod resume;
mod returning;
mod roll_back;
mod route;
pub mod settings;
mod source;
mod standing;
mod switch;
mod switch_first;
#[cfg(test)]
mod switch_first_tests;
mod take_over;
pub mod target;
#[cfg(test)]
mod target_stage;
#[cfg(test)]
mod target_tests;
mod traces;
pub mod trusted;
mod twins;
pub mod verify;
pub mod view;

pub use active::{Limits, PlanStatus};
pub use forwarding::Forwards;
pub use later::Arriving;
pub use moving::{NOT_APPROVED, OPERATOR_ABORT};
pub use settings::Settings;
pub use traces::TraceUnusable;
