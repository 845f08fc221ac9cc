//! The target's side: one connection for what is wanted now, one for the rest, each with many questions
//! outstanding.
//!
//! Invariants: a question is asked again on every new connection until it is answered; a lost link is
//! tried again with back-off for as long as questions are open; nothing is handed on that does not open
//! or does not bear its signature.

use super::piece::Pieces;
use super::wire::{Answer, Class, Fetch, Refusal, Want};
use crate::model::ids::{Epoch, PlanId, Signature, VolumeId};
use crate::model::units::Bytes;
use crate::transfer::connection::{self, Incoming, Receiver, Transmitter};
use crate::transfer::engine::engine;
use crate::transfer::hello::{self, HelloError};
use crate::transfer::link::Hop;
use crate::transfer::message::Message;
use crate::transfer::queue::lock;
use crate::transfer::seal::{DataKey, Sealer};
use crate::transfer::{Options, frame::HEADER_LEN};
use crate::volume::sign::{ZERO, signature};
use crate::volume::tree::Xattr;
use crate::volume::{Entry, FleetKey};
use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest pause between two tries to reach the source.
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Where the source gives out blocks, and the keys for it.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Its data address with the key of its door.
    pub hop: Hop,
    /// What blocks are sealed with.
    pub data_key: DataKey,
}

/// A block of a file: the number that the caller gave the file, and the block's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// File.
    pub file: u32,
    /// Block.
    pub block: u64,
}

/// A block as the source gave it.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// Its signature, which the bytes bear.
    pub signature: Signature,
    /// What came with it.
    pub content: Content<'a>,
}

/// What came with a block's signature.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Its bytes: fewer than a block at the end of the file, none for zeros.
    Bytes(&'a [u8]),
    /// Nothing: it is what was said to be here.
    Held,
    /// Nothing: only the signature was asked for.
    Unasked,
}

/// Who takes what arrives. Called from the connections' threads; must not ask for more from there.
pub trait Arrivals: Send + Sync {
    /// A block, or why it does not come.
    fn arrived(&self, class: Class, place: Place, block: Result<Block<'_>, Refusal>);

    /// Which of the blocks from `first` on that were asked about are holes, in runs counted from there; none are where
    /// the source cannot tell.
    fn mapped(&self, first: Place, holes: &[Range<u32>]);
}

/// What is fetched from.
pub struct FetchPlan {
    /// Plan.
    pub plan: PlanId,
    /// Volume.
    pub volume: VolumeId,
    /// Blocks are signed with this key.
    pub fleet_key: FleetKey,
    /// Asks the source to let this device in; asked again when it does not (it was started anew).
    pub admit: Box<dyn Fn() -> Result<Grant, String> + Send + Sync>,
}

/// The source cannot be asked now. Trying again can help.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It lets nobody in.
    #[error("the source does not give out the volume: {0}")]
    NotAdmitted(String),
    /// Its list is of no use.
    #[error("the source's list of the volume is longer than {0}; copy first")]
    TooLong(Bytes),
    /// The link failed.
    #[error("the link to the source failed: {0}; check the network and the agent there")]
    Link(String),
}

struct Shared {
    plan: Arc<FetchPlan>,
    options: Options,
    grant: Mutex<Option<Grant>>,
    next: AtomicU64,
    over: AtomicBool,
    lanes: [Lane; 2],
}

struct Lane {
    class: Class,
    state: Mutex<LaneState>,
    changed: Condvar,
}

#[derive(Default)]
struct LaneState {
    pending: HashMap<u64, Question>,
    line: Option<Line>,
}

#[derive(Clone)]
struct Question {
    place: Place,
    path: Arc<[u8]>,
    what: What,
}

/// What of a place is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// The block, its bytes only where it does not bear this signature.
    Bytes(Option<Signature>),
    /// The block's signature alone.
    Signature,
    /// Which of so many blocks from there on are holes.
    Holes(u32),
}

impl Question {
    fn want(&self, number: u64) -> Want {
        Want {
            number,
            path: (*self.path).into(),
            block: self.place.block,
            held: match self.what {
                What::Bytes(held) => held,
                _ => None,
            },
        }
    }

    fn asks(&self, number: u64) -> Fetch {
        let want = self.want(number);
        match self.what {
            What::Bytes(_) => Fetch::Want(vec![want]),
            What::Signature => Fetch::Sign(vec![want]),
            What::Holes(count) => Fetch::Map { first: want, count },
        }
    }
}

/// The sending half of a live connection.
struct Line {
    transmitter: Arc<Mutex<Transmitter>>,
    socket: Arc<TcpStream>,
}

/// Fetches blocks of one volume until it is dropped.
pub struct Fetcher {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Fetcher {
    /// Starts; connections are made when something is asked for.
    ///
    /// # Errors
    /// Threads cannot be started.
    pub fn start(
        plan: Arc<FetchPlan>,
        options: Options,
        arrivals: &Arc<dyn Arrivals>,
    ) -> std::io::Result<Self> {
        let lane = |class| Lane {
            class,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        let shared = Arc::new(Shared {
            plan,
            options,
            grant: Mutex::default(),
            next: AtomicU64::new(0),
            over: AtomicBool::new(false),
            lanes: [lane(Class::Demand), lane(Class::Background)],
        });
        let mut fetcher = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
        };
        for at in 0..2 {
            let (shared, arrivals) = (Arc::clone(&shared), Arc::clone(arrivals));
            let thread = std::thread::Builder::new()
                .name("lifeboat-fetch".to_owned())
                .spawn(move || shared.run(&shared.lanes[at], arrivals.as_ref()))?;
            fetcher.threads.push(thread);
        }
        let thread = std::thread::Builder::new()
            .name("lifeboat-ping".to_owned())
            .spawn(move || shared.ping())?;
        fetcher.threads.push(thread);
        Ok(fetcher)
    }

    /// Asks for a block of the file at `path`, its bytes only where it does not bear the signature of what is `held`
    /// here; the answer goes to the arrivals.
    pub fn ask(&self, class: Class, place: Place, path: &Arc<[u8]>, held: Option<Signature>) {
        self.put(class, place, path, What::Bytes(held));
    }

    /// Asks for the signature alone, behind everything else.
    pub fn ask_signature(&self, place: Place, path: &Arc<[u8]>) {
        self.put(Class::Background, place, path, What::Signature);
    }

    /// Asks which of `count` blocks from `first` on are holes, before anything that nobody waits for.
    pub fn ask_holes(&self, first: Place, count: u32, path: &Arc<[u8]>) {
        self.put(Class::Demand, first, path, What::Holes(count));
    }

    fn put(&self, class: Class, place: Place, path: &Arc<[u8]>, what: What) {
        let question = Question {
            place,
            path: Arc::clone(path),
            what,
        };
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let lane = &self.shared.lanes[usize::from(class == Class::Background)];
        let asks = question.asks(number);
        let line = {
            let mut state = lock(&lane.state);
            state.pending.insert(number, question);
            lane.changed.notify_all();
            let line = state.line.as_ref();
            line.map(|line| Arc::clone(&line.transmitter))
        };
        if let Some(transmitter) = line {
            self.shared.say(&transmitter, asks);
        }
    }

    /// Every entry of the volume in path order, files without block signatures, over a connection of its
    /// own; what of that is in the list that is `known` here already is not sent.
    ///
    /// # Errors
    /// The source cannot be asked.
    pub fn list(
        plan: &FetchPlan,
        options: &Options,
        known: &[Entry],
    ) -> Result<Vec<Entry>, FetchError> {
        let link = |error: &dyn std::fmt::Display| FetchError::Link(error.to_string());
        let grant = (plan.admit)().map_err(FetchError::NotAdmitted)?;
        let (_socket, mut receiver, mut transmitter, opener) =
            fetching(plan, &grant, options, Class::Demand).map_err(|e| link(&e))?;
        let pieces = Pieces::of(known, &plan.fleet_key);
        let question = Fetch::List {
            bits: pieces.bits,
            pieces: pieces.signatures.clone(),
        };
        transmitter
            .message(plan.volume, Epoch(0), &Message::Fetch(question))
            .map_err(|e| link(&e))?;
        let mut listed = Listed::of(known, &pieces, LIST_CAP);
        let mut record = Vec::new();
        // Walking a large tree takes longer than a peer may be silent.
        let until = Instant::now() + LIST_TIME;
        let mut ping = || {
            let said = transmitter.message(plan.volume, Epoch(0), &Message::Ping);
            said.map_err(|e| link(&e))
        };
        ping()?;
        loop {
            match receiver.next(std::mem::take(&mut record)) {
                Ok(Incoming::Message(_, _, Message::Ping)) => {
                    std::thread::sleep(Duration::from_millis(10));
                    ping()?;
                }
                Ok(Incoming::Record(header, bytes)) => {
                    record = bytes;
                    let plain = opener
                        .open(&header, &mut record[HEADER_LEN..])
                        .map_err(|e| link(&e))?;
                    let answer = Answer::decode(plain).map_err(|e| link(&e))?;
                    if listed.take(answer, plain.len())? {
                        return Ok(listed.entries);
                    }
                }
                Ok(_) => return Err(FetchError::Link("a message came unasked".to_owned())),
                Err(error) => return Err(link(&error)),
            }
            if Instant::now() > until {
                return Err(FetchError::Link("listing took too long".to_owned()));
            }
        }
    }
}

/// A list as it arrives: of what came and of what is known, each once, so that no source fills the memory here.
struct Listed<'a> {
    known: &'a [Entry],
    pieces: &'a Pieces,
    /// Bytes that may still come.
    room: usize,
    cap: usize,
    /// Where the known entries begin that were not named.
    unnamed: usize,
    entries: Vec<Entry>,
}

impl<'a> Listed<'a> {
    fn of(known: &'a [Entry], pieces: &'a Pieces, cap: usize) -> Self {
        Self {
            known,
            pieces,
            room: cap,
            cap,
            unnamed: 0,
            entries: Vec::new(),
        }
    }

    /// Takes an answer of so many bytes; whether it was the last. What holds them counts too: of short entries it is most.
    fn take(&mut self, answer: Answer<'_>, bytes: usize) -> Result<bool, FetchError> {
        let wrong = |why: &str| FetchError::Link(why.to_owned());
        match answer {
            Answer::Entries { last, entries } => {
                let attributes: usize = entries.iter().map(|entry| entry.xattrs.len()).sum();
                let held = entries.len() * size_of::<Entry>() + attributes * size_of::<Xattr>();
                let room = self.room.checked_sub(bytes + held);
                self.room = room.ok_or(FetchError::TooLong(Bytes(self.cap as u64)))?;
                self.entries.extend(entries);
                Ok(last)
            }
            Answer::Same(same) => {
                for piece in same {
                    let range = self.pieces.range(&piece);
                    let range = range.filter(|range| range.start >= self.unnamed);
                    let range = range.ok_or_else(|| wrong("a piece is named that is not here"))?;
                    self.unnamed = range.end;
                    self.entries.extend_from_slice(&self.known[range]);
                }
                Ok(false)
            }
            _ => Err(wrong("an answer came unasked")),
        }
    }
}

/// Bytes of a list as it is held: some twenty million entries.
const LIST_CAP: usize = 4 << 30;

/// A tree of millions of files on a slow disk takes minutes to walk.
const LIST_TIME: Duration = Duration::from_secs(1800);

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        for lane in &self.shared.lanes {
            let state = lock(&lane.state);
            if let Some(line) = &state.line {
                // It may be closed already.
                let _ = line.socket.shutdown(Shutdown::Both);
            }
            lane.changed.notify_all();
        }
        for thread in self.threads.drain(..) {
            // The last user may be one of them, at an arrival.
            if thread.thread().id() == std::thread::current().id() {
                continue;
            }
            if thread.join().is_err() {
                tracing::error!("a fetching thread panicked; this is a bug");
            }
        }
    }
}

impl Shared {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// A failure shows on the receiving half.
    fn say(&self, transmitter: &Mutex<Transmitter>, message: Fetch) {
        let mut transmitter = lock(transmitter);
        let message = Message::Fetch(message);
        let said = transmitter.message(self.plan.volume, Epoch(0), &message);
        if said.is_err() {
            transmitter.shut();
        }
    }

    fn ping(&self) {
        let step = Duration::from_millis(100);
        let mut next = Instant::now();
        while !self.is_over() {
            std::thread::sleep(step);
            if Instant::now() < next {
                continue;
            }
            next = Instant::now() + self.options.patience / 4;
            for lane in &self.lanes {
                let line = {
                    let state = lock(&lane.state);
                    let line = state.line.as_ref();
                    line.map(|line| Arc::clone(&line.transmitter))
                };
                if let Some(transmitter) = line {
                    let mut transmitter = lock(&transmitter);
                    let said = transmitter.message(self.plan.volume, Epoch(0), &Message::Ping);
                    if said.is_err() {
                        transmitter.shut();
                    }
                }
            }
        }
    }

    fn run(&self, lane: &Lane, arrivals: &dyn Arrivals) {
        let mut backoff = self.options.backoff;
        loop {
            {
                let mut state = lock(&lane.state);
                while state.pending.is_empty() && !self.is_over() {
                    state = lane
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
            if self.is_over() {
                return;
            }
            let mut answered = false;
            let ended = self.connected(lane, arrivals, &mut answered);
            lock(&lane.state).line = None;
            if self.is_over() {
                return;
            }
            if answered {
                backoff = self.options.backoff;
            }
            tracing::info!(plan = %self.plan.plan, class = ?lane.class, "fetching from the source: {ended}; trying again");
            let until = Instant::now() + backoff;
            while Instant::now() < until && !self.is_over() {
                std::thread::sleep(Duration::from_millis(20));
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One connection from its beginning to its end, and why it ended.
    fn connected(&self, lane: &Lane, arrivals: &dyn Arrivals, answered: &mut bool) -> String {
        let grant = match self.grant() {
            Ok(grant) => grant,
            Err(error) => return error,
        };
        let (socket, mut receiver, transmitter, opener) =
            match fetching(&self.plan, &grant, &self.options, lane.class) {
                Ok(connected) => connected,
                Err(error) => {
                    // Its keys may be of an earlier life of the source.
                    *lock(&self.grant) = None;
                    return error;
                }
            };
        let transmitter = Arc::new(Mutex::new(transmitter));
        let open = {
            let mut state = lock(&lane.state);
            state.line = Some(Line {
                transmitter: Arc::clone(&transmitter),
                socket,
            });
            together(&state.pending)
        };
        if self.is_over() {
            return String::new();
        }
        // Said from another thread: the source answers while the questions are still being asked.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for asks in open {
                    self.say(&transmitter, asks);
                }
            });
            let ended = self.receive(lane, arrivals, &mut receiver, &opener, answered);
            lock(&transmitter).shut();
            ended
        })
    }

    fn grant(&self) -> Result<Grant, String> {
        let mut grant = lock(&self.grant);
        if let Some(grant) = &*grant {
            return Ok(grant.clone());
        }
        let new = (self.plan.admit)()?;
        *grant = Some(new.clone());
        Ok(new)
    }

    fn receive(
        &self,
        lane: &Lane,
        arrivals: &dyn Arrivals,
        receiver: &mut Receiver,
        opener: &Sealer,
        answered: &mut bool,
    ) -> String {
        let mut record = Vec::new();
        loop {
            let header = match receiver.next(std::mem::take(&mut record)) {
                Ok(Incoming::Message(_, _, Message::Ping)) => continue,
                Ok(Incoming::Message(..)) => return "a message came out of order".to_owned(),
                Ok(Incoming::Record(header, bytes)) => {
                    record = bytes;
                    header
                }
                Err(error) => return error.to_string(),
            };
            let plain = match opener.open(&header, &mut record[HEADER_LEN..]) {
                Ok(plain) => plain,
                Err(error) => return error.to_string(),
            };
            let answer = match Answer::decode(plain) {
                Ok(answer) => answer,
                Err(error) => return error.to_string(),
            };
            let number = match &answer {
                Answer::Block { number, .. }
                | Answer::Refused { number, .. }
                | Answer::Map { number, .. } => *number,
                Answer::Entries { .. } | Answer::Same(_) => {
                    return "a list came unasked".to_owned();
                }
            };
            *answered = true;
            let known = lock(&lane.state).pending.get(&number).cloned();
            let Some(Question { place, what, .. }) = known else {
                continue;
            };
            let taken = match self.checked(what, &answer) {
                Ok(taken) => taken,
                Err(why) => return why.to_owned(),
            };
            lock(&lane.state).pending.remove(&number);
            match taken {
                Taken::Block(block) => arrivals.arrived(lane.class, place, block),
                Taken::Holes(holes) => arrivals.mapped(place, holes),
            }
        }
    }

    /// An answer that is one to what was asked.
    fn checked<'a>(&self, what: What, answer: &'a Answer<'_>) -> Result<Taken<'a>, &'static str> {
        let (said, bytes) = match (answer, what) {
            (Answer::Map { holes, .. }, What::Holes(count)) => {
                return match holes.last() {
                    Some(last) if last.end > count => Err("holes lie beyond what was asked"),
                    _ => Ok(Taken::Holes(holes)),
                };
            }
            (Answer::Refused { .. }, What::Holes(_)) => return Ok(Taken::Holes(&[])),
            (Answer::Refused { why, .. }, _) => return Ok(Taken::Block(Err(*why))),
            (
                Answer::Block {
                    signature, bytes, ..
                },
                What::Bytes(_) | What::Signature,
            ) => (*signature, *bytes),
            _ => return Err("an answer is not one to its question"),
        };
        let content = match what {
            What::Bytes(held) if bytes.is_empty() && held == Some(said) => Content::Held,
            What::Bytes(_) => Content::Bytes(bytes),
            _ => Content::Unasked,
        };
        let bare = bytes.is_empty() && (said == ZERO || !matches!(content, Content::Bytes(_)));
        if !bare && signature(&self.plan.fleet_key, bytes) != said {
            return Err("a block does not bear its signature");
        }
        Ok(Taken::Block(Ok(Block {
            signature: said,
            content,
        })))
    }
}

/// What an answer brings.
enum Taken<'a> {
    Block(Result<Block<'a>, Refusal>),
    Holes(&'a [Range<u32>]),
}

/// Everything that is asked, in as few messages as may be.
fn together(pending: &HashMap<u64, Question>) -> Vec<Fetch> {
    let wants = |of: fn(What) -> bool| -> Vec<Want> {
        let some = pending.iter().filter(|(_, question)| of(question.what));
        some.map(|(number, question)| question.want(*number))
            .collect()
    };
    let bytes = wants(|what| matches!(what, What::Bytes(_)));
    let signatures = wants(|what| what == What::Signature);
    let holes = pending
        .iter()
        .filter(|(_, question)| matches!(question.what, What::Holes(_)));
    let bytes = bytes.chunks(ASKED_AT_ONCE).map(<[Want]>::to_vec);
    let signatures = signatures.chunks(ASKED_AT_ONCE).map(<[Want]>::to_vec);
    bytes
        .map(Fetch::Want)
        .chain(signatures.map(Fetch::Sign))
        .chain(holes.map(|(number, question)| question.asks(*number)))
        .collect()
}

/// Questions in one message.
const ASKED_AT_ONCE: usize = 32;

/// An agreed connection, and what the source answered to the message that opened it.
pub(super) struct Connected {
    pub(super) socket: Arc<TcpStream>,
    pub(super) receiver: Receiver,
    pub(super) transmitter: Transmitter,
    pub(super) answer: Fetch,
}

pub(super) fn connect(
    plan: &FetchPlan,
    grant: &Grant,
    options: &Options,
    open: Fetch,
) -> Result<Connected, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let patience = options.patience;
    let Hop { addr, link_key } = &grant.hop;
    let socket = TcpStream::connect_timeout(addr, patience).map_err(|e| text(&e))?;
    connection::tune(&socket, patience).map_err(|e| text(&e))?;
    let class = if open.is_waited_for() {
        connection::Class::Demand
    } else {
        connection::Class::Background
    };
    connection::mark(&socket, class).map_err(|e| text(&e))?;
    let socket = Arc::new(socket);
    let mut greeter = engine(options.engine).map_err(|e| text(&e))?;
    let key = hello::call(
        greeter.as_mut(),
        socket.as_fd(),
        &plan.plan,
        link_key,
        patience,
    )
    .map_err(|error: HelloError| text(&error))?;
    let (mut receiver, mut transmitter) =
        connection::split(&socket, &key, true, options.engine, patience).map_err(|e| text(&e))?;
    transmitter
        .message(plan.volume, Epoch(0), &Message::Fetch(open))
        .map_err(|e| text(&e))?;
    match receiver.next(Vec::new()).map_err(|e| text(&e))? {
        Incoming::Message(_, _, Message::Fetch(answer)) => Ok(Connected {
            socket,
            receiver,
            transmitter,
            answer,
        }),
        _ => Err("the source answered out of order".to_owned()),
    }
}

type Fetching = (Arc<TcpStream>, Receiver, Transmitter, Sealer);

/// A connection that fetches.
fn fetching(
    plan: &FetchPlan,
    grant: &Grant,
    options: &Options,
    class: Class,
) -> Result<Fetching, String> {
    let connected = connect(plan, grant, options, Fetch::Open(class))?;
    match connected.answer {
        Fetch::Opened(salt) => {
            let opener = Sealer::new(&plan.plan, &grant.data_key, &salt);
            let Connected {
                socket,
                receiver,
                transmitter,
                ..
            } = connected;
            Ok((socket, receiver, transmitter, opener))
        }
        _ => Err("the source answered out of order".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Kind;
    use crate::volume::tree::{Seen, Timestamp};

    #[test]
    fn a_list_that_never_ends_or_names_what_is_known_again_and_again_is_refused() {
        let entry = |number: usize| Entry {
            path: format!("{number:08}").into_bytes().into(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            kind: Kind::Fifo,
            seen: Seen::default(),
        };
        let known: Vec<Entry> = (0..10_000).map(entry).collect();
        let pieces = Pieces::of(&known, &FleetKey([3; 32]));
        let all = || Answer::Same(pieces.signatures.clone());
        let more = |last| Answer::Entries {
            last,
            entries: vec![entry(10_000)],
        };
        // For one entry with its bytes, and the bytes of the next alone.
        let mut listed = Listed::of(&known, &pieces, size_of::<Entry>() + 610);
        assert!(!listed.take(all(), 10).unwrap());
        let named = listed.entries.len();
        assert!(named > 9000 && listed.take(more(true), 600).unwrap());
        assert_eq!(listed.entries.len(), named + 1);
        let said = listed.take(more(false), 10).unwrap_err().to_string();
        assert!(said.contains("is longer than"), "{said}");
        assert!(listed.take(all(), 10).is_err());
        assert_eq!(listed.entries.len(), named + 1);
    }
}
