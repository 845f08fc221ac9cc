//! The sweep: discover containers, read the kernel, judge, publish a view, about once a second.
//!
//! Invariants: a broken policy never replaces a good one that is loaded, and where there is none keeps the agent from
//! judging alone; the verdict's state is on disk within seconds, so that a restart does not forget a degradation; a
//! state directory that hangs stops no sweep.
//! Non-goals: acting on a verdict.

use super::comparison::Comparison;
use super::config::AgentConfig;
use super::writer::Writer;
use crate::api::recent::Recent;
use crate::containers::Runtimes;
use crate::health::{Judge, Policy, SavedState, Verdict, VerdictKind};
use crate::migration::view::HostView;
use crate::model::edge::Edge;
use crate::model::units::UnixMillis;
use crate::telemetry::Telemetry;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Between two sweeps: less than the second in which a verdict must follow a fault, for the sweep takes time too.
const INTERVAL: Duration = Duration::from_millis(900);

/// Least time between two sweeps, one of which is on the instant at which a threshold has been passed for its time.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

/// Between two writes of an unchanged verdict's state.
const SAVE_EVERY: Duration = Duration::from_secs(10);

/// Between two writes of the same edges.
const SAVE_EDGES_EVERY: Duration = Duration::from_secs(60);

/// Between two tries of a policy that cannot be used, while none is in force.
const MENDED_POLL: Duration = Duration::from_secs(1);

/// The running sweep.
pub struct Senses {
    view: watch::Receiver<Arc<HostView>>,
    recent: Arc<Recent>,
    court: Arc<Court>,
    comparison: Arc<Comparison>,
}

/// Where the judge and its policy come from.
struct Court {
    judging: Mutex<Judging>,
    policy: Option<PathBuf>,
    /// Where the judge's state is kept.
    saved_at: PathBuf,
    /// Held while the policy is loaded, so that an older text never follows a newer one.
    loading: Mutex<()>,
    /// By file: why it could not be loaded or saved the last time.
    troubles: Mutex<BTreeMap<PathBuf, String>>,
}

/// What judges the host.
enum Judging {
    /// No policy is set.
    Nothing,
    /// The policy that is set cannot be used: since when, and why.
    Unusable(UnixMillis, String),
    /// A policy is in force.
    By(Box<Judge>),
}

impl Court {
    fn new(config: &AgentConfig) -> Self {
        let court = Self {
            judging: Mutex::new(Judging::Nothing),
            policy: config.policy.clone(),
            saved_at: config.state.join("verdict.json"),
            loading: Mutex::default(),
            troubles: Mutex::default(),
        };
        if court.policy.is_some()
            && let Err(why) = court.load()
        {
            tracing::error!(
                "the policy cannot be used, so nothing is judged; mend it, and it is loaded within seconds: {why}"
            );
            *locked(&court.judging) = Judging::Unusable(crate::fleet::now(), why);
        }
        court
    }

    /// Puts the policy file in force; one that is broken leaves in force what is.
    fn load(&self) -> Result<Policy, String> {
        let unset = "no `policy` is set in the agent's configuration";
        let path = self.policy.as_deref().ok_or(unset)?;
        let _loading = locked(&self.loading);
        // The disk is asked before the sweep would wait for it.
        let policy = load_policy(path);
        let first = !matches!(&*locked(&self.judging), Judging::By(_));
        let refused = policy.as_ref().err().filter(|_| !first);
        let refused = refused.map(|why| format!("the policy from before is in force: {why}"));
        self.tell(path, refused);
        let policy = policy?;
        let saved = first.then(|| load_saved::<SavedState>(&self.saved_at));
        let mut judging = locked(&self.judging);
        match &mut *judging {
            Judging::By(judge) => judge.replace_policy(policy.clone()),
            other => {
                let judge = Judge::new(policy.clone(), saved.flatten());
                *other = Judging::By(Box::new(judge));
            }
        }
        Ok(policy)
    }

    /// Takes in what is wrong with a file, or that nothing is.
    fn tell(&self, path: &Path, trouble: Option<String>) {
        let mut troubles = locked(&self.troubles);
        match trouble {
            Some(trouble) => troubles.insert(path.to_owned(), trouble),
            None => troubles.remove(path),
        };
    }

    fn write(&self, path: &Path, bytes: &[u8]) {
        let written = crate::fleet::files::write_private(path, bytes).err();
        let trouble = written.map(|error| {
            let file = path.display();
            format!("cannot save {file}, which a restart of the agent goes on from: {error}")
        });
        if let Some(trouble) = &trouble {
            tracing::error!("{trouble}");
        }
        self.tell(path, trouble);
    }

    /// Loads the policy as soon as it can be used; returns when one is in force.
    fn await_policy(&self) {
        loop {
            std::thread::sleep(MENDED_POLL);
            if !matches!(&*locked(&self.judging), Judging::Unusable(..)) {
                return;
            }
            let loaded = self.load();
            match (loaded, &mut *locked(&self.judging)) {
                (Ok(policy), _) => tracing::info!(policy = policy.name, "policy loaded"),
                (Err(now), Judging::Unusable(_, why)) if *why != now => {
                    tracing::error!("the policy cannot be used yet: {now}");
                    *why = now;
                }
                _ => {}
            }
        }
    }
}

impl Senses {
    /// Starts the sweep.
    ///
    /// # Errors
    /// Its threads cannot be started.
    pub fn start(
        config: &AgentConfig,
        mut telemetry: Telemetry,
        runtimes: Arc<Runtimes>,
    ) -> Result<Self, String> {
        let court = Arc::new(Court::new(config));
        let (publish, view) = watch::channel(Arc::new(HostView::default()));
        let edges_at = edges_file(config);
        let recent = Arc::new(Recent::new(crate::fleet::now()));
        let (judged, keeping) = (court.clone(), recent.clone());
        let comparison = Arc::new(Comparison::default());
        let heard = comparison.clone();
        let cannot = |error| format!("cannot start the sweep's threads: {error}");
        let keeper = court.clone();
        let write = move |path: &Path, bytes: &[u8]| keeper.write(path, bytes);
        let writer = Writer::start(write).map_err(cannot)?;
        let handle = tokio::runtime::Handle::current();
        // A thread of its own: sweeping blocks, and must go on when the async runtime is busy.
        let sweep = move || {
            let mut saved = (VerdictKind::Unknown, Instant::now());
            let mut edges_saved = (0, Instant::now());
            let mut before = None;
            let mut number = 0;
            loop {
                let started = Instant::now();
                let discovery = handle.block_on(runtimes.follow());
                let (now, sampled, up) = (crate::fleet::now(), Instant::now(), up());
                telemetry.hear(discovery.heard);
                let mut snapshot = telemetry.sweep(&discovery.containers, now);
                snapshot.samples.extend(heard.samples(now));
                let mut next = started + INTERVAL;
                let verdict = match &mut *locked(&judged.judging) {
                    Judging::Nothing => None,
                    Judging::Unusable(since, why) => Some(Verdict::without_policy(*since, why)),
                    Judging::By(judge) => {
                        if let Some((before, up)) = before.zip(up) {
                            judge.pass(now, up.saturating_sub(before));
                        }
                        // A judge's first sweep goes on from where its memory was saved.
                        before = up;
                        judge.observe(&snapshot.samples, now);
                        let verdict = judge.verdict(now);
                        if is_due(&verdict, &mut saved) {
                            put(&writer, &judged.saved_at, judge.saved());
                        }
                        if let Some(due) = judge.due() {
                            next = next.min(sampled + due.max(SHORTEST_INTERVAL));
                        }
                        Some(verdict)
                    }
                };
                number += 1;
                let mut problems = discovery.problems;
                problems.extend(locked(&judged.troubles).values().cloned());
                let view = HostView {
                    containers: discovery.containers,
                    problems,
                    snapshot,
                    verdict,
                    number,
                    swept: Some(sampled),
                };
                let view = Arc::new(view);
                keeping.keep(&view);
                if publish.send(view.clone()).is_err() {
                    return;
                }
                save_edges(&view.snapshot.edges, &mut edges_saved, &edges_at, &writer);
                telemetry.rest(next);
            }
        };
        std::thread::Builder::new()
            .name("senses".into())
            .spawn(sweep)
            .map_err(cannot)?;
        if matches!(&*locked(&court.judging), Judging::Unusable(..)) {
            let mended = court.clone();
            std::thread::Builder::new()
                .name("policy".into())
                .spawn(move || mended.await_policy())
                .map_err(cannot)?;
        }
        Ok(Self {
            view,
            recent,
            court,
            comparison,
        })
    }

    /// The latest view; changes once a sweep.
    #[must_use]
    pub fn view(&self) -> watch::Receiver<Arc<HostView>> {
        self.view.clone()
    }

    /// The last views, for whoever records them.
    #[must_use]
    pub fn recent(&self) -> Arc<Recent> {
        self.recent.clone()
    }

    /// Returns when nothing is swept any more, which only a panic of the sweep's thread leads to.
    pub async fn ended(&self) {
        let mut view = self.view();
        while view.changed().await.is_ok() {}
    }

    /// What this device and its fleet tell each other to compare.
    #[must_use]
    pub fn comparison(&self) -> Arc<Comparison> {
        self.comparison.clone()
    }

    /// A function that tells the policy in force.
    #[must_use]
    pub fn policy(&self) -> Arc<dyn Fn() -> Option<Policy> + Send + Sync> {
        let court = self.court.clone();
        Arc::new(move || match &*locked(&court.judging) {
            Judging::By(judge) => Some(judge.policy().clone()),
            Judging::Nothing | Judging::Unusable(..) => None,
        })
    }

    /// A function that loads the policy file again and keeps the old policy when the new one is broken.
    #[must_use]
    pub fn reloader(&self) -> Arc<dyn Fn() -> Result<Policy, String> + Send + Sync> {
        let court = self.court.clone();
        Arc::new(move || court.load())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long the host has been up, its sleep included: no step of the wall clock changes that.
fn up() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .ok()
        .map(Duration::from)
}

fn load_policy(path: &Path) -> Result<Policy, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read policy {}: {error}", path.display()))?;
    Policy::parse(&text, &path.display().to_string()).map_err(|error| error.to_string())
}

fn edges_file(config: &AgentConfig) -> PathBuf {
    config.state.join("edges.json")
}

/// The edges that an earlier life of this agent saw.
#[must_use]
pub fn remembered(config: &AgentConfig) -> Vec<Edge> {
    load_saved(&edges_file(config)).unwrap_or_default()
}

fn load_saved<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let text = std::fs::read(path).ok()?;
    match serde_json::from_slice(&text) {
        Ok(saved) => Some(saved),
        Err(error) => {
            tracing::warn!(
                "{} was not written by this agent ({error}): starting anew",
                path.display()
            );
            None
        }
    }
}

/// Whether the judge's state should be kept now; tells a verdict that changed.
fn is_due(verdict: &Verdict, last: &mut (VerdictKind, Instant)) -> bool {
    if verdict.kind == last.0 && last.1.elapsed() < SAVE_EVERY {
        return false;
    }
    if verdict.kind != last.0 {
        let because: Vec<&str> = verdict
            .evidence
            .iter()
            .map(|evidence| evidence.text.as_str())
            .collect();
        tracing::info!(verdict = %verdict.kind, "{}", because.join("; "));
    }
    *last = (verdict.kind, Instant::now());
    true
}

/// Keeps the edges when there is one more or less, and now and then their figures.
fn save_edges(edges: &[Edge], last: &mut (usize, Instant), path: &Path, writer: &Writer) {
    if edges.len() == last.0 && (edges.is_empty() || last.1.elapsed() < SAVE_EDGES_EVERY) {
        return;
    }
    *last = (edges.len(), Instant::now());
    put(writer, path, &edges);
}

fn put(writer: &Writer, path: &Path, what: &impl Serialize) {
    match serde_json::to_vec(what) {
        Ok(bytes) => writer.put(path, bytes),
        Err(error) => tracing::error!("cannot save {}: {error}", path.display()),
    }
}
