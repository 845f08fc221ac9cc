//! A request and what the host is like now become a plan; nothing is begun.

use super::active::locked;
use super::changes::{self, BelowFiles};
use super::choosing;
use super::delegator::{Delegator, DelegatorError, plan_ids, plan_of};
use super::events::SourceEvent;
use super::planner::{self, Gathered, Origin, Request};
use super::traces;
use super::view::HostView;
use crate::containers::{TwinSpec, name_devices};
use crate::model::container::Container;
use crate::model::ids::{PlanId, VolumeId};
use crate::model::plan::{Plan, PlannedContainer};
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::{ChangesBy, Unused, VolumeKind, VolumeSpec};
use std::collections::BTreeSet;

impl Delegator {
    /// Makes a plan without running it, and asks the duplicator whom it would lend for it now.
    ///
    /// # Errors
    /// A container is unknown, a runtime does not answer, or a volume cannot be read.
    pub async fn plan(&self, request: &Request) -> Result<Plan, DelegatorError> {
        let mut plan = self.draft(request, None).await?;
        self.consider(&mut plan).await;
        Ok(plan)
    }

    /// The plan for `request`; one that `waiting` copies already keeps its id and volumes.
    pub(super) async fn draft(
        &self,
        request: &Request,
        waiting: Option<&Plan>,
    ) -> Result<Plan, DelegatorError> {
        let view = self.parts.view.borrow().clone();
        let now = self.now();
        let correlated = view.correlated();
        let edges = view.snapshot.edges.clone();
        let (chosen, mut notes) = planner::select(
            request,
            &view.containers,
            &edges,
            &correlated,
            &self.released(),
        )?;
        let (origins, mut blockers) = planner::origins(&chosen, |path| {
            super::devices::look(self.settings(), &self.parts.state, path)
        });
        notes.extend(origins.iter().filter_map(super::freezing::note));
        let filling = super::places::filling(&self.parts.state);
        blockers.extend(origins.iter().filter_map(|origin| {
            let plan = filling.get(&origin.path)?;
            Some(crate::model::plan::Blocker {
                what: origin.path.display().to_string(),
                why: format!("plan {plan} brings its data, which is not all here yet; wait for it"),
            })
        }));
        if self.parts.fleet.is_none() {
            blockers.push(crate::model::plan::Blocker {
                what: self.parts.device.to_string(),
                why: DelegatorError::NoFleet.to_string(),
            });
        }
        let mut containers = Vec::new();
        for container in chosen {
            containers.push(self.describe(container, &view).await?);
        }
        let known = waiting.and_then(|plan| {
            let volumes = planner::volumes_as_prepared(plan, &containers, &origins)?;
            Some((plan.id.clone(), volumes, plan.epochs.clone()))
        });
        let (id, volumes, epochs) = match known {
            Some(known) => known,
            None => {
                let id = new_plan_id(now, rand::random());
                let mut volumes = measure(origins).await?;
                let epochs = super::places::owned_epochs(&self.parts.state, &volumes);
                let images = self.image_directory(&id);
                volumes.extend(planner::image_volumes(
                    &containers,
                    volumes.len() as u32,
                    &images,
                ));
                (id, volumes, epochs)
            }
        };
        let (traces, moved) = (request.traces.clone(), volumes.clone());
        let ordered = tokio::task::spawn_blocking(move || traces::orders(&traces, &moved));
        let (fetch_orders, told) = ordered.await??;
        notes.extend(told);
        let measured_rate = locked(&self.measured_rate).clone();
        let dirty = choosing::written(&view, &containers);
        Ok(planner::compose(
            request,
            Gathered {
                id,
                now,
                source: self.parts.device.clone(),
                containers,
                edges,
                correlated,
                volumes,
                fetch_orders,
                epochs,
                blockers,
                notes,
                measured_rate,
                dirty,
                failing: super::switch_first::failing(&view),
                deadline: choosing::deadline(&view, now),
                bounds: choosing::bounds(self.settings()),
            },
        ))
    }

    async fn describe(
        &self,
        container: Container,
        view: &HostView,
    ) -> Result<PlannedContainer, DelegatorError> {
        let runtime = self.runtime(&container)?;
        let TwinSpec {
            mut inspect,
            networks,
            volumes,
            ..
        } = runtime.describe(&container.id).await?;
        name_devices(&mut inspect, &container.mounts);
        let image_size = Bytes(runtime.image_size(&container.image_id).await?);
        let service_ports = view.service_ports(&container.name);
        Ok(PlannedContainer {
            container,
            service_ports,
            inspect,
            networks,
            volumes,
            image_size,
        })
    }

    /// Ids of the containers that earlier plans of this source released.
    fn released(&self) -> BTreeSet<String> {
        let mut released = BTreeSet::new();
        for id in plan_ids(&self.parts.state, "source") {
            let entries = self.entries(&id).unwrap_or_default();
            let gone = entries
                .iter()
                .any(|e| matches!(e.event, SourceEvent::Released { .. }))
                && !entries
                    .iter()
                    .any(|e| matches!(e.event, SourceEvent::Returned { .. }));
            if let Some(plan) = plan_of(&entries).filter(|_| gone) {
                released.extend(
                    plan.containers
                        .into_iter()
                        .map(|planned| planned.container.id),
                );
            }
        }
        released
    }
}

async fn measure(origins: Vec<Origin>) -> Result<Vec<VolumeSpec>, DelegatorError> {
    let specs = tokio::task::spawn_blocking(move || {
        let mut below = BelowFiles::default();
        origins
            .into_iter()
            .enumerate()
            .map(|(index, origin)| {
                let measure = crate::volume::measure(&origin.path)?;
                Ok(VolumeSpec {
                    id: VolumeId(index as u32),
                    name: match &origin.kind {
                        VolumeKind::Named(name) => name.clone(),
                        _ => origin.path.display().to_string(),
                    },
                    changes: match &origin.kind {
                        VolumeKind::Device => changes::of_device(&origin.path),
                        VolumeKind::Image(_) => ChangesBy::ChangeTimes,
                        _ => below.ask(&origin.path, measure.largest),
                    },
                    unused: if origin.kind.is_one() {
                        crate::volume::unused::of_volume(&origin.path)
                    } else {
                        Unused::Unknown
                    },
                    kind: origin.kind,
                    source_path: origin.path,
                    containers: origin.containers,
                    size: measure.size,
                    holes: measure.holes,
                    entries: measure.entries,
                    device_nodes: measure.device_nodes,
                    unreadable: measure.unreadable,
                })
            })
            .collect::<Result<Vec<_>, crate::volume::ScanError>>()
    })
    .await?;
    Ok(specs?)
}

/// The id of a new plan: time in milliseconds first, so that plans sort by age; then chance.
fn new_plan_id(now: UnixMillis, chance: u32) -> PlanId {
    PlanId(format!("p{:x}-{chance:08x}", now.0))
}
