//! Starting the twins in order, each ready before the next step.

use super::events::TargetEvent;
use super::places::name_in_runtime;
use super::target::{Target, TargetError};
use crate::containers::{How, ReadyRules, Runtime, RuntimeError, TwinSpec};
use crate::model::container::State;
use crate::model::control::TargetStatus;
use crate::model::ids::{ContainerName, DeviceId, PlanId};
use crate::model::plan::{Plan, PlannedContainer, TwinState};
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Target {
    /// Starts the twins in order, each ready before the next step; tries again until all are.
    pub(super) async fn start_twins(self: Arc<Self>, plan: Plan) {
        let begun = Instant::now();
        super::faults::die_at("start twins");
        let mut pause = Duration::from_millis(500);
        loop {
            if self.may_start(&plan.id).is_err() {
                return;
            }
            match self.start_in_order(&plan).await {
                Ok(()) => break,
                Err(trouble) => {
                    tracing::error!(plan = %plan.id, "{trouble}");
                    if let Some(known) = self.plans().get_mut(&plan.id) {
                        known.trouble = Some(trouble);
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(30));
        }
        let mut plans = self.plans();
        if let Some(known) = plans.get_mut(&plan.id) {
            known.start_up = Some(begun.elapsed());
            known.completed = true;
            known.ended.clear();
            known.trouble = None;
            if let Err(error) = known
                .journal
                .append(crate::fleet::now(), TargetEvent::Completed)
            {
                tracing::error!("{error}");
            }
        }
        tracing::info!(plan = %plan.id, took = ?begun.elapsed(), "all twins are ready");
    }

    /// State of a plan for its source, with the twins as their runtime shows them now.
    ///
    /// # Errors
    /// The plan is unknown or not the peer's.
    pub async fn look(&self, peer: &DeviceId, id: &PlanId) -> Result<TargetStatus, TargetError> {
        let (plan, _) = self.known(peer, id)?;
        let mut status = self.status(peer, id)?;
        // Of one that left before it was ready the journal says nothing.
        for planned in &plan.containers {
            let container = planned.container.name.clone();
            let is_known = status.twins.iter().any(|twin| twin.container == container);
            if !is_known && let Ok(left @ Some(_)) = self.left_with(&plan, &container).await {
                status.twins.push(TwinState {
                    container,
                    ready: None,
                    after: Duration::ZERO,
                    not_carried: Vec::new(),
                    error: None,
                    left,
                });
            }
        }
        let runtime = self.runtime_for(&plan).await;
        let runtime = runtime.as_ref().map_err(ToString::to_string);
        let look = |twin: TwinState| {
            let (plan, runtime) = (&plan, runtime.clone());
            async move {
                let name = &twin.container;
                let left = self.left_with(plan, name).await;
                let error = match (left, runtime) {
                    (Ok(left @ Some(_)), _) => return TwinState { left, ..twin },
                    (Ok(None), Ok(runtime)) => match runtime.state(name.as_str()).await {
                        Ok(State::Running) => return twin,
                        Ok(state) => format!("it is {state:?}").to_lowercase(),
                        Err(error) => error.to_string(),
                    },
                    (Err(error), _) | (_, Err(error)) => error,
                };
                let error = match &twin.ready {
                    Some(_) => format!("it was ready, and does not run now: {error}"),
                    None => format!("it does not run: {error}"),
                };
                let (ready, error) = (None, twin.error.or(Some(error)));
                TwinState {
                    ready,
                    error,
                    ..twin
                }
            }
        };
        status.twins = join_all(status.twins.into_iter().map(look)).await;
        Ok(status)
    }

    pub(super) async fn start_in_order(self: &Arc<Self>, plan: &Plan) -> Result<(), String> {
        let runtime = self
            .runtime_for(plan)
            .await
            .map_err(|error| error.to_string())?;
        let places = match self.plans().get(&plan.id) {
            Some(known) => known.places.clone(),
            None => Vec::new(),
        };
        self.mount_later(plan).await?;
        let devices = self.attach(plan, &places).await;
        let devices = &devices.map_err(|error| error.to_string())?;
        for step in &plan.order {
            let start = |name: &ContainerName| {
                let planned = plan.container(name).cloned();
                async move {
                    match planned {
                        Some(planned) => self.start_twin(plan, &planned, devices, runtime).await,
                        None => Ok(()),
                    }
                }
            };
            if step.sequential {
                for name in &step.containers {
                    start(name).await?;
                }
            } else {
                for started in join_all(step.containers.iter().map(start)).await {
                    started?;
                }
            }
        }
        Ok(())
    }

    pub(super) async fn start_twin(
        &self,
        plan: &Plan,
        planned: &PlannedContainer,
        devices: &Devices,
        runtime: &Runtime,
    ) -> Result<(), String> {
        let name = &planned.container.name;
        let done = |twin: &TwinState| &twin.container == name && twin.ready.is_some();
        if self.has_left(plan, name).await? {
            return Ok(());
        }
        let known = self.plans().get(&plan.id).map(|known| {
            let ready = known.twins.iter().any(done);
            (ready, known.completed && !known.ended.contains(name))
        });
        if let Some((true, completed)) = known {
            if completed {
                return Ok(());
            }
            // It may have been in an earlier life of the host.
            match runtime.state(name.as_str()).await {
                Ok(State::Running | State::Paused) => return Ok(()),
                Err(error) if !error.not_found() => return Err(error.to_string()),
                _ => {}
            }
        }
        let begun = Instant::now();
        let mut twin = TwinState {
            container: name.clone(),
            ready: None,
            after: Duration::ZERO,
            not_carried: Vec::new(),
            error: None,
            left: None,
        };
        let outcome = self
            .make_ready(plan, planned, devices, runtime, &mut twin)
            .await;
        twin.after = begun.elapsed();
        twin.error = outcome.as_ref().err().cloned();
        let mut plans = self.plans();
        if let Some(known) = plans.get_mut(&plan.id) {
            known.twins.retain(|other| &other.container != name);
            known.twins.push(twin.clone());
            if twin.ready.is_some() {
                known
                    .journal
                    .append(crate::fleet::now(), TargetEvent::TwinReady { twin })
                    .map_err(|error| error.to_string())?;
            }
        }
        outcome.map_err(|error| format!("twin {name}: {error}"))
    }

    pub(super) async fn make_ready(
        &self,
        plan: &Plan,
        planned: &PlannedContainer,
        devices: &Devices,
        runtime: &Runtime,
        twin: &mut TwinState,
    ) -> Result<(), String> {
        let name = planned.container.name.as_str();
        let say = |error: RuntimeError| error.to_string();
        self.may_start(&plan.id)?;
        self.check_volumes(plan, planned, runtime).await?;
        match runtime.inspect(name).await {
            Ok(_) => {}
            Err(error) if error.not_found() => {
                let made = runtime
                    .create_twin(&twin_spec(planned, devices))
                    .await
                    .map_err(|error| error.to_string())?;
                twin.not_carried = made.not_carried;
            }
            Err(error) => return Err(say(error)),
        }
        if self.is_filling(&plan.id) {
            self.start_fenced(plan, planned, runtime).await?;
        } else {
            self.may_start(&plan.id)?;
            runtime.start(name).await.map_err(say)?;
        }
        let rules = ReadyRules {
            service_ports: planned.service_ports.clone(),
            settle: self.parts.settings.settle(),
            timeout: self.parts.settings.ready_timeout(),
        };
        let ready = runtime
            .wait_ready(name, &rules)
            .await
            .map_err(|error| error.to_string())?;
        twin.ready = Some(match ready.how {
            How::HealthCheck => "its health check".to_owned(),
            How::PortsListening(ports) => {
                let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                format!("listens on {}", ports.join(", "))
            }
            How::Settled => "it settled".to_owned(),
        });
        Ok(())
    }
}

impl Target {
    /// Refuses to start a twin on another volume of the same name than that which has its data: a runtime would make an
    /// empty one without a word.
    async fn check_volumes(
        &self,
        plan: &Plan,
        planned: &PlannedContainer,
        runtime: &Runtime,
    ) -> Result<(), String> {
        let places = self.plans().get(&plan.id).map(|known| known.places.clone());
        for place in places.unwrap_or_default() {
            let of_twin = |name: &&str| {
                let mut volumes = planned.volumes.iter();
                volumes.any(|volume| volume["Name"].as_str() == Some(*name))
            };
            let Some(name) = name_in_runtime(plan, &place).filter(of_twin) else {
                continue;
            };
            let volume = runtime.volume(name).await;
            let at = volume.map_err(|error| error.to_string())?["Mountpoint"].take();
            if at.as_str().map(Path::new) != Some(&place.path) {
                return Err(format!(
                    "the data of volume {name} is in {}, but the runtime at {} has that volume at {at}; see who made it \
                     anew, and remove it",
                    place.path.display(),
                    runtime.socket().display()
                ));
            }
        }
        Ok(())
    }
}

/// The target's block devices by the source's paths of them.
pub(super) type Devices = BTreeMap<PathBuf, PathBuf>;

/// What a planned container's twin is made of.
pub(super) fn twin_spec(planned: &PlannedContainer, devices: &Devices) -> TwinSpec {
    let mut inspect = planned.inspect.clone();
    let given = inspect["HostConfig"]["Devices"].as_array_mut();
    for device in given.into_iter().flatten() {
        let path = device["PathOnHost"].as_str().map(Path::new);
        if let Some(here) = path.and_then(|path| devices.get(path)) {
            device["PathOnHost"] = here.to_string_lossy().into();
        }
    }
    TwinSpec {
        inspect,
        networks: planned.networks.clone(),
        volumes: planned.volumes.clone(),
        keep_addresses: false,
    }
}
