//! The delegator's dealings with the duplicator and the devices it lent: get, give back, dismiss.

use super::delegator::{Delegator, FleetContext};
use super::events::SourceEvent;
use super::moving::{Move, MoveError};
use crate::fleet::pairing::{self, Pairing, PairingRequest};
use crate::fleet::registry::ActionCost;
use crate::model::action::Actions;
use crate::model::control::{Dismiss, StoodIn};
use crate::model::fleet::{DutyOutcome, PeerAddress, Role, TwinNeeds};
use crate::model::ids::DeviceId;
use crate::model::plan::{Blocker, Chosen, Plan};
use crate::model::volume::VolumeSpec;
use crate::transfer::Spent;
use std::net::IpAddr;
use std::time::Duration;

/// A device that is told of an end answers soon or is not waited for: its pairing ends by itself.
const FAREWELL: Duration = Duration::from_secs(5);

impl Delegator {
    /// Gets a target for the plan.
    pub(super) async fn allocate_target(&self, plan: &Plan) -> Result<Pairing, MoveError> {
        self.ask(&self.fleet_or_error()?.target_for(plan)).await
    }

    /// Gets a paired device for the plan's delegated actions; never the target itself.
    pub(super) async fn pair(&self, plan: &Plan, target: &DeviceId) -> Result<Pairing, MoveError> {
        self.ask(&self.fleet_or_error()?.paired_for(plan, target))
            .await
    }

    async fn ask(&self, request: &PairingRequest) -> Result<Pairing, MoveError> {
        let fleet = self.fleet_or_error()?;
        let role = request.role;
        pairing::pair(&fleet.client, fleet.identity.duplicator(), request)
            .await
            .map_err(|error| MoveError::Allocation { role, error })
    }

    fn fleet_or_error(&self) -> Result<&FleetContext, MoveError> {
        self.fleet().ok_or(MoveError::NoFleet)
    }

    /// Asks the duplicator whom it would lend for this plan now, and writes that into the plan: a target
    /// that nobody can be blocks it, a paired device that nobody can be is a note.
    pub(super) async fn consider(&self, plan: &mut Plan) {
        let Some(fleet) = self.fleet() else { return };
        let (client, duplicator) = (&fleet.client, fleet.identity.duplicator());
        let target = match pairing::consider(client, duplicator, &fleet.target_for(plan)).await {
            Ok(explanation) => explanation,
            Err(error) => {
                plan.blockers.push(Blocker {
                    what: "target".to_owned(),
                    why: error.to_string(),
                });
                return;
            }
        };
        let Some(chosen) = target.first() else { return };
        let device = chosen.device.clone();
        plan.notes.push(format!("target as of now: {chosen}"));
        if plan.delegated.is_empty() {
            return;
        }
        let request = fleet.paired_for(plan, &device);
        plan.notes.push(
            match pairing::consider(client, duplicator, &request).await {
                Ok(explanation) => format!(
                    "paired device as of now: {}",
                    explanation
                        .first()
                        .map(ToString::to_string)
                        .unwrap_or_default()
                ),
                Err(error) => format!("all actions would stay here: {error}"),
            },
        );
    }

    /// Whether unsealed blocks may travel to `address`.
    pub(super) fn trusts(&self, address: IpAddr) -> bool {
        self.fleet()
            .is_some_and(|fleet| fleet.trusted.iter().any(|network| network.holds(address)))
    }

    /// Tells target and paired device that the plan was rolled back; none while the target has not heard.
    pub(super) async fn dismiss(&self, plan: &Plan, reason: &str) -> Option<SourceEvent> {
        let mut freed = Some(None);
        let Some(fleet) = self.fleet() else {
            return freed.map(|left| SourceEvent::TargetFreed { left });
        };
        let id = &plan.id;
        if let Some(target) = plan.target.as_ref().and_then(peer) {
            let body = Dismiss {
                reason: reason.to_owned(),
            };
            freed = tell(fleet, &target, &format!("/v1/plans/{id}/dismiss"), &body).await;
        }
        fleet.end_relay(plan).await;
        freed.map(|left| SourceEvent::TargetFreed { left })
    }

    /// Gives back what was lent, with what the work cost.
    pub(super) async fn end_pairings(
        &self,
        plan: &Plan,
        outcome: DutyOutcome,
        costs: &[ActionCost],
    ) {
        let Some(fleet) = self.fleet() else { return };
        fleet.end_relay(plan).await;
        for chosen in plan.paired.iter().chain(&plan.target) {
            fleet.give_back(chosen, outcome, costs).await;
        }
    }

    /// Gives back a paired device before its plan is over.
    pub(super) async fn give_back_paired(&self, plan: &Plan, outcome: DutyOutcome) {
        let Some(fleet) = self.fleet() else { return };
        fleet.end_relay(plan).await;
        if let Some(paired) = &plan.paired {
            fleet.give_back(paired, outcome, &[]).await;
        }
    }
}

impl FleetContext {
    /// Tells the paired device that its work is over.
    async fn end_relay(&self, plan: &Plan) {
        if let Some(paired) = plan.paired.as_ref().and_then(peer) {
            let _ = tell_end(self, plan, &paired).await;
        }
    }

    async fn give_back(&self, chosen: &Chosen, outcome: DutyOutcome, costs: &[ActionCost]) {
        let Some(pairing) = &chosen.pairing else {
            return;
        };
        let client = self.client.clone().with_timeout(FAREWELL);
        let duplicator = self.identity.duplicator();
        let released =
            pairing::release(&client, duplicator, pairing, outcome, costs.to_vec()).await;
        if let Err(error) = released {
            tracing::warn!(%pairing, "not given back, it ends by itself: {error}");
        }
    }

    /// What is asked of the duplicator for the plan's target.
    fn target_for(&self, plan: &Plan) -> PairingRequest {
        let ports = plan
            .containers
            .iter()
            .flat_map(|planned| &planned.container.published);
        let published: Vec<_> = ports.filter(|port| !port.udp).collect();
        let twins = TwinNeeds {
            ports: published.iter().map(|port| port.host_port).collect(),
            ipv4: published.iter().any(|port| port.host_ip.is_ipv4()),
            ipv6: published
                .iter()
                .any(|port| !port.host_ip.is_unspecified() && port.host_ip.is_ipv6()),
            ..TwinNeeds::default()
        };
        self.request(plan, Role::Target, Actions::default(), twins, Vec::new())
    }

    /// What is asked of the duplicator for the plan's paired device; never the target itself.
    fn paired_for(&self, plan: &Plan, target: &DeviceId) -> PairingRequest {
        let (actions, twins) = (plan.delegated.clone(), TwinNeeds::default());
        self.request(plan, Role::Paired, actions, twins, vec![target.clone()])
    }

    fn request(
        &self,
        plan: &Plan,
        role: Role,
        actions: Actions,
        twins: TwinNeeds,
        exclude: Vec<DeviceId>,
    ) -> PairingRequest {
        PairingRequest {
            plan: plan.id.clone(),
            role,
            actions,
            quantity: plan.volumes.iter().map(VolumeSpec::to_move).sum(),
            volumes: plan.volumes.iter().map(|volume| volume.id).collect(),
            twins,
            exclude,
            configuration: self.configuration.clone(),
        }
    }
}

/// Tells the paired device that its work is over; what it answered in the source's stead.
async fn tell_end(fleet: &FleetContext, plan: &Plan, paired: &PeerAddress) -> Option<StoodIn> {
    let path = format!("/v1/plans/{}/relay/end", plan.id);
    tell::<Option<StoodIn>>(fleet, paired, &path, &())
        .await
        .flatten()
}

impl Move {
    /// Lets the paired device answer the target no more, and writes down what it did.
    pub(super) async fn end_stand_in(&mut self) {
        let Some(paired) = self.active.stand_in() else {
            return;
        };
        let did = match self.delegator.fleet() {
            Some(fleet) => tell_end(fleet, &self.plan, &paired).await,
            None => None,
        };
        let given = self.delegator.given(&self.plan.id);
        self.active.no_stand_in();
        // Nobody asked it.
        if did.is_none() && given.paired == Spent::default() {
            return;
        }
        let stood_in = SourceEvent::StoodIn {
            device: paired.device,
            did,
            given,
        };
        // What it did must not keep the plan from its end.
        if let Err(error) = self.append(stood_in) {
            self.active.trouble(&error.to_string());
        }
    }
}

/// The address of a chosen device.
pub(super) fn peer(chosen: &Chosen) -> Option<PeerAddress> {
    Some(PeerAddress {
        device: chosen.device.clone(),
        addr: chosen.address.parse().ok()?,
    })
}

async fn tell<T: serde::de::DeserializeOwned>(
    fleet: &FleetContext,
    peer: &PeerAddress,
    path: &str,
    body: &impl serde::Serialize,
) -> Option<T> {
    let client = fleet.client.clone().with_timeout(FAREWELL);
    let told = client.post(peer, path, body).await;
    told.inspect_err(|error| tracing::warn!("not told of the end: {error}"))
        .ok()
}
