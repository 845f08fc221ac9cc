//! Twins on volumes that are not whole: started by the agent alone, ended before their mounts are.
//!
//! Invariant: whoever starts one holds `starts`, and looks whether its volumes are being given back. Non-goal: the
//! mounts (`later`).

use super::events::{ContainerFence, TargetEvent};
use super::target::Target;
use crate::containers::{Fence, Means, Runtime};
use crate::model::container::State;
use crate::model::plan::{Plan, PlannedContainer};
use std::sync::Arc;
use std::time::Duration;

/// A twin that is asked to end is killed after this.
const GRACE: Duration = Duration::from_secs(10);

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
        if self.is_returning(&plan.id) {
            return Err("its volumes are being given back".to_owned());
        }
        let name = planned.container.name.as_str();
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
    pub(super) async fn leave_mounts(&self, plan: &Plan) {
        let Ok(runtime) = self.runtime_for(plan).await else {
            return;
        };
        for name in plan.order.iter().flat_map(|step| &step.containers) {
            let name = name.as_str();
            let Ok(inspect) = runtime.inspect(name).await else {
                continue;
            };
            let pid = inspect["State"]["Pid"].as_i64().unwrap_or(0);
            let mounts = self.parts.proc_root.join(format!("{pid}/mountinfo"));
            let mounts = std::fs::read_to_string(mounts).unwrap_or_default();
            if pid == 0 || !mounts.contains(" fuse.lifeboat ") {
                continue;
            }
            tracing::info!(plan = %plan.id, twin = name, "starts anew, on the plain place of its data");
            // What it cannot end by itself, on a mount that answers nobody, is killed.
            let ended = runtime.stop(name, GRACE).await;
            if let Err(error) = ended.and(runtime.start(name).await) {
                tracing::error!(plan = %plan.id, twin = name, "{error}");
            }
        }
    }

    /// Ends the twins of a plan, children before parents.
    pub(super) async fn end_twins(&self, plan: &Plan, at_once: bool) {
        let Ok(runtime) = self.runtime_for(plan).await else {
            return;
        };
        for name in plan
            .order
            .iter()
            .rev()
            .flat_map(|step| step.containers.iter().rev())
        {
            let name = name.as_str();
            match runtime.state(name).await {
                Ok(State::Running | State::Paused) => {}
                _ => continue,
            }
            let ended = if at_once {
                runtime.kill(name, GRACE).await
            } else {
                runtime.stop(name, GRACE).await
            };
            if let Err(error) = ended {
                tracing::error!(plan = %plan.id, twin = name, "{error}");
            }
        }
    }
}
