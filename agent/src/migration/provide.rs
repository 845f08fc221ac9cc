//! The source's side of access before arrival: it lets the target of a plan that is under way fetch blocks.
//!
//! Invariants: only the device that the plan names as its target is let in, and only until the plan is over.

use super::active::{Active, Times, locked};
use super::delegator::Delegator;
use super::returning::mirror_directory;
use crate::fleet::pairing::LetIn;
use crate::fleet::server::PeerIdentity;
use crate::model::control::{Provided, Secret};
use crate::model::ids::{DeviceId, PlanId};
use crate::model::volume::VolumeKind;
use crate::transfer::{DataKey, LinkKey, ProvidePlan, ProvideVolume};
use crate::volume::FleetKey;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// Why the source gives nothing out.
#[derive(Debug, thiserror::Error)]
pub enum ProvideError {
    /// No such plan is under way with the peer as its target.
    #[error("no plan {plan} with target {peer} is under way on this source")]
    NotTarget {
        /// Plan.
        plan: PlanId,
        /// Who asked.
        peer: DeviceId,
    },
    /// The duplicator does not hear that certificate any more.
    #[error(
        "{0} was enrolled anew and this certificate replaced; stop the agent that still has it"
    )]
    Replaced(DeviceId),
    /// No data plane.
    #[error(
        "this device's agent is in no fleet: enrol the device with `lifeboat fleet join`, and set `fleet` in the agent's configuration"
    )]
    NoFleet,
}

/// Gives out blocks of this source's plans.
pub struct Provider {
    delegator: Arc<Delegator>,
    data: SocketAddr,
    provided: Mutex<BTreeMap<PlanId, Provided>>,
    let_in: LetIn,
}

impl Provider {
    /// For the plans of `delegator`; `data` is the address of the data plane that peers are told.
    #[must_use]
    pub fn new(delegator: Arc<Delegator>, data: SocketAddr) -> Self {
        Self {
            delegator,
            data,
            provided: Mutex::default(),
            let_in: LetIn::default(),
        }
    }

    /// Lets the target of a plan in; asked again it gives the same keys, for as long as the plan lasts.
    ///
    /// # Errors
    /// The peer is not the target of a plan that is under way, or its certificate was replaced.
    pub async fn provide(
        self: &Arc<Self>,
        peer: &PeerIdentity,
        plan: &PlanId,
    ) -> Result<Provided, ProvideError> {
        let parts = self.delegator.parts();
        let (Some(data), Some(fleet)) = (&parts.data, &parts.fleet) else {
            return Err(ProvideError::NoFleet);
        };
        self.under_way(&peer.device, plan)?;
        let (client, duplicator) = (&fleet.client, fleet.identity.duplicator());
        if self.let_in.refuses(client, duplicator, plan, peer).await {
            return Err(ProvideError::Replaced(peer.device.clone()));
        }
        let peer = &peer.device;
        // It may have ended meanwhile.
        let (times, active) = self
            .under_way(peer, plan)
            .inspect_err(|_| self.let_in.forget(plan))?;
        let mut provided = locked(&self.provided);
        if let Some(known) = provided.get(plan) {
            return Ok(known.clone());
        }
        let new = Provided {
            data: self.data,
            link_key: Secret(rand::random()),
            data_key: Secret(rand::random()),
        };
        let mirror = mirror_directory(&parts.state, plan);
        let volumes = active.plan().volumes.into_iter();
        data.admit_provide(ProvidePlan {
            plan: plan.clone(),
            link_key: LinkKey(new.link_key.0),
            data_key: DataKey(new.data_key.0),
            fleet_key: FleetKey(*fleet.identity.fleet_key()),
            volumes: volumes
                // An image is exported for its journey alone.
                .filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)))
                .map(|volume| ProvideVolume {
                    times: times.get(&volume.id).copied().unwrap_or_default(),
                    id: volume.id,
                    path: volume.source_path,
                    mirror: Some(mirror.join(volume.id.to_string())),
                })
                .collect(),
        });
        tracing::info!(%plan, target = %peer, "gives out blocks on demand");
        provided.insert(plan.clone(), new.clone());
        tokio::spawn(self.clone().until_over(plan.clone()));
        Ok(new)
    }

    /// The plan, where it is under way with `peer` as its target.
    fn under_way(
        &self,
        peer: &DeviceId,
        plan: &PlanId,
    ) -> Result<(Times, Arc<Active>), ProvideError> {
        let active = locked(&self.delegator.plans).get(plan).cloned();
        let known = active
            .filter(|active| {
                !active.ended.load(Ordering::Acquire) && active.target().as_ref() == Some(peer)
            })
            .and_then(|active| Some((active.times()?, active)));
        known.ok_or_else(|| ProvideError::NotTarget {
            plan: plan.clone(),
            peer: peer.clone(),
        })
    }

    async fn until_over(self: Arc<Self>, plan: PlanId) {
        self.delegator.ended(&plan).await;
        if let Some(data) = &self.delegator.parts().data {
            data.dismiss(&plan);
        }
        locked(&self.provided).remove(&plan);
        self.let_in.forget(&plan);
    }
}
