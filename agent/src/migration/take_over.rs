//! The target takes a plan's volumes over: the release is checked, ownership written, the twins started.
//!
//! Invariant: without a release by the plan's source for exactly what arrived, nothing is owned (rule 4).

use super::events::{Place, TargetEvent};
use super::target::{Target, TargetError};
use crate::model::control::Owns;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::{Content, Plan, Release, SignedRelease, VolumeRelease};
use crate::model::volume::VolumeKind;
use crate::volume::{FleetKey, scan_root, walk};
use std::sync::Arc;

impl Target {
    /// Checks the release against what arrived, writes ownership, and says so. Starts the twins.
    ///
    /// # Errors
    /// The release is not by the plan's source, or not for exactly what arrived.
    pub async fn take_over(
        self: &Arc<Self>,
        peer: &DeviceId,
        id: &PlanId,
        signed: SignedRelease,
    ) -> Result<Owns, TargetError> {
        let _turn = self.turn(peer).await;
        let (plan, places) = self.known(peer, id)?;
        if let Some(owns) = self.plans().get(id).and_then(|known| known.owns.clone()) {
            return Ok(owns);
        }
        let refuse = |why: String| TargetError::BadRelease {
            plan: id.clone(),
            why,
        };
        if self.is_returning(id) {
            return Err(refuse("this target has given the volumes back".to_owned()));
        }
        let release = self.check_signature(&plan, &signed).map_err(refuse)?;
        let mut arrived = self
            .plans()
            .get(id)
            .map(|known| self.arrived(known))
            .unwrap_or_default();
        if arrived.is_empty() {
            // The agent was restarted since the data came: what is on disk speaks for itself.
            arrived = self
                .read_again(&plan, &places, &release)
                .await
                .map_err(refuse)?;
        }
        check_release(&plan, &self.parts.device, &release, &arrived).map_err(refuse)?;
        let owns = Owns {
            plan: id.clone(),
            target: self.parts.device.clone(),
            volumes: release
                .volumes
                .iter()
                .map(|volume| VolumeRelease {
                    epoch: volume.epoch.next(),
                    ..volume.clone()
                })
                .collect(),
        };
        let back = self.comes_back(&plan)?;
        let event = TargetEvent::Owns {
            release: signed,
            owns: owns.clone(),
            back: back.clone(),
        };
        {
            let mut plans = self.plans();
            let known = plans
                .get_mut(id)
                .ok_or_else(|| TargetError::Unknown(id.clone()))?;
            let now = crate::fleet::now();
            known.journal.append(now, event)?;
            known.owns = Some(owns.clone());
            known.owned_at = now;
            known.back.clone_from(&back);
        }
        // Before its source hears of it: that will forward the ports to here.
        self.parts.forwards.let_go(id, back).await;
        self.shut(id);
        tracing::info!(plan = %id, "this target owns the plan's volumes");
        tokio::spawn(self.clone().start_twins(plan));
        Ok(owns)
    }

    /// Reads the places of the released volumes and computes their roots anew.
    async fn read_again(
        &self,
        plan: &Plan,
        places: &[Place],
        release: &Release,
    ) -> Result<Vec<VolumeRelease>, String> {
        let fleet = self
            .parts
            .fleet
            .as_ref()
            .ok_or("this device is in no fleet")?;
        let key = FleetKey(*fleet.identity.fleet_key());
        let jobs: Vec<_> = release
            .volumes
            .iter()
            .filter_map(|released| {
                let place = places
                    .iter()
                    .find(|place| place.volume == released.volume)?;
                let volume = plan
                    .volumes
                    .iter()
                    .find(|volume| volume.id == released.volume)?;
                Some((
                    released.clone(),
                    place.path.clone(),
                    super::verify::block_size(release, volume),
                    release
                        .device_sizes
                        .get(&volume.id)
                        .unwrap_or(&volume.size)
                        .0,
                ))
            })
            .collect();
        tokio::task::spawn_blocking(move || {
            jobs.into_iter()
                .map(|(released, path, block_size, size)| {
                    // The counterpart of a device may be larger than it.
                    let root = walk::open_root(&path).map_err(|error| error.to_string())?;
                    let (state, _) = scan_root(&root.holding(size), &key, block_size)
                        .map_err(|error| error.to_string())?;
                    Ok(VolumeRelease {
                        content: Content::Sealed(state.root),
                        ..released
                    })
                })
                .collect()
        })
        .await
        .map_err(|error| error.to_string())?
    }

    fn check_signature(&self, plan: &Plan, signed: &SignedRelease) -> Result<Release, String> {
        let fleet = self
            .parts
            .fleet
            .as_ref()
            .ok_or("this device is in no fleet")?;
        let signer = crate::fleet::identity::verify_member(
            &fleet.identity,
            &signed.certificate,
            signed.body.as_bytes(),
            &signed.signature,
        )
        .map_err(|error| error.to_string())?;
        if signer != plan.source {
            return Err(format!(
                "it is signed by {signer}, the source is {}",
                plan.source
            ));
        }
        serde_json::from_str(&signed.body).map_err(|error| format!("it cannot be read: {error}"))
    }
}

/// Whether the release is by the source of `plan`, for this target, and for exactly what arrived.
fn check_release(
    plan: &Plan,
    target: &DeviceId,
    release: &Release,
    arrived: &[VolumeRelease],
) -> Result<(), String> {
    if release.plan != plan.id {
        return Err(format!("it is for plan {}", release.plan));
    }
    if release.source != plan.source {
        return Err(format!(
            "it is by {}, the source is {}",
            release.source, plan.source
        ));
    }
    if &release.target != target {
        return Err(format!("it is for target {}", release.target));
    }
    for volume in plan
        .volumes
        .iter()
        .filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)))
    {
        let Some(released) = release
            .volumes
            .iter()
            .find(|released| released.volume == volume.id)
        else {
            return Err(format!("it leaves out volume {}", volume.name));
        };
        match arrived.iter().find(|arrived| arrived.volume == volume.id) {
            None => return Err(format!("nothing of volume {} arrived", volume.name)),
            Some(arrived) if arrived != released => {
                return Err(format!(
                    "volume {}: released epoch {} {}, arrived epoch {} {}",
                    volume.name, released.epoch, released.content, arrived.epoch, arrived.content
                ));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
