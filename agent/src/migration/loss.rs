//! Volumes of which the disk does not give up everything: they leave only when an operator accepts the loss.
//!
//! Invariant: nothing is released that lacks bytes, unless their volume was named by an operator. While that
//! word is waited for, the containers run on here.

use super::clearance::LOOK;
use super::events::SourceEvent;
use super::moving::{Move, MoveError};
use super::replica::Replica;
use crate::model::volume::VolumeSpec;
use crate::volume::Unreadable;
use std::time::{Duration, Instant};

/// Longest wait for an operator: a disk that loses data rarely waits longer.
const PATIENCE: Duration = Duration::from_hours(4);

/// The role under which the loss of a volume is approved.
fn role(volume: &str) -> String {
    format!("loss:{volume}")
}

/// A loss as a person reads it: the first few ranges of each volume.
pub(super) fn tell(volumes: &[(String, Vec<Unreadable>)]) -> String {
    const SHOWN: usize = 5;
    let tell = |(volume, lost): &(String, Vec<Unreadable>)| {
        let mut ranges: Vec<String> = lost.iter().take(SHOWN).map(ToString::to_string).collect();
        if lost.len() > SHOWN {
            ranges.push(format!("{} more", lost.len() - SHOWN));
        }
        format!("volume {volume}: {}", ranges.join("; "))
    };
    volumes.iter().map(tell).collect::<Vec<_>>().join(". ")
}

impl Move {
    /// What is lost of `volumes` and was not accepted.
    pub(super) fn unaccepted(
        &self,
        replica: &Replica,
        volumes: &[VolumeSpec],
    ) -> Vec<(String, Vec<Unreadable>)> {
        let lost = volumes.iter().map(|volume| (volume, replica.lost(volume)));
        lost.filter(|(volume, lost)| {
            !lost.is_empty()
                && !self.plan.guards.accepted_losses.contains(&volume.name)
                && !self.clearance.approved(&role(&volume.name))
        })
        .map(|(volume, lost)| (volume.name.clone(), lost.to_vec()))
        .collect()
    }

    /// Takes note of a volume that cannot be read whole.
    pub(super) fn note_unreadable(&mut self, replica: &Replica, volumes: &[VolumeSpec]) {
        let mut volumes = volumes.iter();
        let found = volumes.find(|volume| !replica.lost(volume).is_empty());
        self.moved.unreadable =
            found.map(|volume| format!("volume {} cannot be read whole", volume.name));
    }

    /// Waits until an operator has accepted what is lost of `volumes`; whether that took a while.
    pub(super) async fn await_acceptance(
        &mut self,
        replica: &Replica,
        volumes: &[VolumeSpec],
    ) -> Result<bool, MoveError> {
        let since = Instant::now();
        let mut waited = false;
        loop {
            self.take_approvals()?;
            let lost = self.unaccepted(replica, volumes);
            if lost.is_empty() {
                self.active.awaits(&[]);
                return Ok(waited);
            }
            if since.elapsed() > PATIENCE {
                return Err(MoveError::Loss(tell(&lost)));
            }
            self.stay("await acceptance of a loss")?;
            if !waited {
                self.append(SourceEvent::LossFound {
                    volumes: lost.clone(),
                })?;
            }
            waited = true;
            let roles: Vec<String> = lost.iter().map(|(volume, _)| role(volume)).collect();
            self.active.awaits(&roles);
            self.active.trouble(&format!(
                "the disk does not give up everything: {}",
                tell(&lost)
            ));
            self.active.heard(LOOK).await;
        }
    }
}
