//! Wires the rooms into the two roles: agent and duplicator.

pub mod agent;
mod automatic;
mod comparison;
pub mod config;
pub mod duplicator;
mod host;
pub mod logging;
pub mod privileges;
mod senses;
mod writer;
