//! The target's side of access before arrival: volumes of a plan that is under way, served on this device while
//! their data is still on the source.
//!
//! Invariants: until the switch the source owns (rule 1), so what is served is a copy of its own: what is
//! written to it stays here and never reaches the source or the twin. It ends with the plan. Non-goal: the
//! copy that the twin will run on, which the data plane makes.

use super::active::locked;
use super::delegator::Parts;
use super::journal::plan_directory;
use super::later::Arriving;
use super::target::Target;
use super::traces::{self, TraceUnusable};
use crate::fleet::agent::PairedState;
use crate::model::action::Action;
use crate::model::control::{self, Provided};
use crate::model::fleet::{PeerAddress, Role};
use crate::model::ids::{PlanId, VolumeId};
use crate::model::plan::Plan;
use crate::model::trace::FetchOrder;
use crate::model::volume::VolumeKind;
use crate::serve::{
    Figures, Filler, FrontEnd, Mount, MountError, NbdAddress, NbdError, NbdServer, Store,
    StoreError, UblkDevice, UblkError,
};
use crate::transfer::fetch::{Admit, FetchPlan, Grant, StandIn, Tally};
use crate::transfer::{DataKey, Hop, LinkKey};
use crate::volume::FleetKey;
use crate::volume::one::CONTENT;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How a volume is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// Its files as NBD exports.
    Nbd(NbdAddress),
    /// Its tree mounted at this directory.
    Mount(PathBuf),
    /// The file with this path, or its only one, as a block device.
    Ublk(Option<String>),
}

/// A request to serve a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServeRequest {
    /// Name of the volume.
    pub volume: String,
    /// How.
    pub how: How,
    /// Whether nobody may write.
    pub read_only: bool,
    /// How long a read of what is not here waits for the source before it fails.
    pub patience: Duration,
    /// File of an access trace: what it found hottest is fetched first.
    pub trace: Option<PathBuf>,
    /// Whether what nobody asks for is fetched too.
    pub fill: bool,
}

/// A served volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Served {
    /// Plan.
    pub plan: PlanId,
    /// Volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Where it is served.
    pub at: String,
    /// Whether nobody may write.
    pub read_only: bool,
    /// What was fetched so far.
    pub figures: Figures,
}

/// Why a volume is not served.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The plan is not known here.
    #[error(
        "no plan {0} is under way with this device as its target; `lifeboat status` on its source tells the plan and the target"
    )]
    Unknown(PlanId),
    /// The switch is over.
    #[error("plan {0} was taken over: its volumes are whole here, and the twins use them")]
    Owned(PlanId),
    /// The plan has no such volume.
    #[error("plan {plan} has no volume {volume}; it has: {has}")]
    NoVolume {
        /// Plan.
        plan: PlanId,
        /// Asked for.
        volume: String,
        /// Volumes it has.
        has: String,
    },
    /// It is served already.
    #[error("it is served already at {0}; end that first with `lifeboat serve PLAN VOLUME --end`")]
    Served(String),
    /// It is not served.
    #[error("that volume is not served; `lifeboat serve` lists what is")]
    NotServed(VolumeId),
    /// The source cannot be asked.
    #[error("{0}")]
    Source(String),
    /// The store.
    #[error("{0}")]
    Store(StoreError),
    /// NBD.
    #[error("{0}")]
    Nbd(#[from] NbdError),
    /// FUSE.
    #[error("{0}")]
    Mount(#[from] MountError),
    /// ublk.
    #[error("{0}")]
    Ublk(#[from] UblkError),
    /// The trace.
    #[error("{0}")]
    Trace(#[from] TraceUnusable),
    /// A thread cannot be started, or the copy cannot be removed.
    #[error("cannot {doing}: {error}")]
    System {
        /// What.
        doing: String,
        /// Cause.
        error: std::io::Error,
    },
    /// A task of this process died.
    #[error("internal task failed: {0}; see the agent's log")]
    Task(#[from] tokio::task::JoinError),
}

impl From<StoreError> for AccessError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Fetch(error) => Self::Source(error.to_string()),
            error => Self::Store(error),
        }
    }
}

struct Serving {
    name: String,
    read_only: bool,
    front: Box<dyn FrontEnd>,
    filler: Option<Filler>,
    store: Arc<Store>,
    directory: PathBuf,
}

impl Serving {
    /// Ends it in the order in which its parts use each other; waits for their threads.
    fn close(self) -> PathBuf {
        // Readers that wait for the source get their error now.
        self.store.detach();
        drop(self.front);
        drop(self.filler);
        self.directory
    }
}

type Key = (PlanId, VolumeId);

/// What this device serves of plans of which it is the target.
pub struct Access {
    target: Arc<Target>,
    pairings: Arc<PairedState>,
    serving: Mutex<BTreeMap<Key, Serving>>,
    /// One at a time: what is found free must still be free when it is taken.
    turn: tokio::sync::Mutex<()>,
}

/// How often it is looked whether a plan is over.
const LOOK: Duration = Duration::from_secs(1);

impl Access {
    /// Nothing is served at first.
    #[must_use]
    pub fn new(target: Arc<Target>, pairings: Arc<PairedState>) -> Self {
        Self {
            target,
            pairings,
            serving: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Plans whose twins run here before their data is here.
    #[must_use]
    pub fn arriving(&self) -> Vec<Arriving> {
        self.target.arriving()
    }

    /// What is served.
    #[must_use]
    pub fn served(&self) -> Vec<Served> {
        let serving = locked(&self.serving);
        serving
            .iter()
            .map(|(key, serving)| described(key, serving))
            .collect()
    }

    /// Serves a volume; takes up the copy that an earlier life of the agent left.
    ///
    /// # Errors
    /// [`AccessError`].
    pub async fn serve(
        self: &Arc<Self>,
        id: &PlanId,
        request: ServeRequest,
    ) -> Result<Served, AccessError> {
        let _turn = self.turn.lock().await;
        let (plan, source) = self.plan(id)?;
        let volumes = plan.volumes.iter();
        let mut volumes = volumes.filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)));
        let volume = volumes.clone().find(|volume| volume.name == request.volume);
        let volume = volume.ok_or_else(|| AccessError::NoVolume {
            plan: id.clone(),
            volume: request.volume.clone(),
            has: volumes
                .by_ref()
                .map(|volume| volume.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        })?;
        let key = (id.clone(), volume.id);
        if let Some(known) = locked(&self.serving).get(&key) {
            return Err(AccessError::Served(known.front.at()));
        }
        let parts = &self.target.parts;
        let directory = plan_directory(&parts.state, "target", id)
            .join("served")
            .join(volume.id.to_string());
        let fleet = parts
            .fleet
            .as_ref()
            .ok_or_else(|| AccessError::Unknown(id.clone()))?;
        let fetch = FetchPlan {
            plan: id.clone(),
            volume: volume.id,
            fleet_key: FleetKey(*fleet.identity.fleet_key()),
            admit: admit(parts, &source, id),
            stand_in: stand_in(
                parts,
                &plan,
                &control::StandIn {
                    volume: volume.id,
                    copy: rand::random::<u64>().max(1),
                    fill: request.fill,
                },
                true,
            ),
            insists: true,
            tally: Tally::default(),
        };
        let (name, parts) = (volume.name.clone(), parts.clone());
        let serving =
            tokio::task::spawn_blocking(move || open(name, directory, fetch, &parts, request));
        let serving = serving.await??;
        let served = described(&key, &serving);
        tracing::info!(plan = %id, volume = served.name, at = served.at, "serves a volume before its data is here");
        locked(&self.serving).insert(key.clone(), serving);
        tokio::spawn(self.clone().until_over(key));
        Ok(served)
    }

    /// The plan, of which this device is the target and which owns nothing here yet, and its source.
    fn plan(&self, id: &PlanId) -> Result<(Plan, PeerAddress), AccessError> {
        let unknown = || AccessError::Unknown(id.clone());
        let plan = {
            let plans = self.target.plans();
            let known = plans.get(id).ok_or_else(unknown)?;
            if known.owns.is_some() {
                return Err(AccessError::Owned(id.clone()));
            }
            known.plan.clone()
        };
        let lent = self.pairings.authorised(id, &plan.source);
        let lent = lent.filter(|lent| lent.role == Role::Target);
        Ok((plan, lent.ok_or_else(unknown)?.peer))
    }

    /// Stops serving a volume and removes the copy with what was written to it.
    ///
    /// # Errors
    /// It is not served, or the copy cannot be removed.
    pub async fn end(&self, plan: &PlanId, volume: VolumeId) -> Result<(), AccessError> {
        let serving = locked(&self.serving).remove(&(plan.clone(), volume));
        let serving = serving.ok_or(AccessError::NotServed(volume))?;
        let removed = tokio::task::spawn_blocking(move || {
            let directory = serving.close();
            std::fs::remove_dir_all(&directory).map_err(|error| AccessError::System {
                doing: format!("remove {}", directory.display()),
                error,
            })
        });
        removed.await?
    }

    async fn until_over(self: Arc<Self>, key: Key) {
        loop {
            tokio::time::sleep(LOOK).await;
            if !locked(&self.serving).contains_key(&key) {
                return;
            }
            let under_way = {
                let plans = self.target.plans();
                plans.get(&key.0).is_some_and(|known| known.owns.is_none())
            };
            if !under_way {
                tracing::info!(plan = %key.0, volume = %key.1, "the plan is over; the volume is not served any more");
                if let Err(error) = self.end(&key.0, key.1).await {
                    tracing::error!("after the plan was over: {error}");
                }
                return;
            }
        }
    }

    /// Stops serving everything, also what twins run on; the copies stay for the next life of the agent.
    pub async fn stop(&self) {
        self.target.stop().await;
        let all = std::mem::take(&mut *locked(&self.serving));
        let closing = tokio::task::spawn_blocking(move || {
            for serving in all.into_values() {
                serving.close();
            }
        });
        if let Err(error) = closing.await {
            tracing::error!("internal task failed: {error}");
        }
    }
}

/// Asks the source over the control channel to let this device fetch.
pub(super) fn admit(parts: &Arc<Parts>, source: &PeerAddress, id: &PlanId) -> Admit {
    asking(parts, source, format!("/v1/plans/{id}/provide"), ())
}

/// Who stands in for the source of a plan, where that was delegated; asked for this copy of a volume.
pub(super) fn stand_in(
    parts: &Arc<Parts>,
    plan: &Plan,
    asked: &control::StandIn,
    lists: bool,
) -> Option<StandIn> {
    let chosen = plan.paired.as_ref();
    let chosen = chosen.filter(|_| plan.delegated.contains(Action::Serve));
    let paired = super::allocation::peer(chosen?)?;
    let path = format!("/v1/plans/{}/stand-in", plan.id);
    Some(StandIn {
        admit: asking(parts, &paired, path, asked.clone()),
        lists,
    })
}

/// Asks another device for its keys. The source is asked when one does not answer soon: each has its time.
fn asking(
    parts: &Arc<Parts>,
    whom: &PeerAddress,
    path: String,
    body: impl Serialize + Send + Sync + 'static,
) -> Admit {
    let (parts, whom) = (parts.clone(), whom.clone());
    let runtime = tokio::runtime::Handle::current();
    Box::new(move || {
        let fleet = parts.fleet.as_ref().ok_or("this device is in no fleet")?;
        let client = fleet.client.clone().with_timeout(ADMISSION_TIME);
        let asked = client.post::<_, Provided>(&whom, &path, &body);
        // Called from threads of the data plane, which may wait.
        let provided = runtime.block_on(asked).map_err(|error| error.to_string())?;
        Ok(Grant {
            hop: Hop {
                addr: provided.data,
                link_key: LinkKey(provided.link_key.0),
            },
            data_key: provided.data_key.map(|key| DataKey(key.0)),
        })
    })
}

/// Who is asked to let a device in draws two keys, and may ask the duplicator whether it knows the device.
const ADMISSION_TIME: Duration = Duration::from_secs(5);

fn described((plan, volume): &Key, serving: &Serving) -> Served {
    Served {
        plan: plan.clone(),
        volume: *volume,
        name: serving.name.clone(),
        at: serving.front.at(),
        read_only: serving.read_only,
        figures: serving.store.figures(),
    }
}

fn open(
    name: String,
    directory: PathBuf,
    fetch: FetchPlan,
    parts: &Parts,
    request: ServeRequest,
) -> Result<Serving, AccessError> {
    let ServeRequest {
        how,
        read_only,
        patience,
        trace,
        fill,
        ..
    } = request;
    let mut hot = FetchOrder::default();
    if let Some(file) = trace {
        // A device is one file without a name in its trace, and one with a name in its volume.
        let named = |path: &[u8]| Some(if path.is_empty() { CONTENT } else { path }.to_vec());
        let mut room = usize::MAX;
        let trace = traces::read(&file)?;
        hot.append(&trace, &trace.hottest(|_| true), named, &mut room);
    }
    match &how {
        How::Nbd(_) => {}
        How::Mount(directory) => Mount::check(directory)?,
        How::Ublk(_) => UblkDevice::check(&parts.state)?,
    }
    let devices = parts.settings.device_nodes;
    let store = Store::open(
        &directory,
        &name,
        fetch,
        &parts.transfer,
        patience,
        devices,
        false,
    )?;
    let front: Box<dyn FrontEnd> = match how {
        How::Nbd(address) => Box::new(NbdServer::bind(&address, Arc::clone(&store), read_only)?),
        How::Mount(directory) => Box::new(Mount::at(&directory, Arc::clone(&store), read_only)?),
        How::Ublk(file) => {
            let file = file.as_deref();
            Box::new(UblkDevice::start(&parts.state, file, &store, read_only)?)
        }
    };
    let filler = fill.then(|| Filler::start(&store, hot)).transpose();
    let filler = filler.map_err(|error| AccessError::System {
        doing: "start the background".to_owned(),
        error,
    })?;
    Ok(Serving {
        name,
        read_only,
        front,
        filler,
        store,
        directory,
    })
}
