//! After a restart of the agent: what an earlier life left is continued or rolled back.

use super::active::{Active, locked};
use super::clearance::Clearance;
use super::delegator::{Delegator, plan_ids, plan_of, target_peer};
use super::events::SourceEvent;
use super::journal::{Entry, Journal, plan_directory};
use super::moving::{Done, Move};
use super::switch;
use crate::model::plan::Plan;
use std::sync::Arc;
use std::time::Duration;

impl Delegator {
    /// Continues or rolls back what an earlier life of the agent left behind. A journal that cannot be read
    /// is told of and left alone: the other plans must not wait for it.
    pub fn resume(self: &Arc<Self>) {
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
            match entries.last().map(|entry| &entry.event) {
                Some(SourceEvent::Completed) => {
                    if let Some(target) = target_peer(&plan) {
                        let delegator = self.clone();
                        tokio::spawn(async move {
                            delegator.forward(&plan, target.addr.ip()).await;
                        });
                    }
                }
                Some(SourceEvent::Aborted { reason }) => {
                    tokio::spawn(self.clone().free_target(plan, journal, reason.clone()));
                }
                Some(SourceEvent::TargetFreed) | None => {}
                Some(_) => self.resume_plan(plan, journal, &entries),
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
        while !self.dismiss(&plan, &reason).await {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(60));
        }
        if let Err(error) = journal.append(self.now(), SourceEvent::TargetFreed) {
            tracing::error!("{error}");
        }
    }

    fn resume_plan(
        self: &Arc<Self>,
        plan: Plan,
        journal: Journal<SourceEvent>,
        entries: &[Entry<SourceEvent>],
    ) {
        let active = Arc::new(Active::new(&plan, false));
        active.set_plan(&plan);
        locked(&self.plans).insert(plan.id.clone(), active.clone());
        let release = entries.iter().find_map(|entry| match &entry.event {
            SourceEvent::Released { release } => Some(release.clone()),
            _ => None,
        });
        let mut done = Done::default();
        for entry in entries {
            done.note(entry.at, &entry.event);
        }
        let mut core = Move {
            delegator: self.clone(),
            plan,
            journal,
            active,
            done,
            clearance: Clearance::default(),
        };
        tokio::spawn(async move {
            match (release, target_peer(&core.plan)) {
                (Some(release), Some(target)) => {
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
                (Some(_), None) => core.active.trouble(
                    "released, but the target's address in the journal cannot be read; repair it and restart the agent",
                ),
                (None, _) => {
                    core.roll_back("the agent was restarted before the release").await;
                }
            }
        });
    }
}
