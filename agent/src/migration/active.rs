//! A plan under way: what `status` shows of it, and how it is asked to stop.
//!
//! Invariant: once committed, it cannot be cancelled; once cancelled, it cannot be committed.

use super::moving::MoveError;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::{Plan, TwinState};
use crate::model::units::{Bytes, UnixMillis};
use crate::transfer::Progress;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
    /// The last thing that went wrong and is being retried.
    pub trouble: Option<String>,
}

/// One plan under way.
pub struct Active {
    status: Mutex<PlanStatus>,
    progress: Arc<Progress>,
    exported: Arc<AtomicU64>,
    cancel: Mutex<Cancel>,
    stop: CancellationToken,
    pub(super) ended: AtomicBool,
}

#[derive(Default)]
struct Cancel {
    reason: Option<String>,
    committed: bool,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The data is plain values that are whole after every statement; a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Active {
    pub(super) fn new(plan: &Plan) -> Self {
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
                images: (Bytes(0), Bytes(0)),
                since: plan.created,
                twins: Vec::new(),
                trouble: None,
            }),
            progress: Arc::new(Progress::default()),
            exported: Arc::default(),
            cancel: Mutex::default(),
            stop: CancellationToken::new(),
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
        true
    }

    pub(super) fn status(&self) -> PlanStatus {
        let mut status = locked(&self.status).clone();
        status.bytes_read = Bytes(self.progress.bytes_read.load(Ordering::Relaxed));
        status.images.0 = Bytes(self.exported.load(Ordering::Relaxed));
        status.bytes_sent = Bytes(self.progress.bytes_sent.load(Ordering::Relaxed));
        status
    }
}
