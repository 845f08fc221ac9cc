//! Wires the rooms into the two roles: agent and duplicator.

pub mod duplicator;
pub mod logging;
