//! Sending a volume epoch by epoch over one sender.

use super::changes::Watches;
use super::events::VolumeRound;
use super::moving::{Move, MoveError};
use crate::model::ids::{Epoch, VolumeId};
use crate::model::volume::VolumeSpec;
use crate::transfer::{SendError, Sender};
use crate::volume::{TreeState, Unreadable};
use std::collections::BTreeMap;

/// The sender and what it sent, volume by volume.
pub(super) struct Replica {
    pub(super) sender: Option<Sender>,
    pub(super) sent: BTreeMap<VolumeId, TreeState>,
    pub(super) watches: Watches,
}

/// Epochs sent of a frozen volume whose device changes all the same: direct writes that were under way when
/// the workload was frozen end within the first.
const FROZEN_EPOCHS: u32 = 4;

impl Replica {
    /// What is lost of a volume as it was sent last.
    pub(super) fn lost(&self, volume: &VolumeSpec) -> &[Unreadable] {
        let sent = self.sent.get(&volume.id);
        sent.map_or(&[], |state| &state.unreadable)
    }

    /// Sends the next epoch of `volume`.
    ///
    /// `frozen` says that nothing may change meanwhile: a change is then an error, not a later epoch.
    pub(super) async fn send(
        &mut self,
        core: &Move,
        volume: &VolumeSpec,
        frozen: bool,
    ) -> Result<VolumeRound, MoveError> {
        let epochs = [&core.moved.epochs, &core.plan.epochs];
        let last = epochs.iter().find_map(|epochs| epochs.get(&volume.id));
        let mut epoch = last.copied().unwrap_or_default();
        for _ in 0..FROZEN_EPOCHS {
            epoch = epoch.next();
            let round = self.send_epoch(core, volume, epoch, frozen).await?;
            if !frozen || !self.watches.has_changed(volume).await {
                return Ok(round);
            }
        }
        let error = SendError::ChangedWhileFrozen {
            volume: volume.name.clone(),
            path: volume.source_path.display().to_string(),
        };
        Err(send_error(core, error))
    }

    async fn send_epoch(
        &mut self,
        core: &Move,
        volume: &VolumeSpec,
        epoch: Epoch,
        frozen: bool,
    ) -> Result<VolumeRound, MoveError> {
        let changed = self.watches.take(volume).await;
        let written = self.watches.below(volume).await;
        let mut previous = self.sent.remove(&volume.id);
        if let Some(previous) = &mut previous {
            (previous.changed, previous.written) = (changed, written);
        }
        let Some(mut sender) = self.sender.take() else {
            return Err(MoveError::Cancelled(
                "the sender was lost with an earlier error".into(),
            ));
        };
        let progress = core.active.progress();
        let spec = volume.clone();
        let (sender, outcome) = tokio::task::spawn_blocking(move || {
            let outcome = sender.send_epoch(&spec, epoch, frozen, previous.as_ref(), &progress);
            (sender, outcome)
        })
        .await?;
        self.sender = Some(sender);
        let (state, report) = outcome.map_err(|error| send_error(core, error))?;
        self.sent.insert(volume.id, state);
        Ok(VolumeRound {
            volume: volume.id,
            name: volume.name.clone(),
            epoch,
            root: report.root,
            entries: report.entries,
            changed_entries: report.changed_entries,
            changeset: report.changeset,
            read: report.bytes_read,
            wire: report.bytes_on_wire,
            held_blocks: report.held_blocks,
            packed_from: report.packed_from,
            packed_to: report.packed_to,
            unused: report.unused,
            cpu: report.source_cpu,
            exceptions: report.skipped.iter().map(ToString::to_string).collect(),
            unreadable: report.unreadable,
            duration: report.duration,
        })
    }
}

fn send_error(core: &Move, error: SendError) -> MoveError {
    match core.active.cancelled() {
        Some(reason) => MoveError::Cancelled(reason),
        None => MoveError::Send {
            target: match &core.plan.target {
                Some(target) => format!("{} at {}", target.device, target.address),
                None => "no target".to_owned(),
            },
            error,
        },
    }
}
