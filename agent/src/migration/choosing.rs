//! Asks whether a plan copies or switches first, with what is known of it now.
//!
//! Invariant: it is asked before the whole copy and after every round, and each answer is in the journal.

use super::events::SourceEvent;
use super::journal::JournalError;
use super::moving::Move;
use super::settings::Settings;
use super::source::PAUSE_MAX;
use super::view::HostView;
use crate::model::choice::{Bounds, Choice, Deadline, Outlook, Rate};
use crate::model::ids::ContainerName;
use crate::model::plan::PlannedContainer;
use crate::model::units::{Bytes, UnixMillis};
use std::collections::BTreeSet;

pub(super) fn bounds(settings: &Settings) -> Bounds {
    Bounds {
        threshold: Bytes(settings.changeset_threshold_bytes),
        rounds: settings.rounds_max,
        pause: PAUSE_MAX,
    }
}

/// What the containers write now, by the kernel's count; none where nobody counts.
pub(super) fn written(view: &HostView, containers: &[PlannedContainer]) -> Option<Rate> {
    let names: BTreeSet<&ContainerName> = containers
        .iter()
        .map(|planned| &planned.container.name)
        .collect();
    let counted = view.snapshot.containers.iter();
    let writes = counted
        .filter(|stats| names.contains(&stats.name))
        .filter_map(|stats| Some(stats.block.as_ref()?.writes.bytes_per_second));
    let rate = writes.reduce(|sum, rate| sum + rate)?;
    Some(Rate {
        bytes: Bytes(rate as u64),
        from: "what the containers write to disks now".into(),
    })
}

/// The soonest of what the verdict's forecasts expect; none when it makes none.
pub(super) fn deadline(view: &HostView, now: UnixMillis) -> Option<Deadline> {
    let evidence = view.verdict.iter().flat_map(|verdict| &verdict.evidence);
    let deadlines = evidence.filter_map(|evidence| {
        let passed = now.since(evidence.last_sample);
        Some(Deadline {
            left: evidence.reached_in?.saturating_sub(passed),
            threshold: evidence.threshold.clone(),
        })
    });
    deadlines.min_by_key(|deadline| deadline.left)
}

impl Move {
    /// Chooses after so many rounds of this evacuation, the last but one of which sent `before`; journalled.
    pub(super) fn choose(
        &mut self,
        rounds: u32,
        before: Option<Bytes>,
    ) -> Result<Choice, JournalError> {
        let view = self.delegator.parts().view.borrow().clone();
        let measured = &self.moved.measured;
        let estimate = &self.plan.estimate;
        let mut copy = measured.copy().unwrap_or_else(|| Rate {
            bytes: estimate.rate,
            from: estimate.basis.clone(),
        });
        if let Some(limit) = self
            .active
            .guards()
            .limit
            .filter(|limit| *limit < copy.bytes)
        {
            copy = Rate {
                bytes: limit,
                from: "its limit".into(),
            };
        }
        let dirty = measured
            .dirty()
            .or_else(|| written(&view, &self.plan.containers));
        let choice = Outlook {
            size: estimate.bytes,
            rounds,
            last: measured.last,
            before,
            whole: measured.whole,
            overhead: measured.overhead(&copy),
            copy,
            dirty,
            deadline: deadline(&view, self.delegator.now()),
            obstacle: self.obstacle(),
            word: self.plan.guards.way,
            bounds: bounds(self.delegator.settings()),
        }
        .choose();
        tracing::info!(plan = %self.plan.id, "{}", choice.why);
        self.active.choose(&choice);
        self.append(SourceEvent::Chosen {
            choice: Box::new(choice.clone()),
        })?;
        Ok(choice)
    }
}
