//! The target's side: sessions of epochs, records in, acknowledgements out.
//!
//! Invariants: nothing is written before its record opened; an epoch is acknowledged only after one
//! write-back made it durable, with the root computed here; a session survives reconnections and
//! applies each record once; one connection feeds a session at a time.

use super::Options;
use super::connection::{Incoming, Receiver, Transmitter};
use super::engine::{Engine, engine};
use super::frame::{FrameKind, HEADER_LEN, Header};
use super::message::{Basis, Done, Failure, FailureCode, Message, SessionId, have_messages};
use super::payload::{Payload, PayloadKind};
use super::queue::{Queue, lock};
use super::rebuild::{Rebuild, RebuildError, Tree};
use super::seal::{DataKey, LinkKey, Salt, Sealer};
use super::sender::{path_hash, proof};
use crate::model::ids::{Epoch, PlanId, Signature, VolumeId};
use crate::volume::apply::{ApplyError, Destination, Parent};
use crate::volume::{BlockSize, FleetKey, ScanError, scan};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A volume that a plan brings here.
#[derive(Clone, Debug)]
pub struct ReceiveVolume {
    /// Number in the plan.
    pub id: VolumeId,
    /// Name for people.
    pub name: String,
    /// Directory to rebuild it in; made if missing. What the source does not have is removed from it.
    pub destination: PathBuf,
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
    /// Records applied so far, over all epochs.
    pub records: u64,
    /// Why the last epoch stopped, if it did.
    pub failure: Option<String>,
}

/// A plan that is admitted, with all its state.
pub(super) struct Reception {
    plan: ReceivePlan,
    volumes: BTreeMap<VolumeId, Volume>,
    options: Options,
}

struct Volume {
    spec: ReceiveVolume,
    state: Mutex<VolumeState>,
    /// Held while a session is being made, which can take a scan.
    beginning: Mutex<()>,
    bytes_written: AtomicU64,
    records: AtomicU64,
}

#[derive(Default)]
struct VolumeState {
    complete: Option<Complete>,
    session: Option<Arc<Session>>,
    failure: Option<String>,
}

/// The tree of the last complete epoch.
struct Complete {
    epoch: Epoch,
    root: Signature,
    block_size: BlockSize,
    tree: Tree,
}

/// One attempt at one epoch, across reconnections.
struct Session {
    id: SessionId,
    epoch: Epoch,
    basis: Basis,
    opener: Sealer,
    rebuild: Rebuild,
    arrived: Mutex<Arrived>,
    outcome: Mutex<Option<Result<Done, Failure>>>,
    /// Held by the connection that feeds the session.
    running: Mutex<()>,
    socket: Mutex<Option<Arc<TcpStream>>>,
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

/// Which record numbers have arrived.
#[derive(Debug, Default)]
pub(super) struct Arrived {
    watermark: u64,
    above: BTreeSet<u64>,
}

impl Arrived {
    pub(super) fn contains(&self, number: u64) -> bool {
        number < self.watermark || self.above.contains(&number)
    }

    /// Adds a number and returns the watermark: all below it have arrived.
    pub(super) fn add(&mut self, number: u64) -> u64 {
        if number >= self.watermark {
            self.above.insert(number);
        }
        while self.above.remove(&self.watermark) {
            self.watermark += 1;
        }
        self.watermark
    }

    pub(super) fn watermark(&self) -> u64 {
        self.watermark
    }
}

/// Why an epoch or a connection stopped.
#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error("volume {volume}, epoch {epoch}, record {number}: {what}")]
    Corrupt {
        volume: String,
        epoch: Epoch,
        number: u64,
        what: String,
    },
    #[error("volume {volume}, epoch {epoch}: {what}; send the epoch again")]
    Protocol {
        volume: String,
        epoch: Epoch,
        what: &'static str,
    },
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error("volume {volume}: cannot look at what is already on the target: {source}")]
    Scan { volume: String, source: ScanError },
    #[error("{0}")]
    Local(String),
}

impl ReceiveError {
    fn failure(&self) -> Failure {
        let code = match self {
            Self::Corrupt { .. } | Self::Rebuild(RebuildError::WrongSignature { .. }) => {
                FailureCode::Corrupt
            }
            Self::Protocol { .. } | Self::Rebuild(RebuildError::Disagree { .. }) => {
                FailureCode::Protocol
            }
            Self::Apply(error) | Self::Rebuild(RebuildError::Apply(error)) if error.is_full() => {
                FailureCode::NoSpace
            }
            Self::Apply(_) | Self::Rebuild(_) | Self::Scan { .. } | Self::Local(_) => {
                FailureCode::Write
            }
        };
        Failure {
            code,
            text: self.to_string(),
        }
    }
}

impl Reception {
    pub(super) fn new(mut plan: ReceivePlan, options: Options) -> Self {
        let volumes = std::mem::take(&mut plan.volumes)
            .into_iter()
            .map(|spec| {
                let volume = Volume {
                    spec,
                    state: Mutex::default(),
                    beginning: Mutex::default(),
                    bytes_written: AtomicU64::new(0),
                    records: AtomicU64::new(0),
                };
                (volume.spec.id, volume)
            })
            .collect();
        Self {
            plan,
            volumes,
            options,
        }
    }

    pub(super) fn link_key(&self) -> LinkKey {
        self.plan.link_key.clone()
    }

    pub(super) fn progress(&self) -> Vec<ReceiveProgress> {
        let progress = |volume: &Volume| {
            let state = lock(&volume.state);
            let running = state.session.as_ref();
            ReceiveProgress {
                volume: volume.spec.id,
                complete: state.complete.as_ref().map(|last| (last.epoch, last.root)),
                bytes_written: volume.bytes_written.load(Ordering::Relaxed)
                    + running.map_or(0, |session| {
                        session.rebuild.bytes_written.load(Ordering::Relaxed)
                    }),
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
            if let Err(error) = self.session(volume, epoch, &begin, &mut receiver, &voice, socket) {
                let failure = error.failure();
                tracing::error!(%plan, "{}", failure.text);
                lock(&volume.state).failure = Some(failure.text.clone());
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
        let current = lock(&volume.state).session.clone();
        let resumed = current.filter(|session| session.id == *id && session.epoch == epoch);
        let is_new = resumed.is_none();
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
        });
        if is_new && session.basis == Basis::Everything {
            let key = &self.plan.fleet_key;
            let held = session.rebuild.held(|path| path_hash(key, path));
            for message in have_messages(held) {
                voice.say(&message);
            }
        }
        voice.say(&Message::HaveEnd);
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
            old.take_over(None);
            // Its last records are applied, or not, before anything new is.
            drop(lock(&old.running));
            let written = old.rebuild.bytes_written.load(Ordering::Relaxed);
            volume.bytes_written.fetch_add(written, Ordering::Relaxed);
        }
        let spec = &volume.spec;
        let destination = Destination::open(&spec.name, &spec.destination)?;
        let complete = complete.filter(|complete| complete.block_size == block_size);
        let (basis, tree) = match complete {
            Some(complete) if Some(complete.root) == wanted => (Basis::Known, complete.tree),
            Some(complete) => (Basis::Everything, complete.tree),
            None if destination.is_empty()? => (Basis::Everything, Tree::new()),
            None => {
                tracing::info!(plan = %self.plan.plan, volume = spec.name, "looking at what the target already holds");
                let (state, _) = scan(&spec.destination, &self.plan.fleet_key, block_size)
                    .map_err(|source| ReceiveError::Scan {
                        volume: spec.name.clone(),
                        source,
                    })?;
                let entries = state.entries.into_iter();
                let tree = entries.map(|entry| (entry.path.clone(), entry)).collect();
                (Basis::Everything, tree)
            }
        };
        Ok(Arc::new(Session {
            id,
            epoch,
            basis,
            opener: Sealer::new(&self.plan.plan, &self.plan.data_key, &salt),
            rebuild: Rebuild::new(
                destination,
                block_size,
                self.plan.fleet_key.clone(),
                tree,
                basis == Basis::Everything,
            ),
            arrived: Mutex::default(),
            outcome: Mutex::default(),
            running: Mutex::default(),
            socket: Mutex::default(),
        }))
    }
}

/// The sending half of a connection, with its signs of life.
pub(super) struct Voice {
    pub(super) transmitter: Mutex<Transmitter>,
    pub(super) volume: VolumeId,
    pub(super) epoch: Epoch,
    pub(super) watermark: AtomicU64,
    pub(super) over: AtomicBool,
}

impl Voice {
    /// Sends a message; a failure shows on the receiving half.
    pub(super) fn say(&self, message: &Message) {
        let mut transmitter = lock(&self.transmitter);
        if transmitter
            .message(self.volume, self.epoch, message)
            .is_err()
        {
            transmitter.shut();
        }
    }

    /// Repeats the last acknowledgement while long work goes on, so that the peer knows it is alive.
    pub(super) fn heartbeat(&self, every: Duration) {
        let step = every.min(Duration::from_millis(100));
        let mut waited = Duration::ZERO;
        while !self.over.load(Ordering::Acquire) {
            std::thread::sleep(step);
            waited += step;
            if waited >= every {
                waited = Duration::ZERO;
                self.say(&Message::Ack(self.watermark.load(Ordering::Relaxed)));
            }
        }
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Release);
        lock(&self.transmitter).shut();
    }
}

/// One connection feeding one session.
struct Feed<'a> {
    reception: &'a Reception,
    volume: &'a Volume,
    session: &'a Session,
    voice: &'a Voice,
}

/// Records waiting for a worker: with those being worked on, well under the sender's window.
const WAITING_CAP: usize = 16;

impl Feed<'_> {
    fn run(&self, receiver: &mut Receiver) -> Result<(), ReceiveError> {
        let queue: Queue<(Header, Vec<u8>)> = Queue::new(WAITING_CAP);
        let spare: Mutex<Vec<Vec<u8>>> = Mutex::default();
        let failed: Mutex<Option<ReceiveError>> = Mutex::default();
        let fail = |error: ReceiveError| {
            // The peer ends the connection, which wakes the receiving thread.
            self.voice.say(&Message::Failed(error.failure()));
            lock(&failed).get_or_insert(error);
            queue.close();
        };
        let worker = || {
            let choice = self.reception.options.engine;
            let mut engine = match engine(choice) {
                Ok(engine) => engine,
                Err(error) => return fail(ReceiveError::Local(error.to_string())),
            };
            let mut parent = Parent::default();
            while let Some((header, mut record)) = queue.take() {
                let result = self.record(engine.as_mut(), &mut parent, &header, &mut record);
                lock(&spare).push(record);
                queue.done();
                if let Err(error) = result {
                    return fail(error);
                }
            }
        };
        let mut done = false;
        std::thread::scope(|scope| {
            for _ in 0..self.reception.options.workers.max(1) {
                scope.spawn(worker);
            }
            match self.take_in(receiver, &queue, &spare) {
                Ok(ended) => done = ended,
                Err(error) => fail(error),
            }
            queue.close();
        });
        let error = lock(&failed).take();
        match error {
            Some(error) => {
                let failure = error.failure();
                if failure.code != FailureCode::Corrupt {
                    *lock(&self.session.outcome) = Some(Err(failure));
                }
                Err(error)
            }
            None => {
                if done {
                    receiver.discard();
                }
                Ok(())
            }
        }
    }

    /// Receives records until the end of the epoch (true) or of the connection (false).
    fn take_in(
        &self,
        receiver: &mut Receiver,
        queue: &Queue<(Header, Vec<u8>)>,
        spare: &Mutex<Vec<Vec<u8>>>,
    ) -> Result<bool, ReceiveError> {
        let mut engine = engine(self.reception.options.engine)
            .map_err(|error| ReceiveError::Local(error.to_string()))?;
        loop {
            let buffer = lock(spare).pop().unwrap_or_default();
            let (header, mut record) = match receiver.next(buffer) {
                Ok(Incoming::Record(header, record)) => (header, record),
                Ok(Incoming::Message(..)) => continue,
                Err(super::connection::ConnectionError::Io(error)) => {
                    tracing::debug!(
                        volume = self.volume.spec.name,
                        "data connection ended: {error}"
                    );
                    return Ok(false);
                }
                Err(error) => return Err(self.corrupt(0, error.to_string())),
            };
            if header.kind != FrameKind::Sealed
                || header.volume != self.volume.spec.id
                || header.epoch != self.session.epoch
            {
                let what = "it does not belong here".to_owned();
                return Err(self.corrupt(header.number, what));
            }
            if lock(&self.session.arrived).contains(header.number) {
                lock(spare).push(record);
                continue;
            }
            if !header.barrier {
                if queue.push((header, record)).is_err() {
                    return Ok(false);
                }
                continue;
            }
            queue.drain();
            if lock(&self.session.arrived).watermark() != header.number {
                return Err(self.protocol("records before a barrier are missing"));
            }
            let mut parent = Parent::default();
            if self.record(engine.as_mut(), &mut parent, &header, &mut record)? {
                return Ok(true);
            }
            lock(spare).push(record);
        }
    }

    fn corrupt(&self, number: u64, what: String) -> ReceiveError {
        ReceiveError::Corrupt {
            volume: self.volume.spec.name.clone(),
            epoch: self.session.epoch,
            number,
            what,
        }
    }

    fn protocol(&self, what: &'static str) -> ReceiveError {
        ReceiveError::Protocol {
            volume: self.volume.spec.name.clone(),
            epoch: self.session.epoch,
            what,
        }
    }

    /// Opens and applies one record; true at the end of the epoch.
    fn record(
        &self,
        engine: &mut dyn Engine,
        parent: &mut Parent,
        header: &Header,
        record: &mut [u8],
    ) -> Result<bool, ReceiveError> {
        let body = &mut record[HEADER_LEN..];
        let bytes = self
            .session
            .opener
            .open(header, body)
            .map_err(|error| self.corrupt(header.number, error.to_string()))?;
        let rebuild = &self.session.rebuild;
        let malformed = |_| self.protocol("a record is malformed");
        let kind = PayloadKind::of(bytes).map_err(malformed)?;
        if kind.is_parallel() == header.barrier {
            return Err(self.protocol("a record stands on the wrong side of a barrier"));
        }
        let payload = Payload::decode(bytes, rebuild.block_size).map_err(malformed)?;
        rebuild.apply(engine, parent, bytes, &payload)?;
        self.volume.records.fetch_add(1, Ordering::Relaxed);
        if let Payload::End { root, entries } = payload {
            self.complete(root, entries)?;
            return Ok(true);
        }
        let watermark = lock(&self.session.arrived).add(header.number);
        let before = self.voice.watermark.fetch_max(watermark, Ordering::Relaxed);
        if watermark > before {
            self.voice.say(&Message::Ack(watermark));
        }
        Ok(false)
    }

    fn complete(&self, root: Signature, entries: u64) -> Result<(), ReceiveError> {
        let session = self.session;
        let (own, tree) = session.rebuild.end()?;
        let plan = &self.reception.plan;
        let mut done = Done {
            root: own,
            entries: tree.len() as u64,
            proof: [0; 32],
        };
        let id = self.volume.spec.id;
        done.proof = proof(&plan.fleet_key, &plan.plan, id, session.epoch, &done);
        if own == root && done.entries == entries {
            lock(&self.volume.state).complete = Some(Complete {
                epoch: session.epoch,
                root: own,
                block_size: session.rebuild.block_size,
                tree,
            });
        } else {
            // The sender sees the difference and says so; without a tree the next epoch looks anew.
            tracing::error!(plan = %plan.plan, volume = self.volume.spec.name, epoch = %session.epoch, source = %root, target = %own, "the roots of source and target differ");
        }
        *lock(&session.outcome) = Some(Ok(done));
        self.voice.say(&Message::Done(done));
        Ok(())
    }
}
