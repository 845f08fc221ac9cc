//! Sending a volume epoch by epoch over one sender.

use super::events::VolumeRound;
use super::moving::{Move, MoveError};
use crate::model::ids::{Epoch, VolumeId};
use crate::model::volume::VolumeSpec;
use crate::transfer::Sender;
use crate::volume::TreeState;
use std::collections::BTreeMap;

/// What was sent of a volume last.
pub(super) struct Sent {
    epoch: Epoch,
    state: TreeState,
}

/// The sender and what it sent, volume by volume.
pub(super) struct Replica {
    pub(super) sender: Option<Sender>,
    pub(super) sent: BTreeMap<VolumeId, Sent>,
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
        let start = core
            .plan
            .epochs
            .get(&volume.id)
            .copied()
            .unwrap_or_default();
        let epoch = previous.as_ref().map_or(start, |sent| sent.epoch).next();
        let Some(mut sender) = self.sender.take() else {
            return Err(MoveError::Cancelled(
                "the sender was lost with an earlier error".into(),
            ));
        };
        let progress = core.active.progress();
        let spec = volume.clone();
        let (sender, outcome) = tokio::task::spawn_blocking(move || {
            let outcome = sender.send_epoch(
                &spec,
                epoch,
                frozen,
                previous.as_ref().map(|sent| &sent.state),
                &progress,
            );
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
        self.sent.insert(volume.id, Sent { epoch, state });
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
