//! Which way a plan's data goes, and what its paired device is told. Pure.

use crate::model::action::{Action, Actions};
use crate::model::control::{OfferAccepted, RelayAccepted, RelayRequest, Secret, ServeFor};
use crate::model::ids::DeviceId;
use crate::model::plan::Plan;
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::transfer::{DataKey, DataPath, Hop, LinkKey};
use std::net::{IpAddr, SocketAddr};

/// Actions for which the paired device gets blocks that are not sealed.
pub(super) const UNSEALED: [Action; 2] = [Action::Encrypt, Action::Serve];

/// Why an action is not delegated.
pub(super) fn stays(action: Action, paired: &DeviceId, address: IpAddr) -> String {
    format!("{action} stays here: the link to {paired} ({address}) is not in `trusted_networks`")
}

/// What the paired device is asked to do.
pub(super) fn relay_request(
    plan: &Plan,
    target: &DeviceId,
    accepted: &OfferAccepted,
) -> RelayRequest {
    let delegated = &plan.delegated;
    RelayRequest {
        plan: plan.id.clone(),
        actions: delegated.clone(),
        forward: delegated
            .contains(Action::Transfer)
            .then(|| (accepted.data, accepted.link_key.clone())),
        seal_key: delegated
            .contains(Action::Encrypt)
            .then(|| accepted.data_key.clone()),
        serve: delegated
            .contains(Action::Serve)
            .then(|| serve_for(plan, target)),
        quantity: plan.volumes.iter().map(VolumeSpec::to_move).sum(),
    }
}

/// What a paired device that serves is told.
pub(super) fn serve_for(plan: &Plan, target: &DeviceId) -> ServeFor {
    let is_image = |volume: &&VolumeSpec| matches!(volume.kind, VolumeKind::Image(_));
    let data = plan.volumes.iter().filter(|volume| !is_image(volume));
    ServeFor {
        target: target.clone(),
        volumes: data.map(|volume| volume.id).collect(),
    }
}

/// The way of blocks with these actions delegated.
pub(super) fn route_over(
    delegated: &Actions,
    target: &OfferAccepted,
    relay: &RelayAccepted,
) -> DataPath {
    let paired = hop(relay.data, &relay.link_key);
    match (
        delegated.contains(Action::Encrypt),
        delegated.contains(Action::Transfer),
    ) {
        (true, true) => DataPath::SealForward { relay: paired },
        (true, false) => DataPath::SealReturn {
            sealer: paired,
            target: hop(target.data, &target.link_key),
        },
        (false, true) => DataPath::ViaSpool {
            relay: paired,
            data_key: DataKey(target.data_key.0),
        },
        (false, false) => DataPath::Direct {
            target: hop(target.data, &target.link_key),
            data_key: DataKey(target.data_key.0),
        },
    }
}

/// Another device's data plane.
pub(super) fn hop(addr: SocketAddr, key: &Secret) -> Hop {
    Hop {
        addr,
        link_key: LinkKey(key.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::target_stage;
    use crate::model::ids::VolumeId;
    use std::collections::BTreeMap;

    fn plan(delegated: Actions) -> Plan {
        let mut plan = target_stage::plan(VolumeKind::Bind, "/srv/it".into());
        let mut image = plan.volumes[0].clone();
        (image.id, image.kind) = (VolumeId(9), VolumeKind::Image("box:1".into()));
        plan.volumes.push(image);
        plan.delegated = delegated;
        plan
    }

    #[test]
    fn each_set_of_actions_has_its_way_and_nothing_is_told_that_an_action_does_not_need() {
        let addr: SocketAddr = "192.0.2.1:7402".parse().unwrap();
        let accepted = OfferAccepted {
            data: addr,
            link_key: Secret([1; 32]),
            data_key: Secret([2; 32]),
            images_present: Vec::new(),
            layers_present: BTreeMap::new(),
            cannot_serve: None,
            times: BTreeMap::new(),
        };
        let relay = RelayAccepted {
            data: addr,
            link_key: Secret([3; 32]),
        };
        for bits in 0..8 {
            let [encrypt, transfer, serve] = [1, 2, 4].map(|bit| bits & bit != 0);
            let all = [
                (encrypt, Action::Encrypt),
                (transfer, Action::Transfer),
                (serve, Action::Serve),
            ];
            let delegated: Actions = all
                .into_iter()
                .filter_map(|(is_in, action)| is_in.then_some(action))
                .collect();
            let way = route_over(&delegated, &accepted, &relay);
            let is_right = match way {
                DataPath::Direct { .. } => !encrypt && !transfer,
                DataPath::ViaSpool { .. } => !encrypt && transfer,
                DataPath::SealReturn { .. } => encrypt && !transfer,
                DataPath::SealForward { .. } => encrypt && transfer,
            };
            assert!(is_right, "{delegated}");
            let request = relay_request(&plan(delegated), &"target".into(), &accepted);
            assert_eq!(request.forward.is_some(), transfer);
            assert_eq!(request.seal_key.is_some(), encrypt);
            let serves = serve.then(|| ServeFor {
                target: "target".into(),
                volumes: vec![VolumeId(0)],
            });
            assert_eq!(request.serve, serves, "an image is for its journey alone");
        }
    }
}
