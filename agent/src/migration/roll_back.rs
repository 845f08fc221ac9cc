//! Before the release: undo what the journal says was done.
//!
//! Invariant: when it is over, the source's containers run and can be started as if nothing had happened.

use super::active::SUSPENDED;
use super::events::SourceEvent;
use super::moving::{Move, MoveError};
use super::switch::RETRY;
use crate::containers::{FenceError, Means};
use crate::model::container::State;
use crate::model::fleet::DutyOutcome;
use crate::model::plan::PlannedContainer;

impl Move {
    /// Appends after the release, when giving up is no choice.
    pub(super) async fn record(&mut self, event: SourceEvent) {
        while let Err(error) = self.append(event.clone()) {
            self.active.trouble(&error.to_string());
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Undoes what the journal says was done, and tells the other devices.
    pub(super) async fn roll_back(mut self, reason: &str) {
        tracing::warn!(plan = %self.plan.id, reason, "rolling back");
        self.active.enter("roll back");
        self.thaw_file_systems().await;
        self.thaw_all().await;
        // So that a next life does not go on with it; the disk may be the very reason.
        if let Err(error) = self.append(SourceEvent::GivenUp {
            reason: reason.to_owned(),
        }) {
            self.active.trouble(&error.to_string());
        }
        self.unfence_all().await;
        self.end_stand_in().await;
        let delegator = self.delegator.clone();
        let freed = delegator.dismiss(&self.plan, reason).await;
        delegator
            .end_pairings(&self.plan, DutyOutcome::Abandoned, &[])
            .await;
        self.record(SourceEvent::Aborted {
            reason: reason.to_owned(),
        })
        .await;
        let _ = tokio::fs::remove_dir_all(delegator.image_directory(&self.plan.id)).await;
        if let Some(freed) = freed {
            self.record(freed).await;
            self.active.enter("aborted");
            return;
        }
        self.active.enter("aborted");
        delegator
            .free_target(self.plan, self.journal, reason.to_owned())
            .await;
    }
}

/// Tries to lift a fence before the roll-back goes on and leaves it to the operator, who is told.
const UNFENCE_TRIES: u32 = 20;

impl Move {
    /// Lets the plan be until the next life of the agent; the containers run, and can be started.
    pub(super) async fn suspend(mut self) {
        tracing::info!(plan = %self.plan.id, "waits for the agent's next start");
        self.let_run().await;
        self.active.enter(SUSPENDED);
    }

    /// Lets everything run and be started as before the plan.
    pub(super) async fn let_run(&mut self) {
        self.thaw_file_systems().await;
        self.thaw_all().await;
        self.unfence_all().await;
    }

    async fn thaw_all(&self) {
        // All side by side: one that cannot be thawed must not keep the others frozen.
        let containers = self.plan.containers.iter();
        futures_util::future::join_all(containers.map(|planned| self.thaw(planned))).await;
    }

    async fn unfence_all(&self) {
        for planned in &self.plan.containers {
            for _ in 0..UNFENCE_TRIES {
                let Err(error) = self.unfence(planned).await else {
                    break;
                };
                self.active
                    .trouble(&format!("restoring {}: {error}", planned.container.name));
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Lets one container run again, however long its runtime takes to answer.
    async fn thaw(&self, planned: &PlannedContainer) {
        if !self.done.may_have_frozen(&planned.container) {
            return;
        }
        while let Err(error) = self.thaw_once(planned).await {
            self.active
                .trouble(&format!("thawing {}: {error}", planned.container.name));
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn thaw_once(&self, planned: &PlannedContainer) -> Result<(), MoveError> {
        let (id, runtime) = (&planned.container.id, self.delegator.runtime_of(planned)?);
        match runtime.state(id).await {
            Ok(State::Paused) => Ok(runtime.unpause(id).await?),
            Ok(_) => Ok(()),
            Err(error) if error.not_found() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets one container be started as before, and starts it when only the fence kept it down.
    async fn unfence(&self, planned: &PlannedContainer) -> Result<(), MoveError> {
        let (container, runtime) = (&planned.container, self.delegator.runtime_of(planned)?);
        let policy = &planned.inspect["HostConfig"]["RestartPolicy"];
        let known = self
            .done
            .fences
            .iter()
            .find(|fence| fence.container == container.name);
        match known {
            Some(known) => runtime.lift_fence(&known.fence).await?,
            None if self.done.fencing => {
                // The agent died between making this fence and writing it down: make it again to know it.
                let mut fence = match runtime.forbid_start(&container.id, "roll-back").await {
                    Err(FenceError::Runtime(error)) if error.not_found() => return Ok(()),
                    fence => fence?,
                };
                if let Means::RestartPolicy { previous } = &mut fence.how {
                    *previous = policy.clone();
                }
                runtime.lift_fence(&fence).await?;
            }
            None => return Ok(()),
        }
        let restarts = !matches!(policy["Name"].as_str(), None | Some("" | "no"));
        if restarts
            && container.state == State::Running
            && runtime.state(&container.id).await? == State::Exited
        {
            runtime.start(&container.id).await?;
        }
        Ok(())
    }
}
