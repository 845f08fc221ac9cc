//! What stands between a plan and its evacuation: the policy's approvals, the operator's pause and the fleet's
//! storm guard.
//!
//! Invariants: an approval is in the journal before it counts; while a plan waits here, giving it up costs
//! nothing but what was copied in advance. Non-goals: who may approve (whoever may use the local API).

use super::events::SourceEvent;
use super::moving::{Move, MoveError};
use crate::fleet::duplicator::{Admission, EvacuationAsk};
use crate::model::plan::PlanGuards;
use crate::model::units::UnixMillis;
use std::time::{Duration, Instant};

/// How far a plan is cleared.
#[derive(Default)]
pub(super) struct Clearance {
    /// It may evacuate.
    pub(super) given: bool,
    /// Since when approvals are waited for.
    asked: Option<Instant>,
    approved: Vec<String>,
    /// Nobody is waited for any longer.
    proceeds: bool,
    /// Whether it was begun to copy in advance.
    in_advance: bool,
    /// An earlier life of the agent cleared it: a plan that runs goes on in a pause.
    begun: bool,
    /// When the storm guard was asked last, and for what.
    tried: Option<(Instant, PlanGuards)>,
    told: String,
}

impl Clearance {
    /// Takes note of a journalled event of an earlier life.
    pub(super) fn note(&mut self, event: &SourceEvent) {
        match event {
            SourceEvent::Approved { approval } => self.approved.push(approval.role.clone()),
            SourceEvent::NotApproved { .. } => self.proceeds = true,
            SourceEvent::Planned { held, .. } => self.in_advance = *held,
            SourceEvent::TargetChosen { .. } => self.begun |= !self.in_advance,
            SourceEvent::GoesOn { .. } => self.begun = true,
            _ => {}
        }
    }

    /// Asks for approvals, for at most `timeout`. In a pause nobody need hurry: the time begins at its end.
    fn ask(&mut self, paused: bool, timeout: Duration) -> Asked {
        if paused {
            self.asked = None;
            return Asked::InTime;
        }
        match self.asked {
            None => {
                self.asked = Some(Instant::now());
                Asked::Anew
            }
            Some(since) if since.elapsed() < timeout => Asked::InTime,
            Some(_) => Asked::InVain,
        }
    }

    /// Whether the plan was approved in this role.
    pub(super) fn approved(&self, role: &str) -> bool {
        self.approved.iter().any(|known| known == role)
    }
}

/// How it stands with the approvals that are missing.
#[derive(Debug, PartialEq)]
enum Asked {
    /// They are asked for from now on.
    Anew,
    /// There is time left.
    InTime,
    /// Nobody gave them in time.
    InVain,
}

/// Between two questions to the storm guard.
const TRY_AGAIN: Duration = Duration::from_secs(15);

/// Between two looks at the time.
pub(super) const LOOK: Duration = Duration::from_secs(1);

impl Move {
    /// Waits until the plan may evacuate.
    pub(super) async fn await_clearance(&mut self) -> Result<(), MoveError> {
        while !self.cleared().await? {
            self.active.heard(LOOK).await;
        }
        Ok(())
    }

    /// Whether the plan may evacuate now. Asks for what is missing.
    pub(super) async fn cleared(&mut self) -> Result<bool, MoveError> {
        let guards = self.active.guards();
        if !self.approved(&guards)? || self.paused()? || !self.admitted(&guards).await? {
            return Ok(false);
        }
        let Some(renewed) = self.active.clear() else {
            return Ok(false);
        };
        if let Some(plan) = renewed {
            // Target, paired device and what they do stay as they were allocated.
            self.plan.event = plan.event;
            self.plan.guards = plan.guards;
            self.plan.containers = plan.containers;
            self.plan.order = plan.order;
            self.plan.groups = plan.groups;
            self.plan.edges = plan.edges;
            // A word without traces takes none away.
            if !plan.fetch_orders.is_empty() {
                self.plan.fetch_orders = plan.fetch_orders;
            }
            self.plan.notes = plan.notes;
            self.plan.choice = plan.choice;
            self.append(SourceEvent::GoesOn {
                plan: Box::new(self.plan.clone()),
            })?;
        }
        self.clearance.given = true;
        Ok(true)
    }

    /// Forgets since when approvals are waited for.
    pub(super) fn wait_anew(&mut self) {
        self.clearance.asked = None;
        self.clearance.tried = None;
        self.active.awaits(&[]);
    }

    fn approved(&mut self, guards: &PlanGuards) -> Result<bool, MoveError> {
        self.take_approvals()?;
        let missing = |role: &&String| !self.clearance.approved(role);
        let missing: Vec<String> = guards.approvals.iter().filter(missing).cloned().collect();
        if missing.is_empty() || self.clearance.proceeds {
            self.active.awaits(&[]);
            return Ok(true);
        }
        self.stay("await approval")?;
        self.active.awaits(&missing);
        let paused = self.in_pause();
        let asked = self.clearance.ask(paused, guards.approval_timeout);
        if asked == Asked::Anew {
            let timeout = u64::try_from(guards.approval_timeout.as_millis()).unwrap_or(u64::MAX);
            self.append(SourceEvent::ApprovalAwaited {
                roles: missing.clone(),
                until: UnixMillis(self.delegator.now().0.saturating_add(timeout)),
            })?;
        }
        if asked != Asked::InVain {
            return Ok(false);
        }
        if !guards.proceed_on_timeout {
            // On disk before the plan is given up: the agent may end while it rolls back.
            if self.active.by_verdict() {
                let refusal = &self.delegator.parts().refusal;
                refusal.set(self.active.stage());
            }
            return Err(MoveError::NotApproved {
                roles: missing.join(", "),
                timeout: guards.approval_timeout,
            });
        }
        self.append(SourceEvent::NotApproved { roles: missing })?;
        self.active.awaits(&[]);
        self.clearance.proceeds = true;
        Ok(true)
    }

    /// Whether an operator's pause keeps what a verdict asked for from moving.
    fn paused(&self) -> Result<bool, MoveError> {
        let paused = self.in_pause();
        if paused {
            self.stay("await the end of the pause")?;
        }
        Ok(paused)
    }

    fn in_pause(&self) -> bool {
        let pauses = &self.delegator.parts().pauses;
        !self.clearance.begun
            && self.active.by_verdict()
            && pauses.now(self.delegator.now()).is_some()
    }

    /// Journals the approvals that came.
    pub(super) fn take_approvals(&mut self) -> Result<(), MoveError> {
        for approval in self.active.approvals() {
            self.append(SourceEvent::Approved {
                approval: approval.clone(),
            })?;
            self.clearance.approved.push(approval.role);
        }
        Ok(())
    }

    async fn admitted(&mut self, guards: &PlanGuards) -> Result<bool, MoveError> {
        if let Some((at, asked)) = &self.clearance.tried
            && at.elapsed() < TRY_AGAIN
            && asked == guards
        {
            return Ok(false);
        }
        let fleet = self.fleet()?;
        let ask = EvacuationAsk {
            plan: self.plan.id.clone(),
            max_percent: guards.max_evacuating,
        };
        let asked = fleet
            .client
            .post(fleet.identity.duplicator(), "/v1/evacuations", &ask);
        let reason = match self.active.unless_cancelled(asked).await {
            Ok(Admission::Admitted) => return Ok(true),
            Ok(full @ Admission::Full { .. }) => full.to_string(),
            Err(MoveError::Peer(error)) if guards.max_evacuating.is_none() => {
                tracing::warn!("the fleet is not told of this evacuation: {error}");
                return Ok(true);
            }
            Err(MoveError::Peer(error)) => format!("the storm guard cannot be asked: {error}"),
            Err(error) => return Err(error),
        };
        let reason =
            format!("{reason}; `lifeboat evacuate --ignore-storm-guard` goes on all the same");
        self.clearance.tried = Some((Instant::now(), guards.clone()));
        self.stay("await the storm guard")?;
        if self.clearance.told != reason {
            self.append(SourceEvent::StormGuard {
                reason: reason.clone(),
            })?;
        }
        self.active.trouble(&reason);
        self.clearance.told = reason;
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_for_an_approval_does_not_run_in_a_pause() {
        let mut clearance = Clearance::default();
        let (long, over) = (Duration::from_hours(1), Duration::ZERO);
        assert_eq!(clearance.ask(false, long), Asked::Anew);
        assert_eq!(clearance.ask(false, long), Asked::InTime);
        assert_eq!(clearance.ask(true, over), Asked::InTime);
        assert_eq!(clearance.ask(true, over), Asked::InTime);
        assert_eq!(clearance.ask(false, over), Asked::Anew);
        assert_eq!(clearance.ask(false, over), Asked::InVain);
    }
}
