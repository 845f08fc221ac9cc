//! The side that is asked, the source or the paired device in its stead: lists a volume and gives out its blocks, what
//! is wanted now before the rest.
//!
//! Invariants: at most [`WAITING_CAP`] questions of a connection wait; the background gets a block in
//! every [`GIVE_WAY`] at least, however much is wanted now. The containers may go on writing: a block
//! is what it was when it was read. Questions that a paired device must pass on hold up no others.

use super::guard::Guard;
use super::mirror;
use super::piece::{Cut, PIECES_CAP};
use super::shelf::Shelf;
use super::stock::{Given, Stock, Waiter};
use super::wire::{Answer, BLOCK, Class, Fetch, Refusal, Want};
use crate::model::ids::{Epoch, PlanId, Signature, VolumeId};
use crate::model::volume::TimesKept;
use crate::transfer::Options;
use crate::transfer::connection::{self, Incoming, Receiver, Transmitter};
use crate::transfer::frame::{DATA_CAP, FrameKind, HEADER_LEN, Header};
use crate::transfer::message::Message;
use crate::transfer::queue::{Queue, lock};
use crate::transfer::seal::{DataKey, LinkKey, Salt, Sealer, random};
use crate::transfer::spent::{Meter, Spent};
use crate::volume::aligned::Aligned;
use crate::volume::mirror::{Log, LogId};
use crate::volume::sign::{ZERO, signature};
use crate::volume::walk::WalkError;
use crate::volume::{Entry, FleetKey};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Questions of one connection that wait; the peer then sends no more until some are answered.
const WAITING_CAP: usize = 4096;
/// Longest time for which a block of the background gives way to what is wanted now.
const GIVE_WAY: Duration = Duration::from_millis(20);

/// A volume that may be asked for.
#[derive(Clone, Debug)]
pub struct ProvideVolume {
    /// Its number within the plan.
    pub id: VolumeId,
    /// Where it is.
    pub at: Whereabouts,
}

/// Where a volume is that may be asked for.
#[derive(Clone, Debug)]
pub enum Whereabouts {
    /// On this source's disk.
    Here {
        /// Its directory, or a block device or image file.
        path: PathBuf,
        /// Where the target's changes of it are kept, in a log that is made there; none: they are refused.
        mirror: Option<PathBuf>,
        /// Which times the target keeps.
        times: TimesKept,
    },
    /// On the source, from which this paired device fetches what it lacks.
    There(Arc<Stock>),
}

/// Whether an address lies behind a link that the operator declared trusted.
pub type Trusts = Arc<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// How blocks travel.
#[derive(Clone)]
pub enum Sealing {
    /// Sealed under this key.
    Under(DataKey),
    /// Plain with a tag, and only to an address that is trusted.
    Plain(Trusts),
}

impl Sealing {
    fn key(&self) -> Option<&DataKey> {
        match self {
            Self::Under(key) => Some(key),
            Self::Plain(_) => None,
        }
    }

    /// Why nothing goes over this connection.
    fn refuses(&self, socket: &TcpStream) -> Option<String> {
        let Self::Plain(trusts) = self else {
            return None;
        };
        match socket.peer_addr() {
            Ok(peer) if trusts(peer.ip()) => None,
            Ok(peer) => Some(format!(
                "{peer} is not in `trusted_networks`; unsealed blocks do not go there"
            )),
            Err(error) => Some(error.to_string()),
        }
    }
}

/// What another device may ask this one for.
#[derive(Clone)]
pub struct ProvidePlan {
    /// The plan.
    pub plan: PlanId,
    /// Proves that a connection is of whom the plan lets in.
    pub link_key: LinkKey,
    /// How its blocks travel.
    pub sealing: Sealing,
    /// Blocks are signed with this key.
    pub fleet_key: FleetKey,
    /// The volumes.
    pub volumes: Vec<ProvideVolume>,
}

/// An admitted [`ProvidePlan`].
pub(in crate::transfer) struct Provision {
    plan: ProvidePlan,
    options: Options,
    /// Questions that somebody waits for.
    demand: Arc<AtomicUsize>,
    over: AtomicBool,
    sockets: Mutex<Vec<Weak<TcpStream>>>,
    logs: Mutex<HashMap<VolumeId, Arc<Mutex<Log>>>>,
    meter: Meter,
}

/// A question of a connection.
pub(super) struct Job {
    asks: Asks,
    /// What came for it, if it had to be passed on.
    pub(super) given: Option<Given>,
    _urgent: Option<Urgent>,
}

enum Asks {
    List(u8, HashSet<Signature>),
    Block { want: Want, with_bytes: bool },
    Map { first: Want, count: u32 },
}

/// One of the questions that somebody waits for, until it is dropped.
struct Urgent(Arc<AtomicUsize>);

impl Drop for Urgent {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Provision {
    pub(in crate::transfer) fn new(plan: ProvidePlan, options: Options) -> Self {
        Self {
            plan,
            options,
            demand: Arc::default(),
            over: AtomicBool::new(false),
            sockets: Mutex::default(),
            logs: Mutex::default(),
            meter: Meter::default(),
        }
    }

    pub(in crate::transfer) fn link_key(&self) -> LinkKey {
        self.plan.link_key.clone()
    }

    pub(in crate::transfer) fn spent(&self) -> Spent {
        self.meter.spent()
    }

    pub(in crate::transfer) fn dismiss(&self) {
        self.over.store(true, Ordering::Release);
        for socket in lock(&self.sockets).iter().filter_map(Weak::upgrade) {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        for volume in &self.plan.volumes {
            if let Whereabouts::There(stock) = &volume.at {
                stock.end();
            }
        }
    }

    /// Serves one agreed connection until it ends.
    pub(in crate::transfer) fn serve(
        &self,
        receiver: Receiver,
        transmitter: Transmitter,
        socket: &Arc<TcpStream>,
    ) {
        {
            let mut sockets = lock(&self.sockets);
            sockets.retain(|socket| socket.strong_count() > 0);
            sockets.push(Arc::downgrade(socket));
        }
        if self.over.load(Ordering::Acquire) {
            return;
        }
        if let Some(why) = self.plan.sealing.refuses(socket) {
            tracing::warn!(plan = %self.plan.plan, "fetching connection refused: {why}");
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
            return;
        }
        if let Err(error) = self.talk(receiver, transmitter, socket) {
            tracing::debug!(plan = %self.plan.plan, "fetching connection ended: {error}");
        }
    }

    fn talk(
        &self,
        mut receiver: Receiver,
        mut transmitter: Transmitter,
        socket: &TcpStream,
    ) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let first = receiver.next(Vec::new()).map_err(|e| text(&e))?;
        let Incoming::Message(id, _, Message::Fetch(first)) = first else {
            return Err("it does not say what it is for".to_owned());
        };
        let volume = self.plan.volumes.iter().find(|volume| volume.id == id);
        let volume = volume.ok_or_else(|| format!("the plan has no volume {id}"))?;
        // It was marked as background when it was let in.
        if first.is_waited_for() {
            connection::mark(socket, connection::Class::Demand).map_err(|e| text(&e))?;
        }
        let class = match first {
            Fetch::Open(class) => class,
            Fetch::Mirror { log, salt } => {
                return self.mirror(volume, (log, salt), &mut receiver, &mut transmitter);
            }
            _ => return Err("it does not say what it is for".to_owned()),
        };
        let salt: Salt = random().map_err(|e| text(&e))?;
        let opened = Message::Fetch(Fetch::Opened(salt));
        transmitter
            .message(id, Epoch(0), &opened)
            .map_err(|e| text(&e))?;
        let (link_key, data_key) = (&self.plan.link_key, self.plan.sealing.key());
        let desk = Desk {
            provision: self,
            volume: id,
            class,
            store: match &volume.at {
                Whereabouts::Here { path, times, .. } => {
                    Store::Shelf(Shelf::open(path, *times).map_err(|e| text(&e))?)
                }
                Whereabouts::There(stock) => Store::Stock(stock),
            },
            guard: Guard::new(&self.plan.plan, link_key, data_key, &salt),
            number: AtomicU64::new(0),
            transmitter: Mutex::new(transmitter),
            jobs: Arc::new(Queue::new(WAITING_CAP)),
        };
        std::thread::scope(|scope| {
            for _ in 0..self.options.workers.max(1) {
                scope.spawn(|| desk.work());
            }
            let ended = desk.hear(&mut receiver);
            desk.jobs.close();
            lock(&desk.transmitter).shut();
            ended
        })
    }
}

impl Provision {
    /// Keeps the changes that the target makes.
    fn mirror(
        &self,
        volume: &ProvideVolume,
        (id, salt): (LogId, Salt),
        receiver: &mut Receiver,
        transmitter: &mut Transmitter,
    ) -> Result<(), String> {
        let directory = match &volume.at {
            Whereabouts::Here { mirror, .. } => mirror.as_ref(),
            Whereabouts::There(_) => None,
        };
        let opened = match directory.zip(self.plan.sealing.key()) {
            None => Err("this device mirrors nothing of this plan".to_owned()),
            Some((directory, key)) => {
                let mut logs = lock(&self.logs);
                let log = match logs.get(&volume.id) {
                    Some(log) => Ok(Arc::clone(log)),
                    None => mirror::open_log(directory, id).map(|log| {
                        let log = Arc::new(Mutex::new(log));
                        logs.insert(volume.id, Arc::clone(&log));
                        log
                    }),
                };
                log.map(|log| (log, key))
            }
        };
        let (log, key) = match opened {
            Ok(opened) => opened,
            Err(why) => {
                tracing::warn!(plan = %self.plan.plan, volume = %volume.id, "keeps no changes of the target: {why}");
                let refused = Message::Fetch(Fetch::Refused(why));
                let said = transmitter.message(volume.id, Epoch(0), &refused);
                return said.map_err(|error| error.to_string());
            }
        };
        let sealer = Sealer::to_source(&self.plan.plan, key, &salt);
        let clock = self.meter.clock();
        mirror::keep(&log, id, &sealer, volume.id, (receiver, transmitter), clock)
    }
}

/// Where a connection's answers come from.
enum Store<'a> {
    Shelf(Shelf),
    Stock(&'a Arc<Stock>),
}

/// One connection.
struct Desk<'a> {
    provision: &'a Provision,
    volume: VolumeId,
    class: Class,
    store: Store<'a>,
    guard: Guard,
    /// Number of the next record: none is used twice under the connection's salt.
    number: AtomicU64,
    transmitter: Mutex<Transmitter>,
    jobs: Arc<Queue<Job>>,
}

impl Desk<'_> {
    fn hear(&self, receiver: &mut Receiver) -> Result<(), String> {
        let mut clock = self.provision.meter.clock();
        loop {
            clock.note();
            match receiver.next(Vec::new()).map_err(|e| e.to_string())? {
                Incoming::Message(_, _, Message::Ping) => {
                    let said =
                        lock(&self.transmitter).message(self.volume, Epoch(0), &Message::Ping);
                    said.map_err(|e| e.to_string())?;
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::List { bits, pieces })) => {
                    self.put(Asks::List(bits, pieces.into_iter().collect()))?;
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::Want(wants))) => {
                    for want in wants {
                        let with_bytes = true;
                        self.put(Asks::Block { want, with_bytes })?;
                    }
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::Sign(wants))) => {
                    for want in wants {
                        let with_bytes = false;
                        self.put(Asks::Block { want, with_bytes })?;
                    }
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::Map { first, count })) => {
                    self.put(Asks::Map { first, count })?;
                }
                _ => return Err("a message came out of order".to_owned()),
            }
        }
    }

    fn put(&self, asks: Asks) -> Result<(), String> {
        let urgent = (self.class == Class::Demand).then(|| {
            let demand = &self.provision.demand;
            demand.fetch_add(1, Ordering::AcqRel);
            Urgent(Arc::clone(demand))
        });
        if let Store::Stock(stock) = &self.store {
            stock.room(WAITING_CAP);
        }
        let job = Job {
            asks,
            given: None,
            _urgent: urgent,
        };
        let put = self.jobs.push(job);
        put.map_err(|_| "its workers are gone".to_owned())
    }

    fn work(&self) {
        let mut memory = Aligned::default();
        let buffer = memory.space(BLOCK as usize);
        let mut record = Vec::with_capacity(HEADER_LEN + BLOCK as usize + 64);
        let mut broken = false;
        let mut clock = self.provision.meter.clock();
        // After an error the rest is only dropped.
        while let Some(job) = self.jobs.take() {
            if !broken {
                self.give_way();
                if let Err(error) = self.answer(job, buffer, &mut record) {
                    tracing::debug!("fetching connection: {error}");
                    broken = true;
                    lock(&self.transmitter).shut();
                    self.jobs.close();
                }
            }
            clock.note();
            self.jobs.done();
        }
    }

    fn answer(&self, job: Job, buffer: &mut [u8], record: &mut Vec<u8>) -> std::io::Result<()> {
        match (&self.store, &job.asks) {
            (_, Asks::List(bits, known)) => self.list(*bits, known, record),
            (Store::Shelf(shelf), Asks::Block { want, with_bytes }) => {
                let read = shelf.read(&want.path, want.block * BLOCK, buffer);
                let read = read.map(|length| {
                    self.provision.meter.read(length);
                    let signature = signature(&self.provision.plan.fleet_key, &buffer[..length]);
                    (signature, &buffer[..length])
                });
                let read = read.map_err(|error| refusal(&error));
                self.block(want, *with_bytes, read, record)
            }
            (Store::Shelf(shelf), Asks::Map { first, count }) => {
                let number = first.number;
                let answer = match shelf.holes(&first.path, first.block, *count) {
                    Ok(holes) => Answer::Map { number, holes },
                    Err(error) => Answer::Refused {
                        number,
                        why: refusal(&error),
                    },
                };
                self.send(&answer, record)
            }
            (Store::Stock(stock), _) => self.answer_of_stock(stock, job, buffer, record),
        }
    }

    /// Answers with what this paired device has or was given for the question; it passes on any other.
    fn answer_of_stock(
        &self,
        stock: &Arc<Stock>,
        mut job: Job,
        buffer: &mut [u8],
        record: &mut Vec<u8>,
    ) -> std::io::Result<()> {
        let given = job.given.take();
        match (&job.asks, given) {
            (Asks::List(..), _) => Ok(()),
            (Asks::Block { want, .. } | Asks::Map { first: want, .. }, Some(Given::Away)) => {
                let number = want.number;
                self.send(&Answer::Away { number }, record)
            }
            (Asks::Map { first, .. }, Some(Given::Holes(holes))) => {
                let number = first.number;
                self.send(&Answer::Map { number, holes }, record)
            }
            (Asks::Map { first, count }, _) => {
                let (place, count) = (stock.place(&first.path, first.block), *count);
                let jobs = Arc::clone(&self.jobs);
                stock.map(place, count, Waiter { jobs, job });
                Ok(())
            }
            (Asks::Block { want, with_bytes }, Some(Given::Block(signature, bytes))) => {
                let read = Ok((signature, &*bytes));
                stock.answered(bytes.len());
                self.block(want, *with_bytes, read, record)
            }
            (Asks::Block { want, with_bytes }, Some(Given::Refused(why))) => {
                self.block(want, *with_bytes, Err(why), record)
            }
            (Asks::Block { want, with_bytes }, _) => {
                let place = stock.place(&want.path, want.block);
                match stock.read(place, buffer) {
                    Ok(Some((signature, length))) => {
                        stock.answered(length);
                        let read = Ok((signature, &buffer[..length]));
                        self.block(want, *with_bytes, read, record)
                    }
                    Ok(None) => {
                        let jobs = Arc::clone(&self.jobs);
                        stock.want(self.class, place, Waiter { jobs, job });
                        Ok(())
                    }
                    Err(error) => {
                        tracing::warn!("what was fetched for the target cannot be read: {error}");
                        let number = want.number;
                        self.send(&Answer::Away { number }, record)
                    }
                }
            }
        }
    }

    fn give_way(&self) {
        if self.class == Class::Demand {
            return;
        }
        let until = Instant::now() + GIVE_WAY;
        while self.provision.demand.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn block(
        &self,
        want: &Want,
        with_bytes: bool,
        read: Result<(Signature, &[u8]), Refusal>,
        record: &mut Vec<u8>,
    ) -> std::io::Result<()> {
        let number = want.number;
        let answer = match read {
            Ok((signature, bytes)) => Answer::Block {
                number,
                signature,
                bytes: if signature == ZERO || !with_bytes || want.held == Some(signature) {
                    &[]
                } else {
                    bytes
                },
            },
            Err(why) => Answer::Refused { number, why },
        };
        self.send(&answer, record)
    }

    fn list(
        &self,
        bits: u8,
        known: &HashSet<Signature>,
        record: &mut Vec<u8>,
    ) -> Result<(), std::io::Error> {
        match &self.store {
            Store::Shelf(shelf) => self.tell(bits, known, shelf.entries(), record),
            Store::Stock(stock) => {
                let entries = stock.list().map_err(|error| {
                    tracing::warn!("listing a volume for the target: {error}");
                    std::io::Error::other(error.to_string())
                })?;
                let entries = entries.into_iter().map(Ok::<_, std::convert::Infallible>);
                self.tell(bits, known, entries, record)
            }
        }
    }

    fn tell<E: std::fmt::Display>(
        &self,
        bits: u8,
        known: &HashSet<Signature>,
        entries: impl Iterator<Item = Result<Entry, E>>,
        record: &mut Vec<u8>,
    ) -> std::io::Result<()> {
        let mut cut = Cut::new(&self.provision.plan.fleet_key, bits);
        let mut telling = Telling::new(self, record);
        let mut piece = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| {
                tracing::warn!("listing a volume for the target: {error}");
                std::io::Error::other(error.to_string())
            })?;
            let ended = if known.is_empty() {
                None
            } else {
                cut.add(&entry)
            };
            piece.push(entry);
            match ended {
                Some(ended) if known.contains(&ended) => {
                    piece.clear();
                    telling.same(ended)?;
                }
                None if !known.is_empty() => {}
                _ => telling.entries(&mut piece)?,
            }
        }
        telling.entries(&mut piece)?;
        telling.end()
    }

    fn send(&self, answer: &Answer<'_>, record: &mut Vec<u8>) -> Result<(), std::io::Error> {
        record.clear();
        record.resize(HEADER_LEN, 0);
        answer.encode(record);
        let header = Header {
            kind: FrameKind::Sealed,
            barrier: false,
            length: 0,
            volume: self.volume,
            epoch: Epoch(0),
            number: self.number.fetch_add(1, Ordering::Relaxed),
            first_block: 0,
        };
        self.guard.close(&header, record);
        self.provision.meter.sent(record.len());
        lock(&self.transmitter).record(record)
    }
}

/// A list on its way to the target, in records of some size.
struct Telling<'a, 'd> {
    desk: &'a Desk<'d>,
    record: &'a mut Vec<u8>,
    entries: Vec<Entry>,
    /// Bytes of their layouts.
    size: usize,
    layout: Vec<u8>,
    same: Vec<Signature>,
}

impl<'a, 'd> Telling<'a, 'd> {
    fn new(desk: &'a Desk<'d>, record: &'a mut Vec<u8>) -> Self {
        Self {
            desk,
            record,
            entries: Vec::new(),
            size: 0,
            layout: Vec::new(),
            same: Vec::new(),
        }
    }

    fn same(&mut self, piece: Signature) -> Result<(), std::io::Error> {
        if !self.entries.is_empty() {
            self.send_entries(false)?;
        }
        self.same.push(piece);
        if self.same.len() == PIECES_CAP {
            self.send_same()?;
        }
        Ok(())
    }

    fn entries(&mut self, entries: &mut Vec<Entry>) -> Result<(), std::io::Error> {
        for entry in entries.drain(..) {
            self.send_same()?;
            self.layout.clear();
            entry.encode(&mut self.layout);
            // One entry with all its attributes fits a record by itself.
            if !self.entries.is_empty() && self.size + self.layout.len() > DATA_CAP / 2 {
                self.send_entries(false)?;
            }
            self.size += self.layout.len();
            self.entries.push(entry);
        }
        Ok(())
    }

    fn end(mut self) -> Result<(), std::io::Error> {
        self.send_same()?;
        self.send_entries(true)
    }

    fn send_same(&mut self) -> Result<(), std::io::Error> {
        if self.same.is_empty() {
            return Ok(());
        }
        let pieces = std::mem::take(&mut self.same);
        self.desk.send(&Answer::Same(pieces), self.record)
    }

    fn send_entries(&mut self, last: bool) -> Result<(), std::io::Error> {
        self.size = 0;
        let entries = std::mem::take(&mut self.entries);
        self.desk
            .send(&Answer::Entries { last, entries }, self.record)
    }
}

fn refusal(error: &WalkError) -> Refusal {
    if error.vanished() {
        return Refusal::Gone;
    }
    tracing::warn!("wanted by another device: {error}");
    Refusal::Unreadable
}
