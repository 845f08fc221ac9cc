//! The delegator: plan, phases, journal, twin start-up, cut-over, report.
//!
//! Invariants: ownership rules 1–5 of the design (§9). The release is the commit point: before it every
//! failure rolls the source back to how it was, after it every failure is retried until the target has
//! what it owns. Non-goals: deciding when to move (health) and who may help (fleet).

mod allocation;
pub mod delegator;
pub mod events;
pub mod journal;
pub mod paired;
pub mod planner;
pub mod report;
pub mod settings;
mod source;
pub mod target;
pub mod verify;
pub mod view;

pub use settings::Settings;
