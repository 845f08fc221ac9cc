//! The side that asks: one connection for what is wanted now, one for the rest, each with many questions
//! outstanding; and such a pair to the paired device that stands in for the source, where there is one.
//!
//! Invariants: a question is asked again on every new connection to the source until it is answered; a lost link is
//! tried again with back-off for as long as questions are open; what the paired device does not answer the source is
//! asked for; nothing is handed on that does not open or does not bear its signature.

use super::connect::fetching;
use super::guard::Guard;
use super::plan::{Arrivals, Block, By, Content, FetchPlan, Grant, Place};
use super::wire::{Answer, Class, Fetch, Refusal, Want};
use crate::model::ids::{Epoch, Signature};
use crate::transfer::Options;
use crate::transfer::connection::{Incoming, Receiver, Transmitter};
use crate::transfer::message::Message;
use crate::transfer::queue::lock;
use crate::volume::sign::{ZERO, signature};
use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest pause between two tries to reach the source.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// In the order of their lanes.
const CLASSES: [Class; 2] = [Class::Demand, Class::Background];

struct Shared {
    plan: Arc<FetchPlan>,
    options: Options,
    next: AtomicU64,
    over: AtomicBool,
    arrivals: Arc<dyn Arrivals>,
    /// Those to the source, then those to who stands in for it.
    lanes: Vec<Lane>,
}

struct Lane {
    class: Class,
    by: By,
    grant: Mutex<Option<Grant>>,
    state: Mutex<LaneState>,
    changed: Condvar,
}

impl Lane {
    fn new(class: Class, by: By) -> Self {
        let state = LaneState {
            pending: HashMap::new(),
            line: None,
            down: false,
            missed: false,
            heard: Instant::now(),
        };
        Self {
            class,
            by,
            grant: Mutex::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }
}

struct LaneState {
    pending: HashMap<u64, Question>,
    line: Option<Line>,
    /// The last try to reach it failed: it is not asked until one succeeds. Never of one that insists.
    down: bool,
    /// It would have been asked since the last try.
    missed: bool,
    /// When it last answered a question, or was asked the first of those that are open.
    heard: Instant,
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
        let by = [By::Source, By::StandIn];
        let lanes = by.iter().filter(|by| plan.admission(**by).is_some());
        let lanes = lanes.flat_map(|by| CLASSES.map(|class| Lane::new(class, *by)));
        let shared = Arc::new(Shared {
            options,
            next: AtomicU64::new(0),
            over: AtomicBool::new(false),
            lanes: lanes.collect(),
            arrivals: Arc::clone(arrivals),
            plan,
        });
        let mut fetcher = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
        };
        for at in 0..shared.lanes.len() {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new()
                .name("lifeboat-fetch".to_owned())
                .spawn(move || shared.run(&shared.lanes[at]))?;
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
        self.put(By::StandIn, class, place, path, What::Bytes(held));
    }

    /// Asks the source itself for a block once more, behind everything else.
    pub fn ask_anew(&self, place: Place, path: &Arc<[u8]>) {
        let what = What::Bytes(None);
        self.put(By::Source, Class::Background, place, path, what);
    }

    /// Asks the source itself for the signature alone, behind everything else.
    pub fn ask_signature(&self, place: Place, path: &Arc<[u8]>) {
        self.put(By::Source, Class::Background, place, path, What::Signature);
    }

    /// Asks which of `count` blocks from `first` on are holes, before anything that nobody waits for.
    pub fn ask_holes(&self, first: Place, count: u32, path: &Arc<[u8]>) {
        self.put(By::StandIn, Class::Demand, first, path, What::Holes(count));
    }

    fn put(&self, by: By, class: Class, place: Place, path: &Arc<[u8]>, what: What) {
        let question = Question {
            place,
            path: Arc::clone(path),
            what,
        };
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.shared.put(class, by, number, question);
    }
}

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

    fn lane(&self, class: Class, by: By) -> Option<&Lane> {
        let mut lanes = self.lanes.iter();
        lanes.find(|lane| (lane.class, lane.by) == (class, by))
    }

    /// Asks who stands in for the source, where there is one that answers, or the source.
    fn put(&self, class: Class, from: By, number: u64, question: Question) {
        for by in [By::StandIn, By::Source] {
            let is_asked = by == By::Source || from == By::StandIn;
            let Some(lane) = self.lane(class, by).filter(|_| is_asked) else {
                continue;
            };
            let asks = question.asks(number);
            let line = {
                let mut state = lock(&lane.state);
                if state.down {
                    state.missed = true;
                    lane.changed.notify_all();
                    continue;
                }
                if state.pending.is_empty() {
                    state.heard = Instant::now();
                }
                state.pending.insert(number, question);
                lane.changed.notify_all();
                let line = state.line.as_ref();
                line.map(|line| Arc::clone(&line.transmitter))
            };
            if let Some(transmitter) = line {
                self.say(&transmitter, asks);
            }
            return;
        }
        self.give_up(&question);
    }

    fn give_up(&self, question: &Question) {
        match question.what {
            What::Holes(count) => self.arrivals.away(question.place, Some(count)),
            _ => self.arrivals.away(question.place, None),
        }
    }

    /// What a connection left unanswered that is not made again for it: the source is asked for what who stands in for
    /// it did not answer.
    fn hand_on(&self, lane: &Lane, ended: &str) {
        let left = {
            let mut state = lock(&lane.state);
            if !state.down {
                let who = match lane.by {
                    By::Source => "the source",
                    By::StandIn => "the paired device, which stands in for the source",
                };
                tracing::info!(plan = %self.plan.plan, class = ?lane.class, "fetching from {who}: {ended}; it is tried again");
            }
            state.down = true;
            std::mem::take(&mut state.pending)
        };
        for (number, question) in left {
            match lane.by {
                By::Source => self.give_up(&question),
                By::StandIn => self.put(lane.class, By::Source, number, question),
            }
        }
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
                    // It lives, and has no answer to give: the source is asked.
                    let stuck = !state.pending.is_empty()
                        && state.heard.elapsed() > self.options.patience * 2;
                    if stuck
                        && lane.by == By::StandIn
                        && let Some(line) = &state.line
                    {
                        // It may be closed already.
                        let _ = line.socket.shutdown(Shutdown::Both);
                        continue;
                    }
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

    fn run(&self, lane: &Lane) {
        let mut backoff = self.options.backoff;
        let insists = lane.by == By::Source && self.plan.insists;
        loop {
            {
                let mut state = lock(&lane.state);
                while state.pending.is_empty() && !state.missed && !self.is_over() {
                    state = lane
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                state.missed = false;
            }
            if self.is_over() {
                return;
            }
            let mut answered = false;
            let ended = self.connected(lane, &mut answered);
            lock(&lane.state).line = None;
            if self.is_over() {
                return;
            }
            if answered {
                backoff = self.options.backoff;
            }
            if insists {
                tracing::info!(plan = %self.plan.plan, class = ?lane.class, "fetching from the source: {ended}; trying again");
            } else {
                self.hand_on(lane, &ended);
            }
            let until = Instant::now() + backoff;
            while Instant::now() < until && !self.is_over() {
                std::thread::sleep(Duration::from_millis(20));
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One connection from its beginning to its end, and why it ended.
    fn connected(&self, lane: &Lane, answered: &mut bool) -> String {
        let grant = match self.grant(lane) {
            Ok(grant) => grant,
            Err(error) => return error,
        };
        let (socket, mut receiver, transmitter, guard) =
            match fetching(&self.plan, &grant, &self.options, lane.class) {
                Ok(connected) => connected,
                Err(error) => {
                    // Its keys may be of an earlier life of who gave them.
                    *lock(&lane.grant) = None;
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
            state.down = false;
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
            let ended = self.receive(lane, &mut receiver, &guard, answered);
            lock(&transmitter).shut();
            ended
        })
    }

    fn grant(&self, lane: &Lane) -> Result<Grant, String> {
        if let Some(grant) = &*lock(&lane.grant) {
            return Ok(grant.clone());
        }
        let admit = self.plan.admission(lane.by);
        let new = admit.ok_or("nobody stands in for the source")?()?;
        *lock(&lane.grant) = Some(new.clone());
        Ok(new)
    }

    fn receive(
        &self,
        lane: &Lane,
        receiver: &mut Receiver,
        guard: &Guard,
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
            let plain = match guard.open(&header, &mut record) {
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
                | Answer::Away { number }
                | Answer::Map { number, .. } => *number,
                Answer::Entries { .. } | Answer::Same(_) => {
                    return "a list came unasked".to_owned();
                }
            };
            *answered = true;
            let known = lock(&lane.state).pending.get(&number).cloned();
            let Some(question) = known else {
                continue;
            };
            if matches!(answer, Answer::Away { .. }) {
                if lane.by == By::Source {
                    return "the source says that it is out of its own reach".to_owned();
                }
                {
                    let mut state = lock(&lane.state);
                    state.pending.remove(&number);
                    state.heard = Instant::now();
                }
                self.put(lane.class, By::Source, number, question);
                continue;
            }
            let Question { place, what, .. } = question;
            let taken = match self.checked(what, &answer) {
                Ok(taken) => taken,
                Err(why) => return why.to_owned(),
            };
            {
                let mut state = lock(&lane.state);
                state.pending.remove(&number);
                state.heard = Instant::now();
            }
            match taken {
                Taken::Block(block) => {
                    if let Ok(Block {
                        content: Content::Bytes(bytes),
                        ..
                    }) = &block
                    {
                        let tally = self.plan.tally.of(lane.by);
                        tally.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    }
                    self.arrivals.arrived(lane.class, place, block);
                }
                Taken::Holes(count, holes) => self.arrivals.mapped(place, count, holes),
            }
        }
    }

    /// An answer that is one to what was asked.
    fn checked<'a>(&self, what: What, answer: &'a Answer<'_>) -> Result<Taken<'a>, &'static str> {
        let (said, bytes) = match (answer, what) {
            (Answer::Map { holes, .. }, What::Holes(count)) => {
                return match holes.last() {
                    Some(last) if last.end > count => Err("holes lie beyond what was asked"),
                    _ => Ok(Taken::Holes(count, holes)),
                };
            }
            (Answer::Refused { .. }, What::Holes(count)) => return Ok(Taken::Holes(count, &[])),
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
    Holes(u32, &'a [Range<u32>]),
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
