//! Fault injection for the end-to-end tests: the real binary dies at a named point.

use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;

/// Kills this process with SIGKILL when `LIFEBOAT_KILL_AT` names the phase that is being entered.
pub(super) fn die_at(phase: &str) {
    if std::env::var_os("LIFEBOAT_KILL_AT").is_some_and(|point| point == phase) {
        // SIGKILL to oneself cannot fail, and nothing after it runs.
        let _ = kill(getpid(), Signal::SIGKILL);
    }
}
