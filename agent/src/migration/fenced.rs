//! Twins on volumes that are not whole: started by the agent alone, ended before their mounts are.
//!
//! Invariants: whoever starts one holds `starts`, and looks whether its volumes are being given back; a twin that the
//! agent ends on its own account is in the journal before, so that some life of the agent starts it again. Non-goal:
//! the mounts (`later`).

use super::delegator::{plan_ids, plan_of};
use super::events::{ContainerFence, SourceEvent, TargetEvent};
use super::journal::{self, Entry, plan_directory};
use super::target::{Target, TargetError};
use crate::containers::{Fence, Means, Runtime};
use crate::model::container::State;
use crate::model::ids::{ContainerName, PlanId};
use crate::model::plan::{Left, Plan, PlannedContainer};
use crate::model::units::UnixMillis;
use std::sync::Arc;
use std::time::Duration;

/// A twin that is asked to end is killed after this.
pub(super) const GRACE: Duration = Duration::from_secs(10);

impl Target {
    /// Starts twins again that crashed, as their restart policies would.
    pub(super) async fn revive(self: &Arc<Self>, plan: &Plan) {
        let ready = self
            .plans()
            .get(&plan.id)
            .is_some_and(|known| known.start_up.is_some());
        let Ok(runtime) = self.runtime_for(plan).await else {
            return;
        };
        for planned in plan.containers.iter().filter(|_| ready) {
            let policy = planned.inspect["HostConfig"]["RestartPolicy"]["Name"].as_str();
            if matches!(policy, None | Some("" | "no")) {
                continue;
            }
            let Ok(inspect) = runtime.inspect(planned.container.name.as_str()).await else {
                continue;
            };
            let state = &inspect["State"];
            let crashed = state["Status"] == "exited"
                // Ended by itself, or at somebody's request.
                && (!matches!(state["ExitCode"].as_i64(), Some(0 | 137 | 143))
                    || state["OOMKilled"] == true);
            if crashed && let Err(error) = self.start_fenced(plan, planned, runtime).await {
                tracing::warn!(plan = %plan.id, twin = %planned.container.name, "{error}");
            }
        }
    }

    /// Starts a twin so that its runtime never does by itself.
    pub(super) async fn start_fenced(
        &self,
        plan: &Plan,
        planned: &PlannedContainer,
        runtime: &Runtime,
    ) -> Result<(), String> {
        let _starts = self.starts.lock().await;
        self.may_start(&plan.id)?;
        if self.has_left(plan, &planned.container.name).await? {
            return Err("it has left this device since".to_owned());
        }
        let name = planned.container.name.as_str();
        if !self.is_filling(&plan.id) {
            // Its data came to its place while `starts` was waited for: no fence is left, and none is to come.
            return runtime.start(name).await.map_err(|error| error.to_string());
        }
        let why = format!(
            "the data of plan {} is not all here; the agent starts it",
            plan.id
        );
        let known = self.later(&plan.id, |later| {
            let mut fences = later.fences.iter();
            fences
                .find(|fence| fence.container == planned.container.name)
                .map(|fence| fence.fence.clone())
        });
        let fence = match known.flatten() {
            Some(fence) => fence,
            None => {
                let mut fence = runtime
                    .forbid_start(name, &why)
                    .await
                    .map_err(|error| error.to_string())?;
                if let Means::RestartPolicy { previous } = &mut fence.how {
                    // An earlier life may have fenced it without writing that down.
                    *previous = planned.inspect["HostConfig"]["RestartPolicy"].clone();
                }
                let container = planned.container.name.clone();
                let event = TargetEvent::TwinFenced {
                    fence: ContainerFence {
                        container,
                        fence: fence.clone(),
                    },
                };
                self.note_later(&plan.id, &event)
                    .map_err(|error| error.to_string())?;
                fence
            }
        };
        let Fence {
            how: Means::Hook { .. },
            ..
        } = fence
        else {
            // The policy is off; a start by hand is none of its business.
            return runtime.start(name).await.map_err(|error| error.to_string());
        };
        runtime
            .lift_fence(&fence)
            .await
            .map_err(|error| error.to_string())?;
        let started = runtime.start(name).await;
        let fenced = runtime.forbid_start(name, &why).await;
        started.map_err(|error| error.to_string())?;
        fenced.map(drop).map_err(|error| error.to_string())
    }

    /// Starts those twins anew that still run on a mount although their volumes are whole.
    ///
    /// # Errors
    /// One may still run on it.
    pub(super) async fn leave_mounts(&self, plan: &Plan) -> Result<(), String> {
        let runtime = self.runtime_for(plan).await;
        let runtime = runtime.map_err(|error| error.to_string())?;
        let mut all = Ok(());
        for name in plan.order.iter().flat_map(|step| &step.containers) {
            if self.has_left(plan, name).await? {
                continue;
            }
            let name = name.as_str();
            let inspect = match runtime.inspect(name).await {
                Ok(inspect) => inspect,
                Err(error) if error.not_found() => continue,
                Err(error) => {
                    all = Err(error.to_string());
                    continue;
                }
            };
            let pid = inspect["State"]["Pid"].as_i64().unwrap_or(0);
            let mounts = self.parts.proc_root.join(format!("{pid}/mountinfo"));
            let mounts = std::fs::read_to_string(mounts).unwrap_or_default();
            if pid == 0 || !mounts.contains(" fuse.lifeboat ") {
                continue;
            }
            tracing::info!(plan = %plan.id, twin = name, "starts anew, on the plain place of its data");
            if let Err(error) = self.start_anew(plan, name, runtime).await {
                tracing::error!(plan = %plan.id, twin = name, "{error}");
                all = Err(format!("twin {name}: {error}"));
            }
        }
        all
    }

    /// Whether a twin is another device's by now: a plan of which this one was the source has released it since.
    pub(super) async fn has_left(&self, plan: &Plan, name: &ContainerName) -> Result<bool, String> {
        let left = self.left_with(plan, name).await?;
        Ok(left.is_some())
    }

    /// Where a twin has gone since, and with which plan.
    pub(super) async fn left_with(
        &self,
        plan: &Plan,
        name: &ContainerName,
    ) -> Result<Option<Left>, String> {
        let state = &self.parts.state;
        let known = self
            .plans()
            .get(&plan.id)
            .map(|known| (known.owned_at, known.back.clone()));
        let (owned_at, back) = known.unzip();
        let back = back.unwrap_or_default();
        let mut released = Vec::new();
        for id in plan_ids(state, "source") {
            // With that it had left before it came back with this plan.
            if back.contains_key(&id) {
                continue;
            }
            // One that cannot be read was told of when the agent started.
            let entries = journal::read(&plan_directory(state, "source", &id)).unwrap_or_default();
            released.extend(released_of(&entries, name));
        }
        released.sort_by_key(|gone| gone.at);
        let Some(last) = released.last() else {
            return Ok(None);
        };
        let since = released.iter().find(|gone| Some(gone.at) >= owned_at);
        let runtime = self.runtime_for(plan).await;
        let runtime = runtime.map_err(|error| error.to_string())?;
        let gone = match runtime.inspect(name.as_str()).await {
            Ok(inspect) => {
                let is_it = |gone: &&Gone| inspect["Id"].as_str() == Some(&gone.container);
                let it = released.iter().find(is_it);
                it.or_else(|| self.is_of_later(plan, name).then(|| since.unwrap_or(last)))
            }
            // Nobody but the clock knows whether it was that one.
            Err(error) if error.not_found() => since,
            Err(error) => return Err(error.to_string()),
        };
        Ok(gone.map(|gone| gone.left.clone()))
    }

    /// Whether a container of this name is the twin of a plan that came here after this one.
    fn is_of_later(&self, plan: &Plan, name: &ContainerName) -> bool {
        let plans = self.plans();
        let Some(this) = plans.get(&plan.id).filter(|this| this.owns.is_some()) else {
            return false;
        };
        plans.values().any(|other| {
            other.plan.id != plan.id
                && other.plan.container(name).is_some()
                && (other.owns.is_none() || other.owned_at > this.owned_at)
        })
    }

    /// Ends a twin and starts it again; one that does not start is the next life's.
    async fn start_anew(&self, plan: &Plan, name: &str, runtime: &Runtime) -> Result<(), String> {
        let id = &plan.id;
        let known = self
            .plans()
            .get(id)
            .map(|known| (known.twins.clone(), known.start_up));
        let (mut twins, start_up) = known.unwrap_or_default();
        twins.retain(|twin| twin.container.as_str() == name);
        // What cannot be noted is no reason to leave it on a mount that answers nobody.
        let noted = self.note_ended(id, vec![name.into()]);
        // What it cannot end by itself there is killed.
        let ended = runtime.stop(name, GRACE).await;
        ended.map_err(|error| error.to_string())?;
        let started = runtime.start(name).await;
        started.map_err(|error| error.to_string())?;
        noted.map_err(|error| error.to_string())?;
        for twin in twins.into_iter().filter(|twin| twin.ready.is_some()) {
            self.note_later(id, &TargetEvent::TwinReady { twin: twin.clone() })
                .map_err(|error| error.to_string())?;
            if let Some(known) = self.plans().get_mut(id) {
                known.twins.push(twin);
            }
        }
        if start_up.is_some() {
            self.note_later(id, &TargetEvent::Completed)
                .map_err(|error| error.to_string())?;
            if let Some(known) = self.plans().get_mut(id) {
                known.start_up = start_up;
            }
        }
        Ok(())
    }

    /// Writes down that twins are ended, and by whom they are started again.
    pub(super) fn note_ended(
        &self,
        id: &PlanId,
        containers: Vec<ContainerName>,
    ) -> Result<(), TargetError> {
        if let Some(known) = self.plans().get_mut(id) {
            known.end(&containers);
        }
        self.note_later(id, &TargetEvent::TwinsEnded { containers })
    }

    /// Ends the twins of a plan, children before parents; tries all of them.
    ///
    /// # Errors
    /// One may still run.
    pub(super) async fn end_twins(&self, plan: &Plan, at_once: bool) -> Result<(), String> {
        let runtime = self.runtime_for(plan).await;
        let runtime = runtime.map_err(|error| error.to_string())?;
        let mut all = Ok(());
        for name in plan
            .order
            .iter()
            .rev()
            .flat_map(|step| step.containers.iter().rev())
        {
            let name = name.as_str();
            let ended = match runtime.state(name).await {
                Ok(State::Running | State::Paused) if at_once => runtime.kill(name, GRACE).await,
                Ok(State::Running | State::Paused) => runtime.stop(name, GRACE).await,
                Err(error) if !error.not_found() => Err(error),
                _ => Ok(()),
            };
            if let Err(error) = ended {
                tracing::error!(plan = %plan.id, twin = name, "{error}");
                all = Err(format!("twin {name} may still run: {error}"));
            }
        }
        all
    }
}

/// A container that a plan released here.
struct Gone {
    at: UnixMillis,
    /// Its id here.
    container: String,
    left: Left,
}

/// How the plan of this journal released a container; none when it came back, or was never of it.
fn released_of(entries: &[Entry<SourceEvent>], name: &ContainerName) -> Option<Gone> {
    let is_back = |entry: &Entry<SourceEvent>| matches!(entry.event, SourceEvent::Returned { .. });
    let is_released =
        |entry: &&Entry<SourceEvent>| matches!(entry.event, SourceEvent::Released { .. });
    let released = entries.iter().find(is_released)?;
    if entries.iter().any(is_back) {
        return None;
    }
    let plan = plan_of(entries)?;
    let planned = plan.container(name)?;
    Some(Gone {
        at: released.at,
        container: planned.container.id.clone(),
        left: Left {
            device: plan.target.as_ref()?.device.clone(),
            plan: plan.id.clone(),
        },
    })
}
