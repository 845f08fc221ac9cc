//! Sending a volume epoch by epoch over one sender.

use super::events::VolumeRound;
use super::moving::{Move, MoveError};
use crate::model::ids::VolumeId;
use crate::model::volume::VolumeSpec;
use crate::transfer::Sender;
use crate::volume::TreeState;
use std::collections::BTreeMap;

/// The sender and what it sent, volume by volume.
pub(super) struct Replica {
    pub(super) sender: Option<Sender>,
    pub(super) sent: BTreeMap<VolumeId, TreeState>,
}

impl Replica {
    /// Sends the next epoch of `volume`.
    ///
    /// `frozen` says that nothing may change meanwhile: a change is then an error, not a later epoch.
    pub(super) async fn send(
        &mut self,
        core: &Move,
        volume: &VolumeSpec,
        frozen: bool,
    ) -> Result<VolumeRound, MoveError> {
        let previous = self.sent.remove(&volume.id);
        let epochs = [&core.moved.epochs, &core.plan.epochs];
        let last = epochs.iter().find_map(|epochs| epochs.get(&volume.id));
        let epoch = last.copied().unwrap_or_default().next();
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
        let (state, report) = outcome.map_err(|error| match core.active.cancelled() {
            Some(reason) => MoveError::Cancelled(reason),
            None => MoveError::Send {
                target: match &core.plan.target {
                    Some(target) => format!("{} at {}", target.device, target.address),
                    None => "no target".to_owned(),
                },
                error,
            },
        })?;
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
            cpu: report.source_cpu,
            exceptions: report
                .skipped
                .iter()
                .map(|exception| format!("{}: {}", exception.path, exception.reason))
                .collect(),
            duration: report.duration,
        })
    }
}
