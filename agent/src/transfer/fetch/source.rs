//! The source's side: lists a volume and gives out its blocks, what is wanted now before the rest.
//!
//! Invariants: at most [`WAITING_CAP`] questions of a connection wait; the background gets a block in
//! every [`GIVE_WAY`] at least, however much is wanted now. The containers may go on writing: a block
//! is what it was when it was read.

use super::mirror;
use super::piece::{Cut, PIECES_CAP};
use super::wire::{Answer, BLOCK, Class, Fetch, RUNS_CAP, Refusal, Want};
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
use crate::volume::scan::{next_data, next_hole, open_file, read_full};
use crate::volume::sign::{ZERO, signature};
use crate::volume::tree::RootHasher;
use crate::volume::walk::{self, Found, WalkError, bare_entry, hard_link, kind_of};
use crate::volume::{BlockSize, Confined, Entry, Exception, FleetKey, Kind};
use nix::sys::stat::{SFlag, fstat};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Questions of one connection that wait; the peer then sends no more until some are answered.
const WAITING_CAP: usize = 4096;
/// Files kept open.
const OPEN_CAP: usize = 128;
/// Longest time for which a block of the background gives way to what is wanted now.
const GIVE_WAY: Duration = Duration::from_millis(20);

/// A volume that may be asked for.
#[derive(Clone, Debug)]
pub struct ProvideVolume {
    /// Its number within the plan.
    pub id: VolumeId,
    /// Its directory, or a block device or image file.
    pub path: PathBuf,
    /// Where the target's changes of it are kept, in a log that is made there; none: they are refused.
    pub mirror: Option<PathBuf>,
    /// Which times the target keeps.
    pub times: TimesKept,
}

/// What the target of a plan may ask this source for.
#[derive(Clone, Debug)]
pub struct ProvidePlan {
    /// The plan.
    pub plan: PlanId,
    /// Proves that a connection is the target's.
    pub link_key: LinkKey,
    /// Blocks are sealed under this key.
    pub data_key: DataKey,
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
    demand: AtomicUsize,
    over: AtomicBool,
    sockets: Mutex<Vec<Weak<TcpStream>>>,
    logs: Mutex<HashMap<VolumeId, Arc<Mutex<Log>>>>,
    meter: Meter,
}

enum Job {
    List(u8, HashSet<Signature>),
    Block(Want),
    Signature(Want),
    Map { first: Want, count: u32 },
}

impl Provision {
    pub(in crate::transfer) fn new(plan: ProvidePlan, options: Options) -> Self {
        Self {
            plan,
            options,
            demand: AtomicUsize::new(0),
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
        let shelf = Shelf::open(volume).map_err(|e| text(&e))?;
        let desk = Desk {
            provision: self,
            volume: id,
            class,
            shelf,
            sealer: Sealer::new(&self.plan.plan, &self.plan.data_key, &salt),
            number: AtomicU64::new(0),
            transmitter: Mutex::new(transmitter),
            jobs: Queue::new(WAITING_CAP),
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
        let opened = match &volume.mirror {
            None => Err("this plan mirrors nothing".to_owned()),
            Some(directory) => {
                let mut logs = lock(&self.logs);
                match logs.get(&volume.id) {
                    Some(log) => Ok(Arc::clone(log)),
                    None => mirror::open_log(directory, id).map(|log| {
                        let log = Arc::new(Mutex::new(log));
                        logs.insert(volume.id, Arc::clone(&log));
                        log
                    }),
                }
            }
        };
        let log = match opened {
            Ok(log) => log,
            Err(why) => {
                tracing::warn!(plan = %self.plan.plan, volume = %volume.id, "keeps no changes of the target: {why}");
                let refused = Message::Fetch(Fetch::Refused(why));
                let said = transmitter.message(volume.id, Epoch(0), &refused);
                return said.map_err(|error| error.to_string());
            }
        };
        let sealer = Sealer::to_source(&self.plan.plan, &self.plan.data_key, &salt);
        let clock = self.meter.clock();
        mirror::keep(&log, id, &sealer, volume.id, (receiver, transmitter), clock)
    }
}

/// One connection.
struct Desk<'a> {
    provision: &'a Provision,
    volume: VolumeId,
    class: Class,
    shelf: Shelf,
    sealer: Sealer,
    /// Number of the next record: none is used twice under the connection's salt.
    number: AtomicU64,
    transmitter: Mutex<Transmitter>,
    jobs: Queue<Job>,
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
                    self.put(Job::List(bits, pieces.into_iter().collect()))?;
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::Want(wants))) => {
                    for want in wants {
                        self.put(Job::Block(want))?;
                    }
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::Sign(wants))) => {
                    for want in wants {
                        self.put(Job::Signature(want))?;
                    }
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::Map { first, count })) => {
                    self.put(Job::Map { first, count })?;
                }
                _ => return Err("a message came out of order".to_owned()),
            }
        }
    }

    fn put(&self, job: Job) -> Result<(), String> {
        if self.class == Class::Demand {
            self.provision.demand.fetch_add(1, Ordering::AcqRel);
        }
        self.jobs.push(job).map_err(|_| {
            self.answered();
            "its workers are gone".to_owned()
        })
    }

    fn answered(&self) {
        if self.class == Class::Demand {
            self.provision.demand.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn work(&self) {
        let mut memory = Aligned::default();
        let buffer = memory.space(BLOCK as usize);
        let mut record = Vec::with_capacity(HEADER_LEN + BLOCK as usize + 64);
        let mut broken = false;
        let mut clock = self.provision.meter.clock();
        // After an error the rest is only counted off.
        while let Some(job) = self.jobs.take() {
            if !broken {
                self.give_way();
                let done = match job {
                    Job::List(bits, known) => self.list(bits, &known, &mut record),
                    Job::Block(want) => self.block(&want, true, buffer, &mut record),
                    Job::Signature(want) => self.block(&want, false, buffer, &mut record),
                    Job::Map { first, count } => self.map(&first, count, &mut record),
                };
                if let Err(error) = done {
                    tracing::debug!("fetching connection: {error}");
                    broken = true;
                    lock(&self.transmitter).shut();
                    self.jobs.close();
                }
            }
            clock.note();
            self.answered();
            self.jobs.done();
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
        buffer: &mut [u8],
        record: &mut Vec<u8>,
    ) -> Result<(), std::io::Error> {
        let number = want.number;
        let answer = match self.shelf.read(&want.path, want.block * BLOCK, buffer) {
            Ok(length) => {
                let bytes = &buffer[..length];
                self.provision.meter.read(length);
                let signature = signature(&self.provision.plan.fleet_key, bytes);
                Answer::Block {
                    number,
                    signature,
                    bytes: if signature == ZERO || !with_bytes || want.held == Some(signature) {
                        &[]
                    } else {
                        bytes
                    },
                }
            }
            Err(error) => refused(number, &error),
        };
        self.send(&answer, record)
    }

    fn map(&self, first: &Want, count: u32, record: &mut Vec<u8>) -> Result<(), std::io::Error> {
        let number = first.number;
        let answer = match self.shelf.holes(&first.path, first.block, count) {
            Ok(holes) => Answer::Map { number, holes },
            Err(error) => refused(number, &error),
        };
        self.send(&answer, record)
    }

    fn list(
        &self,
        bits: u8,
        known: &HashSet<Signature>,
        record: &mut Vec<u8>,
    ) -> Result<(), std::io::Error> {
        let mut cut = Cut::new(&self.provision.plan.fleet_key, bits);
        let mut telling = Telling::new(self, record);
        let mut piece = Vec::new();
        for entry in self.shelf.entries() {
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
        self.sealer.seal(&header, record);
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

fn refused<'a>(number: u64, error: &WalkError) -> Answer<'a> {
    let why = if error.vanished() {
        Refusal::Gone
    } else {
        tracing::warn!("wanted by the target: {error}");
        Refusal::Unreadable
    };
    Answer::Refused { number, why }
}

/// A volume's files, opened as they are asked for.
struct Shelf {
    root: Confined,
    open: Mutex<HashMap<Box<[u8]>, Arc<File>>>,
}

impl Shelf {
    fn open(volume: &ProvideVolume) -> Result<Self, WalkError> {
        Ok(Self {
            root: walk::open_root(&volume.path)?.keeping(volume.times),
            open: Mutex::default(),
        })
    }

    fn file(&self, path: &[u8]) -> Result<Arc<File>, WalkError> {
        let known = lock(&self.open).get(path).cloned();
        // A file that was replaced or removed since is looked up anew.
        let known = known.filter(|file| fstat(file).is_ok_and(|stat| stat.st_nlink > 0));
        if let Some(file) = known {
            return Ok(file);
        }
        let file = Arc::new(open_file(&self.root, path)?.0);
        let mut open = lock(&self.open);
        if open.len() >= OPEN_CAP {
            open.clear();
        }
        open.insert(path.into(), Arc::clone(&file));
        Ok(file)
    }

    /// Reads a block and returns its length.
    fn read(&self, path: &[u8], offset: u64, buffer: &mut [u8]) -> Result<usize, WalkError> {
        let file = self.file(path)?;
        read_full(&file, buffer, offset)
            .map_err(|error| WalkError::new(&self.root, "read", path, error))
    }

    /// Which of `count` blocks from `first` on are nothing but hole, in runs counted from there; what is beyond the
    /// file's end is.
    fn holes(&self, path: &[u8], first: u64, count: u32) -> Result<Vec<Range<u32>>, WalkError> {
        let file = self.file(path)?;
        let failed = |error| WalkError::new(&self.root, "find holes of", path, error);
        let (mut runs, mut at) = (Vec::new(), 0);
        while at < count && runs.len() < RUNS_CAP {
            let from = (first + u64::from(at)) * BLOCK;
            let data = next_data(&file, from).map_err(failed)?;
            // The block in which data begins, as it is counted.
            let until = data.map_or(u64::MAX, |data| data / BLOCK) - first;
            let until = u32::try_from(until).unwrap_or(u32::MAX).min(count);
            if at < until {
                runs.push(at..until);
            }
            let Some(data) = data.filter(|_| until < count) else {
                break;
            };
            let hole = next_hole(&file, data).map_err(failed)?.div_ceil(BLOCK) - first;
            // A file system without holes names its end, and one that is written meanwhile anything.
            at = u32::try_from(hole).unwrap_or(u32::MAX).max(until + 1);
        }
        Ok(runs)
    }

    /// Every entry of the volume in path order, files without their blocks.
    fn entries(&self) -> impl Iterator<Item = Result<Entry, WalkError>> {
        entries(&self.root, walk::walk(&self.root))
    }
}

fn entries<W: Iterator<Item = Result<Found, WalkError>>>(
    root: &Confined,
    walk: W,
) -> impl Iterator<Item = Result<Entry, WalkError>> {
    let mut primaries = HashMap::new();
    walk.filter_map(move |found| {
        let found = match found {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        match entry_of(root, &found, &mut primaries) {
            Err(error) if error.vanished() => None,
            entry => Some(entry),
        }
    })
}

fn entry_of(
    root: &Confined,
    found: &Found,
    primaries: &mut HashMap<(u64, u64), Box<[u8]>>,
) -> Result<Entry, WalkError> {
    let kind = kind_of(&found.stat);
    let identity = (found.stat.st_dev, found.stat.st_ino);
    if let Some(primary) = primaries.get(&identity) {
        return Ok(hard_link(&found.path, &found.stat, primary, false));
    }
    let entry = if kind == SFlag::S_IFREG {
        file_entry(root, &found.path)?
    } else {
        walk::special_entry(root, found, false)?
    };
    if found.stat.st_nlink > 1 && kind != SFlag::S_IFDIR {
        primaries.insert(identity, found.path.clone());
    }
    Ok(entry)
}

/// Root of the list that [`super::Fetcher::list`] gives of a tree, and what is not in it or not as it is.
///
/// # Errors
/// Anything that exists but cannot be looked at.
pub fn list_root(
    tree: &Confined,
    key: &FleetKey,
) -> Result<(Signature, Vec<Exception>), WalkError> {
    let mut root = RootHasher::new(key, BlockSize::for_volume(0));
    let mut walk = walk::walk(tree);
    for entry in entries(tree, &mut walk) {
        root.add(&entry?);
    }
    Ok((root.finish(), walk.skipped()))
}

/// Root over a volume's entries, files without their blocks.
#[must_use]
pub fn root_of_list(entries: &[Entry], key: &FleetKey) -> Signature {
    let mut root = RootHasher::new(key, BlockSize::for_volume(0));
    for entry in entries {
        root.add(entry);
    }
    root.finish()
}

fn file_entry(root: &Confined, path: &[u8]) -> Result<Entry, WalkError> {
    let (file, stat) = open_file(root, path)?;
    let kind = Kind::File {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        blocks: Vec::new(),
    };
    let mut entry = bare_entry(path, &stat, kind, false);
    entry.xattrs = walk::read_xattrs(root, path, &file)?;
    Ok(entry)
}
