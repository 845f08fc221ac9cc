//! The source's side of a plan, phase by phase.
//!
//! Each phase is a type that the next one consumes: allocate → prepare → replicate → pause → final
//! changeset → release. Up to the release an error comes back to the caller, who rolls back; after it
//! ([`Released`]) there is no way back, and every step is retried until it succeeds.

use super::delegator::{Active, Delegator, FleetContext};
use super::events::{ContainerFence, Forwarding, SourceEvent, VolumeRound};
use super::journal::{Journal, JournalError};
use crate::containers::{FenceError, ImageError, Means, PauseError, RuntimeError};
use crate::fleet::client::{CallError, ControlClient};
use crate::fleet::identity;
use crate::fleet::pairing::{PairError, Pairing};
use crate::model::action::{Action, Actions};
use crate::model::container::{Container, State};
use crate::model::control::{
    Offer, OfferAccepted, Owns, RelayAccepted, RelayRequest, Secret, TakeOver, TargetStatus,
};
use crate::model::fleet::{DutyOutcome, PeerAddress, Role};
use crate::model::ids::{ContainerName, Epoch, PlanId, VolumeId};
use crate::model::plan::{Chosen, Plan, PlannedContainer, Release, SignedRelease, VolumeRelease};
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::transfer::{DataKey, DataPath, Hop, LinkKey, SendError, Sender};
use crate::volume::TreeState;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a plan stopped before its release. The source's containers run on.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The operator (or a newer fact) asked to stop.
    #[error("aborted: {0}")]
    Cancelled(String),
    /// No device could be had.
    #[error("no {role} was allocated: {error}")]
    Allocation {
        /// As what it was wanted.
        role: Role,
        /// Cause.
        error: PairError,
    },
    /// The target or paired device refused or cannot be reached.
    #[error("{0}")]
    Peer(#[from] CallError),
    /// A runtime operation failed.
    #[error("{0}")]
    Runtime(#[from] RuntimeError),
    /// An image cannot be exported.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// A container cannot be kept from being started.
    #[error("{0}")]
    Fence(#[from] FenceError),
    /// The workload cannot be frozen.
    #[error("{0}")]
    Pause(#[from] PauseError),
    /// The release cannot be signed.
    #[error("cannot sign the release: {0}; check the identity in the state directory")]
    Sign(String),
    /// The device left its fleet.
    #[error("this device is in no fleet; enrol it with `lifeboat fleet join`")]
    NoFleet,
    /// The journal cannot be written.
    #[error("{0}")]
    Journal(#[from] JournalError),
    /// A volume could not be sent.
    #[error("volume {volume}: {error}")]
    Send {
        /// Volume.
        volume: String,
        /// Cause.
        error: SendError,
    },
    /// A file operation of the plan's own directory failed.
    #[error("cannot {doing}: {error}; free space or repair the file system, then ask again")]
    File {
        /// What was done to what.
        doing: String,
        /// Cause.
        error: std::io::Error,
    },
    /// A task of this process died.
    #[error("internal task failed: {0}; see the agent's log")]
    Task(#[from] tokio::task::JoinError),
}

/// What all phases share: the plan, its journal and the daemon round it.
pub(super) struct Move {
    pub(super) delegator: Arc<Delegator>,
    pub(super) plan: Plan,
    pub(super) journal: Journal<SourceEvent>,
    pub(super) active: Arc<Active>,
    pub(super) done: Done,
}

/// What a roll-back would have to undo.
#[derive(Debug, Default)]
pub(super) struct Done {
    fencing: bool,
    fences: Vec<ContainerFence>,
    pausing: bool,
}

impl Done {
    /// Takes note of a journalled event.
    pub(super) fn note(&mut self, event: &SourceEvent) {
        match event {
            SourceEvent::Fencing => self.fencing = true,
            SourceEvent::Fenced { fences } => self.fences.extend(fences.iter().cloned()),
            SourceEvent::Pausing => self.pausing = true,
            _ => {}
        }
    }
}

impl Move {
    fn append(&mut self, event: SourceEvent) -> Result<(), JournalError> {
        self.done.note(&event);
        self.journal.append(self.delegator.now(), event)
    }

    fn fleet(&self) -> Result<&FleetContext, MoveError> {
        self.delegator.fleet().ok_or(MoveError::NoFleet)
    }

    fn client(&self) -> Result<&ControlClient, MoveError> {
        Ok(&self.fleet()?.client)
    }

    fn enter(&self, phase: &'static str) -> Result<(), MoveError> {
        self.active.enter(phase);
        tracing::info!(plan = %self.plan.id, phase, "phase");
        match self.active.cancelled() {
            Some(reason) => Err(MoveError::Cancelled(reason)),
            None => Ok(()),
        }
    }
}

/// Runs a plan that was just made, to its end or back to its beginning.
pub(super) async fn run(mut core: Move) {
    match up_to_release(&mut core).await {
        Ok(released) => released.finish().await,
        Err(error) => core.roll_back(&error.to_string()).await,
    }
}

async fn up_to_release(core: &mut Move) -> Result<Released<'_>, MoveError> {
    let allocated = Planned { core }.allocate().await?;
    let prepared = allocated.prepare().await?;
    let replicated = prepared.replicate().await?;
    let paused = replicated.pause().await?;
    let last = paused.final_changeset().await?;
    last.release()
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
        let target = delegator.allocate_target(&core.plan).await?;
        let target_peer = target.peer.clone();
        let chosen = describe(&target);
        core.append(SourceEvent::TargetChosen {
            target: chosen.clone(),
        })?;
        core.plan.target = Some(chosen);
        let mut paired_peer = None;
        if !core.plan.delegated.is_empty() {
            let paired = delegator.pair(&core.plan, &target_peer.device).await?;
            if core.plan.delegated.contains(Action::Encrypt)
                && !delegator.trusts(paired.peer.addr.ip())
            {
                core.plan.delegated.0.remove(&Action::Encrypt);
                core.plan.notes.push(format!(
                    "encrypt stays here: the link to {} ({}) is not in `trusted_networks`",
                    paired.peer.device,
                    paired.peer.addr.ip()
                ));
            }
            let chosen = describe(&paired);
            core.append(SourceEvent::Paired {
                paired: chosen.clone(),
            })?;
            core.plan.paired = Some(chosen);
            paired_peer = Some(paired.peer);
        }
        core.active.set_plan(&core.plan);
        Ok(Allocated {
            core,
            target: target_peer,
            paired: paired_peer,
        })
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
        let path = format!("/v1/plans/{}/offer", core.plan.id);
        let accepted: OfferAccepted = client
            .post(
                &target,
                &path,
                &Offer {
                    plan: core.plan.clone(),
                },
            )
            .await?;
        let route = match &paired {
            Some(paired) if !core.plan.delegated.is_empty() => {
                let request = relay_request(&core.plan, &accepted);
                let path = format!("/v1/plans/{}/relay", core.plan.id);
                let relay: RelayAccepted = client.post(paired, &path, &request).await?;
                route_over(&core.plan.delegated, &accepted, &relay)
            }
            _ => DataPath::Direct {
                target: hop(accepted.data, &accepted.link_key),
                data_key: DataKey(accepted.data_key.0),
            },
        };
        core.append(SourceEvent::Prepared {
            images_present: accepted.images_present.clone(),
        })?;
        let mut volumes = Vec::new();
        for volume in core.plan.volumes.clone() {
            if let VolumeKind::Image(reference) = &volume.kind {
                if accepted.images_present.contains(&volume.id) {
                    continue;
                }
                export_image(core, &volume, reference).await?;
            }
            volumes.push(volume);
        }
        let key = *core.fleet()?.identity.fleet_key();
        let sender = core.delegator.sender(&core.plan.id, route, &key);
        Ok(Prepared {
            core,
            target,
            volumes,
            sender,
        })
    }
}

fn relay_request(plan: &Plan, accepted: &OfferAccepted) -> RelayRequest {
    let delegated = &plan.delegated;
    RelayRequest {
        plan: plan.id.clone(),
        actions: delegated.clone(),
        forward: delegated
            .contains(Action::Transfer)
            .then(|| (accepted.data, accepted.link_key.clone())),
        seal_key: delegated
            .contains(Action::Encrypt)
            .then(|| accepted.data_key.clone()),
        quantity: plan.volumes.iter().map(|volume| volume.size).sum(),
    }
}

fn route_over(delegated: &Actions, target: &OfferAccepted, relay: &RelayAccepted) -> DataPath {
    let paired = hop(relay.data, &relay.link_key);
    match (
        delegated.contains(Action::Encrypt),
        delegated.contains(Action::Transfer),
    ) {
        (true, true) => DataPath::SealForward { relay: paired },
        (true, false) => DataPath::SealReturn {
            sealer: paired,
            target: hop(target.data, &target.link_key),
        },
        _ => DataPath::ViaSpool {
            relay: paired,
            data_key: DataKey(target.data_key.0),
        },
    }
}

fn hop(addr: SocketAddr, key: &Secret) -> Hop {
    Hop {
        addr,
        link_key: LinkKey(key.0),
    }
}

async fn export_image(core: &Move, volume: &VolumeSpec, reference: &str) -> Result<(), MoveError> {
    let directory = &volume.source_path;
    tokio::fs::create_dir_all(directory)
        .await
        .map_err(|error| MoveError::File {
            doing: format!("create {}", directory.display()),
            error,
        })?;
    let owner = volume.containers.first();
    if let Some(planned) = owner.and_then(|name| core.plan.container(name)) {
        let runtime = core.delegator.runtime_of(planned)?;
        runtime
            .export_image(reference, &directory.join(IMAGE_FILE))
            .await?;
    }
    Ok(())
}

/// Name of the archive inside an image volume's directory.
pub(super) const IMAGE_FILE: &str = "image.tar";

/// Target and paired device wait for data.
struct Prepared<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    volumes: Vec<VolumeSpec>,
    sender: Sender,
}

/// What was sent of a volume last.
struct Sent {
    epoch: Epoch,
    state: TreeState,
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
        let settings = core.delegator.settings().clone();
        let mut replica = Replica {
            sender: Some(sender),
            sent: BTreeMap::new(),
        };
        let mut before = None;
        for round in 1..=settings.rounds_max {
            core.enter("replicate")?;
            let started = Instant::now();
            let mut rounds = Vec::new();
            for volume in &volumes {
                let is_image = matches!(volume.kind, VolumeKind::Image(_));
                if round > 1 && is_image {
                    continue;
                }
                rounds.push(replica.send(core, volume, false).await?);
            }
            let changeset: u64 = rounds.iter().map(|volume| volume.changeset.0).sum();
            core.append(SourceEvent::Round {
                round,
                volumes: rounds,
                duration: started.elapsed(),
            })?;
            if round == 1 {
                load_images(core, &target).await?;
            }
            let shrinks = before.is_none_or(|before| changeset * 10 <= before * 8);
            // The first round is the whole copy: what changed meanwhile is not known before the second.
            let small = round > 1 && changeset <= settings.changeset_threshold_bytes;
            if small || !shrinks {
                break;
            }
            before = Some(changeset);
        }
        Ok(Replicated {
            core,
            target,
            volumes,
            replica,
        })
    }
}

async fn load_images(core: &Move, target: &PeerAddress) -> Result<(), MoveError> {
    let path = format!("/v1/plans/{}/images", core.plan.id);
    let () = core
        .client()?
        .clone()
        .with_timeout(Duration::from_secs(600))
        .post(target, &path, &())
        .await?;
    for volume in &core.plan.volumes {
        if matches!(volume.kind, VolumeKind::Image(_)) {
            // The export was only made for the journey; a sick disk wants its space back.
            let _ = tokio::fs::remove_dir_all(&volume.source_path).await;
        }
    }
    Ok(())
}

/// The sender and what it sent, volume by volume.
struct Replica {
    sender: Option<Sender>,
    sent: BTreeMap<VolumeId, Sent>,
}

impl Replica {
    /// Sends the next epoch of `volume`.
    ///
    /// `frozen` says that nothing may change meanwhile: a change is then an error, not a later epoch.
    async fn send(
        &mut self,
        core: &Move,
        volume: &VolumeSpec,
        frozen: bool,
    ) -> Result<VolumeRound, MoveError> {
        let previous = self.sent.remove(&volume.id);
        let start = core
            .plan
            .epochs
            .get(&volume.id)
            .copied()
            .unwrap_or_default();
        let epoch = previous.as_ref().map_or(start, |sent| sent.epoch).next();
        let Some(mut sender) = self.sender.take() else {
            return Err(MoveError::Cancelled(
                "the sender was lost with an earlier error".into(),
            ));
        };
        let progress = core.active.progress();
        let spec = volume.clone();
        let (sender, outcome) = tokio::task::spawn_blocking(move || {
            let outcome = sender.send_epoch(
                &spec,
                epoch,
                frozen,
                previous.as_ref().map(|sent| &sent.state),
                &progress,
            );
            (sender, outcome)
        })
        .await?;
        self.sender = Some(sender);
        let (state, report) = outcome.map_err(|error| match core.active.cancelled() {
            Some(reason) => MoveError::Cancelled(reason),
            None => MoveError::Send {
                volume: volume.name.clone(),
                error,
            },
        })?;
        self.sent.insert(volume.id, Sent { epoch, state });
        Ok(VolumeRound {
            volume: volume.id,
            name: volume.name.clone(),
            epoch,
            root: report.root,
            entries: report.entries,
            changed_entries: report.changed_entries,
            changeset: report.changeset,
            read: report.bytes_read,
            wire: report.bytes_on_wire,
            exceptions: report
                .skipped
                .iter()
                .map(|exception| format!("{}: {}", exception.path, exception.reason))
                .collect(),
            duration: report.duration,
        })
    }
}

/// The changeset is as small as it gets.
struct Replicated<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    volumes: Vec<VolumeSpec>,
    replica: Replica,
}

impl<'a> Replicated<'a> {
    /// Switches restart policies off, then freezes the workload, children before parents.
    async fn pause(self) -> Result<Paused<'a>, MoveError> {
        let Self {
            core,
            target,
            volumes,
            replica,
        } = self;
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
        core.append(SourceEvent::Pausing)?;
        let started = Instant::now();
        // Children first: a frozen parent would only make them time out.
        let running: Vec<&Container> = core
            .plan
            .order
            .iter()
            .rev()
            .flat_map(|step| step.containers.iter().rev())
            .filter_map(|name| core.plan.container(name))
            .map(|planned| &planned.container)
            .filter(|container| container.state == State::Running)
            .collect();
        core.delegator.parts().runtimes.pause_all(&running).await?;
        core.append(SourceEvent::Paused {
            duration: started.elapsed(),
        })?;
        Ok(Paused {
            core,
            target,
            volumes,
            replica,
            since: started,
        })
    }
}

/// Nothing writes any more.
struct Paused<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    volumes: Vec<VolumeSpec>,
    replica: Replica,
    since: Instant,
}

impl<'a> Paused<'a> {
    /// Sends what changed since the last round; source and target agree on every root.
    async fn final_changeset(self) -> Result<FinallySent<'a>, MoveError> {
        let Self {
            core,
            target,
            volumes,
            mut replica,
            since,
        } = self;
        core.enter("final changeset")?;
        let started = Instant::now();
        let mut rounds = Vec::new();
        for volume in volumes
            .iter()
            .filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)))
        {
            rounds.push(replica.send(core, volume, true).await?);
        }
        core.append(SourceEvent::Final {
            volumes: rounds.clone(),
            duration: started.elapsed(),
        })?;
        let releases = rounds
            .into_iter()
            .map(|round| VolumeRelease {
                volume: round.volume,
                name: round.name,
                epoch: round.epoch,
                root: round.root,
            })
            .collect();
        Ok(FinallySent {
            core,
            target,
            releases,
            since,
        })
    }
}

/// Everything is on the target.
struct FinallySent<'a> {
    core: &'a mut Move,
    target: PeerAddress,
    releases: Vec<VolumeRelease>,
    since: Instant,
}

impl<'a> FinallySent<'a> {
    /// Signs and writes the release: the commit point.
    fn release(self) -> Result<Released<'a>, MoveError> {
        let Self {
            core,
            target,
            releases,
            since,
        } = self;
        core.enter("release")?;
        let release = Release {
            plan: core.plan.id.clone(),
            source: core.plan.source.clone(),
            target: target.device.clone(),
            volumes: releases,
            at: core.delegator.now(),
        };
        let signed = sign(core.fleet()?, &release)?;
        core.active.commit()?;
        core.append(SourceEvent::Released {
            release: signed.clone(),
        })?;
        Ok(Released {
            core,
            target,
            release: signed,
            paused: Some(since),
        })
    }
}

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

/// The source owns nothing any more.
pub(super) struct Released<'a> {
    pub(super) core: &'a mut Move,
    pub(super) target: PeerAddress,
    pub(super) release: SignedRelease,
    /// When the workload was frozen; unknown after a restart.
    pub(super) paused: Option<Instant>,
}

/// Longest wait for one killed container to be gone before it is killed again.
const KILL_TIME: Duration = Duration::from_secs(10);

/// Between two tries of a step after the release.
const RETRY: Duration = Duration::from_millis(500);

impl Released<'_> {
    /// Hands over, stops the source's containers, forwards, and waits for the twins.
    pub(super) async fn finish(self) {
        let Self {
            core,
            target,
            release,
            paused,
        } = self;
        core.active.enter("switch");
        let owns = loop {
            match hand_over(core, &target, &release).await {
                Ok(owns) => break owns,
                Err(error) => core
                    .active
                    .trouble(&format!("handing over to {}: {error}", target.device)),
            }
            tokio::time::sleep(RETRY).await;
        };
        core.record(SourceEvent::TargetOwns { owns }).await;
        let names: Vec<ContainerName> = core
            .plan
            .containers
            .iter()
            .map(|planned| planned.container.name.clone())
            .collect();
        let kills = core
            .plan
            .containers
            .iter()
            .map(|planned| kill_until_dead(core, planned));
        futures_util::future::join_all(kills).await;
        core.record(SourceEvent::SourceStopped { containers: names })
            .await;
        let ports = core.delegator.forward(&core.plan, target.addr.ip()).await;
        core.record(SourceEvent::Forwarding { ports }).await;
        core.active.enter("start twins");
        let status = loop {
            match target_status(core, &target).await {
                Ok(status) if status.start_up.is_some() => break status,
                Ok(status) => {
                    core.active.twins(&status.twins);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => {
                    core.active
                        .trouble(&format!("asking {} for its twins: {error}", target.device));
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        let interruption = paused.map_or_else(
            || core.delegator.now().since(core.plan.created),
            |since| since.elapsed(),
        );
        core.record(SourceEvent::Twins {
            twins: status.twins,
            interruption,
            start_up: status.start_up.unwrap_or_default(),
        })
        .await;
        core.delegator
            .end_pairings(&core.plan, DutyOutcome::Done, &[])
            .await;
        core.record(SourceEvent::Completed).await;
        core.active.enter("completed");
        tracing::info!(plan = %core.plan.id, "completed");
    }
}

async fn hand_over(
    core: &Move,
    target: &PeerAddress,
    release: &SignedRelease,
) -> Result<Owns, MoveError> {
    let path = format!("/v1/plans/{}/release", core.plan.id);
    core.client()?
        .post(
            target,
            &path,
            &TakeOver {
                release: release.clone(),
            },
        )
        .await
        .map_err(Into::into)
}

async fn target_status(core: &Move, target: &PeerAddress) -> Result<TargetStatus, MoveError> {
    Ok(core
        .client()?
        .get(target, &format!("/v1/plans/{}", core.plan.id))
        .await?)
}

async fn kill_until_dead(core: &Move, planned: &PlannedContainer) {
    loop {
        let killed = match core.delegator.runtime_of(planned) {
            Ok(runtime) => runtime.kill(&planned.container.id, KILL_TIME).await,
            Err(error) => {
                core.active.trouble(&error.to_string());
                return;
            }
        };
        match killed {
            Ok(()) => return,
            Err(error) if error.not_found() => return,
            Err(error) => core
                .active
                .trouble(&format!("killing {}: {error}", planned.container.name)),
        }
        tokio::time::sleep(RETRY).await;
    }
}

impl Move {
    /// Appends after the release, when giving up is no choice.
    async fn record(&mut self, event: SourceEvent) {
        while let Err(error) = self.append(event.clone()) {
            self.active.trouble(&error.to_string());
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Undoes what the journal says was done, and tells the other devices.
    pub(super) async fn roll_back(&mut self, reason: &str) {
        tracing::warn!(plan = %self.plan.id, reason, "rolling back");
        self.active.enter("roll back");
        let delegator = self.delegator.clone();
        for planned in &self.plan.containers {
            while let Err(error) = self.restore(planned).await {
                self.active
                    .trouble(&format!("restoring {}: {error}", planned.container.name));
                tokio::time::sleep(RETRY).await;
            }
        }
        delegator.dismiss(&self.plan, reason).await;
        delegator
            .end_pairings(&self.plan, DutyOutcome::Abandoned, &[])
            .await;
        self.record(SourceEvent::Aborted {
            reason: reason.to_owned(),
        })
        .await;
        let _ = tokio::fs::remove_dir_all(delegator.image_directory(&self.plan.id)).await;
        self.active.enter("aborted");
    }
}

impl Move {
    /// Lets one container run and be started as before.
    async fn restore(&self, planned: &PlannedContainer) -> Result<(), MoveError> {
        let (container, runtime) = (&planned.container, self.delegator.runtime_of(planned)?);
        if self.done.pausing && container.state == State::Running {
            match runtime.state(&container.id).await {
                Ok(State::Paused) => runtime.unpause(&container.id).await?,
                Err(error) if error.not_found() => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let known = self
            .done
            .fences
            .iter()
            .find(|fence| fence.container == container.name);
        match known {
            Some(known) => runtime.lift_fence(&known.fence).await?,
            None if self.done.fencing => {
                // The agent died between making this fence and writing it down: make it again to know it.
                let mut fence = runtime.forbid_start(&container.id, "roll-back").await?;
                if let Means::RestartPolicy { previous } = &mut fence.how {
                    *previous = planned.inspect["HostConfig"]["RestartPolicy"].clone();
                }
                runtime.lift_fence(&fence).await?;
            }
            None => {}
        }
        Ok(())
    }
}

/// Where a plan's ports are forwarded to.
#[must_use]
pub(super) fn forwardings(plan: &Plan, target: std::net::IpAddr) -> Vec<Forwarding> {
    plan.containers
        .iter()
        .flat_map(|planned| planned.container.published.iter())
        .filter(|port| !port.udp)
        .map(|port| Forwarding {
            listen: (port.host_ip, port.host_port).into(),
            to: (target, port.host_port).into(),
        })
        .collect()
}

/// The id of a new plan: time first, so that plans sort; then chance.
#[must_use]
pub(super) fn new_plan_id(now: crate::model::units::UnixMillis, chance: u32) -> PlanId {
    PlanId(format!("p{:x}-{chance:08x}", now.0 / 1000))
}
