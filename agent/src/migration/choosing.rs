//! Asks whether a plan copies or switches first, with what is known of it now.
//!
//! Invariant: it is asked before the whole copy and after every round, and each answer is in the journal. Forecasts are
//! looked at during the whole copy, too, and before a prepared plan evacuates: there only switching first is noted.

use super::active::Active;
use super::delegator::Delegator;
use super::events::SourceEvent;
use super::journal::JournalError;
use super::moving::Move;
use super::settings::Settings;
use super::source::PAUSE_MAX;
use super::switch_first::obstacle_of;
use super::view::HostView;
use crate::model::choice::{Bounds, Choice, Deadline, Next, Outlook, Rate, rate_of};
use crate::model::ids::ContainerName;
use crate::model::plan::{Plan, PlannedContainer};
use crate::model::units::{Bytes, UnixMillis};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
        let choice = self.look(rounds, before);
        self.note_choice(&choice)?;
        Ok(choice)
    }

    pub(super) fn note_choice(&mut self, choice: &Choice) -> Result<(), JournalError> {
        tracing::info!(plan = %self.plan.id, "{}", choice.why);
        self.active.choose(choice);
        self.append(SourceEvent::Chosen {
            choice: Box::new(choice.clone()),
        })
    }

    /// What would be chosen now.
    pub(super) fn look(&self, rounds: u32, before: Option<Bytes>) -> Choice {
        self.outlook(rounds, before).choose()
    }

    /// Looks at the forecasts while everything is copied.
    pub(super) fn watch(&self) -> Watch {
        Watch {
            delegator: self.delegator.clone(),
            active: self.active.clone(),
            plan: self.plan.clone(),
            outlook: self.outlook(0, None),
            cannot_serve: self.moved.cannot_serve.clone(),
            began: (Instant::now(), self.active.copied()),
        }
    }

    fn outlook(&self, rounds: u32, before: Option<Bytes>) -> Outlook {
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
        Outlook {
            size: estimate.bytes,
            copied: Bytes(0),
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
    }
}

/// Looks at the forecasts while everything is copied.
pub(super) struct Watch {
    delegator: Arc<Delegator>,
    active: Arc<Active>,
    plan: Plan,
    /// What was known when the copy began; what changes with time is looked at anew.
    outlook: Outlook,
    cannot_serve: Option<String>,
    /// When the copy began, and what was read before.
    began: (Instant, u64),
}

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row that must agree: there is no way back.
const LOOKS: u32 = 5;

impl Watch {
    /// The choice to switch first, once a forecast makes it the better one for what is left.
    pub(super) async fn late(&self) -> Choice {
        let mut agree = 0;
        loop {
            tokio::time::sleep(LOOK).await;
            let view = self.delegator.parts().view.borrow().clone();
            let rest = deadline(&view, self.delegator.now())
                .map(|deadline| self.rest(&view, deadline))
                .filter(Outlook::is_late);
            let choice = rest.map(Outlook::choose);
            match choice.filter(|choice| choice.next == Next::SwitchFirst) {
                None => agree = 0,
                Some(choice) => {
                    agree += 1;
                    if agree == LOOKS {
                        return choice;
                    }
                }
            }
        }
    }

    fn rest(&self, view: &HostView, deadline: Deadline) -> Outlook {
        let (since, before) = self.began;
        let read = Bytes(self.active.copied().saturating_sub(before));
        let mut outlook = self.outlook.clone();
        if let Some(rate) = rate_of(read, since.elapsed()) {
            outlook.copy = rate;
        }
        outlook.copied = read;
        outlook.dirty = written(view, &self.plan.containers).or(outlook.dirty);
        outlook.deadline = Some(deadline);
        outlook.obstacle = obstacle_of(&self.plan, view).or_else(|| self.cannot_serve.clone());
        outlook
    }
}
