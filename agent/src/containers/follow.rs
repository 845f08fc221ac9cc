//! Whether a runtime can have anything new since it was last asked.
//!
//! A list of 50 containers costs Podman 40 ms of CPU, an event that did not happen nothing. So the runtime's
//! own events decide, and what they can miss is looked for elsewhere: ended processes and new cgroups by
//! the caller, everything else by a list every [`AUDIT`]. Invariant: when in doubt, the runtime is asked.

use super::client::{Runtime, RuntimeError};
use super::discover::Look;
use super::ops::Event;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Longest time without a list, and between two attempts to follow the events of a runtime that has none
/// (Podman with `events_logger = "none"`).
const AUDIT: Duration = Duration::from_secs(15);

/// A runtime does not say when it has begun to tell events; until then it is asked.
const SETTLE: Duration = Duration::from_secs(3);

/// Containers of which the name is remembered from events.
const HEARD: usize = 256;

/// What is remembered of one runtime between two looks.
#[derive(Default)]
pub(super) struct Follow {
    events: Option<BoxStream<'static, Result<Event, RuntimeError>>>,
    opened: Option<Instant>,
    last: Option<(Instant, Look)>,
    /// Containers that the events named lately: id and name, oldest first.
    heard: VecDeque<(String, String)>,
    /// The last list failed or had problems.
    doubt: bool,
}

impl Follow {
    /// Whether the list can have changed since [`Follow::remember`]; takes the events that came, and waits
    /// for none.
    pub(super) async fn may_have_changed(&mut self, runtime: &Runtime) -> bool {
        let mut changed = self.doubt
            || self
                .last
                .as_ref()
                .is_none_or(|(at, _)| at.elapsed() >= AUDIT);
        if self.events.is_none() && self.opened.is_none_or(|at| at.elapsed() >= AUDIT) {
            self.opened = Some(Instant::now());
            // A runtime that is not there is told of by the list.
            self.events = runtime
                .events()
                .await
                .ok()
                .map(futures_util::StreamExt::boxed);
        }
        let Some(events) = &mut self.events else {
            return true;
        };
        while let Some(event) = events.next().now_or_never() {
            match event {
                Some(Ok(event)) => {
                    changed |= concerns_list(&event.action);
                    if self.heard.iter().all(|(id, _)| *id != event.id) {
                        if self.heard.len() == HEARD {
                            self.heard.pop_front();
                        }
                        self.heard.push_back((event.id, event.name));
                    }
                }
                Some(Err(_)) | None => {
                    self.events = None;
                    return true;
                }
            }
        }
        changed || self.opened.is_none_or(|at| at.elapsed() < SETTLE)
    }

    /// Containers that the events named lately: id and name. They may be gone before they are listed.
    pub(super) fn heard(&self) -> impl Iterator<Item = &(String, String)> {
        self.heard.iter()
    }

    /// What the list last showed.
    pub(super) fn last(&self) -> Option<&Look> {
        self.last.as_ref().map(|(_, look)| look)
    }

    /// Keeps what a list showed. After one that failed or had problems the runtime is asked again; what is
    /// shown meanwhile is what it said before, and that it is old.
    pub(super) fn remember(
        &mut self,
        seen: Result<Look, RuntimeError>,
    ) -> Result<Look, RuntimeError> {
        match seen {
            Ok(look) => {
                self.doubt = !look.problems.is_empty();
                self.last = Some((Instant::now(), look.clone()));
                Ok(look)
            }
            Err(error) => {
                self.doubt = true;
                let Some((at, last)) = &self.last else {
                    return Err(error);
                };
                let age = at.elapsed().as_secs();
                Ok(Look {
                    containers: last.containers.clone(),
                    problems: vec![format!("{error}; its containers are shown as {age} s ago")],
                })
            }
        }
    }
}

impl std::fmt::Debug for Follow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follow")
            .field("follows", &self.events.is_some())
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

/// Health checks and `exec` come every few seconds and change nothing that a list shows.
fn concerns_list(action: &str) -> bool {
    !(action.starts_with("exec") || action.starts_with("health_status"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_checks_are_no_reason_to_ask_and_everything_unknown_is() {
        for action in [
            "exec_create: true",
            "exec_die",
            "exec_died",
            "health_status: healthy",
        ] {
            assert!(!concerns_list(action), "{action}");
        }
        for action in ["start", "die", "died", "rename", "pause", "new-in-2030"] {
            assert!(concerns_list(action), "{action}");
        }
    }

    #[tokio::test]
    async fn a_runtime_without_events_is_asked_every_time() {
        let runtime = Runtime::new("/nonexistent/p.sock");
        let mut follow = Follow::default();
        follow.remember(Ok(Look::default())).unwrap();
        assert!(follow.may_have_changed(&runtime).await);
        assert!(follow.may_have_changed(&runtime).await);
    }

    #[test]
    fn after_a_list_that_failed_the_one_before_is_shown_with_its_age() {
        let failed = || RuntimeError::Unreachable {
            socket: "/s".into(),
            operation: "list containers".to_owned(),
            source: std::io::ErrorKind::TimedOut.into(),
        };
        let mut follow = Follow::default();
        assert!(follow.remember(Err(failed())).is_err());
        follow.remember(Ok(Look::default())).unwrap();
        assert!(!follow.doubt);
        let shown = follow.remember(Err(failed())).unwrap();
        assert!(follow.doubt && shown.problems[0].contains("shown as 0 s ago"));
    }
}
