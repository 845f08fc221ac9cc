//! The proof of a plan, taken anew: the source's kept data, the release, the target's word, the fence.

use super::active::Times;
use super::delegator::{Delegator, DelegatorError};
use super::events::SourceEvent;
use super::places::taken_since;
use super::switch_first::is_later;
use crate::model::container::State;
use crate::model::control::{Owns, TargetStatus};
use crate::model::fleet::PeerAddress;
use crate::model::ids::{ContainerName, Epoch, PlanId, Signature, VolumeId};
use crate::model::plan::{Content, Left, Plan, Release};
use crate::model::volume::{TimesKept, VolumeSpec};
use crate::volume::{self, BlockSize, FleetKey, Unreadable};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// One volume's roots, side by side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeProof {
    /// Volume.
    pub name: String,
    /// Epoch that was released.
    pub released_epoch: Epoch,
    /// Epoch from which the target owns it.
    pub owned_epoch: Option<Epoch>,
    /// Root that was released; of a volume that was switched first, that of its list.
    pub released: Signature,
    /// Whether it was switched first: what was released is no root of data.
    #[serde(default)]
    pub listed: bool,
    /// Root of what the target received, computed there.
    pub received: Option<Signature>,
    /// Root of the source's kept data, read again now; none when it is gone.
    pub kept: Option<Signature>,
    /// What the source's disk does not give up of its kept data any more.
    #[serde(default)]
    pub unreadable: Vec<Unreadable>,
    /// The kept data differs, and may do so for what could not be read now or when it was sent: nothing is proven of it.
    #[serde(default)]
    pub incomparable: bool,
    /// Whether all that exist and can be compared agree.
    pub agrees: bool,
}

/// The proof.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verification {
    /// Plan.
    pub plan: PlanId,
    /// Volumes.
    pub volumes: Vec<VolumeProof>,
    /// Twins that are ready, of all.
    pub twins_ready: (usize, usize),
    /// Twins that have gone from the target since, which is as it should be.
    #[serde(default)]
    pub twins_left: BTreeMap<ContainerName, Left>,
    /// Containers of the plan that run on the source: must be empty.
    pub running_on_source: Vec<ContainerName>,
    /// Containers of the plan that the source's runtime would start again: must be empty.
    pub unfenced: Vec<ContainerName>,
    /// Everything that is not as it must be; empty: proven.
    pub faults: Vec<String>,
}

impl Delegator {
    /// Reads the source's kept data again and compares it with the release and the target's word.
    ///
    /// # Errors
    /// The plan is unknown or not released, the target does not answer, or the data cannot be read.
    pub async fn verify(&self, id: &PlanId) -> Result<Verification, DelegatorError> {
        let entries = self.entries(id)?;
        let plan = super::delegator::plan_of(&entries)
            .ok_or_else(|| DelegatorError::UnknownPlan(id.clone()))?;
        let release = entries.iter().find_map(|entry| match &entry.event {
            SourceEvent::Released { release } => {
                let release = serde_json::from_str::<Release>(&release.body).ok()?;
                Some((release, entry.at))
            }
            _ => None,
        });
        let Some((release, released_at)) = release else {
            return Err(DelegatorError::NotReleased(id.clone()));
        };
        let status = self.ask_target(&plan).await?;
        // What is mounted from them went on here.
        let mounted = entries.iter().filter_map(|entry| match &entry.event {
            SourceEvent::Freezing { devices } => Some(devices),
            _ => None,
        });
        let mut others: Vec<PathBuf> = mounted.flatten().cloned().collect();
        // And what came back.
        others.extend(taken_since(&self.parts().state, id, released_at));
        let times = entries.iter().rev().find_map(|entry| match &entry.event {
            SourceEvent::Prepared { times, .. } => Some(times.clone()),
            _ => None,
        });
        let times = times.unwrap_or_default();
        let kept = self.kept_roots(&plan, &release, &others, &times).await?;
        let proven = entries.iter().find_map(|entry| match &entry.event {
            SourceEvent::Whole { roots, .. } => Some(roots.clone()),
            _ => None,
        });
        let proven = proven.unwrap_or_default();
        let lost = entries.iter().rev().find_map(|entry| match &entry.event {
            SourceEvent::Final { volumes, .. } | SourceEvent::Round { volumes, .. } => {
                let lost = volumes.iter();
                let lost = lost.map(|volume| (volume.volume, volume.unreadable.clone()));
                Some(lost.collect::<BTreeMap<_, _>>())
            }
            _ => None,
        });
        let lost = lost.unwrap_or_default();
        let (mut running, mut unfenced, mut faults) = (Vec::new(), Vec::new(), Vec::new());
        for planned in &plan.containers {
            let name = &planned.container.name;
            let runtime = self.runtime_of(planned)?;
            match runtime.state(&planned.container.id).await {
                Ok(State::Running | State::Paused) => running.push(name.clone()),
                Ok(_) => {}
                Err(error) if error.not_found() => {}
                Err(error) => faults.push(format!("whether {name} runs is not known: {error}")),
            }
            let fence = entries.iter().find_map(|entry| match &entry.event {
                SourceEvent::Fenced { fences } => {
                    fences.iter().find(|fence| &fence.container == name)
                }
                _ => None,
            });
            let Some(fence) = fence else {
                unfenced.push(name.clone());
                continue;
            };
            match runtime.fence_holds(&fence.fence).await {
                Ok(true) => {}
                Ok(false) => unfenced.push(name.clone()),
                Err(error) => faults.push(format!("the fence of {name} is not known: {error}")),
            }
        }
        Ok(judge(
            &plan,
            &release,
            &status,
            &Found { kept, proven, lost },
            running,
            unfenced,
            faults,
        ))
    }

    async fn ask_target(&self, plan: &Plan) -> Result<TargetStatus, DelegatorError> {
        let fleet = self.fleet().ok_or(DelegatorError::NoFleet)?;
        let target: PeerAddress = super::delegator::target_peer(plan)
            .ok_or_else(|| DelegatorError::UnknownPlan(plan.id.clone()))?;
        let path = format!("/v1/plans/{}?look=true", plan.id);
        Ok(fleet.client.get(&target, &path).await?)
    }

    async fn kept_roots(
        &self,
        plan: &Plan,
        release: &Release,
        others: &[PathBuf],
        times: &Times,
    ) -> Result<BTreeMap<String, Kept>, DelegatorError> {
        let fleet = self.fleet().ok_or(DelegatorError::NoFleet)?;
        let key = FleetKey(*fleet.identity.fleet_key());
        let paths: Vec<(String, PathBuf, BlockSize, TimesKept)> = plan
            .volumes
            .iter()
            .filter(|volume| {
                release
                    .volumes
                    .iter()
                    .any(|released| released.volume == volume.id)
            })
            .filter(|volume| volume.source_path.exists() && !others.contains(&volume.source_path))
            .map(|volume| {
                let kept = times.get(&volume.id).copied().unwrap_or_default();
                (
                    volume.name.clone(),
                    volume.source_path.clone(),
                    block_size(release, volume),
                    kept,
                )
            })
            .collect();
        let roots = tokio::task::spawn_blocking(move || {
            paths
                .into_iter()
                .map(|(name, path, block_size, times)| {
                    let root = volume::walk::open_root(&path)?.keeping(times);
                    let (state, _) = volume::scan_as_sent(&root, &key, block_size)?;
                    Ok((name, (state.root, state.unreadable)))
                })
                .collect::<Result<_, volume::ScanError>>()
        })
        .await??;
        Ok(roots)
    }
}

/// The blocks over which the root of a released volume's data is: those of this build where the release does not say.
pub(super) fn block_size(release: &Release, volume: &VolumeSpec) -> BlockSize {
    let said = release.block_sizes.get(&volume.id);
    let said = said.and_then(|said| BlockSize::new(u32::try_from(said.0).ok()?));
    said.unwrap_or_else(|| BlockSize::for_volume(if is_later(release) { 0 } else { volume.size.0 }))
}

/// Root of what is kept, and what cannot be read of it.
type Kept = (Signature, Vec<Unreadable>);

/// What is known of volumes beside the release and the target's word.
struct Found {
    kept: BTreeMap<String, Kept>,
    /// Roots of those that were switched first, once all of them had arrived.
    proven: BTreeMap<VolumeId, Signature>,
    /// What could not be read when they were last sent.
    lost: BTreeMap<VolumeId, Vec<Unreadable>>,
}

fn judge(
    plan: &Plan,
    release: &Release,
    status: &TargetStatus,
    found: &Found,
    running_on_source: Vec<ContainerName>,
    unfenced: Vec<ContainerName>,
    mut faults: Vec<String>,
) -> Verification {
    let owns: Option<&Owns> = status.owns.as_ref();
    if owns.is_none() {
        faults.push("the target has not taken over yet".to_owned());
    }
    let mut volumes = Vec::new();
    for released in &release.volumes {
        let owned = owns.and_then(|owns| owns.volumes.iter().find(|v| v.volume == released.volume));
        let (kept, unreadable) = found.kept.get(&released.name).cloned().unzip();
        let unreadable: Vec<Unreadable> = unreadable.unwrap_or_default();
        let taken = owned.is_some_and(|owned| {
            owned.content == released.content && owned.epoch == released.epoch.next()
        });
        let (root, received, sent) = match released.content {
            Content::Sealed(root) => {
                let received = owned.and_then(|owned| match owned.content {
                    Content::Sealed(root) => Some(root),
                    Content::Later(_) => None,
                });
                (root, received, Some(root))
            }
            Content::Later(list) => {
                let received = found.proven.get(&released.volume).copied();
                if received.is_none() {
                    faults.push(format!(
                        "volume {}: not all of it is on the target yet",
                        released.name
                    ));
                }
                (list, received, received)
            }
        };
        let differs = kept.is_some_and(|kept| Some(kept) != sent);
        let lost = found.lost.get(&released.volume);
        let lost = lost.map_or(&[][..], Vec::as_slice);
        let incomparable = differs && may_differ(lost, &unreadable);
        let proof = VolumeProof {
            name: released.name.clone(),
            released_epoch: released.epoch,
            owned_epoch: owned.map(|owned| owned.epoch),
            released: root,
            listed: matches!(released.content, Content::Later(_)),
            received,
            kept,
            agrees: taken && sent.is_some() && (!differs || incomparable),
            incomparable,
            unreadable,
        };
        if !proof.agrees {
            let unsaid = if differs && !release.block_sizes.contains_key(&released.volume) {
                "; an earlier build that wrote its release may have cut it into other blocks, which it does not say"
            } else {
                ""
            };
            let name = &proof.name;
            faults.push(format!("volume {name}: roots or epochs differ{unsaid}"));
        }
        volumes.push(proof);
    }
    let (left, here): (Vec<_>, Vec<_>) = status.twins.iter().partition(|twin| twin.left.is_some());
    let left = left.into_iter();
    let left = left.filter_map(|twin| Some((twin.container.clone(), twin.left.clone()?)));
    let twins_left: BTreeMap<ContainerName, Left> = left.collect();
    let ready = here.iter().filter(|twin| twin.ready.is_some()).count();
    if ready + twins_left.len() < plan.containers.len() {
        faults.push(format!(
            "{ready} of {} twins are ready",
            plan.containers.len() - twins_left.len()
        ));
    }
    for twin in here {
        if let Some(error) = &twin.error {
            faults.push(format!("twin {}: {error}", twin.container));
        }
    }
    for name in &running_on_source {
        faults.push(format!("{name} still runs on the source"));
    }
    for name in &unfenced {
        faults.push(format!(
            "{name} can be started on the source again: its fence is gone"
        ));
    }
    Verification {
        plan: plan.id.clone(),
        volumes,
        twins_ready: (ready, plan.containers.len()),
        twins_left,
        running_on_source,
        unfenced,
        faults,
    }
}

/// Whether kept data may differ from what was sent for what could not be read, `lost` then and `now`: what was sent as
/// zeros and cannot be read now either is zeros here too.
fn may_differ(lost: &[Unreadable], now: &[Unreadable]) -> bool {
    let was_lost = |one: &Unreadable| {
        let of_file = lost.iter().filter(|lost| lost.path == one.path);
        let mut at = one.offset;
        let mut named = false;
        for lost in of_file.filter(|lost| lost.entry.is_none() || one.entry.is_some()) {
            named = true;
            if lost.offset <= at {
                at = at.max(lost.range().end);
            }
        }
        named && at >= one.range().end
    };
    let stays = |lost: &Unreadable| lost.kept || lost.entry.is_some();
    !now.is_empty() && (lost.iter().any(stays) || !now.iter().all(was_lost))
}

#[cfg(test)]
mod tests {
    use super::super::events::TargetEvent;
    use super::super::target_stage::{owns, plan, twin_ready};
    use super::*;
    use crate::model::plan::TwinState;
    use crate::model::units::Bytes;
    use crate::model::volume::VolumeKind;

    fn lost(path: &str, bytes: std::ops::Range<u64>, kept: bool) -> Unreadable {
        Unreadable {
            path: path.to_owned(),
            offset: bytes.start,
            length: bytes.end - bytes.start,
            entry: None,
            kept,
        }
    }

    #[test]
    fn only_what_was_not_sent_as_the_same_zeros_is_an_excuse_for_a_difference() {
        let sent = [lost("a", 0..4096, false), lost("a", 4096..8192, false)];
        assert!(!may_differ(&sent, &[lost("a", 0..8192, false)]));
        assert!(!may_differ(&sent, &[lost("a", 512..1024, false)]));
        assert!(!may_differ(&sent, &[]), "all of it is read again");
        assert!(
            may_differ(&sent, &[lost("a", 4096..8704, false)]),
            "more is lost now"
        );
        assert!(may_differ(&sent, &[lost("b", 0..4096, false)]));
        assert!(may_differ(&[], &[lost("a", 0..1, false)]));
        let kept = [lost("a", 0..4096, true)];
        assert!(may_differ(&kept, &[lost("a", 0..4096, false)]));
    }

    #[test]
    fn a_twin_that_has_left_is_in_order_and_one_that_somebody_stopped_is_not() {
        let plan = plan(VolumeKind::Bind, "/var/x".into());
        let text = r#"{"plan":"p","source":"s","target":"t","volumes":[],"at":0}"#;
        let release: Release = serde_json::from_str(text).unwrap();
        let (TargetEvent::TwinReady { twin }, TargetEvent::Owns { owns, .. }) =
            (twin_ready(), owns())
        else {
            panic!("they are")
        };
        let judged = |twin: TwinState| {
            let status = TargetStatus {
                phase: "running".into(),
                arrived: Vec::new(),
                owns: Some(owns.clone()),
                twins: vec![twin],
                start_up: None,
                arrival: None,
            };
            let found = Found {
                kept: BTreeMap::new(),
                proven: BTreeMap::new(),
                lost: BTreeMap::new(),
            };
            let (none, unfenced, faults) = (Vec::new(), Vec::new(), Vec::new());
            judge(&plan, &release, &status, &found, none, unfenced, faults)
        };
        let here = judged(twin.clone());
        assert!(here.faults.is_empty() && here.twins_left.is_empty());
        assert_eq!(here.twins_ready, (1, 1));
        let left = Left {
            device: "third".into(),
            plan: "p2-2".into(),
        };
        let gone = judged(TwinState {
            left: Some(left.clone()),
            ..twin.clone()
        });
        assert_eq!(gone.faults, Vec::<String>::new());
        assert_eq!(gone.twins_ready, (0, 1));
        assert_eq!(gone.twins_left.into_values().collect::<Vec<_>>(), [left]);
        let stopped = judged(TwinState {
            ready: None,
            error: Some("it was ready".into()),
            ..twin
        });
        assert_eq!(stopped.faults.len(), 2, "{:?}", stopped.faults);
    }

    #[test]
    fn a_release_is_read_over_the_blocks_that_it_says_whatever_this_build_would_take() {
        let volume = VolumeSpec {
            id: VolumeId(1),
            name: "data".into(),
            kind: VolumeKind::Bind,
            source_path: PathBuf::new(),
            containers: Vec::new(),
            size: Bytes(64 << 30),
            holes: Bytes(0),
            entries: 0,
            device_nodes: 0,
            unreadable: 0,
            changes: Default::default(),
            unused: Default::default(),
        };
        let release = |more: &str| {
            let text =
                format!(r#"{{"plan":"p","source":"s","target":"t","volumes":[],"at":0{more}}}"#);
            serde_json::from_str::<Release>(&text).unwrap()
        };
        let before = release("");
        assert_eq!(
            block_size(&before, &volume),
            BlockSize::for_volume(64 << 30)
        );
        assert!(
            !serde_json::to_string(&before)
                .unwrap()
                .contains("block_sizes")
        );
        let said = release(r#","block_sizes":{"1":1048576}"#);
        assert_eq!(block_size(&said, &volume).bytes(), 1 << 20);
        let nonsense = release(r#","block_sizes":{"1":3}"#);
        assert_eq!(
            block_size(&nonsense, &volume),
            BlockSize::for_volume(64 << 30)
        );
    }
}
