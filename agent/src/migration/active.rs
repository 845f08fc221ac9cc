//! A plan under way: what `status` shows of it, and how it is asked to stop.
//!
//! Invariant: once committed, it cannot be cancelled; once cancelled, it cannot be committed.

use super::events::Approval;
use super::moving::MoveError;
use crate::health::Stage;
use crate::model::action::Action;
use crate::model::choice::Choice;
use crate::model::control::Arrival;
use crate::model::fleet::PeerAddress;
use crate::model::ids::{DeviceId, PlanId, VolumeId};
use crate::model::plan::{MigrationEvent, Plan, PlanGuards, TwinState};
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::TimesKept;
use crate::transfer::{Limit, Progress, Spent};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

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
    /// The paired device, where it answers in this one's stead what the target asks for.
    #[serde(default)]
    pub stand_in: Option<DeviceId>,
    /// What was given to each on demand since this agent was started.
    #[serde(default)]
    pub given: Given,
    /// Plain bytes looked at so far.
    pub bytes_read: Bytes,
    /// Bytes on the wire so far.
    pub bytes_sent: Bytes,
    /// Estimated size of the whole.
    pub bytes_total: Bytes,
    /// Bytes of images exported so far, of how many; the phase `export images` is over them.
    pub images: (Bytes, Bytes),
    /// Since when.
    pub since: UnixMillis,
    /// Twins as far as known.
    pub twins: Vec<TwinState>,
    /// Whether the data is copied in advance and the plan waits for the word to evacuate.
    #[serde(default)]
    pub held: bool,
    /// Roles that have not approved it yet.
    #[serde(default)]
    pub awaits: Vec<String>,
    /// What slows the copy.
    #[serde(default)]
    pub limits: Limits,
    /// Whether it copies on, pauses or switches first, and why.
    #[serde(default)]
    pub choice: Option<Choice>,
    /// How far the data is, after a switch that came first.
    #[serde(default)]
    pub arrival: Option<Arrival>,
    /// The last thing that went wrong and is being retried.
    pub trouble: Option<String>,
}

/// What was given out on demand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// To the target itself.
    pub target: Spent,
    /// To the paired device that stands in.
    pub paired: Spent,
}

/// What slows a copy; each in bytes a second that it may read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// An operator's or the policy's word.
    pub cap: Option<Bytes>,
    /// Stage `prepare`.
    pub advance: Option<Bytes>,
    /// The workload's share.
    pub workload: Option<Bytes>,
    /// What the workload loses, as far as can be told, in percent; none while it is not watched.
    pub workload_loss_percent: Option<f64>,
}

/// Which times the target keeps, of volumes of which it does not keep all.
pub(super) type Times = BTreeMap<VolumeId, TimesKept>;

/// One plan under way.
pub struct Active {
    status: Mutex<PlanStatus>,
    progress: Arc<Progress>,
    exported: Arc<AtomicU64>,
    cancel: Mutex<Cancel>,
    stop: CancellationToken,
    word: Mutex<Word>,
    /// Which times the target keeps, once it has said so.
    times: Mutex<Option<Times>>,
    stand_in: Mutex<Option<PeerAddress>>,
    /// Told when `word` changed.
    told: Notify,
    pub(super) ended: AtomicBool,
}

/// What a plan that waits was told.
struct Word {
    /// It must not evacuate yet.
    held: bool,
    /// It may: nothing that can be taken back is under way any more.
    cleared: bool,
    /// The plan, as of when it was told to evacuate or else as it was made.
    plan: Plan,
    /// Whether it was told so after it was made.
    renewed: bool,
    /// Approvals that are not journalled yet.
    approvals: Vec<Approval>,
    /// A changed limit that is not journalled yet.
    limited: Option<Option<Bytes>>,
}

#[derive(Default)]
struct Cancel {
    reason: Option<String>,
    committed: bool,
    /// After the release: the target may still give everything back.
    returnable: bool,
    /// It is asked to, for this reason.
    returning: Option<String>,
    /// The agent ends, and its next life goes on with the plan.
    suspended: bool,
}

const STOPPED: &str = "the agent was stopped";

/// The progress of a plan that has not begun, with its limit.
fn capped(plan: &Plan) -> Progress {
    let progress = Progress::default();
    let limit = plan.guards.limit.map(|limit| limit.0);
    progress.pace.set(Limit::Cap, limit);
    progress
}

/// The phase of a plan that waits for the next life of the agent.
pub(super) const SUSPENDED: &str = "suspended";

pub(super) fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The data is plain values that are whole after every statement; a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Active {
    pub(super) fn new(plan: &Plan, held: bool) -> Self {
        Self {
            status: Mutex::new(PlanStatus {
                plan: plan.id.clone(),
                phase: "planned".into(),
                over: false,
                target: None,
                paired: None,
                stand_in: None,
                given: Given::default(),
                bytes_read: Bytes(0),
                bytes_sent: Bytes(0),
                bytes_total: plan.estimate.bytes,
                images: (Bytes(0), Bytes(0)),
                since: plan.created,
                twins: Vec::new(),
                held,
                awaits: Vec::new(),
                limits: Limits::default(),
                choice: plan.choice.clone(),
                arrival: None,
                trouble: None,
            }),
            progress: Arc::new(capped(plan)),
            exported: Arc::default(),
            cancel: Mutex::default(),
            stop: CancellationToken::new(),
            word: Mutex::new(Word {
                held,
                cleared: false,
                plan: plan.clone(),
                renewed: false,
                approvals: Vec::new(),
                limited: None,
            }),
            times: Mutex::default(),
            stand_in: Mutex::default(),
            told: Notify::new(),
            ended: AtomicBool::new(false),
        }
    }

    pub(super) fn enter(&self, phase: &str) {
        let mut status = locked(&self.status);
        status.phase = phase.to_owned();
        status.trouble = None;
        if matches!(phase, "completed" | "aborted" | SUSPENDED) {
            status.over = true;
            self.ended.store(true, Ordering::Release);
        }
    }

    pub(super) fn set_plan(&self, plan: &Plan) {
        let mut status = locked(&self.status);
        status.target = plan.target.as_ref().map(|chosen| chosen.device.clone());
        status.paired = plan.paired.as_ref().map(|chosen| chosen.device.clone());
        let paired = plan.paired.as_ref().and_then(super::allocation::peer);
        let stand_in = paired.filter(|_| plan.delegated.contains(Action::Serve));
        status.stand_in = stand_in.as_ref().map(|stand_in| stand_in.device.clone());
        *locked(&self.stand_in) = stand_in;
    }

    /// Nobody answers the target in this one's stead any more.
    pub(super) fn no_stand_in(&self) {
        *locked(&self.stand_in) = None;
        locked(&self.status).stand_in = None;
    }

    /// The paired device that answers the target in this one's stead.
    pub(super) fn stand_in(&self) -> Option<PeerAddress> {
        locked(&self.stand_in).clone()
    }

    /// Takes note of what the target says when it accepts the plan.
    pub(super) fn keeps(&self, times: &Times) {
        *locked(&self.times) = Some(times.clone());
    }

    /// Which times the target keeps of each volume, once it has said so.
    pub(super) fn times(&self) -> Option<Times> {
        locked(&self.times).clone()
    }

    pub(super) fn plan(&self) -> Plan {
        locked(&self.word).plan.clone()
    }

    /// The device that was allocated as target.
    pub(super) fn target(&self) -> Option<DeviceId> {
        locked(&self.status).target.clone()
    }

    pub(super) fn phase(&self) -> String {
        locked(&self.status).phase.clone()
    }

    /// Whether it must not evacuate yet.
    pub(super) fn held(&self) -> bool {
        locked(&self.word).held
    }

    /// The stage of a verdict at which it does what it was told.
    pub(super) fn stage(&self) -> Stage {
        if self.held() {
            Stage::Prepare
        } else {
            Stage::Evacuate
        }
    }

    /// The plan, while it waits for the word to evacuate, for approvals or for the storm guard.
    pub(super) fn waiting(&self) -> Option<Plan> {
        let word = locked(&self.word);
        let waits = !word.cleared && !self.ended.load(Ordering::Acquire);
        waits.then(|| word.plan.clone())
    }

    pub(super) fn guards(&self) -> PlanGuards {
        locked(&self.word).plan.guards.clone()
    }

    /// Tells a plan that waits to evacuate as `plan` says; false when it is too late to tell it.
    pub(super) fn evacuate(&self, plan: Plan) -> bool {
        let mut word = locked(&self.word);
        if word.cleared || self.ended.load(Ordering::Acquire) {
            return false;
        }
        self.cap(plan.guards.limit);
        (word.held, word.renewed, word.plan) = (false, true, plan);
        self.progress.pace.set(Limit::Advance, None);
        self.told.notify_one();
        true
    }

    /// Tells a plan that was told to evacuate, and does not yet, to wait again.
    pub(super) fn hold(&self) {
        let mut word = locked(&self.word);
        word.held = !word.cleared;
        self.told.notify_one();
    }

    /// From here it evacuates; the plan as of when it was told so, if it was held before. None when it was
    /// held again.
    pub(super) fn clear(&self) -> Option<Option<Plan>> {
        let mut word = locked(&self.word);
        if word.held {
            return None;
        }
        word.cleared = true;
        Some(word.renewed.then(|| word.plan.clone()))
    }

    pub(super) fn approve(&self, approval: Approval) {
        locked(&self.word).approvals.push(approval);
        self.told.notify_one();
    }

    pub(super) fn approvals(&self) -> Vec<Approval> {
        std::mem::take(&mut locked(&self.word).approvals)
    }

    /// Changes how fast the copy may read.
    pub(super) fn limit(&self, limit: Option<Bytes>) {
        self.cap(limit);
        let mut word = locked(&self.word);
        word.plan.guards.limit = limit;
        word.limited = Some(limit);
    }

    fn cap(&self, limit: Option<Bytes>) {
        let limit = limit.map(|limit| limit.0);
        self.progress.pace.set(Limit::Cap, limit);
    }

    /// A limit that was changed and is not journalled yet.
    pub(super) fn limited(&self) -> Option<Option<Bytes>> {
        locked(&self.word).limited.take()
    }

    /// Slows the copy for the workload's sake; with what it loses now, 0–1.
    pub(super) fn spare_workload(&self, rate: Option<u64>, loss: Option<f64>) {
        self.progress.pace.set(Limit::Workload, rate);
        let percent = loss.map(|loss| (loss * 1000.0).round() / 10.0);
        locked(&self.status).limits.workload_loss_percent = percent;
    }

    /// Whether it copies beside the workload now.
    pub(super) fn copies(&self) -> bool {
        matches!(
            locked(&self.status).phase.as_str(),
            "export images" | "replicate" | "replicate in advance"
        )
    }

    /// Bytes read of volumes and images so far.
    pub(super) fn copied(&self) -> u64 {
        self.progress.bytes_read.load(Ordering::Relaxed) + self.exported.load(Ordering::Relaxed)
    }

    pub(super) fn choose(&self, choice: &Choice) {
        locked(&self.status).choice = Some(choice.clone());
    }

    pub(super) fn arrival(&self, arrival: &Arrival) {
        locked(&self.status).arrival = Some(arrival.clone());
    }

    pub(super) fn awaits(&self, roles: &[String]) {
        locked(&self.status).awaits = roles.to_vec();
    }

    /// Waits until it was told something, at most `longest`.
    pub(super) async fn heard(&self, longest: Duration) {
        let _ = tokio::time::timeout(longest, self.told.notified()).await;
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

    /// Says how much there is to export; the counter that is returned grows with it.
    pub(super) fn exporting(&self, total: Bytes) -> Arc<AtomicU64> {
        locked(&self.status).images.1 = total;
        self.exported.clone()
    }

    /// Does `work` unless an abort comes first, which drops it.
    pub(super) async fn unless_cancelled<T, E: Into<MoveError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, MoveError> {
        match self.stop.run_until_cancelled(work).await {
            Some(done) => done.map_err(Into::into),
            None => Err(MoveError::Cancelled(self.cancelled().unwrap_or_default())),
        }
    }

    pub(super) fn cancelled(&self) -> Option<String> {
        locked(&self.cancel).reason.clone()
    }

    /// From here an abort is refused; fails when one came first.
    pub(super) fn commit(&self) -> Result<(), MoveError> {
        let mut cancel = locked(&self.cancel);
        if let Some(reason) = &cancel.reason {
            return Err(MoveError::Cancelled(reason.clone()));
        }
        cancel.committed = true;
        Ok(())
    }

    /// Asks the plan to stop; false when it is committed.
    pub(super) fn cancel(&self, reason: &str) -> bool {
        let mut cancel = locked(&self.cancel);
        if cancel.committed {
            return false;
        }
        cancel.reason.get_or_insert_with(|| reason.to_owned());
        self.progress.cancel();
        self.stop.cancel();
        self.told.notify_one();
        true
    }

    /// Whether the target may still give everything back.
    pub(super) fn returnable(&self, may: bool) {
        locked(&self.cancel).returnable = may;
    }

    /// Asks for everything to be given back; false when that is too late, or too early.
    pub(super) fn give_back(&self, reason: &str) -> bool {
        let mut cancel = locked(&self.cancel);
        if cancel.returnable {
            cancel.returning = Some(reason.to_owned());
        }
        cancel.returnable
    }

    /// Why everything is to be given back, once it is asked for.
    pub(super) fn take_returning(&self) -> Option<String> {
        locked(&self.cancel).returning.take()
    }

    /// Stops the plan for this life of the agent; false when that is too late, or when it is over.
    pub(super) fn suspend(&self) -> bool {
        if self.ended.load(Ordering::Acquire) || !self.cancel(STOPPED) {
            return false;
        }
        let mut cancel = locked(&self.cancel);
        // Asked to abort before, it does.
        cancel.suspended = cancel.reason.as_deref() == Some(STOPPED);
        true
    }

    pub(super) fn suspended(&self) -> bool {
        locked(&self.cancel).suspended
    }

    /// Whether a verdict asked for it, and no operator.
    pub(super) fn by_verdict(&self) -> bool {
        matches!(
            locked(&self.word).plan.event,
            MigrationEvent::Degraded { .. }
        )
    }

    pub(super) fn status(&self) -> PlanStatus {
        let mut status = locked(&self.status).clone();
        status.held = self.held();
        status.bytes_read = Bytes(self.progress.bytes_read.load(Ordering::Relaxed));
        let limit = |limit| self.progress.pace.get(limit).map(Bytes);
        status.limits.cap = limit(Limit::Cap);
        status.limits.advance = limit(Limit::Advance);
        status.limits.workload = limit(Limit::Workload);
        status.images.0 = Bytes(self.exported.load(Ordering::Relaxed));
        status.bytes_sent = Bytes(self.progress.bytes_sent.load(Ordering::Relaxed));
        status
    }
}
