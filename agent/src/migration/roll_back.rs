//! Before the release: undo what the journal says was done.
//!
//! Invariant: when it is over, the source's containers run and can be started as if nothing had happened.

use super::events::SourceEvent;
use super::moving::{Move, MoveError};
use super::switch::RETRY;
use crate::containers::Means;
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
