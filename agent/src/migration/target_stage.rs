//! A host with made-up runtimes, on which a target is tested over several lives.

use super::delegator::Parts;
use super::events::{ContainerFence, Place, SourceEvent, TargetEvent};
use super::journal::{self, Entry, Journal, plan_directory};
use super::settings::Settings;
use super::target::{Target, rebuild};
use crate::containers::{Fence, Means, Runtime, Runtimes, Scope};
use crate::fleet::agent::PairedState;
use crate::model::action::Actions;
use crate::model::container::Container;
use crate::model::control::Owns;
use crate::model::fleet::PeerAddress;
use crate::model::ids::{DeviceId, PlanId, VolumeId};
use crate::model::plan::{
    Chosen, Estimate, MigrationEvent, Plan, PlannedContainer, PlannedStep, SignedRelease, TwinState,
};
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::{VolumeKind, VolumeSpec};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

pub(super) const TWIN: &str = "db";
pub(super) const VOLUME: &str = "db-data";
pub(super) const PID: i32 = 4242;

/// What a made-up runtime holds.
#[derive(Default)]
pub(super) struct Held {
    /// Containers and the runtime's word for their states.
    pub(super) containers: BTreeMap<String, &'static str>,
    /// Volumes and where they are.
    pub(super) volumes: BTreeMap<String, PathBuf>,
    /// Where new ones go.
    pub(super) root: PathBuf,
    /// Changes that it was asked for.
    pub(super) asked: Vec<String>,
    /// Networks, whose names are their ids.
    pub(super) networks: BTreeSet<String>,
    /// Changes that it refuses, by a part of what is asked.
    pub(super) refused: Option<&'static str>,
    /// It refuses them because somebody uses the thing.
    pub(super) in_use: bool,
}

impl Held {
    /// What Docker would answer, as far as a target asks.
    pub(super) fn answer(&mut self, method: &Method, path: &str) -> (StatusCode, Value) {
        let path = path.strip_prefix("/v1.41/").unwrap();
        if method != Method::GET {
            self.asked.push(format!("{method} {path}"));
            let asked = format!("{method} {path}");
            if self.refused.is_some_and(|part| asked.contains(part)) {
                let why = json!({ "message": "made to refuse" });
                let failed = StatusCode::INTERNAL_SERVER_ERROR;
                return (
                    if self.in_use {
                        StatusCode::CONFLICT
                    } else {
                        failed
                    },
                    why,
                );
            }
        }
        let done = (StatusCode::OK, Value::Null);
        let none = (StatusCode::NOT_FOUND, json!({ "message": "no such thing" }));
        match *path.split('/').collect::<Vec<_>>() {
            ["version"] => (StatusCode::OK, json!({ "Version": "24.0.0" })),
            ["images", "json"] => (StatusCode::OK, json!([])),
            ["containers", name, what] => {
                let Some(state) = self.containers.get_mut(name) else {
                    return none;
                };
                match what {
                    "json" => {
                        let pid = if *state == "running" { PID } else { 0 };
                        let shown = json!({
                            "Id": name,
                            "State": { "Status": *state, "Pid": pid },
                            "HostConfig": { "RestartPolicy": { "Name": "no" } },
                        });
                        return (StatusCode::OK, shown);
                    }
                    "start" => *state = "running",
                    "stop" | "kill" => *state = "exited",
                    _ => {}
                }
                done
            }
            ["containers", name] => {
                let name = name.split('?').next().unwrap();
                self.containers.remove(name).map_or(none, |_| done)
            }
            ["networks", name] if !self.networks.contains(name) => none,
            ["networks", name] => {
                if *method == Method::DELETE {
                    self.networks.remove(name);
                }
                (StatusCode::OK, json!({ "Name": name, "Id": name }))
            }
            ["volumes", "create"] => {
                let at = self.root.join(VOLUME);
                std::fs::create_dir_all(&at).unwrap();
                self.volumes.insert(VOLUME.to_owned(), at.clone());
                (
                    StatusCode::CREATED,
                    json!({ "Name": VOLUME, "Mountpoint": at }),
                )
            }
            ["volumes", name] => match (self.volumes.get(name).cloned(), method) {
                (None, _) => none,
                (Some(_), &Method::DELETE) => {
                    self.volumes.remove(name);
                    done
                }
                (Some(at), _) => (StatusCode::OK, json!({ "Name": name, "Mountpoint": at })),
            },
            _ => none,
        }
    }
}

/// A runtime with the API of Docker as far as a target uses it.
pub(super) struct Fake {
    pub(super) socket: PathBuf,
    pub(super) held: Arc<Mutex<Held>>,
    pub(super) task: Option<JoinHandle<()>>,
}

impl Fake {
    pub(super) fn new(socket: PathBuf) -> Self {
        let root = socket.with_extension("volumes");
        Self {
            held: Arc::new(Mutex::new(Held {
                root,
                ..Held::default()
            })),
            socket,
            task: None,
        }
    }

    pub(super) fn up(&mut self, world: &tokio::runtime::Runtime) {
        async fn answer(
            State(held): State<Arc<Mutex<Held>>>,
            request: Request,
        ) -> (StatusCode, Json<Value>) {
            let path = request.uri().path().to_owned();
            let (status, body) = held.lock().unwrap().answer(request.method(), &path);
            (status, Json(body))
        }
        let routes = Router::new().fallback(answer).with_state(self.held.clone());
        let _inside = world.enter();
        let listener = UnixListener::bind(&self.socket).unwrap();
        self.task = Some(tokio::spawn(async move {
            axum::serve(listener, routes).await.unwrap();
        }));
    }

    pub(super) fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap()
    }

    pub(super) fn state(&self) -> Option<&'static str> {
        self.held().containers.get(TWIN).copied()
    }

    pub(super) fn asked(&self, what: &str) -> bool {
        self.held().asked.iter().any(|asked| asked.contains(what))
    }

    pub(super) fn set(&self, state: &'static str) {
        self.held().containers.insert(TWIN.to_owned(), state);
    }
}

/// A host with two runtimes, of which the first is of the source's kind, and a target on it.
pub(super) struct Stage {
    pub(super) directory: TempDir,
    pub(super) world: tokio::runtime::Runtime,
    pub(super) docker: Fake,
    pub(super) podman: Fake,
}

/// One life of the agent.
pub(super) struct Life {
    pub(super) runtime: tokio::runtime::Runtime,
    pub(super) target: Arc<Target>,
}

impl Life {
    pub(super) fn check_free(&self, plan: &Plan, places: &[Place], runtime: &Fake) -> bool {
        let socket = runtime.socket.display().to_string();
        let runtimes = &self.target.parts.runtimes;
        let runtime = runtimes.get(&socket).unwrap();
        self.target.check_free(plan, places, runtime).is_ok()
    }

    pub(super) fn kill(self) {
        drop(self.target);
        self.runtime.shutdown_timeout(Duration::from_secs(5));
    }
}

impl Stage {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let fake = |name: &str| Fake::new(directory.path().join(name));
        Self {
            docker: fake("docker.sock"),
            podman: fake("podman.sock"),
            world: tokio::runtime::Runtime::new().unwrap(),
            directory,
        }
    }

    /// With its first runtime up, which holds the twin in this state.
    pub(super) fn with(state: &'static str) -> Self {
        let mut stage = Self::new();
        stage.docker.up(&stage.world);
        stage.docker.set(state);
        stage
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) fn live(&self) -> Life {
        let sockets = [&self.docker, &self.podman].map(|one| one.socket.display().to_string());
        let scope = Scope {
            cgroup_root: self.path("cgroup"),
        };
        let settings = Settings {
            settle_seconds: 0,
            bind_roots: vec![self.directory.path().to_owned()],
            ..Settings::default()
        };
        let runtimes = Runtimes::new(&sockets, scope);
        let parts = Parts {
            settings,
            ..Parts::of_test(self.directory.path(), runtimes)
        };
        let pairings = PairedState::open(self.directory.path(), "target".into()).unwrap();
        let data = "127.0.0.1:1".parse().unwrap();
        let target = Target::new(Arc::new(parts), Arc::new(pairings), data);
        Life {
            runtime: tokio::runtime::Runtime::new().unwrap(),
            target: Arc::new(target),
        }
    }

    /// A life that takes up what earlier ones left.
    pub(super) fn resume(&self) -> Life {
        let life = self.live();
        let inside = life.runtime.enter();
        life.target.resume();
        drop(inside);
        life
    }

    /// A life that knows what earlier ones left, and does nothing about it.
    pub(super) fn idle(&self) -> Life {
        let life = self.live();
        let (journal, entries) = Journal::open(&self.plan_directory()).unwrap();
        let known = rebuild(journal, &entries).unwrap();
        life.target.plans().insert(plan_id(), known);
        life
    }

    pub(super) fn plan_directory(&self) -> PathBuf {
        plan_directory(self.directory.path(), "target", &plan_id())
    }

    pub(super) fn write(&self, events: Vec<TargetEvent>) {
        let (mut journal, _) = Journal::open(&self.plan_directory()).unwrap();
        for event in events {
            journal.append(crate::fleet::now(), event).unwrap();
        }
    }

    pub(super) fn journal(&self) -> Vec<TargetEvent> {
        let entries: Vec<Entry<TargetEvent>> = journal::read(&self.plan_directory()).unwrap();
        entries.into_iter().map(|entry| entry.event).collect()
    }

    /// The plan was accepted and is owned, with a bind mount.
    pub(super) fn owned(&self) -> Vec<TargetEvent> {
        let place = self.path("place");
        std::fs::create_dir_all(&place).unwrap();
        vec![self.accepted(VolumeKind::Bind, place), owns()]
    }

    pub(super) fn accepted(&self, kind: VolumeKind, path: PathBuf) -> TargetEvent {
        let (volume, made) = (VolumeId(0), true);
        TargetEvent::Accepted {
            plan: Box::new(plan(kind, self.path("place"))),
            places: vec![Place { volume, path, made }],
            runtime: Some(self.docker.socket.display().to_string()),
        }
    }

    /// The same, switched first, and the twin was ready; its data is here but not in its place.
    pub(super) fn filling(&self) -> Vec<TargetEvent> {
        let store = self.path("store");
        std::fs::create_dir_all(store.join("data")).unwrap();
        let source = PeerAddress {
            device: source(),
            addr: "127.0.0.1:1".parse().unwrap(),
        };
        let mut events = self.owned();
        events.push(TargetEvent::Opening {
            source,
            stores: BTreeMap::from([(VolumeId(0), store)]),
        });
        let fence = Fence {
            container: TWIN.to_owned(),
            runtime: self.docker.socket.display().to_string(),
            how: Means::RestartPolicy {
                previous: json!({ "Name": "no" }),
            },
        };
        let container = TWIN.into();
        events.push(TargetEvent::TwinFenced {
            fence: ContainerFence { container, fence },
        });
        events.extend([twin_ready(), TargetEvent::Completed]);
        events
    }

    /// This device was the source of a plan of the twin, and has released it.
    pub(super) fn release(&self, change: impl FnOnce(&mut Plan)) {
        let mut left = plan(VolumeKind::Bind, self.path("place"));
        left.id = "p2-2".into();
        change(&mut left);
        let directory = plan_directory(self.directory.path(), "source", &left.id);
        let (mut journal, _) = Journal::<SourceEvent>::open(&directory).unwrap();
        let TargetEvent::Owns { release, .. } = owns() else {
            panic!("it is one")
        };
        let (plan, held) = (Box::new(left), false);
        for event in [
            SourceEvent::Planned { plan, held },
            SourceEvent::Released { release },
        ] {
            journal.append(crate::fleet::now(), event).unwrap();
        }
    }

    pub(super) fn proven(&self) -> TargetEvent {
        let data = std::fs::metadata(self.path("store/data")).unwrap();
        TargetEvent::Proven {
            inodes: BTreeMap::from([(VolumeId(0), data.ino())]),
        }
    }
}

pub(super) fn plan_id() -> PlanId {
    "p1-1".into()
}

pub(super) fn source() -> DeviceId {
    "source".into()
}

pub(super) fn plan(kind: VolumeKind, source_path: PathBuf) -> Plan {
    let container = Container {
        id: TWIN.into(),
        runtime: Some("/run/docker.sock".into()),
        ..Container::of_cgroup(TWIN, 1, 1)
    };
    let volumes = match &kind {
        VolumeKind::Named(name) => vec![json!({ "Name": name })],
        _ => Vec::new(),
    };
    Plan {
        id: plan_id(),
        created: UnixMillis(1),
        event: MigrationEvent::Operator,
        guards: Default::default(),
        source: source(),
        containers: vec![PlannedContainer {
            container,
            service_ports: Default::default(),
            inspect: json!({ "Name": TWIN }),
            networks: Vec::new(),
            volumes,
            image_size: Bytes(0),
        }],
        order: vec![PlannedStep {
            containers: vec![TWIN.into()],
            sequential: false,
        }],
        groups: Vec::new(),
        edges: Vec::new(),
        volumes: vec![VolumeSpec {
            id: VolumeId(0),
            name: VOLUME.into(),
            kind,
            source_path,
            containers: vec![TWIN.into()],
            size: Bytes(1),
            holes: Bytes(0),
            entries: 1,
            device_nodes: 0,
            unreadable: 0,
            changes: Default::default(),
            unused: Default::default(),
        }],
        fetch_orders: BTreeMap::new(),
        epochs: BTreeMap::new(),
        delegated: Actions::default(),
        notes: Vec::new(),
        blockers: Vec::new(),
        estimate: Estimate {
            bytes: Bytes(1),
            rate: Bytes(1),
            basis: String::new(),
            duration: Duration::ZERO,
        },
        choice: None,
        target: Some(Chosen {
            device: "target".into(),
            address: "127.0.0.1:1".into(),
            pairing: None,
            explanation: Vec::new(),
        }),
        paired: None,
    }
}

pub(super) fn owns() -> TargetEvent {
    TargetEvent::Owns {
        release: SignedRelease {
            body: String::new(),
            certificate: Vec::new(),
            signature: Vec::new(),
        },
        owns: Owns {
            plan: plan_id(),
            target: "target".into(),
            volumes: Vec::new(),
        },
        back: Default::default(),
    }
}

pub(super) fn twin_ready() -> TargetEvent {
    TargetEvent::TwinReady {
        twin: TwinState {
            container: TWIN.into(),
            ready: Some("it settled".into()),
            after: Duration::ZERO,
            not_carried: Vec::new(),
            error: None,
            left: None,
        },
    }
}

/// Waits until something is so.
pub(super) fn until(what: &str, is_so: impl Fn() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < Duration::from_secs(30), "never {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(super) fn trouble(life: &Life) -> String {
    let plans = life.target.plans();
    let known = plans.get(&plan_id()).unwrap();
    let later = known.later.as_ref();
    let later = later.and_then(|later| later.arrival().trouble);
    known.trouble.clone().or(later).unwrap_or_default()
}

pub(super) async fn known(target: &Target) -> (Plan, &Runtime) {
    let (plan, _) = target.known(&source(), &plan_id()).unwrap();
    let runtime = target.runtime_for(&plan).await.unwrap();
    (plan, runtime)
}
