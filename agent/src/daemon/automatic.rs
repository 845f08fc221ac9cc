//! What the verdict leads to: data copied in advance at stage `prepare`, plans at stage `evacuate`.
//!
//! Invariants: one plan at a time; nothing is started while an operator paused the policy; what an operator
//! aborted or a role did not approve is not tried again before the stage changes, nor after a restart. Non-goals: judging.

use crate::api::local::{Acting, FailedTry};
use crate::health::{OnTimeout, Policy, Stage, Verdict, VerdictKind};
use crate::migration::delegator::Delegator;
use crate::migration::pause::Pauses;
use crate::migration::planner::Request;
use crate::migration::refusal::Refusal;
use crate::migration::view::HostView;
use crate::migration::{NOT_APPROVED, OPERATOR_ABORT};
use crate::model::container::State;
use crate::model::ids::PlanId;
use crate::model::plan::{MigrationEvent, PlanGuards};
use crate::model::units::UnixMillis;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Between two tries of a plan that could not start or was rolled back.
const RETRY: Duration = Duration::from_secs(15);
/// The longest of them.
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// How the reason begins of a plan that was given up because the device is well again.
const RECOVERED: &str = "the verdict does not ask for it any more";

/// Drives the delegator by the verdict.
pub struct Automatic {
    delegator: Arc<Delegator>,
    pauses: Arc<Pauses>,
    policy: Arc<dyn Fn() -> Option<Policy> + Send + Sync>,
    /// The plan that this driver started and has not seen end.
    own: Option<Own>,
    refusal: Arc<Refusal>,
    /// The last try, when it failed, and until when no other is made.
    failed: Option<(FailedTry, Instant)>,
    acting: watch::Sender<Acting>,
    pause: Duration,
    told: String,
}

struct Own {
    plan: PlanId,
    /// Whether it began by copying in advance.
    prepared: bool,
    /// What it was told to do last.
    stage: Stage,
    /// Since when the verdict asks for nothing.
    recovered: Option<Instant>,
}

impl Own {
    fn of_earlier_life((plan, prepared): (PlanId, bool)) -> Self {
        Self {
            plan,
            prepared,
            stage: if prepared {
                Stage::Prepare
            } else {
                Stage::Evacuate
            },
            recovered: None,
        }
    }
}

impl Automatic {
    /// A driver that has started nothing yet.
    #[must_use]
    pub fn new(
        delegator: Arc<Delegator>,
        pauses: Arc<Pauses>,
        policy: Arc<dyn Fn() -> Option<Policy> + Send + Sync>,
        refusal: Arc<Refusal>,
    ) -> Self {
        Self {
            delegator,
            pauses,
            policy,
            own: None,
            refusal,
            failed: None,
            acting: watch::Sender::default(),
            pause: RETRY,
            told: String::new(),
        }
    }

    /// What keeps it from acting; changes with the verdict.
    #[must_use]
    pub fn acting(&self) -> watch::Receiver<Acting> {
        self.acting.subscribe()
    }

    /// Drives until the views end.
    pub async fn run(mut self, mut view: watch::Receiver<Arc<HostView>>) {
        while view.changed().await.is_ok() {
            let now = view.borrow_and_update().clone();
            if let Some(verdict) = &now.verdict {
                self.follow(verdict, &now).await;
                self.acting.send_replace(Acting {
                    refused: self.refusal.stage(),
                    failed: self.failed.as_ref().map(|(failed, _)| failed.clone()),
                });
            }
        }
    }

    async fn follow(&mut self, verdict: &Verdict, view: &HostView) {
        let wanted = verdict.stage.filter(|stage| *stage >= Stage::Prepare);
        // What is asked for again soon still waits, and why must be told then.
        if wanted.is_none() && !self.too_early() {
            self.failed = None;
        }
        if self.own.is_none() {
            self.own = self.delegator.by_verdict().map(Own::of_earlier_life);
        }
        if let Some(own) = self.own.take() {
            self.own = match self.delegator.outcome(&own.plan) {
                None => self.steer(own, wanted, verdict).await,
                Some(Ok(())) => {
                    self.pause = RETRY;
                    None
                }
                Some(Err(reason)) => {
                    self.rolled_back(&own, reason);
                    None
                }
            };
            return;
        }
        self.refusal.follow(verdict);
        // Containers that a release took from us are dead here; only what still lives can leave.
        let alive = view
            .containers
            .iter()
            .any(|container| container.runtime.is_some() && container.state == State::Running);
        let busy = || self.delegator.status().iter().any(|plan| !plan.over);
        let Some(stage) = wanted.filter(|_| self.refusal.stage().is_none()) else {
            return;
        };
        if !alive || self.too_early() || self.paused() || busy() {
            return;
        }
        self.own = self.act(stage, verdict).await.map(|plan| Own {
            plan,
            prepared: stage == Stage::Prepare,
            stage,
            recovered: None,
        });
    }

    /// Tells a plan under way what the verdict wants now.
    async fn steer(
        &mut self,
        mut own: Own,
        wanted: Option<Stage>,
        verdict: &Verdict,
    ) -> Option<Own> {
        if !self.delegator.waits(&own.plan) {
            return Some(own);
        }
        match wanted {
            Some(Stage::Evacuate) if own.stage == Stage::Prepare => {
                own.recovered = None;
                if !self.too_early()
                    && !self.paused()
                    && let Some(plan) = self.act(Stage::Evacuate, verdict).await
                {
                    own.prepared &= plan == own.plan;
                    (own.plan, own.stage) = (plan, Stage::Evacuate);
                }
            }
            Some(stage) => {
                own.recovered = None;
                if stage < own.stage && own.prepared {
                    self.delegator.hold(&own.plan);
                    own.stage = stage;
                } else if stage < own.stage {
                    self.give_up(&own);
                }
            }
            // What cannot be seen is not well.
            None if verdict.kind == VerdictKind::Unknown => {}
            None => {
                let since = *own.recovered.get_or_insert_with(Instant::now);
                let hold = (self.policy)().map_or(Duration::ZERO, |policy| policy.guards.hold);
                if own.prepared && own.stage == Stage::Evacuate {
                    self.delegator.hold(&own.plan);
                    own.stage = Stage::Prepare;
                }
                if !own.prepared || since.elapsed() >= hold {
                    self.give_up(&own);
                }
            }
        }
        Some(own)
    }

    fn give_up(&self, own: &Own) {
        if let Err(error) = self.delegator.abort(&own.plan, RECOVERED) {
            tracing::warn!("not given up: {error}");
        }
    }

    /// Prepares or evacuates everything; the plan, or none, and told, when that cannot be.
    async fn act(&mut self, stage: Stage, verdict: &Verdict) -> Option<PlanId> {
        let request = self.request(verdict);
        let started = match stage {
            Stage::Evacuate => self.delegator.evacuate(&request).await,
            Stage::Prepare | Stage::Watch => self.delegator.prepare(&request).await,
        };
        match started {
            Ok(plan) => {
                tracing::warn!(%plan, %stage, "degraded: the policy acts");
                self.failed = None;
                Some(plan)
            }
            Err(error) => {
                self.failed(stage, error.to_string());
                None
            }
        }
    }

    fn request(&self, verdict: &Verdict) -> Request {
        let guards = (self.policy)().map_or_else(PlanGuards::default, |policy| PlanGuards {
            approvals: policy.guards.approvals,
            approval_timeout: policy.guards.approval_timeout,
            proceed_on_timeout: policy.guards.on_timeout == OnTimeout::Proceed,
            max_evacuating: policy.guards.fleet_max_evacuating,
            limit: policy.guards.limit,
            accepted_losses: Vec::new(),
            way: None,
        });
        let evidence = verdict.evidence.iter();
        Request {
            containers: Vec::new(),
            delegate: verdict.delegate.clone(),
            event: MigrationEvent::Degraded {
                evidence: evidence.map(|evidence| evidence.text.clone()).collect(),
            },
            guards,
            traces: Vec::new(),
        }
    }

    fn rolled_back(&mut self, own: &Own, reason: String) {
        if reason.contains(OPERATOR_ABORT) || reason.contains(NOT_APPROVED) {
            tracing::warn!("{reason}: no automatic plan before the stage of the verdict changes");
            // Mostly it is noted already; who aborts it may be about to.
            if self.refusal.stage().is_none() {
                self.refusal.set(own.stage);
            }
        } else if !reason.contains(RECOVERED) {
            self.failed(own.stage, reason);
        }
    }

    fn failed(&mut self, stage: Stage, why: String) {
        if why != self.told {
            tracing::error!(%stage, "degraded, and the policy could not act: {why}");
            self.told.clone_from(&why);
        }
        let pause = u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX);
        let again = UnixMillis(self.delegator.now().0.saturating_add(pause));
        // A plan that fails late has frozen the workload: each failure waits twice as long.
        self.failed = Some((FailedTry { why, again }, Instant::now() + self.pause));
        self.pause = (self.pause * 2).min(RETRY_MAX);
    }

    fn too_early(&self) -> bool {
        (self.failed.as_ref()).is_some_and(|(_, until)| Instant::now() < *until)
    }

    fn paused(&self) -> bool {
        self.pauses.now(self.delegator.now()).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::{Runtimes, Scope};
    use crate::migration::delegator::Parts;
    use crate::model::container::Container;

    #[tokio::test]
    async fn a_try_that_failed_is_told_for_as_long_as_it_keeps_the_next_one_waiting() {
        let state = tempfile::tempdir().unwrap();
        let cgroup_root = state.path().to_owned();
        let parts = Parts::of_test(state.path(), Runtimes::new(&[], Scope { cgroup_root }));
        let (pauses, refusal) = (parts.pauses.clone(), parts.refusal.clone());
        let delegator = Arc::new(Delegator::new(Arc::new(parts)));
        let mut automatic = Automatic::new(delegator, pauses, Arc::new(|| None), refusal);
        let view = HostView {
            containers: vec![Container {
                runtime: Some("/run/none.sock".into()),
                ..Container::of_cgroup("db", 1, 1)
            }],
            ..HostView::default()
        };
        let verdict = |kind, stage| Verdict {
            kind,
            stage,
            ..Verdict::default()
        };
        let degraded = verdict(VerdictKind::Degraded, Some(Stage::Evacuate));
        automatic.follow(&degraded, &view).await;
        let failed = automatic.failed.clone().expect("nothing can be moved");
        // Well for a moment: the wait goes on, and who asks is told why.
        let healthy = verdict(VerdictKind::Healthy, None);
        automatic.follow(&healthy, &view).await;
        automatic.follow(&degraded, &view).await;
        assert_eq!(automatic.failed, Some(failed.clone()));
        // Once it is over nothing is left of it.
        automatic.failed = Some((failed.0, Instant::now()));
        automatic.follow(&healthy, &view).await;
        assert_eq!(automatic.failed, None);
    }
}
