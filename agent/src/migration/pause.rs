//! The operator's pause: while it lasts the policy judges, and nothing moves by itself.
//!
//! Invariants: it is on disk before it is in force, and outlives a restart; it ends by itself. Non-goals:
//! what an operator asks for by hand, which a pause does not stop.

use super::active::locked;
use crate::fleet::files::write_private;
use crate::model::units::UnixMillis;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

/// A pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// When it began.
    pub since: UnixMillis,
    /// When it ends by itself.
    pub until: UnixMillis,
    /// What the operator gave as the reason.
    pub why: String,
}

impl Pause {
    /// Whether it is in force at `now`. A clock that steps back before it began does not end it.
    #[must_use]
    pub fn holds(&self, now: UnixMillis) -> bool {
        now < self.until
    }
}

/// The device's pause, kept in its state directory.
pub struct Pauses {
    path: PathBuf,
    pause: Mutex<Option<Pause>>,
}

impl Pauses {
    /// The pause that an earlier life of the agent left in the state directory.
    #[must_use]
    pub fn load(state: &std::path::Path) -> Self {
        let path = state.join("pause.json");
        let read = std::fs::read(&path)
            .and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::from));
        let pause = match read {
            Ok(pause) => Some(pause),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Somebody wanted nothing to move: what cannot be read must not end that silently.
            Err(error) => {
                tracing::error!(
                    "{} cannot be read ({error}): paused until `lifeboat policy resume`",
                    path.display()
                );
                Some(Pause {
                    since: UnixMillis(0),
                    until: UnixMillis(u64::MAX),
                    why: format!("{} cannot be read", path.display()),
                })
            }
        };
        Self {
            path,
            pause: Mutex::new(pause),
        }
    }

    /// The pause in force at `now`.
    #[must_use]
    pub fn now(&self, now: UnixMillis) -> Option<Pause> {
        locked(&self.pause).clone().filter(|pause| pause.holds(now))
    }

    /// Puts `pause` in force in place of another.
    ///
    /// # Errors
    /// It cannot be kept; then it is not in force.
    pub fn set(&self, pause: Pause) -> io::Result<()> {
        let mut held = locked(&self.pause);
        write_private(&self.path, &serde_json::to_vec(&pause)?)?;
        *held = Some(pause);
        Ok(())
    }

    /// Ends the pause in force at `now`; tells which.
    ///
    /// # Errors
    /// Its file cannot be removed; then it stays in force.
    pub fn end(&self, now: UnixMillis) -> io::Result<Option<Pause>> {
        let mut held = locked(&self.pause);
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(held.take().filter(|pause| pause.holds(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(until: u64) -> Pause {
        Pause {
            since: UnixMillis(1000),
            until: UnixMillis(until),
            why: "new fans".into(),
        }
    }

    #[test]
    fn a_pause_outlives_a_restart_ends_by_itself_and_by_hand() {
        let state = tempfile::tempdir().unwrap();
        let pauses = Pauses::load(state.path());
        assert_eq!(pauses.now(UnixMillis(1000)), None);
        pauses.set(pause(5000)).unwrap();
        let again = Pauses::load(state.path());
        assert_eq!(again.now(UnixMillis(4999)), Some(pause(5000)));
        assert_eq!(
            again.now(UnixMillis(500)),
            Some(pause(5000)),
            "a clock that stepped back"
        );
        assert_eq!(again.now(UnixMillis(5000)), None);
        assert_eq!(again.end(UnixMillis(4999)).unwrap(), Some(pause(5000)));
        assert_eq!(again.end(UnixMillis(4999)).unwrap(), None);
        again.set(pause(5000)).unwrap();
        assert_eq!(again.end(UnixMillis(5000)).unwrap(), None, "it was over");
        assert_eq!(Pauses::load(state.path()).now(UnixMillis(2000)), None);
    }

    #[test]
    fn a_pause_that_cannot_be_read_is_in_force() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("pause.json"), "{").unwrap();
        let pauses = Pauses::load(state.path());
        assert!(pauses.now(UnixMillis(1)).is_some());
        pauses.end(UnixMillis(1)).unwrap();
        assert_eq!(pauses.now(UnixMillis(1)), None);
        // Not a file that is not there: the read itself fails.
        std::fs::create_dir(state.path().join("pause.json")).unwrap();
        let pauses = Pauses::load(state.path());
        assert!(pauses.now(UnixMillis(1)).is_some());
    }
}
