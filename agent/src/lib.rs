//! Lifeboat: kernel signal → verdict → plan → move → twin running → proof.
//!
//! The rooms below are floors of one house, highest first; a room imports only rooms below it
//! (`tests/rooms.rs` checks it). The rooms of floor 1 are pure: time and data come in as arguments.

// floor 7
pub mod cli;
// floor 6
pub mod api;
pub mod daemon;
// floor 5
pub mod migration;
// floor 4
pub mod fleet;
pub mod power;
pub mod serve;
// floor 3
pub mod transfer;
// floor 2
pub mod containers;
pub mod telemetry;
pub mod volume;
// floor 1
pub mod health;
pub mod model;
pub mod relations;
