//! The delegator: turns a request into a plan and drives it; one for the agent's life.
//!
//! It holds what the phases need (runtimes, data plane, fleet, the latest view of the host) and the
//! plans that are under way. One plan runs at a time on a source.

use super::events::{Forwarding, SourceEvent};
use super::journal::{Journal, JournalError, plan_directory};
use super::planner::{self, Directory, Gathered, PlanError, Request};
use super::report::{Report, report};
use super::settings::Settings;
use super::source::{self, Done, Move};
use super::view::HostView;
use crate::containers::{PauseError, Runtime, RuntimeError, Runtimes, TwinSpec};
use crate::fleet::client::{CallError, ControlClient};
use crate::fleet::identity::Identity;
use crate::model::container::Container;
use crate::model::fleet::{Configuration, PeerAddress};
use crate::model::ids::{DeviceId, PlanId, VolumeId};
use crate::model::plan::{Plan, PlannedContainer, TwinState};
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::VolumeSpec;
use crate::serve::{ForwardError, Forwarder};
use crate::transfer::{DataPath, DataServer, Options, Progress, Sender};
use crate::volume::FleetKey;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A network written as `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u32,
}

/// The text is no network.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a network; write an address, a slash and a prefix length, such as 10.77.0.0/24"
)]
pub struct NotANetwork(String);

impl std::str::FromStr for Network {
    type Err = NotANetwork;
    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        let wrong = || NotANetwork(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u32 = prefix.parse().map_err(|_| wrong())?;
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(wrong());
        }
        Ok(Self { address, prefix })
    }
}

impl Network {
    /// Whether `other` is in it.
    #[must_use]
    pub fn holds(&self, other: IpAddr) -> bool {
        match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let shift = 32 - self.prefix;
                shift == 32 || u32::from(a) >> shift == u32::from(b) >> shift
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let shift = 128 - self.prefix;
                shift == 128 || u128::from(a) >> shift == u128::from(b) >> shift
            }
            _ => false,
        }
    }
}

/// The device's place in the fleet.
pub struct FleetContext {
    /// Who we are.
    pub identity: Arc<Identity>,
    /// The control channel.
    pub client: ControlClient,
    /// What this device is made of.
    pub configuration: Configuration,
    /// Networks over which unsealed blocks may travel.
    pub trusted: Vec<Network>,
}

/// What a delegator is made of.
pub struct Parts {
    /// This device.
    pub device: DeviceId,
    /// State directory.
    pub state: PathBuf,
    /// Settings.
    pub settings: Settings,
    /// Options of the data plane.
    pub transfer: Options,
    /// Where `/proc` is.
    pub proc_root: PathBuf,
    /// Runtimes.
    pub runtimes: Arc<Runtimes>,
    /// Data plane's server; none without a fleet.
    pub data: Option<Arc<DataServer>>,
    /// Fleet; none when the device is in none.
    pub fleet: Option<FleetContext>,
    /// Latest view of the host.
    pub view: watch::Receiver<Arc<HostView>>,
}

/// Why a request was not taken up.
#[derive(Debug, thiserror::Error)]
pub enum DelegatorError {
    /// The request cannot become a plan.
    #[error("{0}")]
    Plan(#[from] PlanError),
    /// The plan is blocked.
    #[error("plan is blocked: {0}")]
    Blocked(String),
    /// Another plan runs.
    #[error(
        "plan {0} is under way; wait for it (`lifeboat status --watch`) or `lifeboat abort {0}`"
    )]
    Busy(PlanId),
    /// No fleet.
    #[error("this device is in no fleet; enrol it with `lifeboat fleet join`")]
    NoFleet,
    /// No such plan.
    #[error("no plan {0} is known here; `lifeboat status` lists the plans of this device")]
    UnknownPlan(PlanId),
    /// Too late.
    #[error(
        "plan {0} was released: its containers belong to the target now; move them back with `lifeboat evacuate` there"
    )]
    Released(PlanId),
    /// Too early.
    #[error("plan {0} was not released: there is nothing to verify yet; see `lifeboat report {0}`")]
    NotReleased(PlanId),
    /// Over already.
    #[error("plan {0} is over ({1})")]
    Over(PlanId, String),
    /// A runtime failed.
    #[error("{0}")]
    Runtime(#[from] RuntimeError),
    /// A container's runtime is not configured.
    #[error("{0}")]
    Pause(#[from] PauseError),
    /// The journal failed.
    #[error("{0}")]
    Journal(#[from] JournalError),
    /// A volume cannot be measured.
    #[error("{0}")]
    Volume(#[from] crate::volume::ScanError),
    /// A peer did not answer.
    #[error("{0}")]
    Peer(#[from] CallError),
    /// A task of this process died.
    #[error("internal task failed: {0}; see the agent's log")]
    Task(#[from] tokio::task::JoinError),
}

/// A plan under way, as `status` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlanStatus {
    /// Plan.
    pub plan: PlanId,
    /// Phase.
    pub phase: String,
    /// Whether it ended.
    pub over: bool,
    /// Target.
    pub target: Option<DeviceId>,
    /// Paired device.
    pub paired: Option<DeviceId>,
    /// Plain bytes looked at so far.
    pub bytes_read: Bytes,
    /// Bytes on the wire so far.
    pub bytes_sent: Bytes,
    /// Estimated size of the whole.
    pub bytes_total: Bytes,
    /// Since when.
    pub since: UnixMillis,
    /// Twins as far as known.
    pub twins: Vec<TwinState>,
    /// The last thing that went wrong and is being retried.
    pub trouble: Option<String>,
}

/// One plan under way.
pub struct Active {
    status: Mutex<PlanStatus>,
    progress: Arc<Progress>,
    cancel: Mutex<Cancel>,
    ended: AtomicBool,
}

#[derive(Default)]
struct Cancel {
    reason: Option<String>,
    committed: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The data is plain values that are whole after every statement; a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Active {
    fn new(plan: &Plan) -> Self {
        Self {
            status: Mutex::new(PlanStatus {
                plan: plan.id.clone(),
                phase: "planned".into(),
                over: false,
                target: None,
                paired: None,
                bytes_read: Bytes(0),
                bytes_sent: Bytes(0),
                bytes_total: plan.estimate.bytes,
                since: plan.created,
                twins: Vec::new(),
                trouble: None,
            }),
            progress: Arc::new(Progress::default()),
            cancel: Mutex::default(),
            ended: AtomicBool::new(false),
        }
    }

    pub(super) fn enter(&self, phase: &str) {
        let mut status = locked(&self.status);
        status.phase = phase.to_owned();
        status.trouble = None;
        if matches!(phase, "completed" | "aborted") {
            status.over = true;
            self.ended.store(true, Ordering::Release);
        }
    }

    pub(super) fn set_plan(&self, plan: &Plan) {
        let mut status = locked(&self.status);
        status.target = plan.target.as_ref().map(|chosen| chosen.device.clone());
        status.paired = plan.paired.as_ref().map(|chosen| chosen.device.clone());
    }

    pub(super) fn trouble(&self, text: &str) {
        let mut status = locked(&self.status);
        if status.trouble.as_deref() != Some(text) {
            tracing::warn!(plan = %status.plan, "{text}");
            status.trouble = Some(text.to_owned());
        }
    }

    pub(super) fn twins(&self, twins: &[TwinState]) {
        locked(&self.status).twins = twins.to_vec();
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    pub(super) fn cancelled(&self) -> Option<String> {
        locked(&self.cancel).reason.clone()
    }

    /// From here an abort is refused; fails when one came first.
    pub(super) fn commit(&self) -> Result<(), source::MoveError> {
        let mut cancel = locked(&self.cancel);
        if let Some(reason) = &cancel.reason {
            return Err(source::MoveError::Cancelled(reason.clone()));
        }
        cancel.committed = true;
        Ok(())
    }

    /// Asks the plan to stop; false when it is committed.
    fn cancel(&self, reason: &str) -> bool {
        let mut cancel = locked(&self.cancel);
        if cancel.committed {
            return false;
        }
        cancel.reason.get_or_insert_with(|| reason.to_owned());
        self.progress.cancel();
        true
    }

    fn status(&self) -> PlanStatus {
        let mut status = locked(&self.status).clone();
        status.bytes_read = Bytes(self.progress.bytes_read.load(Ordering::Relaxed));
        status.bytes_sent = Bytes(self.progress.bytes_sent.load(Ordering::Relaxed));
        status
    }
}

/// The delegator.
pub struct Delegator {
    parts: Arc<Parts>,
    plans: Mutex<BTreeMap<PlanId, Arc<Active>>>,
    forwarders: Mutex<Vec<Forwarder>>,
    measured_rate: Mutex<Option<(PlanId, Bytes)>>,
}

impl Delegator {
    /// A delegator over its parts.
    #[must_use]
    pub fn new(parts: Arc<Parts>) -> Self {
        Self {
            parts,
            plans: Mutex::default(),
            forwarders: Mutex::default(),
            measured_rate: Mutex::default(),
        }
    }

    /// The wall clock.
    #[must_use]
    pub fn now(&self) -> UnixMillis {
        crate::fleet::now()
    }

    /// Makes a plan without running it.
    ///
    /// # Errors
    /// A container is unknown, a runtime does not answer, or a volume cannot be read.
    pub async fn plan(&self, request: &Request) -> Result<Plan, DelegatorError> {
        let view = self.parts.view.borrow().clone();
        let now = self.now();
        let id = source::new_plan_id(now, rand::random());
        let correlated = view.correlated();
        let edges = view.snapshot.edges.clone();
        let (chosen, notes) = planner::select(request, &view.containers, &edges, &correlated)?;
        let (directories, mut blockers) = planner::directories(&chosen, Path::is_dir);
        if self.parts.fleet.is_none() {
            blockers.push(crate::model::plan::Blocker {
                what: self.parts.device.to_string(),
                why: DelegatorError::NoFleet.to_string(),
            });
        }
        let mut containers = Vec::new();
        for container in chosen {
            containers.push(self.describe(container, &view).await?);
        }
        let mut volumes = measure(directories).await?;
        let epochs = super::target::owned_epochs(&self.parts.state, &volumes);
        let images = self.image_directory(&id);
        volumes.extend(planner::image_volumes(
            &containers,
            volumes.len() as u32,
            &images,
        ));
        let measured_rate = locked(&self.measured_rate).clone();
        Ok(planner::compose(
            request,
            Gathered {
                id,
                now,
                source: self.parts.device.clone(),
                containers,
                edges,
                correlated,
                volumes,
                epochs,
                blockers,
                notes,
                measured_rate,
            },
        ))
    }

    async fn describe(
        &self,
        container: Container,
        view: &HostView,
    ) -> Result<PlannedContainer, DelegatorError> {
        let runtime = self.runtime(&container)?;
        let TwinSpec {
            inspect,
            networks,
            volumes,
            ..
        } = runtime.describe(&container.id).await?;
        let image_size = Bytes(runtime.image_size(&container.image_id).await?);
        let service_ports = view.service_ports(&container.name);
        Ok(PlannedContainer {
            container,
            service_ports,
            inspect,
            networks,
            volumes,
            image_size,
        })
    }

    /// Makes a plan and runs it; returns as soon as it is journalled.
    ///
    /// # Errors
    /// As [`Self::plan`], or the plan is blocked, or another one runs.
    pub async fn evacuate(self: &Arc<Self>, request: &Request) -> Result<PlanId, DelegatorError> {
        let plan = self.plan(request).await?;
        if !plan.blockers.is_empty() {
            let lines: Vec<String> = plan
                .blockers
                .iter()
                .map(|blocker| format!("{}: {}", blocker.what, blocker.why))
                .collect();
            return Err(DelegatorError::Blocked(lines.join("; ")));
        }
        let active = Arc::new(Active::new(&plan));
        {
            let mut plans = locked(&self.plans);
            if let Some((id, _)) = plans
                .iter()
                .find(|(_, plan)| !plan.ended.load(Ordering::Acquire))
            {
                return Err(DelegatorError::Busy(id.clone()));
            }
            plans.insert(plan.id.clone(), active.clone());
        }
        let id = plan.id.clone();
        match self.start(plan, active) {
            Ok(()) => Ok(id),
            Err(error) => {
                locked(&self.plans).remove(&id);
                Err(error.into())
            }
        }
    }

    fn start(self: &Arc<Self>, plan: Plan, active: Arc<Active>) -> Result<(), JournalError> {
        let directory = plan_directory(&self.parts.state, "source", &plan.id);
        let (mut journal, _) = Journal::open(&directory)?;
        journal.append(
            plan.created,
            SourceEvent::Planned {
                plan: Box::new(plan.clone()),
            },
        )?;
        let delegator = self.clone();
        tokio::spawn(source::run(Move {
            delegator,
            plan,
            journal,
            active,
            done: Done::default(),
        }));
        Ok(())
    }

    /// Continues or rolls back what an earlier life of the agent left behind.
    ///
    /// # Errors
    /// A journal cannot be read.
    pub fn resume(self: &Arc<Self>) -> Result<(), JournalError> {
        for id in plan_ids(&self.parts.state, "source") {
            let directory = plan_directory(&self.parts.state, "source", &id);
            let (journal, entries) = Journal::<SourceEvent>::open(&directory)?;
            if let Some(told) = report(&entries)
                && told.rate.0 > 0
            {
                *locked(&self.measured_rate) = Some((id.clone(), told.rate));
            }
            let Some(plan) = plan_of(&entries) else {
                continue;
            };
            match entries.last().map(|entry| &entry.event) {
                Some(SourceEvent::Completed) => {
                    if let Some(target) = target_peer(&plan) {
                        let delegator = self.clone();
                        tokio::spawn(async move {
                            delegator.forward(&plan, target.addr.ip()).await;
                        });
                    }
                }
                Some(SourceEvent::Aborted { .. }) | None => {}
                Some(_) => self.resume_plan(plan, journal, &entries),
            }
        }
        Ok(())
    }

    fn resume_plan(
        self: &Arc<Self>,
        plan: Plan,
        journal: Journal<SourceEvent>,
        entries: &[super::journal::Entry<SourceEvent>],
    ) {
        let active = Arc::new(Active::new(&plan));
        active.set_plan(&plan);
        locked(&self.plans).insert(plan.id.clone(), active.clone());
        let release = entries.iter().find_map(|entry| match &entry.event {
            SourceEvent::Released { release } => Some(release.clone()),
            _ => None,
        });
        let mut done = Done::default();
        entries.iter().for_each(|entry| done.note(&entry.event));
        let mut core = Move {
            delegator: self.clone(),
            plan,
            journal,
            active,
            done,
        };
        tokio::spawn(async move {
            match (release, target_peer(&core.plan)) {
                (Some(release), Some(target)) => {
                    // Committed in an earlier life: an abort has come too late.
                    let _ = core.active.commit();
                    source::Released {
                        core: &mut core,
                        target,
                        release,
                        paused: None,
                    }
                    .finish()
                    .await;
                }
                _ => {
                    core.roll_back("the agent was restarted before the release")
                        .await
                }
            }
        });
    }

    /// Plans of this device as source, the newest last.
    #[must_use]
    pub fn status(&self) -> Vec<PlanStatus> {
        locked(&self.plans)
            .values()
            .map(|active| active.status())
            .collect()
    }

    /// Asks a plan to stop and roll back.
    ///
    /// # Errors
    /// The plan is unknown, over, or released.
    pub fn abort(&self, plan: &PlanId, reason: &str) -> Result<(), DelegatorError> {
        let active = locked(&self.plans).get(plan).cloned();
        let Some(active) = active else {
            let told = self.report(plan)?;
            let state = serde_json::to_string(&told.state).unwrap_or_default();
            return Err(DelegatorError::Over(
                plan.clone(),
                state.trim_matches('"').to_owned(),
            ));
        };
        let status = active.status();
        if status.over {
            return Err(DelegatorError::Over(plan.clone(), status.phase));
        }
        if active.cancel(reason) {
            Ok(())
        } else {
            Err(DelegatorError::Released(plan.clone()))
        }
    }

    /// What a plan did.
    ///
    /// # Errors
    /// The plan is unknown or its journal cannot be read.
    pub fn report(&self, plan: &PlanId) -> Result<Report, DelegatorError> {
        report(&self.entries(plan)?).ok_or_else(|| DelegatorError::UnknownPlan(plan.clone()))
    }

    /// The journal of a plan of this source.
    pub(super) fn entries(
        &self,
        plan: &PlanId,
    ) -> Result<Vec<super::journal::Entry<SourceEvent>>, DelegatorError> {
        // A plan's name becomes a path: only names that this device gave are looked up.
        if !plan_ids(&self.parts.state, "source").contains(plan) {
            return Err(DelegatorError::UnknownPlan(plan.clone()));
        }
        let directory = plan_directory(&self.parts.state, "source", plan);
        Ok(super::journal::read(&directory)?)
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.parts.settings
    }

    pub(super) fn fleet(&self) -> Option<&FleetContext> {
        self.parts.fleet.as_ref()
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    pub(super) fn runtime_of(&self, planned: &PlannedContainer) -> Result<&Runtime, PauseError> {
        self.runtime(&planned.container)
    }

    fn runtime(&self, container: &Container) -> Result<&Runtime, PauseError> {
        let unknown = || PauseError::UnknownRuntime(container.name.to_string());
        self.parts.runtimes.of(container).ok_or_else(unknown)
    }

    pub(super) fn image_directory(&self, plan: &PlanId) -> PathBuf {
        plan_directory(&self.parts.state, "source", plan).join("images")
    }

    pub(super) fn sender(&self, plan: &PlanId, path: DataPath, fleet_key: &[u8; 32]) -> Sender {
        Sender::new(
            plan.clone(),
            path,
            FleetKey(*fleet_key),
            self.parts.transfer.clone(),
        )
    }

    /// Forwards the plan's published ports; one that cannot be had is tried again in the background.
    pub(super) async fn forward(self: &Arc<Self>, plan: &Plan, target: IpAddr) -> Vec<Forwarding> {
        let ports = source::forwardings(plan, target);
        for port in &ports {
            if let Err(error) = self.forward_one(port).await {
                tracing::error!("not forwarded yet: {error}");
                let (delegator, port) = (self.clone(), port.clone());
                tokio::spawn(async move {
                    while delegator.forward_one(&port).await.is_err() {
                        tokio::time::sleep(FORWARD_RETRY).await;
                    }
                });
            }
        }
        ports
    }

    async fn forward_one(&self, port: &Forwarding) -> Result<(), ForwardError> {
        let forwarder = Forwarder::start(port.listen, port.to).await?;
        locked(&self.forwarders).push(forwarder);
        Ok(())
    }
}

/// Between two tries for a port that somebody else holds.
const FORWARD_RETRY: Duration = Duration::from_secs(5);

pub(super) fn plan_of(entries: &[super::journal::Entry<SourceEvent>]) -> Option<Plan> {
    let mut entries = entries.iter();
    let SourceEvent::Planned { plan } = &entries.next()?.event else {
        return None;
    };
    let mut plan = (**plan).clone();
    for entry in entries {
        match &entry.event {
            SourceEvent::TargetChosen { target } => plan.target = Some(target.clone()),
            SourceEvent::Paired { paired } => plan.paired = Some(paired.clone()),
            _ => {}
        }
    }
    Some(plan)
}

pub(super) fn target_peer(plan: &Plan) -> Option<PeerAddress> {
    super::allocation::peer(plan.target.as_ref()?)
}

/// Ids of the plans that have files here in `role`, oldest first.
#[must_use]
pub(super) fn plan_ids(state: &Path, role: &str) -> Vec<PlanId> {
    let suffix = format!(".{role}");
    let mut ids: Vec<PlanId> = std::fs::read_dir(state.join("plans"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_suffix(&suffix)
                .map(PlanId::from)
        })
        .collect();
    ids.sort();
    ids
}

async fn measure(directories: Vec<Directory>) -> Result<Vec<VolumeSpec>, DelegatorError> {
    let specs = tokio::task::spawn_blocking(move || {
        directories
            .into_iter()
            .enumerate()
            .map(|(index, directory)| {
                let measure = crate::volume::measure(&directory.path)?;
                Ok(VolumeSpec {
                    id: VolumeId(index as u32),
                    name: match &directory.kind {
                        crate::model::volume::VolumeKind::Named(name) => name.clone(),
                        _ => directory.path.display().to_string(),
                    },
                    kind: directory.kind,
                    source_path: directory.path,
                    containers: directory.containers,
                    size: measure.size,
                    entries: measure.entries,
                })
            })
            .collect::<Result<Vec<_>, crate::volume::ScanError>>()
    })
    .await?;
    Ok(specs?)
}
