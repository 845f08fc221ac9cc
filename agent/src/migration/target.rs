//! The target's side of a plan: take the offer, receive, own, start the twins.
//!
//! Invariants: without a good release nothing is started (rule 4); ownership is on disk before it is
//! said; what a plan made here is removed again when it ends without ownership, and nothing else is.

use super::admission::{Keys, layers_held};
use super::delegator::{Parts, plan_ids};
use super::events::{Place, TargetEvent};
use super::forwarding::Back;
use super::journal::{Entry, Journal, JournalError, plan_directory};
use super::keys;
use super::later::Later;
use super::leftovers::{Left, left_of};
use super::opening;
use super::places::{check_room, name_of, times_kept};
use crate::containers::{
    Engine, ImageError, ResourceError, Runtime, RuntimeError, TwinError, create,
};
use crate::fleet::agent::PairedState;
use crate::model::control::{Offer, OfferAccepted, Owns, TargetStatus};
use crate::model::fleet::Role;
use crate::model::ids::{ContainerName, DeviceId, PlanId, VolumeId};
use crate::model::plan::{Content, Plan, TwinState, VolumeRelease};
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::transfer::ReceiveProgress;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Why the target refused.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The peer is not the plan's source, or we are not its target.
    #[error("plan {plan} is not for us: {why}")]
    NotOurs {
        /// Plan.
        plan: PlanId,
        /// Why.
        why: String,
    },
    /// The plan is not known here.
    #[error("plan {0} is not known on this target; offer it first")]
    Unknown(PlanId),
    /// Something is in the way.
    #[error("target cannot take {what}: {why}")]
    InTheWay {
        /// Container or volume.
        what: String,
        /// What is in the way and what to do.
        why: String,
    },
    /// Not enough space.
    #[error(
        "target has {free} free at {path}, the plan's volumes there need {needed}; free space or choose another target"
    )]
    NoSpace {
        /// Directory.
        path: PathBuf,
        /// Free.
        free: Bytes,
        /// Needed.
        needed: Bytes,
    },
    /// Not enough inodes.
    #[error(
        "target has {free} inodes free at {path}, the plan's volumes there need {needed}; remove files or choose another target"
    )]
    NoInodes {
        /// Directory.
        path: PathBuf,
        /// Free.
        free: u64,
        /// Needed.
        needed: u64,
    },
    /// The release is not good.
    #[error("release of plan {plan} refused: {why}")]
    BadRelease {
        /// Plan.
        plan: PlanId,
        /// Which check failed.
        why: String,
    },
    /// The target owns the plan's volumes: too late to dismiss it.
    #[error("plan {0} was taken over: this target owns its volumes and runs the twins")]
    Owned(PlanId),
    /// A runtime failed.
    #[error("{0}")]
    Runtime(#[from] RuntimeError),
    /// An image cannot be loaded.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// A twin cannot be made.
    #[error("{0}; nothing was released")]
    Twin(#[from] TwinError),
    /// A volume or network cannot be made.
    #[error("{0}")]
    Resource(#[from] ResourceError),
    /// The journal failed.
    #[error("{0}")]
    Journal(#[from] JournalError),
    /// A file operation failed.
    #[error("cannot {doing}: {error}; look at the file system there, or choose another target")]
    File {
        /// What was done to what.
        doing: String,
        /// Cause.
        error: std::io::Error,
    },
}

/// One plan on this target.
pub(super) struct Receiving {
    pub(super) plan: Plan,
    pub(super) places: Vec<Place>,
    /// Socket of the runtime that has its volumes and twins; none in the journal of an earlier build.
    pub(super) runtime: Option<String>,
    pub(super) journal: Journal<TargetEvent>,
    /// Networks that the plan made here.
    pub(super) networks: Vec<String>,
    /// What stands for the source's block devices here.
    pub(super) devices: BTreeMap<PathBuf, PathBuf>,
    pub(super) owns: Option<Owns>,
    /// Since when, by this device's clock.
    pub(super) owned_at: UnixMillis,
    /// What came back here with it.
    pub(super) back: Back,
    /// All its twins were ready once: what ended since was ended by somebody.
    pub(super) completed: bool,
    pub(super) twins: Vec<TwinState>,
    pub(super) start_up: Option<Duration>,
    pub(super) trouble: Option<String>,
    /// Twins that the agent ended since all of them were ready.
    pub(super) ended: BTreeSet<ContainerName>,
    /// Its places were made.
    pub(super) accepted: bool,
    /// What it made was removed but for this, and its journal does not say so yet.
    pub(super) removed: Option<Left>,
    /// Its data comes behind its twins.
    pub(super) later: Option<Later>,
}

impl Receiving {
    /// A plan of which nothing was made yet but, if `accepted`, its places.
    fn new(plan: Plan, places: Vec<Place>, journal: Journal<TargetEvent>, accepted: bool) -> Self {
        Self {
            plan,
            places,
            runtime: None,
            journal,
            networks: Vec::new(),
            devices: BTreeMap::new(),
            owns: None,
            owned_at: UnixMillis::default(),
            back: Back::new(),
            completed: false,
            twins: Vec::new(),
            start_up: None,
            trouble: None,
            ended: BTreeSet::new(),
            accepted,
            removed: None,
            later: None,
        }
    }

    /// Takes note that twins do not run any more.
    pub(super) fn end(&mut self, twins: &[ContainerName]) {
        self.twins.retain(|twin| !twins.contains(&twin.container));
        self.ended.extend(twins.iter().cloned());
        self.start_up = None;
    }
}

/// The target role of an agent.
pub struct Target {
    pub(super) parts: Arc<Parts>,
    pub(super) pairings: Arc<PairedState>,
    data: SocketAddr,
    plans: Mutex<BTreeMap<PlanId, Receiving>>,
    /// What could not be removed of plans that are over.
    pub(super) left: Mutex<BTreeMap<PlanId, Left>>,
    /// One offer or removal at a time: what is found free must still be free when it is taken.
    pub(super) offers: tokio::sync::Mutex<()>,
    /// No twin is started while another one's end is awaited.
    pub(super) starts: tokio::sync::Mutex<()>,
    /// The agent ends: no twin is started any more.
    pub(super) ending: AtomicBool,
    /// One call of a source at a time: each is a few steps that belong together.
    turns: Mutex<BTreeMap<DeviceId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Target {
    /// The role; `data` is the address of the data plane that peers are told.
    #[must_use]
    pub fn new(parts: Arc<Parts>, pairings: Arc<PairedState>, data: SocketAddr) -> Self {
        Self {
            parts,
            pairings,
            data,
            plans: Mutex::default(),
            left: Mutex::default(),
            offers: tokio::sync::Mutex::default(),
            starts: tokio::sync::Mutex::default(),
            ending: AtomicBool::new(false),
            turns: Mutex::default(),
        }
    }

    pub(super) fn plans(&self) -> std::sync::MutexGuard<'_, BTreeMap<PlanId, Receiving>> {
        // Plain values, whole after every statement; a panic elsewhere spoils nothing.
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn turn(&self, source: &DeviceId) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.entry(source.clone()).or_default().clone()
        };
        turn.lock_owned().await
    }

    /// Accepts a plan: checks that everything fits, makes the places and opens the data plane to it.
    ///
    /// # Errors
    /// The plan is not for us, something is in the way, or there is too little space.
    pub async fn offer(
        self: &Arc<Self>,
        peer: &DeviceId,
        offer: Offer,
    ) -> Result<OfferAccepted, TargetError> {
        let Offer { plan, layers } = offer;
        let _turn = self.turn(peer).await;
        let _offer = self.offers.lock().await;
        self.check_ours(peer, &plan)?;
        if let Some(known) = self.plans().get(&plan.id)
            && known.owns.is_some()
        {
            return Err(TargetError::Owned(plan.id));
        }
        if let Some(accepted) = self.accepted_before(&plan, &layers).await? {
            return Ok(accepted);
        }
        // A source runs one plan at a time: what it left unowned here is over.
        for id in self.unowned_of(peer) {
            self.dismiss_now(&id, "its source offers another plan")
                .await?;
        }
        self.check_removed(&plan.id)?;
        let runtime = self.choose_runtime(&plan).await?;
        let socket = Some(runtime.socket().display().to_string());
        self.check_names(&plan, runtime).await?;
        let layers_present = layers_held(runtime, &layers).await?;
        let directory = plan_directory(&self.parts.state, "target", &plan.id);
        let (mut journal, _) = Journal::open(&directory)?;
        let (mut places, mut images_present) = (Vec::new(), Vec::new());
        for volume in &plan.volumes {
            match self.find_place(&plan, volume, runtime, &directory).await? {
                Some(place) => places.push(place),
                None => images_present.push(volume.id),
            }
        }
        self.check_free(&plan, &places, runtime)?;
        // Written before anything is made, so that a death in between leaves nothing behind for good.
        let event = TargetEvent::Offered {
            plan: Box::new(plan.clone()),
            places: places.clone(),
            runtime: socket.clone(),
        };
        journal.append(crate::fleet::now(), event)?;
        let mut made = Ok(());
        for place in &mut places {
            made = Self::make_place(&plan, place, runtime).await;
            if made.is_err() {
                break;
            }
        }
        if let Err(error) = made.and_then(|()| check_room(&plan, &places)) {
            let mut known = Receiving::new(plan, places, journal, false);
            known.runtime = socket;
            let id = known.plan.id.clone();
            self.plans().insert(id.clone(), known);
            if let Err(left) = self.dismiss_now(&id, &error.to_string()).await {
                tracing::warn!("{left}");
            }
            return Err(error);
        }
        let event = TargetEvent::Accepted {
            plan: Box::new(plan.clone()),
            places: places.clone(),
            runtime: socket.clone(),
        };
        journal.append(crate::fleet::now(), event)?;
        let keys = self.admit(&plan, &places)?;
        let answer = self.accepted(&plan, &places, keys, images_present, layers_present);
        tracing::info!(plan = %plan.id, source = %plan.source, volumes = places.len(), "offer accepted");
        let mut known = Receiving::new(plan, places, journal, true);
        known.runtime = socket;
        self.plans().insert(known.plan.id.clone(), known);
        Ok(answer)
    }

    pub(super) fn accepted(
        &self,
        plan: &Plan,
        places: &[Place],
        keys: Keys,
        images_present: Vec<VolumeId>,
        layers_present: BTreeMap<VolumeId, usize>,
    ) -> OfferAccepted {
        OfferAccepted {
            data: self.data,
            link_key: keys.link,
            data_key: keys.data,
            images_present,
            layers_present,
            cannot_serve: opening::cannot_serve(plan, places),
            times: times_kept(plan, places),
        }
    }

    fn check_ours(&self, peer: &DeviceId, plan: &Plan) -> Result<(), TargetError> {
        let not_ours = |why: String| {
            Err(TargetError::NotOurs {
                plan: plan.id.clone(),
                why,
            })
        };
        if peer != &plan.source {
            return not_ours(format!(
                "its source is {}, but {peer} offers it",
                plan.source
            ));
        }
        match &plan.target {
            Some(target) if target.device == self.parts.device => {}
            Some(target) => return not_ours(format!("its target is {}", target.device)),
            None => return not_ours("it names no target".into()),
        }
        if self
            .plans()
            .get(&plan.id)
            .is_some_and(|known| &known.plan.source != peer)
        {
            return not_ours("another source has a plan of that id here".into());
        }
        let lent = self.pairings.authorised(&plan.id, peer);
        if lent.is_none_or(|lent| lent.role != Role::Target) {
            return not_ours("the duplicator did not lend us to it as target".into());
        }
        if !plan.id.is_plain() {
            return not_ours("its id is not made of letters, digits and dashes".into());
        }
        check_binds(plan).or_else(&not_ours)?;
        for volume in &plan.volumes {
            let climbs = volume
                .source_path
                .components()
                .any(|part| matches!(part, Component::ParentDir | Component::CurDir));
            if climbs || !volume.source_path.is_absolute() {
                return not_ours(format!("volume {} has no plain absolute path", volume.name));
            }
            if matches!(volume.kind, VolumeKind::Bind | VolumeKind::File)
                && !self.parts.settings.takes_bind(&volume.source_path)
            {
                return not_ours(format!(
                    "volume {} is below none of the directories in `bind_roots`",
                    volume.source_path.display()
                ));
            }
            if volume.device_nodes > 0 && !self.parts.settings.device_nodes {
                return not_ours(format!(
                    "volume {} holds {} device nodes; set `device_nodes: true` under `migration` in the \
                     target's configuration to take them",
                    volume.name, volume.device_nodes
                ));
            }
        }
        Ok(())
    }

    /// The runtime that has a plan's volumes and twins: the one that took it, also while it is away and another one
    /// answers.
    pub(super) async fn runtime_for(&self, plan: &Plan) -> Result<&Runtime, TargetError> {
        let known = self
            .plans()
            .get(&plan.id)
            .map(|known| known.runtime.clone());
        match known {
            None => Err(TargetError::Unknown(plan.id.clone())),
            Some(None) => self.choose_runtime(plan).await,
            Some(Some(socket)) => {
                let runtime = self.parts.runtimes.get(&socket);
                runtime.ok_or_else(|| TargetError::InTheWay {
                    what: format!("the containers of plan {}", plan.id),
                    why: format!("the runtime at {socket} has them; put it back into `runtimes`"),
                })
            }
        }
    }

    /// Whether this life of the agent has nothing to do with a plan's twins any more.
    pub(super) fn is_over(&self, id: &PlanId) -> bool {
        let owned = |known: &Receiving| known.owns.is_some();
        self.ending.load(Ordering::Acquire) || !self.plans().get(id).is_some_and(owned)
    }

    /// Whether the twins of a plan may be started now.
    pub(super) fn may_start(&self, id: &PlanId) -> Result<(), String> {
        if self.is_over(id) {
            return Err("its volumes are not this device's, or its agent ends".to_owned());
        }
        if self.is_returning(id) {
            return Err("its volumes are being given back".to_owned());
        }
        Ok(())
    }

    async fn choose_runtime(&self, plan: &Plan) -> Result<&Runtime, TargetError> {
        let wanted = plan
            .containers
            .first()
            .and_then(|planned| planned.container.runtime.as_deref());
        let docker = |socket: &str| socket.contains("docker");
        let mut last = None;
        // The source's kind of runtime first: its settings carry over whole.
        let mut runtimes: Vec<&Runtime> = self.parts.runtimes.all().iter().collect();
        runtimes.sort_by_key(|runtime| {
            wanted
                .is_some_and(|wanted| docker(wanted) != docker(&runtime.socket().to_string_lossy()))
        });
        for runtime in runtimes {
            match runtime.engine().await {
                Ok(Engine::Docker(_) | Engine::Podman(_)) => return Ok(runtime),
                Err(error) => last = Some(error),
            }
        }
        Err(TargetError::InTheWay {
            what: "the containers".into(),
            why: last.map_or_else(
                || "no container runtime is configured; set `runtimes`".into(),
                |error| error.to_string(),
            ),
        })
    }

    pub(super) fn known(
        &self,
        peer: &DeviceId,
        id: &PlanId,
    ) -> Result<(Plan, Vec<Place>), TargetError> {
        let plans = self.plans();
        let known = plans
            .get(id)
            .ok_or_else(|| TargetError::Unknown(id.clone()))?;
        if &known.plan.source != peer {
            return Err(TargetError::NotOurs {
                plan: id.clone(),
                why: format!("its source is {}, but {peer} asks", known.plan.source),
            });
        }
        Ok((known.plan.clone(), known.places.clone()))
    }

    /// The same, of a plan whose volumes are not ours yet.
    pub(super) fn not_owned(
        &self,
        peer: &DeviceId,
        id: &PlanId,
    ) -> Result<(Plan, Vec<Place>), TargetError> {
        let known = self.known(peer, id)?;
        let owned = |known: &Receiving| known.owns.is_some();
        if self.plans().get(id).is_some_and(owned) {
            return Err(TargetError::Owned(id.clone()));
        }
        Ok(known)
    }

    /// State of a plan, for its source.
    ///
    /// # Errors
    /// The plan is unknown or not the peer's.
    pub fn status(&self, peer: &DeviceId, id: &PlanId) -> Result<TargetStatus, TargetError> {
        self.known(peer, id)?;
        let plans = self.plans();
        let known = plans
            .get(id)
            .ok_or_else(|| TargetError::Unknown(id.clone()))?;
        let phase = match (&known.owns, known.start_up, &known.trouble) {
            (None, ..) => "receiving",
            (Some(_), Some(_), _) if known.later.as_ref().is_some_and(|later| !later.whole) => {
                "filling"
            }
            (Some(_), Some(_), _) => "running",
            (Some(_), None, Some(_)) => "failed",
            (Some(_), None, None) => "starting",
        };
        let arrived = self.arrived(known);
        Ok(TargetStatus {
            arrived,
            phase: phase.into(),
            owns: known.owns.clone(),
            twins: known.twins.clone(),
            start_up: known.start_up,
            arrival: known.later.as_ref().map(Later::arrival),
        })
    }

    /// What of each volume arrived last, as the data plane verified it, or was listed.
    pub(super) fn arrived(&self, known: &Receiving) -> Vec<VolumeRelease> {
        let progress = self
            .parts
            .data
            .as_ref()
            .and_then(|data| data.progress(&known.plan.id));
        let complete = |progress: &ReceiveProgress| {
            let (epoch, root) = progress.complete?;
            let volume = progress.volume;
            Some(VolumeRelease {
                volume,
                name: name_of(&known.plan, volume),
                epoch,
                content: Content::Sealed(root),
            })
        };
        let listed = known.later.iter().flat_map(|later| later.opened.clone());
        let progress = progress.unwrap_or_default();
        listed.chain(progress.iter().filter_map(complete)).collect()
    }

    /// Takes a plan as its source has it now: containers, order and relations may have changed since it was
    /// offered, volumes and places have not.
    ///
    /// # Errors
    /// The plan is not known, not for us, taken over, or about other volumes or containers.
    pub async fn revise(&self, peer: &DeviceId, plan: Plan) -> Result<(), TargetError> {
        let _turn = self.turn(peer).await;
        let (known, places) = self.known(peer, &plan.id)?;
        self.check_ours(peer, &plan)?;
        let names = |plan: &Plan| {
            let names = plan.containers.iter();
            names
                .map(|planned| planned.container.name.clone())
                .collect::<BTreeSet<_>>()
        };
        if known.volumes != plan.volumes || names(&known) != names(&plan) {
            return Err(TargetError::NotOurs {
                plan: plan.id,
                why: "its volumes or containers are not those that were offered".into(),
            });
        }
        let mut plans = self.plans();
        let Some(receiving) = plans.get_mut(&plan.id) else {
            return Err(TargetError::Unknown(plan.id));
        };
        if receiving.owns.is_some() {
            return Err(TargetError::Owned(plan.id));
        }
        let event = TargetEvent::Accepted {
            plan: Box::new(plan.clone()),
            places,
            runtime: receiving.runtime.clone(),
        };
        receiving.journal.append(crate::fleet::now(), event)?;
        receiving.plan = plan;
        Ok(())
    }

    /// Takes up what an earlier life of the agent left: the twins of owned plans are started; the data of
    /// others is kept until their source releases or dismisses them, or offers another plan. A journal that
    /// cannot be read is told of and left alone.
    pub fn resume(self: &Arc<Self>) {
        for id in plan_ids(&self.parts.state, "target") {
            let directory = plan_directory(&self.parts.state, "target", &id);
            let (journal, entries) = match Journal::<TargetEvent>::open(&directory) {
                Ok(opened) => opened,
                Err(error) => {
                    self.parts.trouble(&error);
                    continue;
                }
            };
            if let Some(left) = left_of(&entries) {
                self.go_on_removing(&id, left, journal);
                continue;
            }
            let Some(known) = rebuild(journal, &entries) else {
                continue;
            };
            let (plan, owned, running, later) = (
                known.plan.clone(),
                known.owns.is_some(),
                known.start_up.is_some(),
                known.later.is_some(),
            );
            if !owned
                && known.accepted
                && !known.later.as_ref().is_some_and(Later::is_given_back)
                && let Err(error) = self.admit(&plan, &known.places)
            {
                tracing::error!(plan = %id, "its data is not taken: {error}");
            }
            self.plans().insert(id.clone(), known);
            if owned {
                keys::wipe(&directory);
                self.attach_again(&id);
            }
            if owned && later {
                tokio::spawn(self.clone().resume_later(plan));
            } else if owned && !running {
                tokio::spawn(self.clone().start_twins(plan));
            }
        }
    }
}

/// The state that a journal tells; none when the plan was dismissed or never accepted.
pub(super) fn rebuild(
    journal: Journal<TargetEvent>,
    entries: &[Entry<TargetEvent>],
) -> Option<Receiving> {
    let mut known: Option<Receiving> = None;
    let mut journal = Some(journal);
    for entry in entries {
        let accepted = matches!(entry.event, TargetEvent::Accepted { .. });
        if let (
            TargetEvent::Offered { plan, places, .. } | TargetEvent::Accepted { plan, places, .. },
            None,
        ) = (&entry.event, &known)
        {
            let (plan, places) = ((**plan).clone(), places.clone());
            known = Some(Receiving::new(plan, places, journal.take()?, accepted));
        }
        match (&entry.event, &mut known) {
            (
                TargetEvent::Offered {
                    plan,
                    places,
                    runtime,
                }
                | TargetEvent::Accepted {
                    plan,
                    places,
                    runtime,
                },
                Some(known),
            ) => {
                known.plan = (**plan).clone();
                known.places.clone_from(places);
                known.runtime.clone_from(runtime);
                known.accepted = accepted;
            }
            (TargetEvent::Networks { names }, Some(known)) => {
                known.networks.extend(names.iter().cloned());
            }
            (TargetEvent::Attached { devices }, Some(known)) => {
                known.devices.clone_from(devices);
            }
            (TargetEvent::Owns { owns, back, .. }, Some(known)) => {
                known.owns = Some(owns.clone());
                known.owned_at = entry.at;
                known.back.clone_from(back);
            }
            (TargetEvent::TwinReady { twin }, Some(known)) => {
                known
                    .twins
                    .retain(|other| other.container != twin.container);
                known.twins.push(twin.clone());
            }
            (TargetEvent::TwinsEnded { containers }, Some(known)) => known.end(containers),
            (TargetEvent::Completed, Some(known)) => {
                known.start_up = Some(entry.at.since(known.owned_at));
                known.completed = true;
                known.ended.clear();
            }
            (TargetEvent::Dismissed { .. }, Some(known)) => known.places.clear(),
            (event, Some(known)) => {
                match event {
                    TargetEvent::GivenBack { .. } => known.owns = None,
                    // An earlier build said no more of where it made the twins.
                    TargetEvent::TwinFenced { fence } => {
                        let socket = || fence.fence.runtime.clone();
                        known.runtime.get_or_insert_with(socket);
                    }
                    _ => {}
                }
                Later::note(&mut known.later, event);
            }
            (_, None) => {}
        }
    }
    if let Some(known) = &mut known
        && known.later.as_ref().is_some_and(|later| !later.whole)
    {
        // They ran on a mount that died with the agent.
        known.twins.clear();
        known.start_up = None;
        known.completed = false;
    }
    let dismissed = matches!(entries.last()?.event, TargetEvent::Dismissed { .. });
    if dismissed { None } else { known }
}

/// Every host directory that a twin would mount, and every block device that it would be given, must be a
/// volume of the plan.
pub(super) fn check_binds(plan: &Plan) -> Result<(), String> {
    for planned in &plan.containers {
        let name = &planned.container.name;
        // As it will be asked for: configured, given as mounts, or implied by what the source's runtime mounted.
        let made = create::body(&planned.inspect, "", false, false);
        let list = |key: &str| made["HostConfig"][key].as_array().into_iter().flatten();
        let binds = list("Binds").filter_map(|bind| bind.as_str()?.split(':').next());
        let mounts = list("Mounts").filter(|mount| mount["Type"] == "bind");
        let mounts = mounts.filter_map(|mount| mount["Source"].as_str());
        for source in binds.filter(|source| source.starts_with('/')).chain(mounts) {
            let path = Path::new(source);
            let is_moved = |volume: &VolumeSpec| path.starts_with(&volume.source_path);
            let climbs = path.components().any(|part| part == Component::ParentDir);
            if climbs || !plan.volumes.iter().any(is_moved) {
                return Err(format!(
                    "{name} would mount {source}, which is no volume of the plan"
                ));
            }
        }
        for volume in &planned.volumes {
            let option = |key: &str| volume["Options"][key].as_str().unwrap_or_default();
            if option("device").starts_with('/') {
                return Err(format!(
                    "{name} has a volume {} that stands for {} of its host; mount that itself instead",
                    volume["Name"],
                    option("device")
                ));
            }
        }
        let devices = planned.inspect["HostConfig"]["Devices"].as_array();
        let devices = devices.into_iter().flatten();
        for device in devices.filter_map(|device| device["PathOnHost"].as_str()) {
            let moves = |volume: &VolumeSpec| {
                volume.kind == VolumeKind::Device && volume.source_path == Path::new(device)
            };
            let is_block =
                std::fs::metadata(device).is_ok_and(|found| found.file_type().is_block_device());
            if is_block && !plan.volumes.iter().any(moves) {
                return Err(format!(
                    "{} would be given the block device {device}, which is no volume of the plan",
                    planned.container.name
                ));
            }
        }
    }
    Ok(())
}
