//! A person's no to what the verdict asks for: an operator's abort, or an approval that nobody gave.
//!
//! Invariants: it outlives a restart of the agent; it ends when the stage of the verdict changes, and not because
//! something is not known for a while. Non-goals: what an operator asks for by hand.

use super::active::locked;
use crate::fleet::files::write_private;
use crate::health::{Stage, Verdict, VerdictKind};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The device's refusal, kept in its state directory.
pub struct Refusal {
    path: PathBuf,
    refused: Mutex<Refused>,
}

#[derive(Clone, Copy)]
enum Refused {
    Nothing,
    /// Somebody said no, and it cannot be read to what.
    Unread,
    Stage(Stage),
}

impl Refusal {
    /// What an earlier life of the agent left in the state directory.
    #[must_use]
    pub fn load(state: &Path) -> Self {
        let path = state.join("refused.json");
        let read = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Refused::Nothing),
            Err(error) => Err(error.to_string()),
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Refused::Stage)
                .map_err(|error| error.to_string()),
        };
        if let Err(error) = &read {
            tracing::error!(
                "{} cannot be read ({error}): no automatic plan before the stage of the verdict changes",
                path.display()
            );
        }
        Self {
            refused: Mutex::new(read.unwrap_or(Refused::Unread)),
            path,
        }
    }

    /// The stage that is refused.
    #[must_use]
    pub fn stage(&self) -> Option<Stage> {
        match *locked(&self.refused) {
            Refused::Stage(stage) => Some(stage),
            Refused::Nothing | Refused::Unread => None,
        }
    }

    /// Takes note that somebody said no at `stage`.
    pub fn set(&self, stage: Stage) {
        self.write(&mut locked(&self.refused), stage);
    }

    fn write(&self, refused: &mut Refused, stage: Stage) {
        *refused = Refused::Stage(stage);
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
    pub fn follow(&self, verdict: &Verdict) {
        let wanted = verdict.stage.filter(|stage| *stage >= Stage::Prepare);
        let mut refused = locked(&self.refused);
        match (*refused, wanted) {
            (Refused::Nothing, _) => return,
            _ if verdict.kind == VerdictKind::Unknown => return,
            (Refused::Unread, Some(stage)) => return self.write(&mut refused, stage),
            (Refused::Stage(stage), wanted) if wanted == Some(stage) => return,
            // What failed and is not measured may be what asked for more.
            (Refused::Stage(stage), wanted)
                if wanted < Some(stage) && verdict.missing.iter().any(|one| one.failing) =>
            {
                return;
            }
            _ => {}
        }
        match std::fs::remove_file(&self.path) {
            // It would be back after a restart: it stays, and is removed at the next verdict.
            Err(error) if error.kind() != ErrorKind::NotFound => tracing::error!(
                "cannot remove {}: {error}; what it refuses stays refused until that can be done",
                self.path.display()
            ),
            _ => {
                // Or it might be back after a power failure.
                if let Some(Ok(directory)) = self.path.parent().map(File::open) {
                    let _ = directory.sync_all();
                }
                *refused = Refused::Nothing;
            }
        }
    }
}

/// The stage that is refused with a plan that was told what to do at stage `told`: what the verdict asks for by now, which
/// may be more than a copy in advance does or less than an operator told it; and at least `told` while something that
/// failed is not seen, for it may be asked for again.
pub(super) fn refused_stage(verdict: Option<&Verdict>, told: Stage) -> Stage {
    let asked = |verdict: &Verdict| {
        let asked = verdict.stage.filter(|stage| *stage >= Stage::Prepare)?;
        let sees_all = verdict.missing.iter().all(|one| !one.failing);
        Some(if sees_all { asked } else { asked.max(told) })
    };
    verdict.and_then(asked).unwrap_or(told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::{Runtimes, Scope};
    use crate::health::Missing;
    use crate::migration::active::Active;
    use crate::migration::delegator::{Delegator, Parts};
    use crate::migration::events::SourceEvent;
    use crate::migration::journal::{Journal, plan_directory};
    use crate::migration::target_stage::plan;
    use crate::model::plan::{MigrationEvent, Plan};
    use crate::model::volume::VolumeKind;
    use std::sync::Arc;

    fn missing(failing: bool) -> Missing {
        Missing {
            threshold: "hot".into(),
            metric: "cpu.temperature".into(),
            subject: None,
            last_sample: None,
            failing,
            text: "silent".into(),
        }
    }

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
        let refusal = Refusal::load(state.path());
        refusal.follow(&evacuate);
        assert_eq!(refusal.stage(), None);
        refusal.set(Stage::Evacuate);
        // The next life begins blind.
        let refusal = Refusal::load(state.path());
        refusal.follow(&verdict(VerdictKind::Unknown, None));
        // One of two sensors answers, and asks for less.
        let partly_blind = Verdict {
            missing: vec![missing(true)],
            ..verdict(VerdictKind::Degraded, Some(Stage::Prepare))
        };
        refusal.follow(&partly_blind);
        refusal.follow(&evacuate);
        assert_eq!(refusal.stage(), Some(Stage::Evacuate));
        // A file that stays would refuse again after a restart: it still refuses now.
        let path = state.path().join("refused.json");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        refusal.follow(&verdict(VerdictKind::Degraded, Some(Stage::Prepare)));
        assert_eq!(refusal.stage(), Some(Stage::Evacuate));
        std::fs::remove_dir(&path).unwrap();
        refusal.follow(&verdict(VerdictKind::Degraded, Some(Stage::Prepare)));
        assert_eq!(refusal.stage(), None);
        assert_eq!(Refusal::load(state.path()).stage(), None);
        refusal.set(Stage::Prepare);
        refusal.follow(&verdict(VerdictKind::Healthy, None));
        assert_eq!(Refusal::load(state.path()).stage(), None);
        // What this host never measures asks for nothing.
        refusal.set(Stage::Evacuate);
        refusal.follow(&Verdict {
            missing: vec![missing(false)],
            ..verdict(VerdictKind::Degraded, Some(Stage::Prepare))
        });
        assert_eq!(refusal.stage(), None);
    }

    #[test]
    fn an_abort_says_no_to_what_is_asked_for_by_now() {
        let asks = |stage| verdict(VerdictKind::Degraded, Some(stage));
        let (copy, move_on) = (asks(Stage::Prepare), asks(Stage::Evacuate));
        let of = |verdict: &Verdict, told| refused_stage(Some(verdict), told);
        assert_eq!(of(&move_on, Stage::Prepare), Stage::Evacuate);
        // An operator moves what the verdict only has copied.
        assert_eq!(of(&copy, Stage::Evacuate), Stage::Prepare);
        let partly_blind = Verdict {
            missing: vec![missing(true)],
            ..copy
        };
        assert_eq!(of(&partly_blind, Stage::Evacuate), Stage::Evacuate);
        let blind = verdict(VerdictKind::Unknown, None);
        assert_eq!(of(&blind, Stage::Prepare), Stage::Prepare);
        assert_eq!(refused_stage(None, Stage::Evacuate), Stage::Evacuate);
    }

    #[test]
    fn the_abort_of_a_plan_that_the_verdict_began_is_a_no_also_where_an_operator_has_made_it_theirs()
     {
        for (by_verdict, no) in [(true, Some(Stage::Evacuate)), (false, None)] {
            let state = tempfile::tempdir().unwrap();
            let cgroup_root = state.path().to_owned();
            let parts = Parts::of_test(state.path(), Runtimes::new(&[], Scope { cgroup_root }));
            let theirs = plan(VolumeKind::Bind, state.path().to_owned());
            let mut begun = Plan::clone(&theirs);
            if by_verdict {
                begun.event = MigrationEvent::Degraded {
                    evidence: Vec::new(),
                };
            }
            let directory = plan_directory(state.path(), "source", &begun.id);
            let (mut journal, _) = Journal::open(&directory).unwrap();
            let planned = SourceEvent::Planned {
                plan: Box::new(begun.clone()),
                held: true,
            };
            journal.append(begun.created, planned).unwrap();
            let active = Arc::new(Active::new(&begun, true));
            assert!(active.evacuate(theirs.clone()));
            let delegator = Delegator::new(Arc::new(parts));
            locked(&delegator.plans).insert(begun.id.clone(), active);
            delegator.refuse(&begun.id).unwrap();
            assert_eq!(Refusal::load(state.path()).stage(), no);
        }
    }

    #[test]
    fn a_no_that_cannot_be_read_is_one_to_the_stage_that_is_asked_for_next() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("refused.json"), "{").unwrap();
        let refusal = Refusal::load(state.path());
        let evacuate = verdict(VerdictKind::Degraded, Some(Stage::Evacuate));
        refusal.follow(&evacuate);
        assert_eq!(refusal.stage(), Some(Stage::Evacuate));
        let again = Refusal::load(state.path());
        assert_eq!(again.stage(), Some(Stage::Evacuate));
        refusal.follow(&verdict(VerdictKind::Healthy, None));
        assert_eq!(refusal.stage(), None);
    }
}
