//! Registry, allocation, identities, tokens and the mutual-TLS control channel.
//!
//! Invariants: every call between devices runs over TLS 1.3 with certificates of the fleet's own CA on
//! both sides (the one exception is enrolment, pinned by the join token); a device is lent only by a
//! transaction of the registry; a token is worth one pairing, one plan, one peer, once.
//! Non-goals: moving data (`transfer`), deciding when to move (`migration`).

pub mod agent;
pub mod allocate;
pub mod ca;
pub mod client;
pub mod compare;
pub mod duplicator;
pub mod enrol;
pub mod files;
pub mod identity;
pub mod pairing;
pub mod registry;
pub mod secret;
pub mod server;
pub mod sqlite;
pub mod tls;
pub mod token;

use crate::model::units::UnixMillis;
use std::time::{SystemTime, UNIX_EPOCH};

/// The wall clock, once for the room.
#[must_use]
pub fn now() -> UnixMillis {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
