//! What all phases of a plan on its source share: the plan, its journal, what went wrong.

use super::active::Active;
use super::clearance::Clearance;
use super::delegator::{Delegator, FleetContext};
use super::events::{ContainerFence, SourceEvent, VolumeRound};
use super::freezing::Watchdog;
use super::journal::{Journal, JournalError};
use crate::containers::{FenceError, ImageError, PauseError, RuntimeError};
use crate::fleet::client::{CallError, ControlClient};
use crate::fleet::pairing::PairError;
use crate::model::choice::{Changeset, Measured};
use crate::model::container::{Container, State};
use crate::model::fleet::{PeerAddress, Role};
use crate::model::ids::{ContainerName, DeviceId, Epoch, VolumeId};
use crate::model::plan::Plan;
use crate::model::units::{UnixMillis, human_duration};
use crate::transfer::SendError;
use crate::volume::Unreadable;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Reason of a plan that an operator aborted.
pub const OPERATOR_ABORT: &str = "an operator asked for it";

/// How the reason begins of a plan that was given up because roles did not approve it.
pub const NOT_APPROVED: &str = "not approved by";

/// A plan that is prepared for longer is given up: its pairings last a day.
pub(super) const PREPARED_MAX: Duration = Duration::from_hours(20);

/// Why a plan stopped before its release. The source's containers run on.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The operator (or a newer fact) asked to stop.
    #[error("aborted: {0}")]
    Cancelled(String),
    /// No device could be had.
    #[error("no {role} was allocated: {error}")]
    Allocation {
        /// As what it was wanted.
        role: Role,
        /// Cause.
        error: PairError,
    },
    /// The target or paired device refused or cannot be reached.
    #[error("{0}")]
    Peer(#[from] CallError),
    /// The paired device refused or cannot be reached.
    #[error("paired device {device}: {error}")]
    Paired {
        /// Paired device.
        device: DeviceId,
        /// Cause.
        error: CallError,
    },
    /// A runtime operation failed.
    #[error("{0}")]
    Runtime(#[from] RuntimeError),
    /// An image cannot be exported.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// A container cannot be kept from being started.
    #[error("{0}")]
    Fence(#[from] FenceError),
    /// The workload cannot be frozen.
    #[error("{0}")]
    Pause(#[from] PauseError),
    /// The disk does not give up everything.
    #[error(
        "the disk does not give up everything, and nobody accepted that. {0}. Repair the files, or move them with this loss by `lifeboat evacuate --accept-loss VOLUME`"
    )]
    Loss(String),
    /// The release cannot be signed.
    #[error("cannot sign the release: {0}; check the identity in the state directory")]
    Sign(String),
    /// The paired device takes data at an address that is not trusted.
    #[error(
        "the paired device takes data at {0}, which is not in `trusted_networks`; unsealed blocks do not go there"
    )]
    Untrusted(std::net::SocketAddr),
    /// The pause took too long.
    #[error(
        "the final changeset was not on the target after {0:?}; the workload was let run again; try when disk or link are faster"
    )]
    PauseTooLong(Duration),
    /// Somebody let a container run again during the pause.
    #[error("{0} was let run again during the pause; find who did it and ask again")]
    Thawed(ContainerName),
    /// Nobody approved it.
    #[error("{NOT_APPROVED} {roles} within {}; `lifeboat evacuate` moves the containers by hand", human_duration(*timeout))]
    NotApproved {
        /// Roles that did not.
        roles: String,
        /// How long they were waited for.
        timeout: Duration,
    },
    /// It was prepared for so long that its pairings end.
    #[error(
        "prepared for {}, and pairings end after a day; it is prepared anew",
        human_duration(PREPARED_MAX)
    )]
    PreparedTooLong,
    /// The target's own word differs.
    #[error(
        "{target} does not confirm the last epoch and root of volume {volume}; nothing was released; ask again"
    )]
    NotArrived {
        /// Volume.
        volume: String,
        /// Target.
        target: DeviceId,
    },
    /// What is here cannot be looked at.
    #[error("{0}")]
    Unlisted(String),
    /// What arrived is not what is here.
    #[error("what arrived of volume {volume} is not what this device reads: {answer}")]
    Unproven {
        /// The volume's name.
        volume: String,
        /// What the target says to that.
        answer: String,
    },
    /// The device left its fleet.
    #[error(
        "this device's agent is in no fleet: enrol the device with `lifeboat fleet join`, and set `fleet` in the agent's configuration"
    )]
    NoFleet,
    /// The journal cannot be written.
    #[error("{0}")]
    Journal(#[from] JournalError),
    /// A volume could not be sent.
    #[error("sending to {target}: {error}")]
    Send {
        /// Target of the plan.
        target: String,
        /// Cause.
        error: SendError,
    },
    /// A file operation of the plan's own directory failed.
    #[error("cannot {doing}: {error}; free space or repair the file system, then ask again")]
    File {
        /// What was done to what.
        doing: String,
        /// Cause.
        error: std::io::Error,
    },
    /// A task of this process died.
    #[error("internal task failed: {0}; see the agent's log")]
    Task(#[from] tokio::task::JoinError),
}

impl MoveError {
    /// Whether a paired device that went away can be the cause. Whose end of a link is dead shows only when the
    /// target is asked without it.
    pub(super) fn may_be_of_paired(&self) -> bool {
        match self {
            Self::Paired { .. } => true,
            Self::Send {
                error: SendError::Link { source, .. },
                ..
            } => source.may_be_of_relay(),
            _ => false,
        }
    }
}

/// How long a device that has taken the plan may be away: a server takes minutes to start.
const ABSENCE: Duration = Duration::from_secs(600);
/// Between two calls of a device that is away.
const AGAIN: Duration = Duration::from_secs(1);

/// What all phases share: the plan, its journal and the daemon round it.
pub(super) struct Move {
    pub(super) delegator: Arc<Delegator>,
    pub(super) plan: Plan,
    pub(super) journal: Journal<SourceEvent>,
    pub(super) active: Arc<Active>,
    pub(super) done: Done,
    pub(super) moved: Moved,
    pub(super) clearance: Clearance,
}

/// How far the data has come, over all lives of the agent.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// Target and paired device have taken the plan.
    pub(super) prepared: bool,
    /// Why the target cannot start twins before their data, as it said last.
    pub(super) cannot_serve: Option<String>,
    /// A volume with bytes that cannot be read, so that it never would be whole.
    pub(super) unreadable: Option<String>,
    /// Rounds that are on the target.
    pub(super) rounds: u32,
    /// The last epoch of each volume there.
    pub(super) epochs: BTreeMap<VolumeId, Epoch>,
    /// What was lost of it.
    pub(super) lost: BTreeMap<VolumeId, Vec<Unreadable>>,
    /// Lives of the agent since the last round.
    pub(super) lives: u32,
    /// What the rounds measured.
    pub(super) measured: Measured,
    /// Why the target is asked to give everything back, until it answers.
    pub(super) asked_back: Option<String>,
}

impl Moved {
    /// Takes note of a journalled event.
    pub(super) fn note(&mut self, at: UnixMillis, event: &SourceEvent) {
        match event {
            SourceEvent::Prepared { .. } => self.prepared = true,
            SourceEvent::Resumed => {
                self.lives += 1;
                self.measured.restart();
            }
            // It was copied in advance, and slowly.
            SourceEvent::GoesOn { .. } => self.measured.hurry(),
            SourceEvent::Round {
                round,
                volumes,
                duration,
            } => {
                (self.rounds, self.lives) = (*round, 0);
                let bytes = volumes.iter().map(|volume| volume.changeset).sum();
                let took = *duration;
                self.measured.note(at, Changeset { bytes, took });
                self.sent(volumes);
            }
            SourceEvent::Final { volumes, .. } => self.sent(volumes),
            SourceEvent::AskedBack { reason } => self.asked_back = Some(reason.clone()),
            SourceEvent::NotGivenBack { .. } => self.asked_back = None,
            _ => {}
        }
    }

    fn sent(&mut self, volumes: &[VolumeRound]) {
        let epochs = volumes.iter().map(|volume| (volume.volume, volume.epoch));
        self.epochs.extend(epochs);
        let lost = volumes.iter();
        self.lost
            .extend(lost.map(|volume| (volume.volume, volume.unreadable.clone())));
    }
}

/// What a roll-back would have to undo.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) fencing: bool,
    pub(super) fences: Vec<ContainerFence>,
    /// When the workload was about to be frozen.
    pub(super) pausing: Option<UnixMillis>,
    /// What of it ran, which is what is thawed; none in the journal of an earlier build.
    frozen: Option<Vec<ContainerName>>,
    /// Devices from which frozen file systems may be mounted.
    pub(super) freezing: Vec<PathBuf>,
    /// What ends their freeze should this life of the agent not do it.
    pub(super) watchdogs: Vec<Watchdog>,
}

impl Done {
    /// Takes note of a journalled event.
    pub(super) fn note(&mut self, at: UnixMillis, event: &SourceEvent) {
        match event {
            SourceEvent::Fencing => self.fencing = true,
            SourceEvent::Fenced { fences } => self.fences.extend(fences.iter().cloned()),
            SourceEvent::Pausing { containers } => {
                self.pausing = Some(at);
                self.frozen.clone_from(containers);
            }
            SourceEvent::Freezing { devices } => self.freezing.clone_from(devices),
            SourceEvent::Resumed => *self = Self::default(),
            _ => {}
        }
    }

    /// Whether a container may be frozen by this plan, and by nobody before it.
    pub(super) fn may_have_frozen(&self, container: &Container) -> bool {
        let named = |names: &Vec<ContainerName>| names.contains(&container.name);
        let by_state = container.state != State::Paused;
        self.pausing.is_some() && self.frozen.as_ref().map_or(by_state, named)
    }
}

impl Move {
    pub(super) fn append(&mut self, event: SourceEvent) -> Result<(), JournalError> {
        let now = self.delegator.now();
        if let Some(limit) = self.active.limited() {
            self.plan.guards.limit = limit;
            self.journal.append(now, SourceEvent::Limited { limit })?;
        }
        self.done.note(now, &event);
        self.moved.note(now, &event);
        self.journal.append(now, event)
    }

    pub(super) fn fleet(&self) -> Result<&FleetContext, MoveError> {
        self.delegator.fleet().ok_or(MoveError::NoFleet)
    }

    pub(super) fn client(&self) -> Result<&ControlClient, MoveError> {
        Ok(&self.fleet()?.client)
    }

    /// Calls a device. One that has taken the plan and does not answer is probably being started anew, and is
    /// called again for a while.
    pub(super) async fn call<T: DeserializeOwned>(
        &self,
        client: &ControlClient,
        to: &PeerAddress,
        what: &str,
        body: &impl Serialize,
    ) -> Result<T, MoveError> {
        let path = format!("/v1/plans/{}/{what}", self.plan.id);
        let began = Instant::now();
        loop {
            let asked = client.post(to, &path, body);
            match self.active.unless_cancelled(asked).await {
                Err(MoveError::Peer(error))
                    if error.is_away() && self.moved.prepared && began.elapsed() < ABSENCE =>
                {
                    self.active.trouble(&error.to_string());
                    self.active.heard(AGAIN).await;
                }
                answer => return answer,
            }
        }
    }

    pub(super) fn enter(&self, phase: &'static str) -> Result<(), MoveError> {
        self.active.enter(phase);
        super::faults::die_at(phase);
        tracing::info!(plan = %self.plan.id, phase, "phase");
        self.go_on_unless_cancelled()
    }

    /// Enters a phase in which the plan waits, or stays in it.
    pub(super) fn stay(&self, phase: &'static str) -> Result<(), MoveError> {
        if self.active.phase() == phase {
            return self.go_on_unless_cancelled();
        }
        self.enter(phase)
    }

    fn go_on_unless_cancelled(&self) -> Result<(), MoveError> {
        match self.active.cancelled() {
            Some(reason) => Err(MoveError::Cancelled(reason)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ran_when_it_was_frozen_is_thawed_whatever_it_did_when_the_plan_was_made() {
        let mut container = Container::of_cgroup("db", 1, 1);
        let done = |line: &str| {
            let mut done = Done::default();
            done.note(UnixMillis(1), &serde_json::from_str(line).unwrap());
            done
        };
        let named = done(r#"{"event":"pausing","containers":["db"]}"#);
        let other = done(r#"{"event":"pausing","containers":["web"]}"#);
        let earlier_build = done(r#"{"event":"pausing"}"#);
        for state in [State::Running, State::Paused] {
            container.state = state;
            assert!(!Done::default().may_have_frozen(&container));
            assert!(named.may_have_frozen(&container));
            assert!(!other.may_have_frozen(&container));
            assert_eq!(
                earlier_build.may_have_frozen(&container),
                state == State::Running
            );
        }
    }
}
