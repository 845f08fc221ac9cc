//! What the journals of a plan hold, on the source and on the target.

use super::active::Given;
use super::forwarding::Back;
use super::leftovers::Left;
use crate::model::action::Actions;
use crate::model::choice::Choice;
use crate::model::control::Owns;
use crate::model::control::StoodIn;
use crate::model::fleet::PeerAddress;
use crate::model::ids::{ContainerName, DeviceId, Epoch, Signature, VolumeId};
use crate::model::plan::{Chosen, Plan, SignedRelease, TwinState, VolumeRelease};
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::TimesKept;
use crate::transfer::Spent;
use crate::volume::Unreadable;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// One volume in one round of replication.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRound {
    /// Volume.
    pub volume: VolumeId,
    /// Name for people.
    pub name: String,
    /// Epoch that was sent.
    pub epoch: Epoch,
    /// Root that source and target computed, each for itself.
    pub root: Signature,
    /// Files, directories, links, … in the volume.
    pub entries: u64,
    /// Entries that had changed since the epoch before.
    pub changed_entries: u64,
    /// Plain bytes of the changed blocks: the changeset.
    pub changeset: Bytes,
    /// Bytes read from the source's disk.
    pub read: Bytes,
    /// Bytes on the wire from the source, everything included.
    pub wire: Bytes,
    /// Changed blocks that the target took from what it held elsewhere, and that were not sent.
    pub held_blocks: u64,
    /// Bytes that were packed because the link was the limit, as they were before.
    #[serde(default)]
    pub packed_from: Bytes,
    /// What was left of them.
    #[serde(default)]
    pub packed_to: Bytes,
    /// Bytes that the file system on it does not use: zeros on the target, and no loss.
    #[serde(default)]
    pub unused: Bytes,
    /// Processor time of the agent meanwhile, in all its threads.
    pub cpu: Duration,
    /// What was left out or changed and why, for instance sockets.
    pub exceptions: Vec<String>,
    /// What the source's disk did not give up.
    #[serde(default)]
    pub unreadable: Vec<Unreadable>,
    /// Time it took.
    pub duration: Duration,
}

/// How one source container is kept from being started again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFence {
    /// Container.
    pub container: ContainerName,
    /// The runtime room's fence, as it wants to have it back to lift it.
    pub fence: crate::containers::Fence,
}

/// A role's word that a plan may evacuate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    /// Role.
    pub role: String,
    /// Who said so, as the kernel knows the caller of the local API.
    pub by: String,
}

/// The source's journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum SourceEvent {
    /// The plan as made; later events fill in the allocation.
    Planned {
        /// Plan.
        plan: Box<Plan>,
        /// Whether its data is only copied in advance.
        #[serde(default)]
        held: bool,
    },
    /// The duplicator chose a target.
    TargetChosen {
        /// Target.
        target: Chosen,
    },
    /// The duplicator chose a paired device, which authenticated itself and was authorised.
    Paired {
        /// Paired device.
        paired: Chosen,
        /// Actions that it does; `encrypt` and `serve` only over a trusted link.
        delegated: Actions,
        /// Which others were asked for, and why the source does them.
        #[serde(default)]
        kept: Vec<String>,
    },
    /// The copy is over, and the paired device does nothing more but to answer the target in this one's stead.
    ServesOn,
    /// The paired device answers the target in this one's stead no more.
    StoodIn {
        /// Paired device.
        device: DeviceId,
        /// What it did, since its agent was last started; none where it does not say.
        did: Option<StoodIn>,
        /// What was given out here meanwhile, since this agent was last started.
        given: Given,
    },
    /// No device could be lent for the delegated actions, or it went away: the source does all from now on.
    NotPaired {
        /// Why.
        reason: String,
    },
    /// The target is ready to receive.
    Prepared {
        /// Image volumes that it holds already.
        images_present: Vec<VolumeId>,
        /// How many layers of the other images it holds.
        #[serde(default)]
        layers_present: usize,
        /// Which times its file systems keep, of volumes of which they do not keep all.
        #[serde(default)]
        times: BTreeMap<VolumeId, TimesKept>,
    },
    /// One round of replication is on the target.
    Round {
        /// Round, from 1.
        round: u32,
        /// Each volume of it.
        volumes: Vec<VolumeRound>,
        /// Time the round took.
        duration: Duration,
    },
    /// Whether it copies on, pauses or switches first from here, and why.
    Chosen {
        /// The choice.
        choice: Box<Choice>,
    },
    /// The plan may evacuate only when these roles have approved it.
    ApprovalAwaited {
        /// Roles.
        roles: Vec<String>,
        /// Until when.
        until: UnixMillis,
    },
    /// Bytes are lost, and the plan goes on only when an operator accepts that.
    LossFound {
        /// Volumes by name, and what is lost of each.
        volumes: Vec<(String, Vec<Unreadable>)>,
    },
    /// A role approved it.
    Approved {
        /// By whom, as what.
        approval: Approval,
    },
    /// Roles that did not approve in time; the policy says to proceed.
    NotApproved {
        /// Roles.
        roles: Vec<String>,
    },
    /// Too many devices of the fleet evacuate already.
    StormGuard {
        /// What the duplicator said.
        reason: String,
    },
    /// A plan that was prepared in advance evacuates from here on.
    GoesOn {
        /// The plan as of now: containers and order may have changed, volumes have not.
        plan: Box<Plan>,
    },
    /// An operator changed how fast it may read.
    Limited {
        /// Bytes a second; none: no limit.
        limit: Option<Bytes>,
    },
    /// A new life of the agent goes on with it; what had been fenced and frozen runs again.
    Resumed,
    /// It is about to be rolled back.
    GivenUp {
        /// Why.
        reason: String,
    },
    /// Restart policies are about to be switched off.
    Fencing,
    /// Restart policies are off.
    Fenced {
        /// How, container by container.
        fences: Vec<ContainerFence>,
    },
    /// From here these containers may be frozen.
    Pausing {
        /// Those that ran; an earlier build did not say.
        #[serde(default)]
        containers: Option<Vec<ContainerName>>,
    },
    /// All containers are frozen.
    Paused {
        /// Time it took.
        duration: Duration,
    },
    /// File systems that are mounted from these devices may be frozen from here until the plan goes on without
    /// their containers, or back.
    Freezing {
        /// The devices.
        devices: Vec<PathBuf>,
    },
    /// The final changeset is on the target and the roots agree.
    Final {
        /// Each volume.
        volumes: Vec<VolumeRound>,
        /// Time it took.
        duration: Duration,
    },
    /// Source and target agree on the lists of volumes whose data comes behind the twins.
    Listed {
        /// Each list.
        volumes: Vec<VolumeRelease>,
        /// What was left out of each volume, by name, and why.
        #[serde(default)]
        exceptions: BTreeMap<String, Vec<String>>,
        /// Time it took.
        duration: Duration,
        /// Processor time that making the lists took here.
        #[serde(default)]
        cpu: Duration,
    },
    /// The commit point.
    Released {
        /// Release.
        release: SignedRelease,
    },
    /// The target owns every volume, durably.
    TargetOwns {
        /// Its word.
        owns: Owns,
    },
    /// The source's containers were killed.
    SourceStopped {
        /// Containers.
        containers: Vec<ContainerName>,
    },
    /// Published ports are forwarded to the twins.
    Forwarding {
        /// `listen → to`, one a line.
        ports: Vec<Forwarding>,
    },
    /// The target told of its twins' readiness.
    Twins {
        /// Twins.
        twins: Vec<TwinState>,
        /// From the first freeze until the source heard that the last twin was ready.
        interruption: Duration,
        /// The part of it that the target spent making and starting twins, by its own clock.
        start_up: Duration,
    },
    /// Switched first, everything is on the target now: the roots that both computed agree.
    Whole {
        /// Root of each tree.
        roots: BTreeMap<VolumeId, Signature>,
        /// Bytes of all files.
        bytes: Bytes,
        /// Of those, copied before the switch and the same since.
        #[serde(default)]
        held: Bytes,
        /// What giving it out and proving it took here.
        #[serde(default)]
        given: Spent,
    },
    /// The target is asked to give everything back, until it answers.
    AskedBack {
        /// Why.
        reason: String,
    },
    /// It does not; its twins run on.
    NotGivenBack {
        /// Its word.
        why: String,
    },
    /// The target gives the volumes back: what its twins changed is about to be written over the data here.
    Returning {
        /// Its word.
        word: SignedRelease,
        /// Why.
        reason: String,
    },
    /// It is written, durably: this device owns the volumes again, from these epochs on.
    Returned {
        /// Epoch of each tree.
        epochs: BTreeMap<VolumeId, Epoch>,
        /// Changes that were written.
        changes: u64,
        /// What giving data out took here before.
        #[serde(default)]
        given: Spent,
    },
    /// Nothing is left to do.
    Completed,
    /// Rolled back: the source's containers run on as if nothing had happened.
    Aborted {
        /// Why.
        reason: String,
    },
    /// After that: the target has removed what it had made for the plan.
    TargetFreed {
        /// But for this, in its words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        left: Option<String>,
    },
}

/// One forwarded port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarding {
    /// Address on the source.
    pub listen: std::net::SocketAddr,
    /// Address of the twin on the target.
    pub to: std::net::SocketAddr,
}

/// The target's journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum TargetEvent {
    /// Nothing is in the way of an offer, and the places of its volumes are about to be made.
    Offered {
        /// Plan.
        plan: Box<Plan>,
        /// What will be made; a named volume's path is not known yet and empty.
        places: Vec<Place>,
        /// Socket of the runtime that has its volumes and twins; an earlier build did not say.
        #[serde(default)]
        runtime: Option<String>,
    },
    /// An offer was accepted.
    Accepted {
        /// Plan.
        plan: Box<Plan>,
        /// Where each volume goes, and whether this plan made that place.
        places: Vec<Place>,
        /// Socket of the runtime that has its volumes and twins; an earlier build did not say.
        #[serde(default)]
        runtime: Option<String>,
    },
    /// Networks of the plan's containers that are not here and are about to be made.
    Networks {
        /// Names.
        names: Vec<String>,
    },
    /// What stands for the source's block devices here.
    Attached {
        /// By path on the source.
        devices: BTreeMap<PathBuf, PathBuf>,
    },
    /// Stores are about to be made of volumes whose data comes behind the twins, from the source's lists of them.
    Opening {
        /// Who has the data.
        source: PeerAddress,
        /// The directory of each store.
        stores: BTreeMap<VolumeId, PathBuf>,
    },
    /// It came to no release, and nothing is left of it.
    NotOpened,
    /// The lists are here, durably; the data is not.
    Opened {
        /// Each list.
        volumes: Vec<VolumeRelease>,
    },
    /// A twin's runtime does not start it by itself.
    TwinFenced {
        /// How.
        fence: ContainerFence,
    },
    /// Everything is here and its roots are the source's: the data is about to take its final place.
    Proven {
        /// Inode of each tree's data.
        inodes: BTreeMap<VolumeId, u64>,
    },
    /// The data is in its final place, and the source is not needed any more.
    Whole,
    /// The volumes are the source's again: no twin is ever started here any more.
    GivenBack {
        /// What was signed.
        word: SignedRelease,
    },
    /// The release was found good and the target owns n+1.
    Owns {
        /// Release.
        release: SignedRelease,
        /// Ownership.
        owns: Owns,
        /// What came back here with it.
        #[serde(default, skip_serializing_if = "Back::is_empty")]
        back: Back,
    },
    /// A twin was made and started.
    TwinReady {
        /// Twin.
        twin: TwinState,
    },
    /// The agent is about to end these twins, or has ended them, and its next life is to start those that are not said to
    /// be ready again.
    TwinsEnded {
        /// Twins.
        containers: Vec<ContainerName>,
    },
    /// All twins are ready.
    Completed,
    /// The plan is over, and what it had made here is gone again.
    Dismissed {
        /// Why.
        reason: String,
        /// But for this.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        left: Option<Box<Left>>,
    },
}

/// Where one volume goes on the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Volume.
    pub volume: VolumeId,
    /// Directory; file or device of a volume that is one.
    pub path: PathBuf,
    /// Whether the plan made it, so that a dismissal removes it.
    pub made: bool,
}

#[cfg(test)]
mod tests {
    use super::super::report::tell;
    use super::*;

    #[test]
    fn what_a_target_could_not_remove_is_in_the_report_and_a_journal_of_an_earlier_build_says_nothing_of_it()
     {
        let read = |line: &str| serde_json::from_str::<SourceEvent>(line).unwrap();
        let freed = read(r#"{"event":"target-freed"}"#);
        assert_eq!(tell(&freed), ["the target has removed what it had made"]);
        let left = Some("volume db-data".to_owned());
        let line = serde_json::to_string(&SourceEvent::TargetFreed { left }).unwrap();
        assert!(tell(&read(&line))[0].ends_with("volume db-data"));
        let line = r#"{"event":"dismissed","reason":"asked to"}"#;
        let dismissed: TargetEvent = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&dismissed).unwrap(), line);
    }
}
