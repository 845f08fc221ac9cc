//! The target's side: sessions of epochs, records in, acknowledgements out.
//!
//! Invariants: nothing is written before its record opened; an epoch is acknowledged only after one
//! write-back made it durable, with the root computed here; a session survives reconnections and
//! applies each record once; one connection feeds a session at a time.

use super::Options;
use super::connection::{Incoming, Receiver, Transmitter};
use super::feed::{Arrived, Feed, ReceiveError, Voice};
use super::message::{
    Answers, Basis, Done, Failure, FailureCode, Holdings, Message, SessionId, have_messages,
};
use super::queue::{OnPanic, lock};
use super::rebuild::Rebuild;
use super::seal::{DataKey, LinkKey, Salt, Sealer};
use super::sender::path_hash;
use crate::model::ids::{Epoch, PlanId, Signature, VolumeId};
use crate::volume::apply::Destination;
use crate::volume::state::EntryMap;
use crate::volume::{BlockMap, BlockSize, FleetKey, scan};
use std::collections::{BTreeMap, VecDeque};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A volume that a plan brings here.
#[derive(Clone, Debug)]
pub struct ReceiveVolume {
    /// Number in the plan.
    pub id: VolumeId,
    /// Name for people.
    pub name: String,
    /// Directory to rebuild it in; made if missing. What the source does not have is removed from it.
    pub destination: PathBuf,
    /// It is one file or block device at `destination`, not a directory.
    pub one: bool,
}

/// What a target admits.
#[derive(Clone, Debug)]
pub struct ReceivePlan {
    /// The plan.
    pub plan: PlanId,
    /// Key that whoever connects for it must know.
    pub link_key: LinkKey,
    /// Key that records are sealed with.
    pub data_key: DataKey,
    /// Key of signatures.
    pub fleet_key: FleetKey,
    /// Its volumes.
    pub volumes: Vec<ReceiveVolume>,
}

/// How far a volume has come on the target.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ReceiveProgress {
    /// Number in the plan.
    pub volume: VolumeId,
    /// Last complete epoch and its root.
    pub complete: Option<(Epoch, Signature)>,
    /// Plain bytes written so far, over all epochs.
    pub bytes_written: u64,
    /// Of those, bytes that it had already, at the same place of the same file.
    pub bytes_again: u64,
    /// Records applied so far, over all epochs.
    pub records: u64,
    /// Why the last epoch stopped, if it did.
    pub failure: Option<String>,
}

/// A plan that is admitted, with all its state.
pub(super) struct Reception {
    pub(super) plan: ReceivePlan,
    pub(super) volumes: BTreeMap<VolumeId, Volume>,
    pub(super) options: Options,
    /// What this device holds of any volume.
    pub(super) map: Option<Arc<BlockMap>>,
}

pub(super) struct Volume {
    pub(super) spec: ReceiveVolume,
    pub(super) state: Mutex<VolumeState>,
    /// Held while a session is being made, which can take a scan.
    pub(super) beginning: Mutex<()>,
    pub(super) bytes_written: AtomicU64,
    pub(super) bytes_again: AtomicU64,
    pub(super) records: AtomicU64,
}

impl Volume {
    /// Ends a session for good.
    fn replace(&self, old: &Session) {
        {
            let replaced = &mut lock(&self.state).replaced;
            replaced.push_back((old.id, old.salt));
            if replaced.len() > REPLACED_CAP {
                replaced.pop_front();
            }
        }
        old.take_over(None);
        // Its last records are applied, or not, before anything new is.
        drop(lock(&old.running));
        let written = old.rebuild.bytes_written.load(Ordering::Relaxed);
        self.bytes_written.fetch_add(written, Ordering::Relaxed);
        let again = old.rebuild.bytes_again.load(Ordering::Relaxed);
        self.bytes_again.fetch_add(again, Ordering::Relaxed);
    }
}

#[derive(Default)]
pub(super) struct VolumeState {
    pub(super) complete: Option<Complete>,
    pub(super) session: Option<Arc<Session>>,
    pub(super) failure: Option<String>,
    /// Sessions that others took the place of, newest last: what is left of them must not come back.
    replaced: VecDeque<(SessionId, Salt)>,
}

/// Most of them that are remembered.
const REPLACED_CAP: usize = 64;

/// The tree of the last complete epoch.
pub(super) struct Complete {
    pub(super) epoch: Epoch,
    pub(super) root: Signature,
    pub(super) block_size: BlockSize,
    pub(super) tree: EntryMap,
}

/// One attempt at one epoch, across reconnections.
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) epoch: Epoch,
    /// A paired device that seals draws another one when it was started anew.
    salt: Salt,
    pub(super) basis: Basis,
    pub(super) opener: Sealer,
    pub(super) rebuild: Rebuild,
    pub(super) arrived: Mutex<Arrived>,
    pub(super) answers: Mutex<Answers>,
    pub(super) outcome: Mutex<Option<Result<Done, Failure>>>,
    /// Held by the connection that feeds the session.
    pub(super) running: Mutex<()>,
    pub(super) socket: Mutex<Option<Arc<TcpStream>>>,
}

impl Session {
    /// Ends the connection that feeds the session now, and makes `next` the one that does.
    fn take_over(&self, next: Option<Arc<TcpStream>>) {
        if let Some(old) = std::mem::replace(&mut *lock(&self.socket), next) {
            // It may be closed already.
            let _ = old.shutdown(Shutdown::Both);
        }
    }
}

impl Reception {
    pub(super) fn new(mut plan: ReceivePlan, options: Options, map: Option<Arc<BlockMap>>) -> Self {
        let volumes = std::mem::take(&mut plan.volumes)
            .into_iter()
            .map(|spec| {
                let volume = Volume {
                    spec,
                    state: Mutex::default(),
                    beginning: Mutex::default(),
                    bytes_written: AtomicU64::new(0),
                    bytes_again: AtomicU64::new(0),
                    records: AtomicU64::new(0),
                };
                (volume.spec.id, volume)
            })
            .collect();
        Self {
            plan,
            volumes,
            options,
            map,
        }
    }

    pub(super) fn link_key(&self) -> LinkKey {
        self.plan.link_key.clone()
    }

    pub(super) fn progress(&self) -> Vec<ReceiveProgress> {
        let progress = |volume: &Volume| {
            let state = lock(&volume.state);
            let running = state.session.as_ref().map(|session| &session.rebuild);
            let sum = |before: &AtomicU64, now: fn(&Rebuild) -> &AtomicU64| {
                let now = running.map_or(0, |rebuild| now(rebuild).load(Ordering::Relaxed));
                before.load(Ordering::Relaxed) + now
            };
            ReceiveProgress {
                volume: volume.spec.id,
                complete: state.complete.as_ref().map(|last| (last.epoch, last.root)),
                bytes_written: sum(&volume.bytes_written, |rebuild| &rebuild.bytes_written),
                bytes_again: sum(&volume.bytes_again, |rebuild| &rebuild.bytes_again),
                records: volume.records.load(Ordering::Relaxed),
                failure: state.failure.clone(),
            }
        };
        self.volumes.values().map(progress).collect()
    }

    /// Ends every connection of the plan.
    pub(super) fn dismiss(&self) {
        for volume in self.volumes.values() {
            if let Some(session) = lock(&volume.state).session.take() {
                session.take_over(None);
            }
        }
    }

    /// Ends what is being received of a volume, and forgets what was.
    pub(super) fn forget(&self, id: VolumeId) {
        let Some(volume) = self.volumes.get(&id) else {
            return;
        };
        let _beginning = lock(&volume.beginning);
        let old = lock(&volume.state).session.take();
        if let Some(old) = old {
            volume.replace(&old);
        }
        lock(&volume.state).complete = None;
    }

    /// Serves one agreed connection until it ends.
    pub(super) fn serve(
        &self,
        mut receiver: Receiver,
        transmitter: Transmitter,
        socket: &Arc<TcpStream>,
    ) {
        let plan = &self.plan.plan;
        let (id, epoch, begin) = match receiver.next(Vec::new()) {
            Ok(Incoming::Message(id, epoch, begin @ Message::Begin { .. })) => (id, epoch, begin),
            Ok(_) => {
                return tracing::warn!(%plan, "data connection refused: it does not begin an epoch");
            }
            Err(error) => return tracing::warn!(%plan, "data connection ended: {error}"),
        };
        let Some(volume) = self.volumes.get(&id) else {
            return tracing::warn!(%plan, volume = %id, "data connection refused: the plan has no such volume");
        };
        let voice = Voice {
            transmitter: Mutex::new(transmitter),
            volume: id,
            epoch,
            watermark: AtomicU64::new(0),
            over: AtomicBool::new(false),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| voice.heartbeat(self.options.patience / 4));
            let _end = OnPanic(|| voice.end());
            if let Err(error) = self.session(volume, epoch, &begin, &mut receiver, &voice, socket) {
                let failure = error.failure();
                if failure.code == FailureCode::Forgotten {
                    tracing::warn!(%plan, "{}", failure.text);
                } else {
                    tracing::error!(%plan, "{}", failure.text);
                    lock(&volume.state).failure = Some(failure.text.clone());
                }
                voice.say(&Message::Failed(failure));
                receiver.discard();
            }
            voice.end();
        });
    }

    /// Finds or makes the session and feeds it.
    fn session(
        &self,
        volume: &Volume,
        epoch: Epoch,
        begin: &Message,
        receiver: &mut Receiver,
        voice: &Voice,
        socket: &Arc<TcpStream>,
    ) -> Result<(), ReceiveError> {
        let Message::Begin {
            session: id,
            salt,
            block_size,
            basis,
        } = begin
        else {
            return Ok(());
        };
        let beginning = lock(&volume.beginning);
        if lock(&volume.state).replaced.contains(&(*id, *salt)) {
            return Err(ReceiveError::Replaced {
                volume: volume.spec.name.clone(),
                epoch,
            });
        }
        let current = lock(&volume.state).session.clone();
        let resumed = current
            .filter(|session| (session.id, session.epoch, session.salt) == (*id, epoch, *salt));
        let session = match resumed {
            Some(session) => {
                session.take_over(Some(Arc::clone(socket)));
                session
            }
            None => {
                let session = self.begin(volume, *id, epoch, *salt, *block_size, *basis)?;
                session.take_over(Some(Arc::clone(socket)));
                lock(&volume.state).session = Some(Arc::clone(&session));
                session
            }
        };
        drop(beginning);
        let _running = lock(&session.running);
        let watermark = lock(&session.arrived).watermark();
        voice.watermark.store(watermark, Ordering::Relaxed);
        voice.say(&Message::Begun {
            watermark,
            basis: session.basis,
            salt: *salt,
            holdings: match &self.map {
                None => Holdings::Closed,
                Some(map) if map.entries() == 0 => Holdings::Empty,
                Some(_) => Holdings::Filled,
            },
        });
        // Of a connection that broke before the first record nobody knows how much of the list it brought.
        if session.basis == Basis::Everything && lock(&session.arrived).is_empty() {
            let key = &self.plan.fleet_key;
            let held = session.rebuild.held(|path| path_hash(key, path));
            for message in have_messages(held) {
                voice.say(&message);
            }
        }
        voice.say(&Message::HaveEnd);
        // Those that an earlier connection may have lost.
        let answers: Vec<Message> = lock(&session.answers).messages().collect();
        for answer in &answers {
            voice.say(answer);
        }
        let outcome = lock(&session.outcome).clone();
        match outcome {
            Some(Ok(done)) => voice.say(&Message::Done(done)),
            Some(Err(failure)) => voice.say(&Message::Failed(failure)),
            None => {
                return Feed {
                    reception: self,
                    volume,
                    session: &session,
                    voice,
                }
                .run(receiver);
            }
        }
        receiver.discard();
        Ok(())
    }

    fn begin(
        &self,
        volume: &Volume,
        id: SessionId,
        epoch: Epoch,
        salt: Salt,
        block_size: BlockSize,
        wanted: Option<Signature>,
    ) -> Result<Arc<Session>, ReceiveError> {
        let (old, complete) = {
            let mut state = lock(&volume.state);
            state.failure = None;
            (state.session.take(), state.complete.take())
        };
        if let Some(old) = old {
            volume.replace(&old);
        }
        let spec = &volume.spec;
        let destination = Destination::open(&spec.name, &spec.destination, spec.one)?
            .taking_devices(self.options.device_nodes);
        let complete = complete.filter(|complete| complete.block_size == block_size);
        let (basis, tree) = match complete {
            Some(complete) if Some(complete.root) == wanted => (Basis::Known, complete.tree),
            Some(complete) => (Basis::Everything, complete.tree),
            None if destination.is_empty()? => (Basis::Everything, EntryMap::default()),
            None => {
                tracing::info!(plan = %self.plan.plan, volume = spec.name, "looking at what the target already holds");
                let (state, _) = scan(&spec.destination, &self.plan.fleet_key, block_size)
                    .map_err(|source| ReceiveError::Scan {
                        volume: spec.name.clone(),
                        source,
                    })?;
                (Basis::Everything, state.iter().collect())
            }
        };
        Ok(Arc::new(Session {
            id,
            epoch,
            salt,
            basis,
            opener: Sealer::new(&self.plan.plan, &self.plan.data_key, &salt),
            rebuild: Rebuild::new(
                destination,
                block_size,
                self.plan.fleet_key.clone(),
                self.map.clone(),
                tree,
                basis == Basis::Everything,
            ),
            arrived: Mutex::default(),
            answers: Mutex::default(),
            outcome: Mutex::default(),
            running: Mutex::default(),
            socket: Mutex::default(),
        }))
    }
}
