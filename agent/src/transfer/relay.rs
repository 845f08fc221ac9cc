//! The paired device's side: seals records for the target, or carries sealed ones, or both.
//!
//! Invariants: a device that only carries has no data key and sees ciphertext alone; plain records are
//! accepted only with their tag, for a plan whose key this device was given; acknowledgements of the
//! target pass through unchanged and cannot be made here.

use super::connection::{ConnectionError, Incoming, Receiver, Transmitter};
use super::feed::{Arrived, Voice};
use super::frame::{FrameKind, Header};
use super::link::{Event, Hop, Link, LinkError, LinkSetup};
use super::message::{
    Answers, Basis, Done, Failure, FailureCode, Have, Holdings, Message, SessionId,
};
use super::queue::{OnPanic, lock};
use super::seal::{DataKey, LinkKey, Salt, Sealer, Tagger, random};
use super::spool::Spool;
use super::{Options, Progress};
use crate::model::ids::{Epoch, PlanId, VolumeId};
use crate::volume::{BlockSize, FleetKey};
use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// What a paired device admits.
#[derive(Clone, Debug)]
pub struct RelayPlan {
    /// The plan.
    pub plan: PlanId,
    /// Key that the source must know.
    pub link_key: LinkKey,
    /// The plan's key, when `encrypt` is delegated to this device.
    pub seal_key: Option<DataKey>,
    /// Key of signatures.
    pub fleet_key: FleetKey,
    /// The target, when `transfer` is delegated to this device.
    pub forward: Option<Hop>,
    /// Directory in which records wait when only `transfer` is delegated.
    pub spool: PathBuf,
}

/// A plan relayed here.
pub(super) struct Relay {
    plan: RelayPlan,
    options: Options,
    sessions: Mutex<HashMap<VolumeId, Arc<Session>>>,
}

/// One attempt at one epoch.
struct Session {
    id: SessionId,
    epoch: Epoch,
    block_size: BlockSize,
    salt: Salt,
    basis: Basis,
    holdings: Holdings,
    /// What the target holds, for as long as the source may not have heard it.
    have: Mutex<Vec<Have>>,
    /// Onward to the target.
    link: Option<Arc<Link>>,
    spool: Option<Arc<Spool>>,
    sealer: Option<Sealer>,
    tagger: Tagger,
    upstream: Arc<Upstream>,
    running: Mutex<()>,
}

impl Session {
    fn end(&self) {
        self.upstream.take_over(None);
        if let Some(spool) = &self.spool {
            spool.close();
        }
        if let Some(link) = &self.link {
            link.fail(LinkError::Cancelled);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

/// The way back to the source, which may be away for a while.
#[derive(Default)]
struct Upstream {
    socket: Mutex<Option<Arc<TcpStream>>>,
    voice: Mutex<Option<Arc<Voice>>>,
    watermark: AtomicU64,
    arrived: Mutex<Arrived>,
    outcome: Mutex<Option<Result<Done, Failure>>>,
    answers: Mutex<Answers>,
}

impl Upstream {
    fn say(&self, message: &Message) {
        let voice = lock(&self.voice).clone();
        if let Some(voice) = voice {
            if let Message::Ack(watermark) = message {
                voice.watermark.fetch_max(*watermark, Ordering::Relaxed);
            }
            voice.say(message);
        }
    }

    fn take_over(&self, next: Option<Arc<TcpStream>>) {
        if let Some(old) = std::mem::replace(&mut *lock(&self.socket), next) {
            // It may be closed already.
            let _ = old.shutdown(Shutdown::Both);
        }
    }

    fn acknowledge(&self, watermark: u64) {
        self.watermark.fetch_max(watermark, Ordering::Relaxed);
        self.say(&Message::Ack(watermark));
    }

    fn give_up(&self, failure: Failure) {
        lock(&self.outcome).get_or_insert(Err(failure.clone()));
        self.say(&Message::Failed(failure));
    }

    /// Passes on what the target says. With a spool, what the source waits for is the spool.
    fn event(&self, event: Event, spool: Option<&Spool>) {
        match event {
            Event::Ack(watermark) => match spool {
                Some(spool) => spool.acknowledged(watermark),
                None => self.acknowledge(watermark),
            },
            Event::Held(held) => {
                lock(&self.answers).keep(held.clone());
                self.say(&Message::Held(held));
            }
            Event::Done(done) => {
                if let Some(spool) = spool {
                    spool.discard();
                }
                *lock(&self.outcome) = Some(Ok(done));
                self.say(&Message::Done(done));
            }
            Event::Failed(error) => {
                if let Some(spool) = spool {
                    spool.close();
                }
                self.give_up(failure(error));
            }
            Event::Record(..) => {}
        }
    }
}

fn failure(error: LinkError) -> Failure {
    match error {
        LinkError::Failed(failure) => failure,
        other => Failure {
            code: FailureCode::Unreachable,
            text: format!("the paired device reports: {other}"),
        },
    }
}

impl Relay {
    pub(super) fn new(plan: RelayPlan, options: Options) -> Self {
        Self {
            plan,
            options,
            sessions: Mutex::default(),
        }
    }

    pub(super) fn link_key(&self) -> LinkKey {
        self.plan.link_key.clone()
    }

    pub(super) fn dismiss(&self) {
        let sessions = std::mem::take(&mut *lock(&self.sessions));
        for session in sessions.values() {
            session.end();
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
        let voice = Arc::new(Voice {
            transmitter: Mutex::new(transmitter),
            volume: id,
            epoch,
            watermark: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        std::thread::scope(|scope| {
            scope.spawn(|| voice.heartbeat(self.options.patience / 4));
            let _end = OnPanic(|| voice.end());
            if let Err(failure) = self.session(id, epoch, &begin, &mut receiver, &voice, socket) {
                tracing::error!(%plan, "{}", failure.text);
                voice.say(&Message::Failed(failure));
                receiver.discard();
            }
            voice.end();
        });
    }

    fn session(
        &self,
        id: VolumeId,
        epoch: Epoch,
        begin: &Message,
        receiver: &mut Receiver,
        voice: &Arc<Voice>,
        socket: &Arc<TcpStream>,
    ) -> Result<(), Failure> {
        let Message::Begin {
            session: wanted, ..
        } = begin
        else {
            return Ok(());
        };
        let current = lock(&self.sessions).get(&id).cloned();
        let resumed = current.filter(|old| old.id == *wanted && old.epoch == epoch);
        let session = match resumed {
            Some(session) => session,
            None => {
                // The old one must have left the target before a new one comes there.
                let old = lock(&self.sessions).remove(&id);
                if let Some(old) = old {
                    old.end();
                    drop(lock(&old.running));
                }
                let session = self.begin(id, epoch, begin)?;
                lock(&self.sessions).insert(id, Arc::clone(&session));
                session
            }
        };
        let upstream = &session.upstream;
        upstream.take_over(Some(Arc::clone(socket)));
        let _running = lock(&session.running);
        let watermark = upstream.watermark.load(Ordering::Relaxed);
        voice.watermark.store(watermark, Ordering::Relaxed);
        voice.say(&Message::Begun {
            watermark,
            basis: session.basis,
            salt: session.salt,
            holdings: session.holdings,
        });
        for list in lock(&session.have).chunks(HAVE_CHUNK) {
            voice.say(&Message::Have(list.to_vec()));
        }
        voice.say(&Message::HaveEnd);
        *lock(&upstream.voice) = Some(Arc::clone(voice));
        // What the target said while the source was away.
        let answers: Vec<Message> = lock(&upstream.answers).messages().collect();
        for answer in &answers {
            voice.say(answer);
        }
        let outcome = lock(&upstream.outcome).clone();
        match outcome {
            Some(Ok(done)) => voice.say(&Message::Done(done)),
            Some(Err(failure)) => voice.say(&Message::Failed(failure)),
            None => {}
        }
        let result = self.carry(&session, receiver, voice);
        lock(&upstream.voice).take_if(|current| Arc::ptr_eq(current, voice));
        result
    }

    fn begin(&self, id: VolumeId, epoch: Epoch, begin: &Message) -> Result<Arc<Session>, Failure> {
        let Message::Begin {
            session,
            salt,
            block_size,
            basis,
        } = *begin
        else {
            return Err(protocol("the connection does not begin an epoch"));
        };
        let plan = &self.plan;
        let seals = plan.seal_key.is_some();
        // Records sealed here have a session key of their own.
        let salt = if seals {
            random().map_err(|e| local(&e.to_string()))?
        } else {
            salt
        };
        let upstream: Arc<Upstream> = Arc::default();
        let spool = match (&plan.forward, seals) {
            (Some(_), false) => {
                let name = format!("{epoch}-{}", hex::encode(session));
                let spool = Spool::open(&plan.spool.join(id.to_string()), &name);
                Some(Arc::new(spool.map_err(|e| full(&e))?))
            }
            (None, false) => {
                return Err(protocol("neither encrypt nor transfer is delegated here"));
            }
            _ => None,
        };
        let mut opened = None;
        let link = match &plan.forward {
            None => None,
            Some(hop) => {
                let setup = LinkSetup {
                    plan: plan.plan.clone(),
                    hop: hop.clone(),
                    volume: id,
                    epoch,
                    begin: Message::Begin {
                        session,
                        salt,
                        block_size,
                        basis,
                    },
                    options: self.options.clone(),
                    known: true,
                    progress: Arc::new(Progress::default()),
                };
                let (events, kept) = (Arc::clone(&upstream), spool.clone());
                let handler = Box::new(move |event| {
                    events.event(event, kept.as_deref());
                    Ok(())
                });
                let (link, answer) = Link::open(setup, handler).map_err(failure)?;
                opened = Some(answer);
                Some(Arc::new(link))
            }
        };
        // What a target that remembers the session has, and what an earlier life of this device spooled.
        let watermark = opened.as_ref().map_or(0, |opened| opened.watermark);
        *lock(&upstream.arrived) = Arrived::below(watermark);
        upstream.watermark.store(watermark, Ordering::Relaxed);
        if let (Some(spool), Some(link)) = (&spool, &link) {
            let arrived = spool.go_on_at(watermark).map_err(|e| full(&e))?;
            let durable = arrived.watermark();
            *lock(&upstream.arrived) = arrived;
            upstream.watermark.store(durable, Ordering::Relaxed);
            carry_on(spool, link, &upstream)?;
        }
        let basis = opened
            .as_ref()
            .map_or(Basis::Everything, |opened| opened.basis);
        // With a spool the source is done when this device has its records; it does not wait for the
        // target's answers.
        let holdings = match (&opened, &spool) {
            (Some(opened), None) => opened.holdings,
            _ => Holdings::Closed,
        };
        let have = opened.map_or_else(Vec::new, |opened| opened.have);
        let session = Session {
            id: session,
            epoch,
            block_size,
            salt,
            basis,
            holdings,
            have: Mutex::new(have),
            link,
            spool,
            sealer: plan
                .seal_key
                .as_ref()
                .map(|key| Sealer::new(&plan.plan, key, &salt)),
            tagger: Tagger::new(&plan.link_key, &session),
            upstream,
            running: Mutex::default(),
        };
        Ok(Arc::new(session))
    }

    /// Takes records in until the source leaves.
    fn carry(
        &self,
        session: &Session,
        receiver: &mut Receiver,
        voice: &Voice,
    ) -> Result<(), Failure> {
        let mut buffer = Vec::new();
        loop {
            let (header, mut record) = match receiver.next(std::mem::take(&mut buffer)) {
                Ok(Incoming::Record(header, record)) => (header, record),
                Ok(Incoming::Message(..)) => continue,
                Err(ConnectionError::Io(error)) => {
                    tracing::debug!(plan = %self.plan.plan, "data connection ended: {error}");
                    return Ok(());
                }
                Err(error) => return Err(corrupt(&error)),
            };
            let wanted = if session.sealer.is_some() {
                FrameKind::Tagged
            } else {
                FrameKind::Carried
            };
            if header.kind != wanted || header.epoch != session.epoch {
                return Err(protocol("a record does not belong here"));
            }
            let number = header.number;
            lock(&session.have).clear();
            if let Some(sealer) = &session.sealer {
                let (key, size) = (&self.plan.fleet_key, session.block_size);
                let checked = session.tagger.check_plain(&header, &mut record, key, size);
                checked.map_err(|e| corrupt(&e))?;
                let header = Header {
                    kind: FrameKind::Sealed,
                    ..header
                };
                sealer.seal(&header, &mut record);
            } else {
                let unwrapped = session.tagger.unwrap(&header, &mut record);
                unwrapped.map_err(|e| corrupt(&e))?;
            }
            if session.link.is_none() {
                session.tagger.wrap(&header, &mut record);
                // Returned to the source; sealing the same record again gives the same bytes.
                let sent = lock(&voice.transmitter).record(&record);
                if let Err(error) = sent {
                    tracing::debug!(plan = %self.plan.plan, "data connection ended: {error}");
                    return Ok(());
                }
                buffer = record;
                continue;
            }
            {
                let mut arrived = lock(&session.upstream.arrived);
                if arrived.contains(number) {
                    continue;
                }
                arrived.add(number);
            }
            match (&session.spool, &session.link) {
                (Some(spool), _) => {
                    spool.put(number, &record).map_err(|e| full(&e))?;
                    buffer = record;
                }
                (None, Some(link)) => {
                    if link.push(number, record).is_err() {
                        // The link's own event has told the source why.
                        return Ok(());
                    }
                    buffer = link.buffer();
                }
                (None, None) => {}
            }
        }
    }
}

/// Pieces of a list of held blocks that surely fit one message together: a piece has at most 8192
/// blocks of 32 bytes.
const HAVE_CHUNK: usize = 1;

/// Forwards from the spool and reports what is durable, for as long as the session lives.
fn carry_on(spool: &Arc<Spool>, link: &Arc<Link>, upstream: &Arc<Upstream>) -> Result<(), Failure> {
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map(drop)
            .map_err(|e| local(&format!("cannot start a data thread: {e}")))
    };
    let (from, to, back) = (Arc::clone(spool), Arc::clone(link), Arc::clone(upstream));
    spawn(
        "lifeboat-spool",
        Box::new(move || {
            loop {
                match from.take(to.buffer()) {
                    Ok(Some((number, record))) => {
                        if to.push(number, record).is_err() {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(error) => return back.give_up(full(&error)),
                }
            }
        }),
    )?;
    let (from, back) = (Arc::clone(spool), Arc::clone(upstream));
    spawn(
        "lifeboat-flush",
        Box::new(move || {
            loop {
                match from.flush() {
                    Ok(Some(watermark)) => back.acknowledge(watermark),
                    Ok(None) => return,
                    Err(error) => return back.give_up(full(&error)),
                }
            }
        }),
    )
}

fn protocol(text: &str) -> Failure {
    Failure {
        code: FailureCode::Protocol,
        text: format!("the paired device reports: {text}; start the plan again"),
    }
}

fn local(text: &str) -> Failure {
    Failure {
        code: FailureCode::Write,
        text: format!("the paired device reports: {text}"),
    }
}

fn corrupt(error: &dyn std::error::Error) -> Failure {
    Failure {
        code: FailureCode::Corrupt,
        text: format!("the paired device reports: {error}"),
    }
}

fn full(error: &dyn std::error::Error) -> Failure {
    Failure {
        code: FailureCode::Spool,
        text: format!("the paired device reports: {error}"),
    }
}
