//! The source's side of switching first: the release comes before the data, which the target then fetches from what
//! lies frozen here.
//!
//! Invariants: target and source agree on the list of every tree before the release; from then on nothing here is
//! written, and it is given out until the target has proven that it holds everything. Non-goal: serving (the
//! target's, `later`) and giving out (`provide`).

use super::events::SourceEvent;
use super::faults::die_at;
use super::moving::{Move, MoveError};
use super::returning::mirror_directory;
use super::route::serve_for;
use super::source::PAUSE_MAX;
use super::switch::{RETRY, target_status};
use super::view::HostView;
use crate::model::action::{Action, Actions};
use crate::model::control::{Arrival, Open, RelayAccepted, RelayRequest, Whole};
use crate::model::fleet::{DutyOutcome, PeerAddress};
use crate::model::ids::{Epoch, Signature, VolumeId};
use crate::model::plan::{Content, Plan, PlannedContainer, Release, VolumeRelease};
use crate::model::units::Bytes;
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::transfer::fetch::list_root;
use crate::transfer::{Spent, thread_time};
use crate::volume::{BlockSize, FleetKey, Unreadable, walk};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Metrics of which evidence means that a disk may not give up later what it gives up now.
const DISK_FAILS: [&str; 18] = [
    "block.errors",
    "block.media_errors",
    "block.timeout_errors",
    "block.transport_errors",
    "block.target_errors",
    "block.protection_errors",
    "disk.attributes_failing",
    "disk.media_errors",
    "disk.offline",
    "disk.pending_sectors",
    "disk.reallocated_sectors",
    "disk.smart_failed",
    "filesystem.errors",
    "filesystem.known_errors",
    "filesystem.read_only",
    "raid.failed",
    "raid.mismatches",
    "raid.missing_disks",
];

/// What losing the target would lose of a plan that was switched first.
pub(super) const RISK: &str = "switched first: until all data has arrived, losing this device loses what has not, and \
     losing the target what the twins wrote without `fsync`, which alone waits for the mirror here";

/// Why a plan cannot switch first, as far as its source knows; none when it can.
pub(super) fn obstacle(
    containers: &[PlannedContainer],
    volumes: &[VolumeSpec],
    failing: Option<&str>,
) -> Option<String> {
    let mut data = volumes
        .iter()
        .filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)));
    if data.clone().next().is_none() {
        return Some("there is no data that could come later".into());
    }
    if let Some(one) = data.clone().find(|volume| volume.kind.is_one()) {
        return Some(format!(
            "volume {} is of one piece, and only directory trees are served to a container",
            one.name
        ));
    }
    if let Some(lost) = data.find(|volume| volume.unreadable > 0) {
        return Some(format!(
            "volume {} has names that its disk does not give up, and what is lost is found and accepted by copying",
            lost.name
        ));
    }
    let mut containers = containers.iter();
    let removed = |planned: &&PlannedContainer| {
        planned.inspect["HostConfig"]["AutoRemove"].as_bool() == Some(true)
    };
    if let Some(planned) = containers.find(removed) {
        return Some(format!(
            "container {} was made with --rm: its volumes here may go with it",
            planned.container.name
        ));
    }
    failing.map(|evidence| format!("what is not fetched yet may be lost with the disk: {evidence}"))
}

/// The same, of a plan as the host is now.
pub(super) fn obstacle_of(plan: &Plan, view: &HostView) -> Option<String> {
    obstacle(&plan.containers, &plan.volumes, failing(view).as_deref())
}

/// Evidence that a disk of this host fails.
pub(super) fn failing(view: &HostView) -> Option<String> {
    let verdict = view.verdict.as_ref()?;
    let mut evidence = verdict.evidence.iter();
    let found = evidence.find(|evidence| DISK_FAILS.contains(&evidence.metric.as_str()))?;
    Some(found.text.clone())
}

impl Move {
    /// Why this plan cannot switch first now; none when it can.
    pub(super) fn obstacle(&self) -> Option<String> {
        let view = self.delegator.parts().view.borrow().clone();
        obstacle_of(&self.plan, &view)
            .or_else(|| self.moved.cannot_serve.clone())
            .or_else(|| self.moved.unreadable.clone())
    }

    /// Ends the copy before the workload is frozen: what was copied is durable on the target, nothing comes after it, and
    /// a paired device that carried the data does so no more: it is let go unless it answers the target. The target then
    /// takes the lists ahead, so that those of the frozen workload are to be compared only.
    pub(super) async fn end_copy(&mut self, target: &PeerAddress) -> Result<(), MoveError> {
        if self.plan.paired.is_some() && self.plan.delegated.contains(Action::Transfer) {
            if !self.serves_on(target).await? {
                self.end_stand_in().await;
                let done = DutyOutcome::Done;
                self.delegator.give_back_paired(&self.plan, done).await;
                self.keep_all(ALONE)?;
            }
            self.active.set_plan(&self.plan);
        }
        self.enter("end the copy")?;
        let client = self.client()?.clone().with_timeout(END_TIME);
        self.call(&client, target, "end-copy", &()).await
    }

    /// Leaves the paired device nothing but to answer the target; false where it was not to, or is away.
    async fn serves_on(&mut self, target: &PeerAddress) -> Result<bool, MoveError> {
        let Some(paired) = self.active.stand_in() else {
            return Ok(false);
        };
        let serves = Actions::from_iter([Action::Serve]);
        let request = RelayRequest {
            plan: self.plan.id.clone(),
            actions: serves.clone(),
            forward: None,
            seal_key: None,
            serve: Some(serve_for(&self.plan, &target.device)),
            quantity: Bytes(0),
        };
        let path = format!("/v1/plans/{}/relay", self.plan.id);
        let told = self.client()?.post(&paired, &path, &request);
        let told: Result<RelayAccepted, MoveError> = self.active.unless_cancelled(told).await;
        match told {
            Ok(_) => {
                self.plan.delegated = serves;
                self.append(SourceEvent::ServesOn)?;
                Ok(true)
            }
            Err(MoveError::Peer(error)) => {
                tracing::warn!(plan = %self.plan.id, "{error}");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Lets the target take the list of every tree, and compares it with what is here; the workload is frozen
    /// since `since`.
    pub(super) async fn agree_on_lists(
        &mut self,
        target: &PeerAddress,
        since: Instant,
    ) -> Result<Vec<VolumeRelease>, MoveError> {
        self.enter("list")?;
        let started = Instant::now();
        let left = PAUSE_MAX.saturating_sub(since.elapsed());
        let agreed = tokio::time::timeout(left, self.lists(target)).await;
        let (volumes, exceptions, cpu) =
            agreed.map_err(|_| MoveError::PauseTooLong(PAUSE_MAX))??;
        self.append(SourceEvent::Listed {
            volumes: volumes.clone(),
            exceptions,
            duration: started.elapsed(),
            cpu,
        })?;
        Ok(volumes)
    }

    /// What both agree on, by volume what is not in it or not as it is here, and the processor time of the lists here.
    async fn lists(&self, target: &PeerAddress) -> Result<Lists, MoveError> {
        let times = self.active.times().unwrap_or_default();
        let mut expected = Vec::new();
        for volume in trees(&self.plan) {
            let known = [&self.moved.epochs, &self.plan.epochs];
            let last = known.iter().find_map(|epochs| epochs.get(&volume.id));
            expected.push((volume.clone(), last.copied().unwrap_or_default().next()));
        }
        let epochs: BTreeMap<VolumeId, Epoch> = expected
            .iter()
            .map(|(volume, epoch)| (volume.id, *epoch))
            .collect();
        let client = self.client()?.clone().with_timeout(PAUSE_MAX);
        let open = Open { epochs };
        let key = FleetKey(*self.fleet()?.identity.fleet_key());
        // Beside the target, which asks for the same list.
        let here = tokio::task::spawn_blocking(move || {
            let began = thread_time();
            let (mut volumes, mut exceptions) = (Vec::new(), BTreeMap::new());
            for (volume, epoch) in expected {
                let times = times.get(&volume.id).copied().unwrap_or_default();
                let tree = walk::open_root(&volume.source_path)?.keeping(times);
                let (root, skipped) = list_root(&tree, &key)?;
                let told = skipped.iter().map(ToString::to_string).collect();
                exceptions.insert(volume.name.clone(), told);
                volumes.push(VolumeRelease {
                    volume: volume.id,
                    name: volume.name,
                    epoch,
                    content: Content::Later(root),
                });
            }
            Ok::<_, crate::volume::ScanError>((volumes, exceptions, thread_time() - began))
        });
        let there: Vec<VolumeRelease> = self.call(&client, target, "open", &open).await?;
        let (here, exceptions, cpu) = here
            .await?
            .map_err(|error| MoveError::Unlisted(error.to_string()))?;
        match here.iter().find(|volume| !there.contains(volume)) {
            None => Ok((here, exceptions, cpu)),
            Some(volume) => Err(MoveError::NotArrived {
                volume: volume.name.clone(),
                target: target.device.clone(),
            }),
        }
    }

    /// Waits until the target holds everything, proves it, and lets the target stand by itself; false when it was
    /// given back instead.
    pub(super) async fn fill(&mut self, target: &PeerAddress) -> bool {
        self.active.enter("fill");
        die_at("fill");
        let (mut own, mut proving) = (None, Spent::default());
        loop {
            if self.asked_back(target).await {
                return false;
            }
            match self.filled(target, &mut own, &mut proving).await {
                Ok(Some(Proven { roots, bytes, .. })) => {
                    self.active.returnable(false);
                    let arrival = self.active.status().arrival;
                    let held = arrival.map_or(Bytes(0), |arrival| arrival.held);
                    let mut given = self.given_out();
                    given += proving;
                    let whole = SourceEvent::Whole {
                        roots,
                        bytes,
                        held,
                        given,
                    };
                    self.record(whole).await;
                    let mirror = mirror_directory(&self.delegator.parts().state, &self.plan.id);
                    let _ = tokio::fs::remove_dir_all(mirror).await;
                    return true;
                }
                Ok(None) => tokio::time::sleep(FILL_LOOK).await,
                Err(error) => {
                    self.active
                        .trouble(&format!("filling {}: {error}", target.device));
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// What the target fetched since this agent was started, and the changes that it mirrored, have taken here.
    pub(super) fn given_out(&self) -> Spent {
        let given = self.delegator.given(&self.plan.id);
        let mut spent = given.target;
        spent += given.paired;
        spent
    }

    /// The roots and bytes once everything is there and proven; none while it is not.
    async fn filled(
        &self,
        target: &PeerAddress,
        known: &mut Option<Proven>,
        proving: &mut Spent,
    ) -> Result<Option<Proven>, MoveError> {
        let status = target_status(self, target).await?;
        let arrival = status.arrival.unwrap_or_default();
        self.active.arrival(&arrival);
        let ready = status.start_up.is_some();
        match &arrival.trouble {
            Some(trouble) => self.active.trouble(trouble),
            None if !ready => self.tell_twins(&status.twins),
            None => {}
        }
        // Its agent was started anew, and its twins do not run again yet: nothing is over before they do.
        if !ready {
            return Ok(None);
        }
        let Arrival {
            roots,
            whole,
            trouble,
            ..
        } = arrival;
        if roots.is_empty() && !whole {
            return Ok(None);
        }
        let own = match known {
            Some(own) => own,
            None => {
                self.active.enter("prove");
                let read = self.roots().await?;
                *proving += read.spent;
                known.insert(read)
            }
        };
        let proven = own.clone();
        let Proven {
            roots: expected,
            unread,
            ..
        } = &proven;
        let path = format!("/v1/plans/{}/whole", self.plan.id);
        let word = Whole {
            roots: expected.clone(),
        };
        let client = self.client()?.clone().with_timeout(SETTLE_TIME);
        let told = client.post::<_, ()>(target, &path, &word).await;
        if !whole && roots != *expected {
            // The target does not take that word: it compares every block with what is here, which is read once more
            // unless it is known already what differs.
            if trouble.is_none() {
                *known = None;
            }
            let mut trees = trees(&self.plan);
            let differs = trees.find(|volume| roots.get(&volume.id) != expected.get(&volume.id));
            let volume = differs.map_or_else(String::new, |volume| volume.name.clone());
            let told = told.err().map(|error| error.to_string());
            let unread = unread.get(&volume).cloned();
            let answer: Vec<String> = unread.into_iter().chain(told).collect();
            let answer = answer.join("; ");
            return Err(MoveError::Unproven { volume, answer });
        }
        let () = told?;
        Ok(Some(proven))
    }

    /// Reads everything here once more, at the pace of one reader.
    async fn roots(&self) -> Result<Proven, MoveError> {
        let key = FleetKey(*self.fleet()?.identity.fleet_key());
        let trees: Vec<VolumeSpec> = trees(&self.plan).cloned().collect();
        let times = self.active.times().unwrap_or_default();
        let read = tokio::task::spawn_blocking(move || {
            let began = thread_time();
            let mut proven = Proven::default();
            for volume in trees {
                let block_size = BlockSize::for_volume(0);
                let times = times.get(&volume.id).copied().unwrap_or_default();
                let root = walk::open_root(&volume.source_path)?.keeping(times);
                let (state, _) = crate::volume::scan_root(&root, &key, block_size)?;
                proven.bytes += state.iter().map(|entry| Bytes(entry.size())).sum();
                proven.roots.insert(volume.id, state.root);
                if let Some(lost) = state.unreadable.first() {
                    proven.unread.insert(volume.name, unread(lost));
                }
            }
            proven.spent.cpu = thread_time() - began;
            proven.spent.read = proven.bytes;
            Ok(proven)
        });
        let read: Result<Proven, crate::volume::ScanError> = read.await?;
        read.map_err(|error| MoveError::Unlisted(error.to_string()))
    }
}

/// Lists that both agree on, what is not in them, and the processor time that they took.
type Lists = (Vec<VolumeRelease>, BTreeMap<String, Vec<String>>, Duration);

/// What lies frozen here.
#[derive(Clone, Default)]
struct Proven {
    /// Root of each tree.
    roots: BTreeMap<VolumeId, Signature>,
    /// Bytes of all their files.
    bytes: Bytes,
    /// What reading it took.
    spent: Spent,
    /// By name of the volume, what its disk does not give up of it, for people.
    unread: BTreeMap<String, String>,
}

/// Says why the root here is not that of what arrived.
fn unread(lost: &Unreadable) -> String {
    format!(
        "this device's disk does not give up {} bytes of `{}` at offset {} any more, with which what arrived would be \
         compared; look for disk errors here",
        lost.length, lost.path, lost.offset
    )
}

/// Why nothing is delegated from the switch on.
const ALONE: &str =
    "switched first: what comes behind the twins goes straight from here to the target";
/// The target writes back what it has not yet, and makes trees of millions of files.
const END_TIME: Duration = Duration::from_secs(3600);
/// Between two questions how much is there.
const FILL_LOOK: Duration = Duration::from_millis(500);
/// The target moves directories and changes its containers' restart policies.
const SETTLE_TIME: Duration = Duration::from_secs(120);

/// The volumes whose data comes later when a plan switches first.
pub(super) fn trees(plan: &Plan) -> impl Iterator<Item = &VolumeSpec> {
    plan.volumes
        .iter()
        .filter(|volume| matches!(volume.kind, VolumeKind::Named(_) | VolumeKind::Bind))
}

/// Whether a release comes before the data.
pub(super) fn is_later(release: &Release) -> bool {
    let mut volumes = release.volumes.iter();
    volumes.any(|volume| matches!(volume.content, Content::Later(_)))
}
