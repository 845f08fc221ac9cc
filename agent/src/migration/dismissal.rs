//! The end of a plan that was not taken over, on its target: what it made here is removed.
//!
//! Invariant: what a plan made is removed once: a place that could be removed may be another plan's soon after, which it
//! is not before the journal says so. What cannot be removed is in the journal then (`leftovers`).

use super::events::{Place, TargetEvent};
use super::later::Later;
use super::leftovers::Left;
use super::places::name_in_runtime;
use super::target::{Target, TargetError};
use crate::containers::Runtime;
use crate::model::container::Container;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::Plan;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for this device's own view to show that containers were removed.
const VIEW_TIME: Duration = Duration::from_secs(3);

impl Target {
    /// Ends a plan that was not taken over and removes what it made here; what is left of that, in words.
    ///
    /// # Errors
    /// The plan was taken over, belongs to another source, or its runtime is away: nothing is removed then.
    pub async fn dismiss(
        self: &Arc<Self>,
        peer: &DeviceId,
        id: &PlanId,
        why: &str,
    ) -> Result<Option<String>, TargetError> {
        let _turn = self.turn(peer).await;
        // What is removed here is found free by nobody before the journal says that it is over.
        let _offer = self.offers.lock().await;
        match self.known(peer, id) {
            Err(TargetError::Unknown(_)) => Ok(self.left_of(peer, id)),
            Err(error) => Err(error),
            Ok(_) => self.dismiss_now(id, why).await,
        }
    }

    pub(super) async fn dismiss_now(
        self: &Arc<Self>,
        id: &PlanId,
        why: &str,
    ) -> Result<Option<String>, TargetError> {
        let plan = match self.plans().get(id) {
            None => return Ok(None),
            Some(known) if known.owns.is_some() => return Err(TargetError::Owned(id.clone())),
            Some(known) => known.plan.clone(),
        };
        // Its source forwards nothing to here any more; of what ran here nothing does.
        self.parts.forwards.take_again(id).await;
        // Before anything is removed, and asked: one that is away would have all of it left behind.
        let runtime = self.runtime_for(&plan).await?;
        runtime.answers().await?;
        let made = self.made_of(id, runtime).await?;
        self.shut(id);
        self.close_later(id).await;
        let Some(mut known) = self.plans().remove(id) else {
            return Ok(None);
        };
        let ran = known.later.as_ref().is_some_and(Later::is_given_back);
        let left = match known.removed.take() {
            Some(left) => left,
            None => Left::after(&plan.source, made, runtime).await,
        };
        let words = left.words();
        let reason = why.to_owned();
        let event = TargetEvent::Dismissed {
            reason,
            left: words.is_some().then(|| Box::new(left.clone())),
        };
        if let Err(error) = known.journal.append(crate::fleet::now(), event) {
            // A next life would remove it once more: until then nobody else gets its places.
            known.removed = Some(left);
            self.plans().insert(id.clone(), known);
            return Err(error.into());
        }
        tracing::info!(plan = %id, why, "dismissed");
        if let Some(words) = &words {
            tracing::warn!(plan = %id, "left behind: {words}");
            self.go_on_removing(id, left, known.journal);
        }
        if ran {
            self.tell_ports(&plan).await;
        }
        Ok(words)
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
