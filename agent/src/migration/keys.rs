//! What opens the data plane to a plan, kept beside its journal for as long as the plan takes data.
//!
//! Invariants: only the agent's user can read it; it is gone when the plan ends or is owned; what it was read into
//! or written from is wiped. Non-goals: keys of the device itself, which the fleet room keeps.

use crate::fleet::files::{secret_json, write_private};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::Path;
use zeroize::Zeroizing;

const FILE: &str = "keys.json";

/// Writes `keys` durably into a plan's `directory`.
///
/// # Errors
/// Those of writing the file.
pub(super) fn keep(directory: &Path, keys: &impl Serialize) -> io::Result<()> {
    write_private(&directory.join(FILE), &secret_json(keys)?)
}

/// What was kept in a plan's `directory`; none when there is nothing, or nothing that can be read.
pub(super) fn kept<T: DeserializeOwned>(directory: &Path) -> Option<T> {
    let text = Zeroizing::new(std::fs::read(directory.join(FILE)).ok()?);
    serde_json::from_slice(&text).ok()
}

/// Removes what was kept in a plan's `directory`.
pub(super) fn wipe(directory: &Path) {
    if let Err(error) = std::fs::remove_file(directory.join(FILE))
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("keys in {} stay behind: {error}", directory.display());
    }
}
