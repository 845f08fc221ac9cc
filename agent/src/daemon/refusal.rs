//! A person's no to what the verdict asks for: an operator's abort, or an approval that nobody gave.
//!
//! Invariants: it outlives a restart of the agent; it ends when the stage of the verdict changes, and not because
//! nothing is known for a while. Non-goals: what an operator asks for by hand.

use crate::fleet::files::write_private;
use crate::health::{Stage, Verdict, VerdictKind};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The device's refusal, kept in its state directory.
pub struct Refusal {
    path: PathBuf,
    stage: Option<Stage>,
    /// Somebody said no, and it cannot be read to what.
    unread: bool,
}

impl Refusal {
    /// What an earlier life of the agent left in the state directory.
    #[must_use]
    pub fn load(state: &Path) -> Self {
        let path = state.join("refused.json");
        let read = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|error| error.to_string()),
        };
        if let Err(error) = &read {
            tracing::error!(
                "{} cannot be read ({error}): no automatic plan before the stage of the verdict changes",
                path.display()
            );
        }
        Self {
            unread: read.is_err(),
            stage: read.unwrap_or_default(),
            path,
        }
    }

    /// The stage that is refused.
    #[must_use]
    pub fn stage(&self) -> Option<Stage> {
        self.stage
    }

    /// Takes note that somebody said no at `stage`.
    pub fn set(&mut self, stage: Stage) {
        (self.stage, self.unread) = (Some(stage), false);
        let written = serde_json::to_vec(&stage)
            .map_err(std::io::Error::from)
            .and_then(|bytes| write_private(&self.path, &bytes));
        if let Err(error) = written {
            tracing::error!(
                "cannot save {}: {error}; a restart of the agent would try again what was refused",
                self.path.display()
            );
        }
    }

    /// Forgets it when `verdict` asks for another stage.
    pub fn follow(&mut self, verdict: &Verdict) {
        let wanted = verdict.stage.filter(|stage| *stage >= Stage::Prepare);
        if verdict.kind == VerdictKind::Unknown || (self.stage == wanted && !self.unread) {
            return;
        }
        if let (Some(stage), true) = (wanted, self.unread) {
            self.set(stage);
            return;
        }
        (self.stage, self.unread) = (None, false);
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::error!("cannot remove {}: {error}", self.path.display());
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(kind: VerdictKind, stage: Option<Stage>) -> Verdict {
        Verdict {
            kind,
            stage,
            ..Verdict::default()
        }
    }

    #[test]
    fn a_no_outlives_a_restart_and_blindness_and_ends_with_the_stage() {
        let state = tempfile::tempdir().unwrap();
        let evacuate = verdict(VerdictKind::Degraded, Some(Stage::Evacuate));
        let mut refusal = Refusal::load(state.path());
        refusal.follow(&evacuate);
        assert_eq!(refusal.stage(), None);
        refusal.set(Stage::Evacuate);
        // The next life begins blind.
        let mut refusal = Refusal::load(state.path());
        refusal.follow(&verdict(VerdictKind::Unknown, None));
        refusal.follow(&evacuate);
        assert_eq!(refusal.stage(), Some(Stage::Evacuate));
        refusal.follow(&verdict(VerdictKind::Degraded, Some(Stage::Prepare)));
        assert_eq!(refusal.stage(), None);
        assert_eq!(Refusal::load(state.path()).stage(), None);
        refusal.set(Stage::Prepare);
        refusal.follow(&verdict(VerdictKind::Healthy, None));
        assert_eq!(Refusal::load(state.path()).stage(), None);
    }

    #[test]
    fn a_no_that_cannot_be_read_is_one_to_the_stage_that_is_asked_for_next() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("refused.json"), "{").unwrap();
        let mut refusal = Refusal::load(state.path());
        let evacuate = verdict(VerdictKind::Degraded, Some(Stage::Evacuate));
        refusal.follow(&evacuate);
        assert_eq!(refusal.stage(), Some(Stage::Evacuate));
        let again = Refusal::load(state.path());
        assert_eq!(again.stage(), Some(Stage::Evacuate));
        refusal.follow(&verdict(VerdictKind::Healthy, None));
        assert_eq!(refusal.stage(), None);
    }
}
