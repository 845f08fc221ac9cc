//! The end of a plan that was not taken over, on its target: what it made here is removed.
//!
//! Invariants: what a plan made is removed once, as a place that could be removed may be somebody else's soon after; whoever
//! dismisses it is told what cannot be removed, and that is tried again when it is asked again, for some minutes; then it is
//! left behind, as by then a person may have something of that name there. Until it is over, no other plan gets it.

use super::events::{Place, TargetEvent};
use super::later::Later;
use super::places::{name_in_runtime, remove_places};
use super::target::{Receiving, Target, TargetError};
use crate::containers::Runtime;
use crate::model::container::{Container, State};
use crate::model::ids::{ContainerName, DeviceId, PlanId};
use crate::model::plan::Plan;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Longest wait for this device's own view to show that containers were removed.
const VIEW_TIME: Duration = Duration::from_secs(3);
/// For how long what cannot be removed is tried again.
pub(super) const REMOVING_MAX: Duration = Duration::from_mins(10);

/// A dismissal that is not over.
pub(super) struct Removing {
    /// When it began in this life of the agent.
    pub(super) since: Instant,
    /// Containers that are still to be looked at.
    pub(super) twins: BTreeSet<ContainerName>,
}

impl Removing {
    fn of(plan: &Plan) -> Self {
        let twins = plan.containers.iter();
        Self {
            since: Instant::now(),
            twins: twins.map(|one| one.container.name.clone()).collect(),
        }
    }
}

impl Target {
    /// Ends a plan that was not taken over and removes what it made here.
    ///
    /// # Errors
    /// The plan was taken over, belongs to another source, or its runtime is away: nothing is removed then. Or not
    /// everything can be removed.
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
        let mut removing = known.removing.take().unwrap_or_else(|| Removing::of(&plan));
        let left = self.remove_all(&mut known, &mut removing, runtime).await;
        let left = left.join("; ");
        let again = !left.is_empty() && removing.since.elapsed() < REMOVING_MAX;
        let ended = if again {
            let (plan, left) = (id.clone(), left.clone());
            Err(TargetError::Left { plan, left })
        } else {
            let reason = why.to_owned();
            let event = TargetEvent::Dismissed { reason };
            let written = known.journal.append(crate::fleet::now(), event);
            written.map_err(TargetError::from)
        };
        if let Err(error) = ended {
            // Nobody else gets its places meanwhile, of which a next life would remove all once more.
            known.removing = Some(removing);
            self.plans().insert(id.clone(), known);
            return Err(error);
        }
        tracing::info!(plan = %id, why, "dismissed");
        if ran {
            self.tell_ports(&plan).await;
        }
        if left.is_empty() {
            return Ok(());
        }
        tracing::warn!(plan = %id, "left behind: {left}");
        let plan = id.clone();
        Err(TargetError::LeftBehind { plan, left })
    }

    /// Removes what is left of what a plan made here; what could not be removed, and why.
    async fn remove_all(
        &self,
        known: &mut Receiving,
        removing: &mut Removing,
        runtime: &Runtime,
    ) -> Vec<String> {
        let mut left = Vec::new();
        for name in removing.twins.clone() {
            match remove_twin(known, &name, runtime).await {
                Ok(()) => {
                    removing.twins.remove(&name);
                }
                Err(error) => left.push(error),
            }
        }
        left.extend(self.remove_later(known).await);
        left.extend(remove_places(&known.plan, &mut known.places, runtime).await);
        for name in std::mem::take(&mut known.networks) {
            match runtime.remove_network(&name).await {
                Ok(()) => {}
                // Others' containers may be in it by now.
                Err(error) if !error.retry_helps() => {
                    tracing::warn!(plan = %known.plan.id, "left behind: {error}");
                }
                Err(error) => {
                    left.push(error.to_string());
                    known.networks.push(name);
                }
            }
        }
        left
    }

    /// Refuses places and names of a plan that is not dismissed yet: its dismissal would remove them under this one.
    pub(super) fn check_free(
        &self,
        plan: &Plan,
        places: &[Place],
        runtime: &Runtime,
    ) -> Result<(), TargetError> {
        let socket = runtime.socket().display().to_string();
        let plans = self.plans();
        let in_the_way = |what: String, other: &Plan| TargetError::InTheWay {
            what,
            why: format!("plan {} is to have it until it is dismissed", other.id),
        };
        for known in plans.values().filter(|known| known.owns.is_none()) {
            let other = &known.plan;
            let same_runtime = known
                .runtime
                .as_ref()
                .is_none_or(|theirs| *theirs == socket);
            for place in places {
                // A volume's path is known once its runtime made it.
                let name = name_in_runtime(plan, place);
                let meets = |one: &Place| match (name, name_in_runtime(other, one)) {
                    (Some(name), Some(theirs)) => same_runtime && name == theirs,
                    (None, None) => {
                        one.path.starts_with(&place.path) || place.path.starts_with(&one.path)
                    }
                    _ => false,
                };
                if known.places.iter().any(meets) {
                    let path = || place.path.display().to_string();
                    let what = name.map_or_else(path, |name| format!("volume {name}"));
                    return Err(in_the_way(what, other));
                }
            }
            let mut names = plan.containers.iter().map(|one| &one.container.name);
            if let Some(name) = names.find(|name| same_runtime && other.container(name).is_some()) {
                return Err(in_the_way(format!("container {name}"), other));
            }
        }
        Ok(())
    }

    /// Plans of a source that are not taken over, nor dismissed.
    pub(super) fn unowned_of(&self, source: &DeviceId) -> Vec<PlanId> {
        let plans = self.plans();
        let unowned = plans.values().filter(|known| known.owns.is_none());
        unowned
            .map(|known| &known.plan)
            .filter(|plan| &plan.source == source)
            .map(|plan| plan.id.clone())
            .collect()
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

/// Removes a twin that was given back, with what kept it from being started; or one that was never started, which a
/// rehearsal that was cut short may have left.
async fn remove_twin(
    known: &Receiving,
    name: &ContainerName,
    runtime: &Runtime,
) -> Result<(), String> {
    let given_back = known.later.as_ref().filter(|later| later.is_given_back());
    let Some(later) = given_back else {
        let removed = match runtime.state(name.as_str()).await {
            Ok(State::Created) => runtime.remove(name.as_str()).await,
            Err(error) if !error.not_found() => Err(error),
            _ => Ok(()),
        };
        return removed.map_err(|error| error.to_string());
    };
    // Where that fails its fence stays: nothing else keeps the runtime from starting it beside the source's container.
    let removed = runtime.remove(name.as_str()).await;
    removed.map_err(|error| error.to_string())?;
    for fence in later.fences.iter().filter(|fence| &fence.container == name) {
        let lifted = runtime.lift_fence(&fence.fence).await;
        lifted.map_err(|error| error.to_string())?;
    }
    Ok(())
}
