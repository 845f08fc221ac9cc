//! Answers requests while and after the data moves: forwarding of published ports.
//!
//! Non-goals of this version: NBD, HTTP ranges, and UDP (callers report UDP ports as not forwarded).

mod forward;

pub use forward::{ForwardError, Forwarder, Traffic};
