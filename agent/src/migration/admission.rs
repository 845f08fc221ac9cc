//! The target's door for a plan's data: its keys outlive the agent, so that what arrived is gone on with.
//!
//! Invariant: a plan is admitted only between its acceptance and its ownership or dismissal.

use super::events::{Place, TargetEvent};
use super::journal::plan_directory;
use super::keys;
use super::places::{image_id, is_one, name_of};
use super::target::{Target, TargetError};
use crate::containers::{Runtime, RuntimeError};
use crate::model::control::{OfferAccepted, Secret};
use crate::model::ids::{PlanId, VolumeId};
use crate::model::plan::Plan;
use crate::model::volume::VolumeKind;
use crate::transfer::{DataKey, Door, LinkKey, ReceivePlan, ReceiveVolume};
use crate::volume::FleetKey;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the source needs to know to send.
#[derive(Serialize, Deserialize)]
pub(super) struct Keys {
    pub(super) link: Secret,
    pub(super) data: Secret,
}

impl Target {
    /// Opens the data plane to a plan, unless it is open: under the keys that were kept, or new ones.
    pub(super) fn admit(&self, plan: &Plan, places: &[Place]) -> Result<Keys, TargetError> {
        let directory = self.directory(&plan.id);
        let kept = match keys::kept(&directory) {
            Some(kept) => kept,
            None => {
                let made = Keys {
                    link: Secret(rand::random()),
                    data: Secret(rand::random()),
                };
                keys::keep(&directory, &made).map_err(|error| TargetError::File {
                    doing: format!("keep the keys of plan {}", plan.id),
                    error,
                })?;
                made
            }
        };
        if let (Some(data), Some(fleet)) = (&self.parts.data, &self.parts.fleet)
            && !data.admits(&plan.id, Door::Receive)
        {
            let receive = |place: &Place| ReceiveVolume {
                id: place.volume,
                name: name_of(plan, place.volume),
                destination: place.path.clone(),
                one: is_one(plan, place.volume),
            };
            data.admit_receive(ReceivePlan {
                plan: plan.id.clone(),
                link_key: LinkKey(kept.link.0),
                data_key: DataKey(kept.data.0),
                fleet_key: FleetKey(*fleet.identity.fleet_key()),
                volumes: places.iter().map(receive).collect(),
            });
        }
        Ok(kept)
    }

    /// Closes the data plane to a plan for good.
    pub(super) fn shut(&self, id: &PlanId) {
        if let Some(data) = &self.parts.data {
            data.dismiss(id);
        }
        keys::wipe(&self.directory(id));
    }

    fn directory(&self, id: &PlanId) -> PathBuf {
        plan_directory(&self.parts.state, "target", id)
    }

    /// Answers an offer of a plan that was accepted before: its source was started anew, and what arrived of
    /// the plan is gone on with. None when the plan is to be taken afresh.
    pub(super) async fn accepted_before(
        &self,
        plan: &Plan,
        layers: &BTreeMap<VolumeId, Vec<String>>,
    ) -> Result<Option<OfferAccepted>, TargetError> {
        let known = self.plans().get(&plan.id).and_then(|known| {
            let same =
                known.accepted && known.removed.is_none() && known.plan.volumes == plan.volumes;
            same.then(|| known.places.clone())
        });
        let Some(places) = known else {
            return Ok(None);
        };
        let runtime = self.runtime_for(plan).await?;
        let mut images_present = Vec::new();
        for volume in &plan.volumes {
            if matches!(volume.kind, VolumeKind::Image(_))
                && runtime.image_present(&image_id(plan, volume)).await?
            {
                images_present.push(volume.id);
            }
        }
        self.put_back(plan, &places).await?;
        let keys = self.admit(plan, &places)?;
        if let Some(known) = self.plans().get_mut(&plan.id) {
            let event = TargetEvent::Accepted {
                plan: Box::new(plan.clone()),
                places: places.clone(),
                runtime: known.runtime.clone(),
            };
            known.journal.append(crate::fleet::now(), event)?;
            known.plan = plan.clone();
        }
        tracing::info!(plan = %plan.id, source = %plan.source, "its source goes on");
        let layers_present = layers_held(runtime, layers).await?;
        let accepted = self.accepted(plan, &places, keys, images_present, layers_present);
        Ok(Some(accepted))
    }
}

/// How many of the lowest layers of each image a runtime holds, as a chain: a layer upon another one is none.
pub(super) async fn layers_held(
    runtime: &Runtime,
    wanted: &BTreeMap<VolumeId, Vec<String>>,
) -> Result<BTreeMap<VolumeId, usize>, RuntimeError> {
    let here = runtime.all_layers().await?;
    let same = |one: &[String], other: &[String]| {
        let pairs = one.iter().zip(other);
        pairs.take_while(|(one, other)| one == other).count()
    };
    let held = |layers: &Vec<String>| here.iter().map(|here| same(here, layers)).max();
    Ok(wanted
        .iter()
        .map(|(volume, layers)| (*volume, held(layers).unwrap_or(0)))
        .collect())
}
