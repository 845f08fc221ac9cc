//! The source's side of access before arrival: it lets the target of a plan that is under way fetch blocks, and the
//! paired device that answers the target in its stead.
//!
//! Invariants: only the devices that the plan names are let in, each with keys of its own, and only until the plan is
//! over; blocks go unsealed to the paired device, and only over a link that the operator declared trusted.

use super::active::{Active, SUSPENDED, Times, locked};
use super::delegator::Delegator;
use super::returning::mirror_directory;
use crate::fleet::pairing::LetIn;
use crate::fleet::server::PeerIdentity;
use crate::model::control::{Provided, Secret};
use crate::model::fleet::Role;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::volume::VolumeKind;
use crate::transfer::{DataKey, Door, LinkKey, ProvidePlan, ProvideVolume, Sealing, Whereabouts};
use crate::volume::FleetKey;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Why the source gives nothing out.
#[derive(Debug, thiserror::Error)]
pub enum ProvideError {
    /// No such plan is under way with the peer as its target or to answer it.
    #[error(
        "no plan {plan} is under way on this source with {peer} as its target, or as the paired device that answers the target"
    )]
    NotTarget {
        /// Plan.
        plan: PlanId,
        /// Who asked.
        peer: DeviceId,
    },
    /// Unsealed blocks do not go there.
    #[error(
        "the link to {peer} ({address}) is not in `trusted_networks` of the source; unsealed blocks do not go there"
    )]
    Untrusted {
        /// Who asked.
        peer: DeviceId,
        /// Where it is.
        address: IpAddr,
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
    provided: Mutex<BTreeMap<(PlanId, Role), Provided>>,
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

    /// Lets the target of a plan in, or who answers it here; asked again it gives the same keys, for as long as the plan
    /// lasts.
    ///
    /// # Errors
    /// The peer is neither of a plan that is under way, or its certificate was replaced.
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
        let (role, times, active) = self
            .under_way(peer, plan)
            .inspect_err(|_| self.let_in.forget(plan))?;
        let mut provided = locked(&self.provided);
        let key = (plan.clone(), role);
        if let Some(known) = provided.get(&key) {
            return Ok(known.clone());
        }
        let is_target = role == Role::Target;
        let new = Provided {
            data: self.data,
            link_key: Secret(rand::random()),
            data_key: is_target.then(|| Secret(rand::random())),
        };
        let mirror = mirror_directory(&parts.state, plan);
        let volumes = active.plan().volumes.into_iter();
        let plan_of_data = ProvidePlan {
            plan: plan.clone(),
            link_key: LinkKey(new.link_key.0),
            sealing: match &new.data_key {
                Some(key) => Sealing::Under(DataKey(key.0)),
                None => {
                    let delegator = self.delegator.clone();
                    Sealing::Plain(Arc::new(move |address| delegator.trusts(address)))
                }
            },
            fleet_key: FleetKey(*fleet.identity.fleet_key()),
            volumes: volumes
                // An image is exported for its journey alone.
                .filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)))
                .map(|volume| ProvideVolume {
                    id: volume.id,
                    at: Whereabouts::Here {
                        path: volume.source_path,
                        mirror: is_target.then(|| mirror.join(volume.id.to_string())),
                        times: times.get(&volume.id).copied().unwrap_or_default(),
                    },
                })
                .collect(),
        };
        data.admit_provide(Door::Provide(role), plan_of_data);
        tracing::info!(%plan, %peer, %role, "gives out blocks on demand");
        provided.insert(key, new.clone());
        tokio::spawn(self.clone().until_over(peer.clone(), plan.clone(), role));
        Ok(new)
    }

    /// Whether the peer is, or may be in the agent's next life, the paired device of a plan that is under way.
    #[must_use]
    pub fn is_lent(&self, peer: &DeviceId, plan: &PlanId) -> bool {
        let active = locked(&self.delegator.plans).get(plan).cloned();
        active.is_some_and(|active| {
            let status = active.status();
            status.paired.as_ref() == Some(peer) && (!status.over || status.phase == SUSPENDED)
        })
    }

    /// The plan, where it is under way with `peer` as its target or as who answers it.
    fn under_way(
        &self,
        peer: &DeviceId,
        plan: &PlanId,
    ) -> Result<(Role, Times, Arc<Active>), ProvideError> {
        let active = locked(&self.delegator.plans).get(plan).cloned();
        let active = active.filter(|active| !active.ended.load(Ordering::Acquire));
        let known = active.and_then(|active| {
            if active.target().as_ref() == Some(peer) {
                return Some((Role::Target, None, active));
            }
            let stand_in = active.stand_in().filter(|one| one.device == *peer)?;
            Some((Role::Paired, Some(stand_in.addr.ip()), active))
        });
        let known = known.and_then(|(role, address, active)| {
            let times = active.times()?;
            Some((role, address, times, active))
        });
        let (role, address, times, active) = known.ok_or_else(|| ProvideError::NotTarget {
            plan: plan.clone(),
            peer: peer.clone(),
        })?;
        match address.filter(|address| !self.delegator.trusts(*address)) {
            None => Ok((role, times, active)),
            Some(address) => Err(ProvideError::Untrusted {
                peer: peer.clone(),
                address,
            }),
        }
    }

    async fn until_over(self: Arc<Self>, peer: DeviceId, plan: PlanId, role: Role) {
        while self.under_way(&peer, &plan).is_ok() {
            tokio::time::sleep(LOOK).await;
        }
        if let Some(data) = &self.delegator.parts().data {
            data.close(&plan, Door::Provide(role));
        }
        locked(&self.provided).remove(&(plan.clone(), role));
        self.let_in.forget(&plan);
    }
}

/// Between two looks whether a plan has ended.
const LOOK: Duration = Duration::from_millis(100);
