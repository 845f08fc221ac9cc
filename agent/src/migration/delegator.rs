//! The delegator: turns a request into a plan and drives it; one for the agent's life.
//!
//! It holds what the phases need (runtimes, data plane, fleet, the latest view of the host) and the
//! plans that are under way. One plan runs at a time on a source.

use super::active::{Active, Given, PlanStatus, locked};
use super::clearance::Clearance;
use super::events::{Approval, SourceEvent};
use super::forwarding::Forwards;
use super::journal::{Journal, JournalError, plan_directory};
use super::moving::{Done, Move, Moved, OPERATOR_ABORT};
use super::pause::Pauses;
use super::planner::{PlanError, Request};
use super::refusal::{Refusal, refused_stage};
use super::report::{Report, report};
use super::settings::Settings;
use super::source;
use super::traces::TraceUnusable;
use super::trusted::Network;
use super::view::HostView;
use crate::containers::{PauseError, Runtime, RuntimeError, Runtimes};
use crate::fleet::client::{CallError, ControlClient};
use crate::fleet::identity::Identity;
use crate::model::action::{Action, Actions};
use crate::model::container::Container;
use crate::model::fleet::{Configuration, PeerAddress, Role};
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::{MigrationEvent, Plan, PlannedContainer};
use crate::model::units::{Bytes, UnixMillis};
use crate::transfer::{DataPath, DataServer, Door, Options, Sender};
use crate::volume::FleetKey;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, watch};

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
    /// The operator's pause.
    pub pauses: Arc<Pauses>,
    /// A person's no to what the verdict asks for.
    pub refusal: Arc<Refusal>,
    /// Ports that are forwarded to where their containers went.
    pub forwards: Forwards,
    /// Sends the next heartbeat at once.
    pub beat: Arc<Notify>,
    /// What an operator must see to: journals that cannot be read.
    pub troubles: Mutex<Vec<String>>,
    /// Why the last heartbeat was not answered.
    pub unheard: Mutex<Option<String>>,
}

impl Parts {
    pub(super) fn trouble(&self, error: &JournalError) {
        tracing::error!("{error}; this plan is left as it is");
        locked(&self.troubles).push(error.to_string());
    }

    /// Those of a device of no fleet.
    #[cfg(test)]
    pub(crate) fn of_test(state: &Path, runtimes: Runtimes) -> Self {
        let (_, view) = watch::channel(Arc::default());
        Self {
            device: "target".into(),
            state: state.to_owned(),
            settings: Settings::default(),
            transfer: Options::default(),
            proc_root: state.join("proc"),
            runtimes: Arc::new(runtimes),
            data: None,
            fleet: None,
            view,
            pauses: Arc::new(Pauses::load(state)),
            refusal: Arc::new(Refusal::load(state)),
            forwards: Forwards::load(state),
            beat: Arc::default(),
            troubles: Mutex::default(),
            unheard: Mutex::default(),
        }
    }
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
    #[error(
        "this device's agent is in no fleet: enrol the device with `lifeboat fleet join`, and set `fleet` in the agent's configuration"
    )]
    NoFleet,
    /// No such plan.
    #[error("no plan {0} is known here; `lifeboat status` lists the plans of this device")]
    UnknownPlan(PlanId),
    /// Too late.
    #[error(
        "plan {0} was released: its containers belong to the target now; move them back with `lifeboat evacuate` there"
    )]
    Released(PlanId),
    /// Nobody asked for that approval.
    #[error("plan {plan} does not wait for an approval by `{role}`; it waits for: {awaits}")]
    NotAwaited {
        /// Plan.
        plan: PlanId,
        /// Role.
        role: String,
        /// Roles it waits for.
        awaits: String,
    },
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
    /// A recorded access trace cannot be used.
    #[error("{0}")]
    Trace(#[from] TraceUnusable),
    /// A peer did not answer.
    #[error("{0}")]
    Peer(#[from] CallError),
    /// A task of this process died.
    #[error("internal task failed: {0}; see the agent's log")]
    Task(#[from] tokio::task::JoinError),
}

/// The delegator.
pub struct Delegator {
    pub(super) parts: Arc<Parts>,
    pub(super) plans: Mutex<BTreeMap<PlanId, Arc<Active>>>,
    pub(super) measured_rate: Mutex<Option<(PlanId, Bytes)>>,
}

impl Delegator {
    /// A delegator over its parts.
    #[must_use]
    pub fn new(parts: Arc<Parts>) -> Self {
        Self {
            parts,
            plans: Mutex::default(),
            measured_rate: Mutex::default(),
        }
    }

    /// The wall clock.
    #[must_use]
    pub fn now(&self) -> UnixMillis {
        crate::fleet::now()
    }

    /// Makes a plan and runs it; returns as soon as it is journalled. A plan that waits with the same data
    /// copied in advance is told to go on; another one that waits is given up for it.
    ///
    /// # Errors
    /// As [`Self::plan`], or the plan is blocked, or another one runs.
    pub async fn evacuate(self: &Arc<Self>, request: &Request) -> Result<PlanId, DelegatorError> {
        let plans: Vec<Arc<Active>> = locked(&self.plans).values().cloned().collect();
        let waiting = plans
            .iter()
            .find_map(|active| Some((active, active.waiting()?)));
        let plan = self
            .draft(request, waiting.as_ref().map(|(_, plan)| plan))
            .await?;
        refuse_blocked(&plan)?;
        if let Some((active, waiting)) = waiting {
            let id = waiting.id;
            if plan.id == id {
                return if active.evacuate(plan) {
                    Ok(id)
                } else {
                    Err(DelegatorError::Busy(id))
                };
            }
            self.abort(&id, "another selection of containers is evacuated")?;
            self.ended(&id).await;
        }
        self.begin(plan, false)
    }

    /// Copies the data of a plan in advance, again and again, and runs it no further before
    /// [`Self::evacuate`] asks for it; returns as soon as it is journalled.
    ///
    /// # Errors
    /// As [`Self::evacuate`].
    pub async fn prepare(self: &Arc<Self>, request: &Request) -> Result<PlanId, DelegatorError> {
        let plan = self.draft(request, None).await?;
        refuse_blocked(&plan)?;
        self.begin(plan, true)
    }

    /// Lets a plan that was prepared, told to evacuate, and still waits for that, be only prepared again.
    pub fn hold(&self, plan: &PlanId) {
        if let Some(active) = locked(&self.plans).get(plan) {
            active.hold();
        }
    }

    /// Whether a plan waits: for the word to evacuate, for approvals or for the storm guard.
    #[must_use]
    pub fn waits(&self, plan: &PlanId) -> bool {
        let plans = locked(&self.plans);
        plans
            .get(plan)
            .is_some_and(|active| active.waiting().is_some())
    }

    /// Takes note that `approval` lets a plan evacuate.
    ///
    /// # Errors
    /// The plan is unknown or over, or does not wait for that role.
    pub fn approve(&self, plan: &PlanId, approval: Approval) -> Result<(), DelegatorError> {
        let active = locked(&self.plans).get(plan).cloned();
        let active = active.ok_or_else(|| DelegatorError::UnknownPlan(plan.clone()))?;
        let status = active.status();
        if status.over {
            return Err(DelegatorError::Over(plan.clone(), status.phase));
        }
        if !status.awaits.contains(&approval.role) {
            return Err(DelegatorError::NotAwaited {
                plan: plan.clone(),
                role: approval.role,
                awaits: if status.awaits.is_empty() {
                    "nobody".to_owned()
                } else {
                    status.awaits.join(", ")
                },
            });
        }
        active.approve(approval);
        Ok(())
    }

    fn begin(self: &Arc<Self>, plan: Plan, held: bool) -> Result<PlanId, DelegatorError> {
        let active = Arc::new(Active::new(&plan, held));
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
        match self.start(plan, active, held) {
            Ok(()) => Ok(id),
            Err(error) => {
                locked(&self.plans).remove(&id);
                Err(error.into())
            }
        }
    }

    fn start(
        self: &Arc<Self>,
        plan: Plan,
        active: Arc<Active>,
        held: bool,
    ) -> Result<(), JournalError> {
        let directory = plan_directory(&self.parts.state, "source", &plan.id);
        let (mut journal, _) = Journal::open(&directory)?;
        journal.append(
            plan.created,
            SourceEvent::Planned {
                plan: Box::new(plan.clone()),
                held,
            },
        )?;
        let delegator = self.clone();
        tokio::spawn(source::run(Move {
            delegator,
            plan,
            journal,
            active,
            done: Done::default(),
            moved: Moved::default(),
            clearance: Clearance::default(),
        }));
        Ok(())
    }

    /// What an operator must see to: journals of plans that cannot be read, and a duplicator that takes no heartbeat.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let mut troubles = locked(&self.parts.troubles).clone();
        let unheard = locked(&self.parts.unheard).clone();
        troubles.extend(
            unheard.map(|why| format!("{why}; until it does, no target is found for what is here")),
        );
        troubles
    }

    /// Plans of this device as source, the newest last.
    #[must_use]
    pub fn status(&self) -> Vec<PlanStatus> {
        locked(&self.plans)
            .values()
            .map(|active| {
                let status = active.status();
                let given = self.given(&status.plan);
                PlanStatus { given, ..status }
            })
            .collect()
    }

    /// What of a plan's data was given out on demand since this agent was started.
    pub(super) fn given(&self, plan: &PlanId) -> Given {
        let data = self.parts.data.as_ref();
        data.map_or_else(Given::default, |data| Given {
            target: data.spent(plan, Door::Provide(Role::Target)),
            paired: data.spent(plan, Door::Provide(Role::Paired)),
        })
    }

    /// Changes how fast the copy of a plan under way may read.
    ///
    /// # Errors
    /// The plan is unknown or over.
    pub fn limit(&self, plan: &PlanId, limit: Option<Bytes>) -> Result<(), DelegatorError> {
        let active = locked(&self.plans).get(plan).cloned();
        let active = active.ok_or_else(|| DelegatorError::UnknownPlan(plan.clone()))?;
        let status = active.status();
        if status.over {
            return Err(DelegatorError::Over(plan.clone(), status.phase));
        }
        active.limit(limit);
        Ok(())
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
        if active.cancel(reason) || active.give_back(reason) {
            Ok(())
        } else {
            Err(DelegatorError::Released(plan.clone()))
        }
    }

    /// Asks a plan to stop because an operator wants it. That what a verdict asked for is refused with it is on disk
    /// when this returns: the agent may end while the plan rolls back.
    ///
    /// # Errors
    /// As [`Self::abort`].
    pub fn refuse(&self, plan: &PlanId) -> Result<(), DelegatorError> {
        let begun = self.entries(plan).map(|told| begun_by_verdict(&told));
        self.abort(plan, OPERATOR_ABORT)?;
        let active = locked(&self.plans).get(plan).cloned();
        if let Some(active) = active.filter(|one| one.by_verdict() || begun.is_ok_and(|by| by)) {
            // Nobody waits for the disk with the view in his hands: the sweep would wait for him.
            let verdict = self.parts.view.borrow().verdict.clone();
            let stage = refused_stage(verdict.as_ref(), active.stage());
            self.parts.refusal.set(stage);
        }
        Ok(())
    }

    /// Waits until a plan of this life has ended.
    pub(super) async fn ended(&self, plan: &PlanId) {
        let active = locked(&self.plans).get(plan).cloned();
        while active
            .as_ref()
            .is_some_and(|active| !active.ended.load(Ordering::Acquire))
        {
            tokio::time::sleep(ENDED_POLL).await;
        }
    }

    /// How a plan of this life ended: with the reason when it was rolled back; none while it has not.
    #[must_use]
    pub fn outcome(&self, plan: &PlanId) -> Option<Result<(), String>> {
        let active = locked(&self.plans).get(plan).cloned();
        if active.is_some_and(|active| !active.ended.load(Ordering::Acquire)) {
            return None;
        }
        Some(match self.report(plan) {
            Ok(Report { reason: None, .. }) => Ok(()),
            Ok(Report {
                reason: Some(reason),
                ..
            }) => Err(reason),
            Err(error) => Err(error.to_string()),
        })
    }

    /// A plan under way that a verdict asked for, and whether it is only prepared: an earlier life of the
    /// agent may have begun it.
    #[must_use]
    pub fn by_verdict(&self) -> Option<(PlanId, bool)> {
        let plans = locked(&self.plans);
        let mut under_way = plans
            .iter()
            .filter(|(_, plan)| !plan.ended.load(Ordering::Acquire));
        under_way.find_map(|(id, plan)| plan.by_verdict().then(|| (id.clone(), plan.held())))
    }

    /// Lets go of what is not released, because the agent ends: what is fenced or frozen runs again, and the
    /// next life goes on. Waits at most `patience`.
    pub async fn stop(&self, patience: Duration) {
        let plans: Vec<Arc<Active>> = locked(&self.plans).values().cloned().collect();
        let suspended: Vec<_> = plans.iter().filter(|plan| plan.suspend()).collect();
        let all_ended = async {
            while !suspended
                .iter()
                .all(|plan| plan.ended.load(Ordering::Acquire))
            {
                tokio::time::sleep(ENDED_POLL).await;
            }
        };
        if tokio::time::timeout(patience, all_ended).await.is_err() {
            tracing::error!(
                "a plan could not be let go of in time; the next start of the agent does it"
            );
        }
    }

    /// What a plan did.
    ///
    /// # Errors
    /// The plan is unknown or its journal cannot be read.
    pub fn report(&self, plan: &PlanId) -> Result<Report, DelegatorError> {
        report(&self.entries(plan)?).ok_or_else(|| DelegatorError::UnknownPlan(plan.clone()))
    }

    /// Takes the rate of a plan as that of the next one's estimate.
    pub(super) fn learn_rate(&self, plan: &PlanId) {
        if let Ok(told) = self.report(plan)
            && told.rate.0 > 0
        {
            *locked(&self.measured_rate) = Some((plan.clone(), told.rate));
        }
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

    pub(super) fn runtimes(&self) -> &Runtimes {
        &self.parts.runtimes
    }

    pub(super) fn runtime_of(&self, planned: &PlannedContainer) -> Result<&Runtime, PauseError> {
        self.runtime(&planned.container)
    }

    pub(super) fn runtime(&self, container: &Container) -> Result<&Runtime, PauseError> {
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
}

fn refuse_blocked(plan: &Plan) -> Result<(), DelegatorError> {
    if plan.blockers.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = plan
        .blockers
        .iter()
        .map(|blocker| format!("{}: {}", blocker.what, blocker.why))
        .collect();
    Err(DelegatorError::Blocked(lines.join("; ")))
}

/// Between two looks whether a plan has ended.
const ENDED_POLL: Duration = Duration::from_millis(100);

/// Whether a verdict began the plan, also where an operator has made it theirs since.
pub(super) fn begun_by_verdict(entries: &[super::journal::Entry<SourceEvent>]) -> bool {
    matches!(
        entries.first().map(|entry| &entry.event),
        Some(SourceEvent::Planned { plan, .. }) if matches!(plan.event, MigrationEvent::Degraded { .. })
    )
}

pub(super) fn plan_of(entries: &[super::journal::Entry<SourceEvent>]) -> Option<Plan> {
    let mut entries = entries.iter();
    let SourceEvent::Planned { plan, .. } = &entries.next()?.event else {
        return None;
    };
    let mut plan = (**plan).clone();
    for entry in entries {
        match &entry.event {
            SourceEvent::TargetChosen { target } => plan.target = Some(target.clone()),
            SourceEvent::Paired {
                paired, delegated, ..
            } => {
                plan.paired = Some(paired.clone());
                plan.delegated = delegated.clone();
            }
            SourceEvent::ServesOn => plan.delegated = Actions::from_iter([Action::Serve]),
            SourceEvent::NotPaired { .. } => {
                plan.paired = None;
                plan.delegated = Actions::default();
            }
            SourceEvent::GoesOn { plan: renewed } => plan = (**renewed).clone(),
            SourceEvent::Limited { limit } => plan.guards.limit = *limit,
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
