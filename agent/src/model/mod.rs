//! The words of the design as types: ids, units, evidence, plans and wire types. Pure.
//!
//! Invariants: everything here is plain data with `serde`; nothing opens a file or reads a clock.

pub mod action;
pub mod choice;
#[cfg(test)]
mod choice_tests;
pub mod container;
pub mod control;
pub mod edge;
pub mod extent;
pub mod fleet;
pub mod ids;
pub mod locate;
pub mod metric;
pub mod mounts;
pub mod nearest;
pub mod places;
pub mod plan;
pub mod secret_hex;
pub mod telemetry;
pub mod trace;
pub mod units;
pub(crate) mod varint;
pub mod volume;
