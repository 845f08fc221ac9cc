//! The agent's interfaces: a local HTTP API on a unix socket for the command line, and the routes that
//! other devices call over the control channel.
//!
//! Invariants: the socket is the operator's alone (mode 0600); a device's call is judged by the identity
//! its certificate proved, never by what its body says. Non-goals: state; it lives in the rooms below.

pub mod client;
pub mod control;
pub mod local;
pub mod recent;
