//! Abort after a switch that came first: the target gives everything back, and the source has the whole state.
//!
//! Invariants: before the target signs, its twins have ended for good and every change that they made is in the
//! source's mirror; the source's containers run only when the mirror is written over its data, durably, and that it
//! owns n+2 is in its journal. Each step may be done again. Non-goal: keeping the mirror (`serve`, `volume::mirror`).

use super::events::{SourceEvent, TargetEvent};
use super::journal::plan_directory;
use super::later::{Live, MIRROR_PATIENCE};
use super::moving::{Move, MoveError};
use super::opening::Lists;
use super::switch::RETRY;
use super::switch_first::trees;
use super::target::{Target, TargetError};
use crate::fleet::identity;
use crate::model::container::State;
use crate::model::control::GivenBack;
use crate::model::fleet::{DutyOutcome, PeerAddress};
use crate::model::ids::{DeviceId, PlanId, VolumeId};
use crate::model::plan::{Plan, SignedRelease};
use crate::serve::Mount;
use crate::volume::mirror::write_back;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for what the twins changed last to be in the mirror.
const MIRROR_MAX: Duration = Duration::from_secs(60);
/// The target ends its twins first.
const GIVE_BACK_TIME: Duration = Duration::from_secs(300);

/// Where the source keeps what the twins of a plan change, a directory for each volume.
pub(super) fn mirror_directory(state: &Path, plan: &PlanId) -> PathBuf {
    plan_directory(state, "source", plan).join("mirror")
}

impl Target {
    /// Ends the twins of a plan that was switched first, brings all that they changed to the source's mirror, and gives
    /// the volumes back: signed, and durable here before it is said.
    ///
    /// # Errors
    /// It is too late, or not all is in the mirror; the twins then go on.
    pub async fn give_back(
        self: &Arc<Self>,
        peer: &DeviceId,
        id: &PlanId,
    ) -> Result<SignedRelease, TargetError> {
        let _turn = self.turn(peer).await;
        let (plan, _) = self.known(peer, id)?;
        let refuse = |why: String| TargetError::InTheWay {
            what: format!("giving plan {id} back"),
            why,
        };
        let owned = self
            .plans()
            .get(id)
            .is_some_and(|known| known.owns.is_some());
        let known = self.later(id, |later| {
            if let Some(word) = &later.given_back {
                return Some(word.clone());
            }
            later.returning = owned && !later.is_proven();
            None
        });
        match known {
            Some(Some(word)) => return Ok(word),
            _ if self.is_returning(id) => {}
            _ => {
                return Err(refuse(
                    "its data is all here, and is the target's alone".into(),
                ));
            }
        }
        super::faults::die_at("give back");
        match self.mirror_all(&plan).await {
            Ok(changes) => {
                let word = self.sign_back(id, changes).map_err(refuse)?;
                let event = TargetEvent::GivenBack { word: word.clone() };
                self.note_later(id, &event)?;
                if let Some(known) = self.plans().get_mut(id) {
                    known.owns = None;
                }
                self.close_later(id).await;
                tracing::info!(plan = %id, "its volumes are given back to the source");
                Ok(word)
            }
            Err(why) => {
                self.later(id, |later| later.returning = false);
                if let Some(known) = self.plans().get_mut(id) {
                    known.twins.clear();
                    known.start_up = None;
                }
                tokio::spawn(self.clone().start_twins(plan));
                Err(refuse(why))
            }
        }
    }

    /// Ends the twins and waits for their changes to be in the mirror; the number of changes of each tree.
    async fn mirror_all(&self, plan: &Plan) -> Result<BTreeMap<VolumeId, u64>, String> {
        let _starts = self.starts.lock().await;
        for planned in &plan.containers {
            let name = &planned.container.name;
            if self.has_left(plan, name).await? {
                return Err(format!("{name} has left this device since"));
            }
        }
        self.end_twins(plan, false).await?;
        let runtime = self
            .runtime_for(plan)
            .await
            .map_err(|error| error.to_string())?;
        for planned in &plan.containers {
            let name = planned.container.name.as_str();
            match runtime.state(name).await {
                Ok(State::Running | State::Paused) => {
                    return Err(format!("twin {name} does not end"));
                }
                Err(error) if !error.not_found() => return Err(error.to_string()),
                _ => {}
            }
        }
        // An agent that was started just now has not opened them.
        let places = self.plans().get(&plan.id).map(|known| known.places.clone());
        self.make_stores(plan, &places.unwrap_or_default(), Lists::Kept)
            .await?;
        let parts = self.later(&plan.id, |later| {
            let live = later.live.iter_mut();
            live.map(|(volume, live)| {
                let Live {
                    mount,
                    filler,
                    store,
                } = live;
                (*volume, mount.take(), filler.take(), Arc::clone(store))
            })
            .collect::<Vec<_>>()
        });
        let parts = parts.unwrap_or_default();
        let settled = tokio::task::spawn_blocking(move || {
            let mut changes = BTreeMap::new();
            for (volume, mount, filler, store) in parts {
                // What was written through a mapping is in the store when it is unmounted.
                drop(mount);
                drop(filler);
                if store.mirrored().is_none() {
                    store
                        .mirror(MIRROR_PATIENCE)
                        .map_err(|error| error.to_string())?;
                }
                store.settle_mirror(MIRROR_MAX)?;
                let mirrored = store.mirrored().ok_or("it was not mirrored")?;
                changes.insert(volume, mirrored.changes);
            }
            Ok(changes)
        });
        let settled = settled.await.map_err(|error| error.to_string())?;
        // Those of an agent that was killed.
        for path in self.places_of(plan) {
            if let Err(error) = Mount::check(&path) {
                tracing::debug!("{error}");
            }
        }
        settled
    }

    fn sign_back(
        &self,
        id: &PlanId,
        changes: BTreeMap<VolumeId, u64>,
    ) -> Result<SignedRelease, String> {
        let fleet = self
            .parts
            .fleet
            .as_ref()
            .ok_or("this device is in no fleet")?;
        let word = GivenBack {
            plan: id.clone(),
            target: self.parts.device.clone(),
            changes,
        };
        let body = serde_json::to_string(&word).map_err(|error| error.to_string())?;
        let signature = identity::sign(&fleet.identity, body.as_bytes());
        Ok(SignedRelease {
            body,
            certificate: fleet.identity.certificate().to_vec(),
            signature: signature.map_err(|error| error.to_string())?,
        })
    }
}

impl Move {
    /// Takes everything back when that was asked for, now or in an earlier life of the agent; false when it was not,
    /// or the target refuses. One that does not answer is asked until it does: it may have given it back.
    pub(super) async fn asked_back(&mut self, target: &PeerAddress) -> bool {
        let new = self.active.take_returning();
        if let (Some(reason), None) = (new, &self.moved.asked_back) {
            self.record(SourceEvent::AskedBack { reason }).await;
        }
        let Some(reason) = self.moved.asked_back.clone() else {
            return false;
        };
        self.active.enter("give back");
        super::faults::die_at("asked back");
        let answer = loop {
            match self.ask_back(target).await {
                Ok(word) => break Ok(word),
                Err(MoveError::Peer(error)) if error.is_refusal() => break Err(error),
                // It may have given everything back all the same.
                Err(error) => {
                    self.active
                        .trouble(&format!("asking for everything back: {error}"));
                    tokio::time::sleep(RETRY * 4).await;
                }
            }
        };
        match answer {
            Ok(word) => {
                let event = SourceEvent::Returning {
                    word: word.clone(),
                    reason: reason.clone(),
                };
                self.record(event).await;
                self.take_back(target, &word, &reason).await;
                true
            }
            Err(error) => {
                let why = error.to_string();
                self.record(SourceEvent::NotGivenBack { why }).await;
                self.active.enter("fill");
                self.active
                    .trouble(&format!("not given back, ask again: {error}"));
                false
            }
        }
    }

    async fn ask_back(&self, target: &PeerAddress) -> Result<SignedRelease, MoveError> {
        let client = self.client()?.clone().with_timeout(GIVE_BACK_TIME);
        let path = format!("/v1/plans/{}/give-back", self.plan.id);
        let word: SignedRelease = client.post(target, &path, &()).await?;
        self.given_back(target, &word).map_err(MoveError::Sign)?;
        Ok(word)
    }

    /// What the target's word says, when it is the target's and about this plan.
    fn given_back(&self, target: &PeerAddress, word: &SignedRelease) -> Result<GivenBack, String> {
        let fleet = self.fleet().map_err(|error| error.to_string())?;
        let signer = identity::verify_member(
            &fleet.identity,
            &word.certificate,
            word.body.as_bytes(),
            &word.signature,
        )
        .map_err(|error| error.to_string())?;
        let said: GivenBack =
            serde_json::from_str(&word.body).map_err(|error| error.to_string())?;
        if signer != target.device || said.target != target.device || said.plan != self.plan.id {
            return Err(format!("{signer} gives back what is not its own"));
        }
        Ok(said)
    }

    /// Writes what the twins changed over the data here, owns it, and lets the containers run.
    pub(super) async fn take_back(
        &mut self,
        target: &PeerAddress,
        word: &SignedRelease,
        reason: &str,
    ) {
        self.active.enter("take back");
        super::faults::die_at("take back");
        let changes = loop {
            match self.write_mirror(target, word).await {
                Ok(changes) => break changes,
                Err(error) => self.active.trouble(&error),
            }
            tokio::time::sleep(RETRY * 10).await;
        };
        let known = [&self.moved.epochs, &self.plan.epochs];
        let epochs = trees(&self.plan)
            .map(|volume| {
                let last = known.iter().find_map(|epochs| epochs.get(&volume.id));
                // It released n, the target owned n+1.
                let released = last.copied().unwrap_or_default().next();
                (volume.id, released.next().next())
            })
            .collect();
        let returned = SourceEvent::Returned {
            epochs,
            changes,
            given: self.given_out(),
        };
        self.record(returned).await;
        self.delegator.parts().forwards.end(&self.plan.id).await;
        self.let_run().await;
        self.start_again().await;
        self.end_stand_in().await;
        let delegator = self.delegator.clone();
        delegator
            .end_pairings(&self.plan, DutyOutcome::Abandoned, &[])
            .await;
        // Before it is said to be over: whoever asks for the same target then finds its ports free.
        let mut freed = delegator.dismiss(&self.plan, reason).await;
        self.record(SourceEvent::Aborted {
            reason: reason.to_owned(),
        })
        .await;
        self.active.enter("aborted");
        let freed = loop {
            match freed {
                Some(freed) => break freed,
                None => tokio::time::sleep(RETRY * 10).await,
            }
            freed = delegator.dismiss(&self.plan, reason).await;
        };
        let mirror = mirror_directory(&delegator.parts().state, &self.plan.id);
        let _ = tokio::fs::remove_dir_all(mirror).await;
        self.record(freed).await;
    }

    async fn write_mirror(
        &self,
        target: &PeerAddress,
        word: &SignedRelease,
    ) -> Result<u64, String> {
        let said = self.given_back(target, word)?;
        let mirror = mirror_directory(&self.delegator.parts().state, &self.plan.id);
        let volumes: Vec<_> = trees(&self.plan).cloned().collect();
        let written = tokio::task::spawn_blocking(move || {
            let mut all = 0;
            for volume in volumes {
                let expected = said.changes.get(&volume.id).copied().unwrap_or(0);
                if expected == 0 {
                    continue;
                }
                let written = write_back(&mirror.join(volume.id.to_string()), &volume.source_path)
                    .map_err(|error| format!("volume {}: {error}", volume.name))?;
                if written != expected {
                    return Err(format!(
                        "volume {}: {written} changes are in the mirror, the target made {expected}",
                        volume.name
                    ));
                }
                all += written;
            }
            Ok(all)
        });
        written.await.map_err(|error| error.to_string())?
    }

    /// Starts what ran when the plan was made, parents first.
    async fn start_again(&self) {
        for name in self.plan.order.iter().flat_map(|step| &step.containers) {
            let planned = self.plan.container(name);
            let Some(planned) = planned.filter(|one| one.container.state == State::Running) else {
                continue;
            };
            loop {
                let started = match self.delegator.runtime_of(planned) {
                    Ok(runtime) => runtime.start(&planned.container.id).await,
                    Err(error) => {
                        self.active.trouble(&error.to_string());
                        break;
                    }
                };
                match started {
                    Ok(()) => break,
                    Err(error) if error.not_found() => break,
                    Err(error) => self.active.trouble(&format!("starting {name}: {error}")),
                }
                tokio::time::sleep(RETRY * 4).await;
            }
        }
    }
}
