//! Whether the target can make what a plan needs, found out while the source still owns everything.

use super::devices::detach_all;
use super::events::TargetEvent;
use super::images::IMAGE_FILE;
use super::places::image_id;
use super::target::{Target, TargetError};
use super::twins::{Devices, twin_spec};
use crate::containers::{Runtime, TwinError};
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::Plan;
use crate::model::volume::VolumeKind;

impl Target {
    /// Loads the images that arrived, and makes every twin once without starting it: what this device
    /// cannot make is found while the source still owns everything.
    ///
    /// The rehearsed twins are removed again: a runtime's own start-up service starts what has a restart
    /// policy, and nothing of the plan may start here before the release (rule 4).
    ///
    /// # Errors
    /// The plan is unknown or owned, or the runtime refuses an image or a twin.
    pub async fn rehearse(&self, peer: &DeviceId, id: &PlanId) -> Result<(), TargetError> {
        let _turn = self.turn(peer).await;
        super::faults::die_at("rehearse");
        let (plan, places) = self.not_owned(peer, id)?;
        let runtime = self.runtime_for(&plan).await?;
        for volume in &plan.volumes {
            let VolumeKind::Image(reference) = &volume.kind else {
                continue;
            };
            if let Some(place) = places.iter().find(|place| place.volume == volume.id) {
                let archive = place.path.join(IMAGE_FILE);
                runtime
                    .load_image(&archive, &image_id(&plan, volume), reference)
                    .await?;
                let _ = std::fs::remove_file(&archive);
            }
        }
        self.note_networks(&plan, runtime).await?;
        let devices = self.attach(&plan, &places).await?;
        let rehearsed = rehearse_twins(&plan, &devices, runtime).await;
        // What they show of the images now is not what comes with the next round.
        detach_all(&plan, &places);
        rehearsed
    }

    /// Writes down which networks the twins will bring with them.
    async fn note_networks(&self, plan: &Plan, runtime: &Runtime) -> Result<(), TargetError> {
        let mut names = Vec::new();
        let described = plan.containers.iter().flat_map(|planned| &planned.networks);
        for name in described.filter_map(|network| network["Name"].as_str()) {
            let missing = matches!(runtime.network(name).await, Err(error) if error.not_found());
            if missing && !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        if let Some(known) = self.plans().get_mut(&plan.id).filter(|_| !names.is_empty()) {
            known.networks.extend(names.iter().cloned());
            let event = TargetEvent::Networks { names };
            known.journal.append(crate::fleet::now(), event)?;
        }
        Ok(())
    }
}

async fn rehearse_twins(
    plan: &Plan,
    devices: &Devices,
    runtime: &Runtime,
) -> Result<(), TargetError> {
    for planned in &plan.containers {
        let name = planned.container.name.as_str();
        let made = runtime.create_twin(&twin_spec(planned, devices)).await;
        if !matches!(made, Err(TwinError::NameTaken { .. })) {
            runtime.remove(name).await?;
        }
        made?;
    }
    Ok(())
}
