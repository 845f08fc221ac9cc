//! After the release: hand over, stop the source's containers, forward, wait for the twins.
//!
//! Invariant: there is no way back, so every step is retried until it succeeds; each may be done again.

use super::events::SourceEvent;
use super::faults::die_at;
use super::moving::{Move, MoveError};
use super::switch_first::is_later;
use crate::containers::PauseError;
use crate::model::control::{Owns, TakeOver, TargetStatus};
use crate::model::fleet::{DutyOutcome, PeerAddress};
use crate::model::ids::ContainerName;
use crate::model::plan::{PlannedContainer, SignedRelease, TwinState};
use std::time::{Duration, Instant};

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
pub(super) const RETRY: Duration = Duration::from_millis(500);

impl Released<'_> {
    /// Hands over, stops the source's containers, forwards, and waits for the twins.
    pub(super) async fn finish(self) {
        let Self {
            core,
            target,
            release,
            paused,
        } = self;
        let later = serde_json::from_str(&release.body).is_ok_and(|release| is_later(&release));
        core.active.enter("switch");
        // The release is written: nothing of the plan is written here any more.
        core.thaw_file_systems().await;
        die_at("switch");
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
        let ports = core.delegator.forward(&core.plan, &target).await;
        core.record(SourceEvent::Forwarding { ports }).await;
        core.active.enter("start twins");
        die_at("start twins");
        core.active.returnable(later);
        let status = loop {
            if later && core.asked_back(&target).await {
                return;
            }
            match target_status(core, &target).await {
                Ok(status) if status.start_up.is_some() => break status,
                Ok(status) => {
                    core.tell_twins(&status.twins);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => {
                    core.active
                        .trouble(&format!("asking {} for its twins: {error}", target.device));
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        let frozen = core.done.pausing.unwrap_or(core.plan.created);
        let interruption = paused.map_or_else(
            || core.delegator.now().since(frozen),
            |since| since.elapsed(),
        );
        core.record(SourceEvent::Twins {
            twins: status.twins,
            interruption,
            start_up: status.start_up.unwrap_or_default(),
        })
        .await;
        if later && !core.fill(&target).await {
            return;
        }
        core.end_stand_in().await;
        core.delegator
            .end_pairings(&core.plan, DutyOutcome::Done, &[])
            .await;
        core.record(SourceEvent::Completed).await;
        core.delegator.learn_rate(&core.plan.id);
        core.active.enter("completed");
        tracing::info!(plan = %core.plan.id, "completed");
    }
}

impl Move {
    /// Tells people how far the twins are.
    pub(super) fn tell_twins(&self, twins: &[TwinState]) {
        self.active.twins(twins);
        if let Some(twin) = twins.iter().find(|twin| twin.error.is_some()) {
            let why = twin.error.as_deref().unwrap_or_default();
            self.active
                .trouble(&format!("twin {}: {why}", twin.container));
        }
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

pub(super) async fn target_status(
    core: &Move,
    target: &PeerAddress,
) -> Result<TargetStatus, MoveError> {
    Ok(core
        .client()?
        .get(target, &format!("/v1/plans/{}", core.plan.id))
        .await?)
}

async fn kill_until_dead(core: &Move, planned: &PlannedContainer) {
    loop {
        let runtimes = core.delegator.runtimes();
        match runtimes.kill(&planned.container, KILL_TIME).await {
            Ok(()) => return,
            Err(PauseError::Runtime(error)) if error.not_found() => return,
            Err(error @ PauseError::UnknownRuntime(_)) => {
                core.active.trouble(&error.to_string());
                return;
            }
            Err(error) => core
                .active
                .trouble(&format!("killing {}: {error}", planned.container.name)),
        }
        tokio::time::sleep(RETRY).await;
    }
}
