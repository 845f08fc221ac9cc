//! The source's side of a plan, phase by phase.
//!
//! Each phase is a type that the next one consumes: allocate → prepare → replicate → pause → final
//! changeset → release. Up to the release an error comes back to the caller, who rolls back; after it
//! ([`Released`]) there is no way back, and every step is retried until it succeeds.

use super::allocation;
use super::changes::Watches;
use super::clearance::LOOK;
use super::delegator::{FleetContext, target_peer};
use super::events::{ContainerFence, SourceEvent};
use super::foreground;
use super::freezing::FROZEN_MAX;
use super::images::{drop_exports, export_images, held_layers, layers};
use super::moving::{Move, MoveError, PREPARED_MAX};
use super::replica::Replica;
use super::route::{UNSEALED, hop, relay_request, route_over, stays};
use super::switch::{RETRY, Released};
use crate::fleet::identity;
use crate::fleet::pairing::{PairError, Pairing};
use crate::model::action::Actions;
use crate::model::choice::{Next, Way};
use crate::model::container::{Container, State};
use crate::model::control::{Offer, OfferAccepted, RelayAccepted, TargetStatus};
use crate::model::fleet::{DutyOutcome, PeerAddress};
use crate::model::ids::VolumeId;
use crate::model::plan::{
    Chosen, Content, PlannedContainer, Release, SignedRelease, VolumeRelease,
};
use crate::model::units::Bytes;
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::transfer::{DataKey, DataPath, Limit, Sender};
use crate::volume::BlockSize;
use crate::volume::one::CONTENT;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Runs a plan to its end or back to its beginning; one that was begun in an earlier life of the agent goes on
/// with what arrived.
pub(super) async fn run(mut core: Move) {
    let active = core.active.clone();
    let _spared = foreground::spare(&core.delegator, &active);
    loop {
        let error = match up_to_release(&mut core).await {
            Ok(released) => return released.finish().await,
            Err(_) if active.suspended() => return core.suspend().await,
            Err(error) => error,
        };
        if !error.may_be_of_paired() || core.plan.paired.is_none() {
            return core.roll_back(&error.to_string()).await;
        }
        if let Err(error) = core.go_on_alone(&error).await {
            return core.roll_back(&error.to_string()).await;
        }
    }
}

async fn up_to_release(core: &mut Move) -> Result<Released<'_>, MoveError> {
    if !core.active.held() {
        core.await_clearance().await?;
    }
    let allocated = Planned { core }.allocate().await?;
    let prepared = allocated.prepare().await?;
    let replicated = prepared.replicate().await?;
    let paused = replicated.pause().await?;
    let last = paused.final_changeset().await?;
    last.release().await
}

/// A plan on paper.
struct Planned<'a> {
    core: &'a mut Move,
}

impl<'a> Planned<'a> {
    /// Gets a target and, when something is delegated, a paired device.
    async fn allocate(self) -> Result<Allocated<'a>, MoveError> {
        let core = self.core;
        core.enter("allocate")?;
        let delegator = core.delegator.clone();
        let active = core.active.clone();
        let target = match target_peer(&core.plan) {
            Some(chosen) => chosen,
            None => {
                let target = active
                    .unless_cancelled(delegator.allocate_target(&core.plan))
                    .await?;
                let chosen = describe(&target);
                core.append(SourceEvent::TargetChosen {
                    target: chosen.clone(),
                })?;
                core.plan.target = Some(chosen);
                target.peer
            }
        };
        let mut paired = core.plan.paired.as_ref().and_then(allocation::peer);
        if paired.is_none() && !core.plan.delegated.is_empty() {
            let pair = delegator.pair(&core.plan, &target.device);
            match active.unless_cancelled(pair).await {
                Ok(lent) => paired = Some(core.take_paired(&lent)?),
                // A host that must go does not wait for help that is not there.
                Err(MoveError::Allocation {
                    error: error @ PairError::NobodyFits { .. },
                    ..
                }) => core.keep_all(&error.to_string())?,
                Err(error) => return Err(error),
            }
        }
        core.active.set_plan(&core.plan);
        Ok(Allocated {
            core,
            target,
            paired,
        })
    }
}

impl Move {
    /// Writes down the paired device, and which of the delegated actions it may have.
    fn take_paired(&mut self, paired: &Pairing) -> Result<PeerAddress, MoveError> {
        let address = paired.peer.addr.ip();
        let mut kept = Vec::new();
        if !self.delegator.trusts(address) {
            for action in UNSEALED {
                if self.plan.delegated.0.remove(&action) {
                    kept.push(stays(action, &paired.peer.device, address));
                }
            }
        }
        self.plan.notes.extend(kept.iter().cloned());
        let chosen = describe(paired);
        self.plan.paired = Some(chosen.clone());
        let delegated = self.plan.delegated.clone();
        self.append(SourceEvent::Paired {
            paired: chosen,
            delegated,
            kept,
        })?;
        Ok(paired.peer.clone())
    }

    /// Goes on without the paired device, from what arrived: a host that must go does not wait for help
    /// that went away.
    async fn go_on_alone(&mut self, why: &MoveError) -> Result<(), MoveError> {
        tracing::warn!(plan = %self.plan.id, "every action is done here from now on: {why}");
        self.active.enter("resume");
        self.let_run().await;
        self.end_stand_in().await;
        let failed = DutyOutcome::Failed;
        self.delegator.give_back_paired(&self.plan, failed).await;
        self.keep_all(&why.to_string())?;
        self.append(SourceEvent::Resumed)?;
        self.active.set_plan(&self.plan);
        Ok(())
    }

    /// Keeps every action here from now on.
    pub(super) fn keep_all(&mut self, why: &str) -> Result<(), MoveError> {
        self.plan.paired = None;
        self.plan.delegated = Actions::default();
        self.append(SourceEvent::NotPaired {
            reason: why.to_owned(),
        })?;
        Ok(())
    }
}

fn describe(pairing: &Pairing) -> Chosen {
    Chosen {
        device: pairing.peer.device.clone(),
        address: pairing.peer.addr.to_string(),
        pairing: Some(pairing.id.clone()),
        explanation: pairing
            .explanation
            .iter()
            .map(ToString::to_string)
            .collect(),
    }
}

/// Devices are chosen.
struct Allocated<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    paired: Option<PeerAddress>,
}

impl<'a> Allocated<'a> {
    /// Makes target and paired device ready to receive, and exports the images the target lacks.
    async fn prepare(self) -> Result<Prepared<'a>, MoveError> {
        let Self {
            core,
            target,
            paired,
        } = self;
        core.enter("prepare")?;
        let client = core.client()?;
        let offer = Offer {
            plan: core.plan.clone(),
            layers: layers(core).await?,
        };
        let accepted: OfferAccepted = core.call(client, &target, "offer", &offer).await?;
        let route = match &paired {
            Some(paired) if !core.plan.delegated.is_empty() => {
                let request = relay_request(&core.plan, &target.device, &accepted);
                let relay = core.call(client, paired, "relay", &request).await;
                let relay: RelayAccepted = relay.map_err(|error| match error {
                    MoveError::Peer(error) => MoveError::Paired {
                        device: paired.device.clone(),
                        error,
                    },
                    error => error,
                })?;
                let delegated = &core.plan.delegated;
                let unsealed = UNSEALED.iter().any(|action| delegated.contains(*action));
                if unsealed && !core.delegator.trusts(relay.data.ip()) {
                    return Err(MoveError::Untrusted(relay.data));
                }
                route_over(&core.plan.delegated, &accepted, &relay)
            }
            _ => DataPath::Direct {
                target: hop(accepted.data, &accepted.link_key),
                data_key: DataKey(accepted.data_key.0),
            },
        };
        core.append(SourceEvent::Prepared {
            images_present: accepted.images_present.clone(),
            layers_present: accepted.layers_present.values().sum(),
            times: accepted.times.clone(),
        })?;
        core.active.keeps(&accepted.times);
        core.moved.cannot_serve.clone_from(&accepted.cannot_serve);
        let mut volumes = core.plan.volumes.clone();
        volumes.retain(|volume| !accepted.images_present.contains(&volume.id));
        let held = held_layers(&offer.layers, &accepted.layers_present);
        export_images(core, &volumes, &held).await?;
        let key = *core.fleet()?.identity.fleet_key();
        let sender = core.delegator.sender(&core.plan.id, route, &key);
        let (since, lost) = (core.plan.created, core.moved.lost.clone());
        let sender = sender.keeping(accepted.times).after(since, lost);
        Ok(Prepared {
            core,
            target,
            volumes,
            sender,
        })
    }
}

/// Target and paired device wait for data.
struct Prepared<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    volumes: Vec<VolumeSpec>,
    sender: Sender,
}

impl<'a> Prepared<'a> {
    /// Copies, then copies changesets until one is small enough or they stop shrinking.
    async fn replicate(self) -> Result<Replicated<'a>, MoveError> {
        let Self {
            core,
            target,
            volumes,
            sender,
        } = self;
        let mut replica = Replica {
            sender: Some(sender),
            sent: BTreeMap::new(),
            watches: Watches::default(),
        };
        let in_advance = !core.clearance.given;
        if in_advance {
            prepare_in_advance(core, &mut replica, &volumes).await?;
            revise(core, &target).await?;
            rehearse(core, &target).await?;
        }
        let (mut before, mut rounds) = (None, 0);
        core.note_unreadable(&replica, &volumes);
        let first = core.look(rounds, before);
        if first.next == Next::SwitchFirst || !in_advance {
            core.note_choice(&first)?;
        }
        if first.next == Next::SwitchFirst {
            if !in_advance {
                send_images(core, &mut replica, &volumes).await?;
                rehearse(core, &target).await?;
            }
            return Ok(Replicated {
                core,
                target,
                volumes,
                replica,
                way: Way::SwitchFirst,
            });
        }
        let way = loop {
            core.enter("replicate")?;
            let whole = rounds == 0 && !in_advance;
            let changeset = if whole {
                match whole_round(core, &mut replica, &volumes).await? {
                    Some(changeset) => changeset,
                    None => {
                        send_images(core, &mut replica, &volumes).await?;
                        rehearse(core, &target).await?;
                        break Way::SwitchFirst;
                    }
                }
            } else {
                let round = replicate_round(core, &mut replica, &volumes, false);
                round.await?.0
            };
            rounds += 1;
            if whole {
                drop_exports(core).await;
                rehearse(core, &target).await?;
            }
            core.note_unreadable(&replica, &volumes);
            match core.choose(rounds, before)?.next {
                Next::Copy => before = Some(changeset),
                Next::SwitchFirst => break Way::SwitchFirst,
                // What changed while an operator was waited for goes before the pause.
                Next::Pause if core.await_acceptance(&replica, &volumes).await? => before = None,
                Next::Pause => break Way::CopyFirst,
            }
        };
        Ok(Replicated {
            core,
            target,
            volumes,
            replica,
            way,
        })
    }
}

/// Copies while the plan must not evacuate, at a bounded rate and with pauses.
async fn prepare_in_advance(
    core: &mut Move,
    replica: &mut Replica,
    volumes: &[VolumeSpec],
) -> Result<(), MoveError> {
    let settings = core.delegator.settings().clone();
    let progress = core.active.progress();
    let mut whole = true;
    loop {
        slow_down(core);
        core.enter("replicate in advance")?;
        let (_, took) = replicate_round(core, replica, volumes, whole).await?;
        if std::mem::take(&mut whole) {
            drop_exports(core).await;
        }
        let next = Instant::now() + settings.prepare_pause(took);
        while Instant::now() < next {
            if core.active.held() {
                core.wait_anew();
                core.stay("prepared")?;
                if core.delegator.now().since(core.plan.created) > PREPARED_MAX {
                    return Err(MoveError::PreparedTooLong);
                }
            } else if core.cleared().await? {
                progress.pace.set(Limit::Advance, None);
                return Ok(());
            }
            core.active.heard(LOOK).await;
        }
    }
}

/// Keeps a copy in advance to its rate.
pub(super) fn slow_down(core: &Move) {
    let pace = &core.active.progress().pace;
    let rate = core.delegator.settings().prepare_rate_bytes;
    pace.set(Limit::Advance, core.active.held().then_some(rate));
    // The word to evacuate, which lifts the limit, may have come in between.
    if !core.active.held() {
        pace.set(Limit::Advance, None);
    }
}

/// Sends the next epoch of each volume, an image's only when it is the `whole`; the changeset's bytes and the
/// time it took.
async fn replicate_round(
    core: &mut Move,
    replica: &mut Replica,
    volumes: &[VolumeSpec],
    whole: bool,
) -> Result<(Bytes, Duration), MoveError> {
    let started = Instant::now();
    let round = core.moved.rounds + 1;
    let mut rounds = Vec::new();
    for volume in volumes {
        let is_image = matches!(volume.kind, VolumeKind::Image(_));
        if is_image && !whole {
            continue;
        }
        rounds.push(replica.send(core, volume, false).await?);
    }
    let changeset = rounds.iter().map(|volume| volume.changeset).sum();
    let duration = started.elapsed();
    core.append(SourceEvent::Round {
        round,
        volumes: rounds,
        duration,
    })?;
    Ok((changeset, duration))
}

/// Sends everything, unless a forecast comes up meanwhile by which the rest should come behind the twins: none then.
async fn whole_round(
    core: &mut Move,
    replica: &mut Replica,
    volumes: &[VolumeSpec],
) -> Result<Option<Bytes>, MoveError> {
    let (watch, progress) = (core.watch(), core.active.progress());
    let late = {
        let mut round = std::pin::pin!(replicate_round(core, replica, volumes, true));
        let late = tokio::select! {
            sent = &mut round => return Ok(Some(sent?.0)),
            late = watch.late() => late,
        };
        progress.interrupt(true);
        let ended = round.await;
        progress.interrupt(false);
        if let Err(error) = ended {
            tracing::info!("the copy ends: {error}");
        }
        late
    };
    core.note_choice(&late)?;
    Ok(None)
}

/// Sends the images, which a twin needs whole.
async fn send_images(
    core: &mut Move,
    replica: &mut Replica,
    volumes: &[VolumeSpec],
) -> Result<(), MoveError> {
    let is_image = |volume: &&VolumeSpec| matches!(volume.kind, VolumeKind::Image(_));
    let images: Vec<VolumeSpec> = volumes.iter().filter(is_image).cloned().collect();
    if !images.is_empty() {
        core.enter("replicate")?;
        replicate_round(core, replica, &images, true).await?;
        drop_exports(core).await;
    }
    Ok(())
}

/// Tells the target how the containers of a plan that was prepared in advance are now.
async fn revise(core: &Move, target: &PeerAddress) -> Result<(), MoveError> {
    let offer = Offer {
        plan: core.plan.clone(),
        layers: BTreeMap::new(),
    };
    core.call(core.client()?, target, "revise", &offer).await
}

/// Lets the target load the images and make every twin once, without starting it, so that what it cannot
/// make is found while the source still owns everything.
async fn rehearse(core: &Move, target: &PeerAddress) -> Result<(), MoveError> {
    core.enter("rehearse twins")?;
    let client = core.client()?.clone().with_timeout(REHEARSAL_TIME);
    core.call(&client, target, "rehearse", &()).await
}

/// A slow disk unpacks a large image for minutes.
const REHEARSAL_TIME: Duration = Duration::from_secs(1800);

/// The changeset is as small as it gets.
struct Replicated<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    volumes: Vec<VolumeSpec>,
    replica: Replica,
    way: Way,
}

impl<'a> Replicated<'a> {
    /// Switches restart policies off, then freezes the workload, children before parents.
    async fn pause(self) -> Result<Paused<'a>, MoveError> {
        let Self {
            core,
            target,
            volumes,
            replica,
            way,
        } = self;
        if way == Way::SwitchFirst {
            core.end_copy(&target).await?;
        }
        core.enter("fence")?;
        core.append(SourceEvent::Fencing)?;
        for planned in &core.plan.containers.clone() {
            let runtime = core.delegator.runtime_of(planned)?;
            let why = format!("Lifeboat moves it away with plan {}", core.plan.id);
            let fence = runtime.forbid_start(&planned.container.id, &why).await?;
            let container = planned.container.name.clone();
            core.append(SourceEvent::Fenced {
                fences: vec![ContainerFence { container, fence }],
            })?;
        }
        core.enter("pause")?;
        let started = Instant::now();
        // As they are now: one may have been started or have ended since the plan was made.
        let mut running = Vec::new();
        for planned in &core.plan.containers {
            if core.state_of(planned).await? == Some(State::Running) {
                running.push(planned.container.clone());
            }
        }
        let names = running.iter().map(|container| container.name.clone());
        let containers = Some(names.collect());
        core.append(SourceEvent::Pausing { containers })?;
        let running: Vec<&Container> = running.iter().collect();
        core.delegator.parts().runtimes.pause_all(&running).await?;
        core.append(SourceEvent::Paused {
            duration: started.elapsed(),
        })?;
        Ok(Paused {
            core,
            target,
            volumes,
            replica,
            way,
            since: started,
        })
    }
}

/// Longest time the workload stays frozen before the release: a disk or link that takes longer for the
/// last changeset is not to be waited for with everything stopped.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Nothing writes any more.
struct Paused<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    volumes: Vec<VolumeSpec>,
    replica: Replica,
    way: Way,
    since: Instant,
}

impl<'a> Paused<'a> {
    /// Sends what changed since the last round; source and target agree on every root. When the plan switches first,
    /// they agree on the lists instead.
    async fn final_changeset(self) -> Result<FinallySent<'a>, MoveError> {
        let Self {
            core,
            target,
            volumes,
            mut replica,
            way,
            since,
        } = self;
        if way == Way::SwitchFirst {
            let releases = core.agree_on_lists(&target, since).await?;
            let volumes = releases.iter().map(|release| release.volume);
            // Those over which a store proves what arrived, whatever the volume's size.
            let bytes = Bytes(BlockSize::for_volume(0).bytes());
            let block_sizes = volumes.map(|volume| (volume, bytes)).collect();
            return Ok(FinallySent {
                core,
                target,
                releases,
                block_sizes,
                device_sizes: BTreeMap::new(),
                since,
            });
        }
        core.enter("final changeset")?;
        core.freeze_file_systems().await?;
        let started = Instant::now();
        let mut rounds = Vec::new();
        for volume in volumes
            .iter()
            .filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)))
        {
            let left = PAUSE_MAX.saturating_sub(since.elapsed());
            let sent = tokio::time::timeout(left, replica.send(core, volume, true)).await;
            let too_long = |_| {
                // Or its thread would try to reach a device that is away.
                core.active.progress().cancel();
                MoveError::PauseTooLong(PAUSE_MAX)
            };
            rounds.push(sent.map_err(too_long)??);
        }
        core.append(SourceEvent::Final {
            volumes: rounds.clone(),
            duration: started.elapsed(),
        })?;
        let lost = core.unaccepted(&replica, &volumes);
        if !lost.is_empty() {
            return Err(MoveError::Loss(super::loss::tell(&lost)));
        }
        let sent = replica.sent.iter();
        let block_sizes = sent
            .map(|(volume, state)| (*volume, Bytes(state.block_size.bytes())))
            .collect();
        let devices = volumes
            .iter()
            .filter(|volume| volume.kind == VolumeKind::Device);
        let device_sizes = devices
            .filter_map(|volume| {
                let content = replica.sent.get(&volume.id)?.get(CONTENT)?;
                Some((volume.id, Bytes(content.size())))
            })
            .collect();
        let releases = rounds
            .into_iter()
            .map(|round| VolumeRelease {
                volume: round.volume,
                name: round.name,
                epoch: round.epoch,
                content: Content::Sealed(round.root),
            })
            .collect();
        Ok(FinallySent {
            core,
            target,
            releases,
            block_sizes,
            device_sizes,
            since,
        })
    }
}

/// Everything is on the target.
struct FinallySent<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    releases: Vec<VolumeRelease>,
    /// Of the blocks over which each root is.
    block_sizes: BTreeMap<VolumeId, Bytes>,
    device_sizes: BTreeMap<VolumeId, Bytes>,
    since: Instant,
}

impl<'a> FinallySent<'a> {
    /// Signs and writes the release: the commit point.
    async fn release(self) -> Result<Released<'a>, MoveError> {
        let Self {
            core,
            target,
            releases,
            block_sizes,
            device_sizes,
            since,
        } = self;
        core.enter("release")?;
        core.check_arrived(&target, &releases).await?;
        core.check_frozen().await?;
        if !core.done.freezing.is_empty() && since.elapsed() >= FROZEN_MAX {
            return Err(MoveError::PauseTooLong(FROZEN_MAX));
        }
        let release = Release {
            plan: core.plan.id.clone(),
            source: core.plan.source.clone(),
            target: target.device.clone(),
            volumes: releases,
            block_sizes,
            device_sizes,
            at: core.delegator.now(),
        };
        let signed = sign(core.fleet()?, &release)?;
        core.active.commit()?;
        let released = SourceEvent::Released {
            release: signed.clone(),
        };
        if let Err(error) = core.append(released) {
            // As long as a next life might find it, nothing may run here.
            while let Err(error) = core.journal.cut_back() {
                core.active.trouble(&error.to_string());
                tokio::time::sleep(RETRY).await;
            }
            return Err(error.into());
        }
        Ok(Released {
            core,
            target,
            release: signed,
            paused: Some(since),
        })
    }
}

impl Move {
    /// State of a planned container now; none when it is gone.
    async fn state_of(&self, planned: &PlannedContainer) -> Result<Option<State>, MoveError> {
        match self
            .delegator
            .runtime_of(planned)?
            .state(&planned.container.id)
            .await
        {
            Ok(state) => Ok(Some(state)),
            Err(error) if error.not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Nothing of the plan may run when it is released.
    async fn check_frozen(&self) -> Result<(), MoveError> {
        for planned in &self.plan.containers {
            if self.state_of(planned).await? == Some(State::Running) {
                return Err(MoveError::Thawed(planned.container.name.clone()));
            }
        }
        Ok(())
    }

    /// Asks the target itself, over mutual TLS, what arrived: an acknowledgement on the data plane came
    /// through whoever carried the data.
    async fn check_arrived(
        &self,
        target: &PeerAddress,
        releases: &[VolumeRelease],
    ) -> Result<(), MoveError> {
        let path = format!("/v1/plans/{}", self.plan.id);
        let client = self.client()?.clone().with_timeout(CHECK_TIME);
        let status: TargetStatus = client.get(target, &path).await?;
        for release in releases {
            if !status.arrived.contains(release) {
                return Err(MoveError::NotArrived {
                    volume: release.name.clone(),
                    target: target.device.clone(),
                });
            }
        }
        Ok(())
    }
}

/// A target that just acknowledged everything answers at once.
const CHECK_TIME: Duration = Duration::from_secs(5);

fn sign(fleet: &FleetContext, release: &Release) -> Result<SignedRelease, MoveError> {
    let failed = |error: String| MoveError::Sign(error);
    let body = serde_json::to_string(release).map_err(|error| failed(error.to_string()))?;
    let signature = identity::sign(&fleet.identity, body.as_bytes())
        .map_err(|error| failed(error.to_string()))?;
    Ok(SignedRelease {
        body,
        certificate: fleet.identity.certificate().to_vec(),
        signature,
    })
}
