//! After a restart of the agent: what an earlier life left is gone on with, from what arrived, or its roll-back is.

use super::active::{Active, locked};
use super::clearance::Clearance;
use super::delegator::{Delegator, begun_by_verdict, plan_ids, plan_of, target_peer};
use super::events::SourceEvent;
use super::journal::{Entry, Journal, plan_directory};
use super::moving::{Done, Move, Moved, OPERATOR_ABORT};
use super::returning::mirror_directory;
use super::{source, switch};
use crate::model::plan::{Plan, SignedRelease};
use std::sync::Arc;
use std::time::Duration;

impl Delegator {
    /// Goes on with what an earlier life of the agent left behind. When this returns, the ports that it forwarded are
    /// known to be forwarded: nobody may be told before that they are free. A journal that cannot be read is told of and
    /// left alone: the other plans must not wait for it.
    pub async fn resume(self: &Arc<Self>) {
        for id in plan_ids(&self.parts.state, "source") {
            let directory = plan_directory(&self.parts.state, "source", &id);
            let (journal, entries) = match Journal::<SourceEvent>::open(&directory) {
                Ok(opened) => opened,
                Err(error) => {
                    self.parts.trouble(&error);
                    continue;
                }
            };
            self.learn_rate(&id);
            let Some(plan) = plan_of(&entries) else {
                continue;
            };
            let is_over = |event: &SourceEvent| {
                matches!(
                    event,
                    SourceEvent::Whole { .. } | SourceEvent::Aborted { .. }
                )
            };
            if entries.iter().any(|entry| is_over(&entry.event)) {
                // An earlier life may have died before it removed it; mostly there is none.
                let _ = std::fs::remove_dir_all(mirror_directory(&self.parts.state, &id));
            }
            let after = After::of(entries.iter().map(|entry| &entry.event));
            let stopped = |entry: &Entry<SourceEvent>| {
                matches!(entry.event, SourceEvent::SourceStopped { .. })
            };
            let forwards = match &after {
                After::Forward => true,
                After::GoOn(UnderWay::Released(_)) => entries.iter().any(stopped),
                _ => false,
            };
            if let Some(target) = target_peer(&plan).filter(|_| forwards) {
                self.forward(&plan, &target).await;
            }
            match after {
                After::Nothing | After::Forward => {}
                After::FreeTarget(reason) => {
                    tokio::spawn(self.clone().free_target(plan, journal, reason));
                }
                After::GoOn(after) => self.resume_plan(plan, journal, &entries, after),
            }
        }
    }

    /// Tells the target of a rolled-back plan until it has removed what it made for it.
    pub(super) async fn free_target(
        self: Arc<Self>,
        plan: Plan,
        mut journal: Journal<SourceEvent>,
        reason: String,
    ) {
        let mut pause = Duration::from_secs(1);
        let freed = loop {
            if let Some(freed) = self.dismiss(&plan, &reason).await {
                break freed;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(60));
        };
        if let Err(error) = journal.append(self.now(), freed) {
            tracing::error!("{error}");
        }
    }

    fn resume_plan(
        self: &Arc<Self>,
        plan: Plan,
        journal: Journal<SourceEvent>,
        entries: &[Entry<SourceEvent>],
        after: UnderWay,
    ) {
        let mut core = Move {
            active: Arc::new(Active::new(&plan, is_held(entries))),
            delegator: self.clone(),
            plan,
            journal,
            done: Done::default(),
            moved: Moved::default(),
            clearance: Clearance::default(),
        };
        core.active.set_plan(&core.plan);
        locked(&self.plans).insert(core.plan.id.clone(), core.active.clone());
        for entry in entries {
            if let SourceEvent::Prepared { times, .. } = &entry.event {
                core.active.keeps(times);
            }
            core.done.note(entry.at, &entry.event);
            core.moved.note(entry.at, &entry.event);
            core.clearance.note(&entry.event);
        }
        // Aborted, and the agent ended before the journal had it: a verdict begins none while a refusal stands.
        let refused = self.parts.refusal.stage().is_some() && begun_by_verdict(entries);
        if refused && matches!(after, UnderWay::Unreleased) {
            core.active.cancel(OPERATOR_ABORT);
        }
        tokio::spawn(async move {
            match (after, target_peer(&core.plan)) {
                (UnderWay::Released(release), Some(target)) => {
                    // Committed in an earlier life: an abort has come too late.
                    let _ = core.active.commit();
                    switch::Released {
                        core: &mut core,
                        target,
                        release,
                        paused: None,
                    }
                    .finish()
                    .await;
                }
                (UnderWay::Returning { word, reason }, Some(target)) => {
                    let _ = core.active.commit();
                    core.take_back(&target, &word, &reason).await;
                }
                (UnderWay::Released(_) | UnderWay::Returning { .. }, None) => core.active.trouble(
                    "released, but the target's address in the journal cannot be read; repair it and restart the agent",
                ),
                (UnderWay::GivenUp(reason), _) => core.roll_back(&reason).await,
                (UnderWay::Unreleased, _) => core.go_on().await,
            }
        });
    }
}

/// What a source does about a plan after a restart: its journal alone decides.
pub(super) enum After {
    /// Nothing is left to do.
    Nothing,
    /// Completed: its ports are forwarded.
    Forward,
    /// Rolled back for this reason: the target must still hear of it.
    FreeTarget(String),
    /// It was under way.
    GoOn(UnderWay),
}

/// How far a plan was that was under way.
pub(super) enum UnderWay {
    /// Released: there is no way back.
    Released(SignedRelease),
    /// The target has given everything back.
    Returning {
        /// Its word.
        word: SignedRelease,
        /// Why.
        reason: String,
    },
    /// It was being rolled back for this reason.
    GivenUp(String),
    /// Neither.
    Unreleased,
}

impl After {
    pub(super) fn of<'a>(events: impl Iterator<Item = &'a SourceEvent>) -> Self {
        let (mut after, mut under_way) = (Self::Nothing, UnderWay::Unreleased);
        for event in events {
            match event {
                SourceEvent::Released { release } => {
                    under_way = UnderWay::Released(release.clone());
                }
                SourceEvent::Returning { word, reason } => {
                    under_way = UnderWay::Returning {
                        word: word.clone(),
                        reason: reason.clone(),
                    };
                }
                SourceEvent::GivenUp { reason } if !matches!(under_way, UnderWay::Released(_)) => {
                    under_way = UnderWay::GivenUp(reason.clone());
                }
                _ => {}
            }
            after = match event {
                SourceEvent::Completed => Self::Forward,
                SourceEvent::Aborted { reason } => Self::FreeTarget(reason.clone()),
                SourceEvent::TargetFreed { .. } => Self::Nothing,
                _ => Self::GoOn(UnderWay::Unreleased),
            };
        }
        match after {
            Self::GoOn(_) => Self::GoOn(under_way),
            over => over,
        }
    }
}

/// Whether the plan must not evacuate yet.
fn is_held(entries: &[Entry<SourceEvent>]) -> bool {
    let told = |entry: &Entry<SourceEvent>| matches!(entry.event, SourceEvent::GoesOn { .. });
    let first = entries.first().map(|entry| &entry.event);
    matches!(first, Some(SourceEvent::Planned { held: true, .. })) && !entries.iter().any(told)
}

/// Lives of the agent in which a plan may get no further before it is given up: it may be what ends them.
const LIVES_MAX: u32 = 12;

impl Move {
    /// Goes on with what arrived before the agent was started anew. Until the plan freezes them again, the
    /// containers run.
    async fn go_on(mut self) {
        self.active.enter("resume");
        if self.moved.lives >= LIVES_MAX {
            let reason =
                format!("the agent was started {LIVES_MAX} times without a round of replication");
            return self.roll_back(&reason).await;
        }
        self.let_run().await;
        match self.append(SourceEvent::Resumed) {
            Ok(()) => source::run(self).await,
            Err(error) => self.roll_back(&error.to_string()).await,
        }
    }
}
