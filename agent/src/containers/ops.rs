//! Holding, ending, starting and watching containers.
//!
//! Invariants: a group is paused whole or not at all; every wait is bounded.

use super::cgroups::{FreezeError, freeze, kill_all_but, thaw};
use super::client::{Runtime, RuntimeError, escape};
use super::discover::Runtimes;
use crate::model::container::{Container, State};
use futures_util::future::join_all;
use futures_util::{Stream, StreamExt as _};
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Between two looks at a container that is about to change.
const LOOK: Duration = Duration::from_millis(25);

/// A change in a container's life, as the runtime told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The runtime's word: `create`, `start`, `die`, `pause`, `unpause`, `remove` or `destroy`, ….
    pub action: String,
    /// Id of the container.
    pub id: String,
    /// Name of the container.
    pub name: String,
}

/// A container could not be paused or let run again.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The kernel failed, for a container without a runtime.
    #[error(transparent)]
    Cgroup(#[from] FreezeError),
    /// The container's runtime is not one of the agent's.
    #[error(
        "container {0} belongs to a runtime that is not in the agent's configuration; add its socket to `runtimes`"
    )]
    UnknownRuntime(String),
}

impl Runtime {
    /// The compatible API's description of a container.
    ///
    /// # Errors
    /// When there is no such container or the runtime fails.
    pub async fn inspect(&self, container: &str) -> Result<Value, RuntimeError> {
        let path = format!("/containers/{}/json", escape(container));
        self.get(&path, &format!("inspect container {container}"))
            .await
    }

    /// Stops all processes of a container where they are. Pausing a paused one is no error.
    ///
    /// # Errors
    /// When it does not run or the runtime fails.
    pub async fn pause(&self, container: &str) -> Result<(), RuntimeError> {
        match self.act(container, "pause", "pause container").await {
            Err(_) if self.state(container).await? == State::Paused => Ok(()),
            result => result,
        }
    }

    /// Lets a paused container run again. Doing so to a running one is no error.
    ///
    /// # Errors
    /// When it has ended or the runtime fails.
    pub async fn unpause(&self, container: &str) -> Result<(), RuntimeError> {
        match self.act(container, "unpause", "unpause container").await {
            Err(_) if self.state(container).await? == State::Running => Ok(()),
            result => result,
        }
    }

    /// Ends a running or paused container at once (SIGKILL) and waits until it has ended. The runtime
    /// then counts it as stopped on purpose. No error when it has ended already. Runtimes signal the
    /// first process alone and thaw a paused container for it: the others may run until it is gone,
    /// see [`Runtimes::kill`].
    ///
    /// # Errors
    /// When it still lives after `timeout`, or the runtime fails.
    pub async fn kill(&self, container: &str, timeout: Duration) -> Result<(), RuntimeError> {
        let operation = format!("kill container {container}");
        let before = self.state(container).await?;
        if matches!(before, State::Exited | State::Created) {
            return Ok(());
        }
        let killed = self
            .act(container, "kill?signal=SIGKILL", "kill container")
            .await;
        if let Err(error) = killed {
            return match self.state(container).await? {
                State::Exited => Ok(()),
                _ => Err(error),
            };
        }
        let since = Instant::now();
        let mut thawed = before != State::Paused;
        while since.elapsed() < timeout {
            match self.state(container).await {
                Ok(State::Exited | State::Created) => return Ok(()),
                Err(error) if error.not_found() => return Ok(()), // made with --rm
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            // A cgroup v1 freezer holds the signal back.
            if !thawed && since.elapsed() > LOOK * 4 {
                thawed = true;
                let _ = self.act(container, "unpause", "unpause container").await;
            }
            tokio::time::sleep(LOOK).await;
        }
        Err(RuntimeError::Timeout {
            socket: self.socket().to_owned(),
            operation,
            after: timeout,
        })
    }

    /// Starts a container. No error when it runs already.
    ///
    /// # Errors
    /// When the runtime refuses, for instance because of a [`super::Fence`].
    pub async fn start(&self, container: &str) -> Result<(), RuntimeError> {
        self.act(container, "start", "start container").await
    }

    /// Asks a container to end (its stop signal), and kills it after `grace`.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn stop(&self, container: &str, grace: Duration) -> Result<(), RuntimeError> {
        let action = format!("stop?t={}", grace.as_secs());
        self.act(container, &action, "stop container").await
    }

    /// Removes a container, ending it when it runs; its named volumes stay. No error when it is gone.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn remove(&self, container: &str) -> Result<(), RuntimeError> {
        let path = format!("/containers/{}?force=true&v=false", escape(container));
        let operation = format!("remove container {container}");
        match self.delete(&path, &operation).await {
            Err(error) if error.not_found() => Ok(()),
            result => result,
        }
    }

    /// State of a container now.
    ///
    /// # Errors
    /// When there is no such container or the runtime fails.
    pub async fn state(&self, container: &str) -> Result<State, RuntimeError> {
        let inspect = self.inspect(container).await?;
        Ok(super::inspect::state(
            inspect["State"]["Status"].as_str().unwrap_or_default(),
        ))
    }

    /// The last `lines` lines a container wrote, both streams, as text.
    ///
    /// # Errors
    /// When the runtime keeps no logs or fails.
    pub async fn logs(&self, container: &str, lines: u32) -> Result<String, RuntimeError> {
        let path = format!(
            "/containers/{}/logs?stdout=true&stderr=true&tail={lines}",
            escape(container)
        );
        let operation = format!("read the logs of container {container}");
        let bytes = self.get_bytes(&path, &operation).await?;
        Ok(unframe(&bytes))
    }

    /// Container events from now on, as they happen; ends when the runtime ends.
    ///
    /// # Errors
    /// When nobody takes the question; afterwards each item can be an error, which is the last item.
    pub async fn events(
        &self,
    ) -> Result<impl Stream<Item = Result<Event, RuntimeError>> + Send + use<>, RuntimeError> {
        let filters = escape(r#"{"type":["container"]}"#);
        let path = format!("/events?filters={filters}");
        let pieces = self.endless(&path, "follow events").await?;
        let start = (Box::pin(pieces), Vec::new());
        Ok(futures_util::stream::unfold(
            start,
            |(mut pieces, mut rest): (_, Vec<u8>)| async move {
                loop {
                    if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                        let line: Vec<u8> = rest.drain(..=end).collect();
                        if let Some(event) = event(&line) {
                            return Some((Ok(event), (pieces, rest)));
                        }
                        continue;
                    }
                    match pieces.next().await? {
                        Ok(bytes) => rest.extend_from_slice(&bytes),
                        Err(error) => return Some((Err(error), (pieces, rest))),
                    }
                }
            },
        ))
    }

    async fn act(&self, container: &str, action: &str, what: &str) -> Result<(), RuntimeError> {
        let path = format!("/containers/{}/{action}", escape(container));
        self.post(&path, None, &format!("{what} {container}"))
            .await
            .map(|_| ())
    }
}

impl Runtimes {
    /// Pauses several containers side by side; containers without a runtime by freezing their cgroup.
    /// When one cannot be paused, those that were are let run again. Returns how long it took.
    ///
    /// # Errors
    /// The first failure.
    pub async fn pause_all(&self, containers: &[&Container]) -> Result<Duration, PauseError> {
        let since = Instant::now();
        let results = join_all(containers.iter().map(|c| self.pause_one(c))).await;
        let failure = results.into_iter().find_map(Result::err);
        match failure {
            None => Ok(since.elapsed()),
            Some(error) => {
                let _ = self.unpause_all(containers).await;
                Err(error)
            }
        }
    }

    /// Lets several containers run again, side by side; tries all of them. Returns how long it took.
    ///
    /// # Errors
    /// The first failure.
    pub async fn unpause_all(&self, containers: &[&Container]) -> Result<Duration, PauseError> {
        let since = Instant::now();
        let results = join_all(containers.iter().map(|c| self.unpause_one(c))).await;
        match results.into_iter().find_map(Result::err) {
            None => Ok(since.elapsed()),
            Some(error) => Err(error),
        }
    }

    /// Ends a container as [`Runtime::kill`] does. When it is paused, none of its processes runs another
    /// instruction: it writes nothing after its pause.
    ///
    /// # Errors
    /// When it still lives after `timeout`, a process cannot be signalled, or its runtime fails.
    pub async fn kill(&self, container: &Container, timeout: Duration) -> Result<(), PauseError> {
        let runtime = self
            .owner(container)?
            .ok_or_else(|| PauseError::UnknownRuntime(container.name.to_string()))?;
        let state = runtime.inspect(&container.id).await?["State"].take();
        if super::inspect::state(state["Status"].as_str().unwrap_or_default()) == State::Paused
            && let Some(first) = state["Pid"]
                .as_i64()
                .and_then(|pid| i32::try_from(pid).ok())
            && let Ok(Some(cgroup)) = self.scope().cgroup_of(first, &container.id)
            && cgroup.path == container.cgroup_path
        {
            kill_all_but(&self.directory(container), first)?;
        }
        Ok(runtime.kill(&container.id, timeout).await?)
    }

    async fn pause_one(&self, container: &Container) -> Result<(), PauseError> {
        match self.owner(container)? {
            Some(runtime) => Ok(runtime.pause(&container.id).await?),
            None => Ok(freeze(&self.directory(container)).await?),
        }
    }

    async fn unpause_one(&self, container: &Container) -> Result<(), PauseError> {
        match self.owner(container)? {
            Some(runtime) => Ok(runtime.unpause(&container.id).await?),
            None => Ok(thaw(&self.directory(container)).await?),
        }
    }

    fn owner(&self, container: &Container) -> Result<Option<&Runtime>, PauseError> {
        match (&container.runtime, self.of(container)) {
            (None, _) => Ok(None),
            (Some(_), Some(runtime)) => Ok(Some(runtime)),
            (Some(_), None) => Err(PauseError::UnknownRuntime(container.name.to_string())),
        }
    }

    /// The cgroup2 directory of a container.
    #[must_use]
    pub fn directory(&self, container: &Container) -> PathBuf {
        self.scope()
            .cgroup_root
            .join(container.cgroup_path.trim_start_matches('/'))
    }
}

/// A line of a runtime's event stream; none when it is not about a container.
#[must_use]
pub fn event(line: &[u8]) -> Option<Event> {
    let event: Value = serde_json::from_slice(line).ok()?;
    if event["Type"].as_str()? != "container" {
        return None;
    }
    Some(Event {
        action: event["Action"].as_str()?.to_owned(),
        id: event["Actor"]["ID"].as_str()?.to_owned(),
        name: event["Actor"]["Attributes"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
    })
}

/// Takes the 8-byte frame headers out of a log stream: stream number, three zeros, length (Docker API,
/// "Stream format"). A container with a terminal has no frames.
#[must_use]
pub fn unframe(bytes: &[u8]) -> String {
    let mut text = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [0..=2, 0, 0, 0, a, b, c, d, tail @ ..] = rest {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        let (piece, after) = tail.split_at(length.min(tail.len()));
        text.extend_from_slice(piece);
        rest = after;
    }
    text.extend_from_slice(rest);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_frames_of_both_streams_become_plain_text() {
        let mut framed = vec![1, 0, 0, 0, 0, 0, 0, 3];
        framed.extend_from_slice(b"ab\n");
        framed.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 2]);
        framed.extend_from_slice(b"c\n");
        assert_eq!(unframe(&framed), "ab\nc\n");
        assert_eq!(unframe(b"no frames\n"), "no frames\n");
    }

    #[test]
    fn a_frame_longer_than_the_stream_is_cut_and_not_a_panic() {
        assert_eq!(unframe(&[1, 0, 0, 0, 255, 255, 255, 255, b'x']), "x");
    }

    #[test]
    fn only_container_events_are_taken() {
        let line = br#"{"status":"die","Type":"container","Action":"die","Actor":{"ID":"ab","Attributes":{"name":"db"}}}"#;
        let taken = event(line).unwrap();
        assert_eq!((taken.action.as_str(), taken.name.as_str()), ("die", "db"));
        assert_eq!(event(br#"{"Type":"network","Action":"connect"}"#), None);
    }
}
