//! The end of a plan that was not taken over, on its target: what it made here is removed.
//!
//! Invariant: what a plan made is removed once: a place that could be removed may be another plan's soon after. Non-goal:
//! what cannot be removed, which is told of and left behind.

use super::events::TargetEvent;
use super::later::Later;
use super::places::remove_places;
use super::target::{Receiving, Target, TargetError};
use crate::containers::Runtime;
use crate::model::container::{Container, State};
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::Plan;
use std::time::Duration;

/// Longest wait for this device's own view to show that containers were removed.
const VIEW_TIME: Duration = Duration::from_secs(3);

impl Target {
    /// Ends a plan that was not taken over and removes what it made here.
    ///
    /// # Errors
    /// The plan was taken over, belongs to another source, or its runtime is away: nothing is removed then.
    pub async fn dismiss(
        &self,
        peer: &DeviceId,
        id: &PlanId,
        why: &str,
    ) -> Result<(), TargetError> {
        let _turn = self.turn(peer).await;
        match self.known(peer, id) {
            Err(TargetError::Unknown(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => self.dismiss_now(id, why).await,
        }
    }

    pub(super) async fn dismiss_now(&self, id: &PlanId, why: &str) -> Result<(), TargetError> {
        let plan = match self.plans().get(id) {
            None => return Ok(()),
            Some(known) if known.owns.is_some() => return Err(TargetError::Owned(id.clone())),
            Some(known) => known.plan.clone(),
        };
        // Its source forwards nothing to here any more; of what ran here nothing does.
        self.parts.forwards.take_again(id).await;
        // Before anything is removed, and asked: one that is away would have all of it left behind.
        let runtime = self.runtime_for(&plan).await?;
        runtime.answers().await?;
        self.shut(id);
        let Some(mut known) = self.plans().remove(id) else {
            return Ok(());
        };
        let ran = known.later.as_ref().is_some_and(Later::is_given_back);
        if !known.removed {
            for left in self.remove_all(&mut known, runtime).await {
                tracing::warn!(plan = %id, "left behind: {left}");
            }
        }
        let reason = why.to_owned();
        let event = TargetEvent::Dismissed { reason };
        if let Err(error) = known.journal.append(crate::fleet::now(), event) {
            // A next life would remove it once more: until then nobody else gets its places.
            known.removed = true;
            self.plans().insert(id.clone(), known);
            return Err(error.into());
        }
        tracing::info!(plan = %id, why, "dismissed");
        if ran {
            self.tell_ports(&plan).await;
        }
        Ok(())
    }

    /// Removes what a plan made here; what is left of it, and why.
    async fn remove_all(&self, known: &mut Receiving, runtime: &Runtime) -> Vec<String> {
        let mut left = self.remove_returned(known, runtime).await;
        left.extend(self.remove_later(known).await);
        // A rehearsal that was cut short may have left a twin, which was never started.
        for planned in &known.plan.containers {
            let name = planned.container.name.as_str();
            let removed = match runtime.state(name).await {
                Ok(State::Created) => runtime.remove(name).await,
                Err(error) if !error.not_found() => Err(error),
                _ => Ok(()),
            };
            left.extend(removed.err().map(|error| error.to_string()));
        }
        left.extend(remove_places(&known.plan, &known.places, runtime).await);
        for name in &known.networks {
            let removed = runtime.remove_network(name).await;
            left.extend(removed.err().map(|error| error.to_string()));
        }
        left
    }

    /// Tells the duplicator at once that the ports of twins that were removed are free.
    async fn tell_ports(&self, plan: &Plan) {
        let mut view = self.parts.view.clone();
        let is_twin = |container: &Container| plan.container(&container.name).is_some();
        let gone = view.wait_for(|view| !view.containers.iter().any(is_twin));
        // The next heartbeat but one says so, too.
        let _ = tokio::time::timeout(VIEW_TIME, gone).await;
        self.parts.beat.notify_one();
    }
}
