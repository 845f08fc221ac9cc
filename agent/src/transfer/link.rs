//! A resumable stream of records to the next device.
//!
//! Records stay in a window until the peer has them; when the link breaks, the link reconnects with
//! back-off, asks how far the peer got, and sends the rest of the window again. Invariants: memory in
//! the window is capped; a record is released only by an acknowledgement; after the retries are used
//! up the link fails for good and says why.

use super::connection::{self, Class, ConnectionError, Incoming, Transmitter};
use super::engine::engine;
use super::frame::Header;
use super::hello::{self, HelloError};
use super::message::{Basis, Done, Failure, FailureCode, Have, Held, Holdings, Message};
use super::queue::lock;
use super::record::Record;
use super::seal::{LinkKey, OpenFailed, Salt};
use super::{Options, Progress};
use crate::model::ids::{Epoch, PlanId, VolumeId};
use crate::telemetry::links::{self, Sent, Waits};
use std::collections::{BTreeMap, VecDeque};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where records go next, and the key that opens the door there.
#[derive(Clone, Debug)]
pub struct Hop {
    /// Data address.
    pub addr: SocketAddr,
    /// Key of the admission there.
    pub link_key: LinkKey,
}

/// The link to the next device failed for good.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// No connection could be made or kept.
    #[error(
        "the data link to {addr} failed {attempts} times, last: {last}; check the network and the device there, then start again"
    )]
    Lost {
        /// Next device.
        addr: SocketAddr,
        /// Connections tried since the last progress.
        attempts: u32,
        /// The last failure.
        last: String,
    },
    /// The greeting failed in a way that a retry does not mend.
    #[error("data link to {addr}: {source}")]
    Hello {
        /// Next device.
        addr: SocketAddr,
        /// Why.
        source: Arc<HelloError>,
    },
    /// The peer gave up on the epoch.
    #[error("{}", .0.text)]
    Failed(Failure),
    /// The operator or the plan stopped it.
    #[error("cancelled")]
    Cancelled,
    /// This side could not go on.
    #[error("{0}")]
    Local(String),
}

impl LinkError {
    /// Whether a device on the path was started anew: the epoch can be begun again at once.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self, Self::Failed(failure) if failure.code == FailureCode::Forgotten)
    }

    /// Whether a relay can be the cause: it is away, or its own disk fails. One that cannot reach the next device has
    /// waited for it.
    #[must_use]
    pub fn may_be_of_relay(&self) -> bool {
        match self {
            Self::Lost { .. } => true,
            Self::Failed(failure) => failure.code == FailureCode::Spool,
            _ => false,
        }
    }
}

/// What the peer says while records flow.
#[derive(Debug)]
pub(super) enum Event {
    /// All records below this number are there.
    Ack(u64),
    /// Which offered blocks the target had.
    Held(Held),
    /// A record came back (sealed by the paired device).
    Record(Header, Vec<u8>),
    /// The target completed the epoch.
    Done(Done),
    /// The link is over.
    Failed(LinkError),
}

/// The first answer of the peer.
#[derive(Debug)]
pub(super) struct Opened {
    /// All records below this number have arrived.
    pub(super) watermark: u64,
    pub(super) basis: Basis,
    pub(super) salt: Salt,
    pub(super) have: Vec<Have>,
    pub(super) holdings: Holdings,
}

/// What a link needs to know.
#[derive(Clone, Debug)]
pub(super) struct LinkSetup {
    pub(super) plan: PlanId,
    pub(super) hop: Hop,
    pub(super) volume: VolumeId,
    pub(super) epoch: Epoch,
    pub(super) begin: Message,
    /// The peer agreed to this plan before: should it refuse now, it was started anew and will know it soon.
    pub(super) known: bool,
    pub(super) options: Options,
    pub(super) progress: Arc<Progress>,
}

/// Takes what the peer says; an error about a record means that the connection is not sound.
pub(super) type Handler = Box<dyn FnMut(Event) -> Result<(), OpenFailed> + Send>;

struct State {
    window: BTreeMap<u64, Arc<Record>>,
    unsent: VecDeque<u64>,
    bytes: usize,
    /// Answers to records with offers, once they came. A peer that is connected to again repeats those
    /// that may have been lost.
    answers: BTreeMap<u64, Option<Held>>,
    /// The current connection is gone.
    broken: Option<String>,
    over: Option<Result<Done, LinkError>>,
    /// Something was acknowledged since the last connection began.
    moved: bool,
    /// All records below this number were acknowledged.
    acknowledged: u64,
    /// What the peer's first answer said to build upon, and its salt.
    agreed: Option<(Basis, Salt)>,
    spare: Vec<Vec<u8>>,
    /// Bytes a second that the link took when it was last the limit, and when that was.
    limit: Option<(u64, Instant)>,
}

impl State {
    /// Keeps a buffer for the next record.
    fn keep(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE_CAP {
            self.spare.push(buffer);
        }
    }
}

struct Shared {
    setup: LinkSetup,
    state: Mutex<State>,
    changed: Condvar,
}

/// A running link.
pub(super) struct Link {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Most used buffers that are kept.
const SPARE_CAP: usize = 16;
/// How often a waiting thread looks at the cancel flag.
const TICK: Duration = Duration::from_millis(100);
/// How often a link that sends is asked how it does.
const MEASURED_EVERY: Duration = Duration::from_secs(1);
/// How long a link counts as the limit after it was seen to be: less travels once records are packed, so that it
/// may not show until they no longer are.
const LIMIT_COUNTS: Duration = Duration::from_secs(15);
/// Shares of a second, in percent, that a sender may have nothing to send and that a peer may take nothing on a
/// link that is the limit.
const IDLE: u128 = 10;
const REFUSED: u64 = 30;

impl Link {
    /// Connects, greets and begins; returns when the peer is ready.
    pub(super) fn open(setup: LinkSetup, handler: Handler) -> Result<(Self, Opened), LinkError> {
        let shared = Arc::new(Shared {
            setup,
            state: Mutex::new(State {
                window: BTreeMap::new(),
                unsent: VecDeque::new(),
                bytes: 0,
                answers: BTreeMap::new(),
                broken: None,
                over: None,
                moved: false,
                acknowledged: 0,
                agreed: None,
                spare: Vec::new(),
                limit: None,
            }),
            changed: Condvar::new(),
        });
        let (opened_here, opened) = sync_channel(1);
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lifeboat-link".to_owned())
            .spawn(move || for_thread.run(handler, &opened_here))
            .map_err(|e| LinkError::Local(format!("cannot start a data thread: {e}")))?;
        let mut link = Self {
            shared,
            thread: Some(thread),
        };
        match opened.recv() {
            Ok(opened) => Ok((link, opened)),
            Err(_) => {
                // The thread ended without a connection and left its reason.
                link.join();
                Err(link.error())
            }
        }
    }

    /// Hands over a numbered record; waits while the window is full.
    pub(super) fn push(&self, number: u64, record: impl Into<Record>) -> Result<(), LinkError> {
        let record = record.into();
        let cap = self.shared.setup.options.in_flight_cap;
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(over) = &state.over {
                return Err(over.clone().err().unwrap_or(LinkError::Cancelled));
            }
            // The oldest number is always let in: the window can only shrink once it arrives.
            let oldest = state
                .window
                .keys()
                .next()
                .is_none_or(|&first| number < first);
            if oldest || state.bytes + record.held() <= cap {
                break;
            }
            state = self.shared.wait(state, TICK);
        }
        state.bytes += record.held();
        state.window.insert(number, Arc::new(record));
        state.unsent.push_back(number);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Number below which everything was acknowledged.
    pub(super) fn acknowledged(&self) -> u64 {
        lock(&self.shared.state).acknowledged
    }

    /// Says that the record of this number will be answered; before it is pushed.
    pub(super) fn expect(&self, number: u64) {
        lock(&self.shared.state).answers.insert(number, None);
    }

    /// Whether the answer to a record is there.
    pub(super) fn is_answered(&self, number: u64) -> bool {
        let state = lock(&self.shared.state);
        matches!(state.answers.get(&number), Some(Some(_)))
    }

    /// Waits for the answer to an expected record.
    pub(super) fn answer(&self, number: u64) -> Result<Held, LinkError> {
        let mut state = lock(&self.shared.state);
        loop {
            match state.answers.get_mut(&number).map(Option::take) {
                Some(Some(held)) => {
                    state.answers.remove(&number);
                    return Ok(held);
                }
                Some(None) => {}
                None => return Ok(Held::default()),
            }
            if let Some(over) = &state.over {
                return Err(over.clone().err().unwrap_or(LinkError::Cancelled));
            }
            state = self.shared.wait(state, TICK);
        }
    }

    /// A used buffer, or a new one.
    pub(super) fn buffer(&self) -> Vec<u8> {
        lock(&self.shared.state).spare.pop().unwrap_or_default()
    }

    /// Bytes a second that the link takes, if it is what limits the transfer or was a moment ago.
    pub(super) fn limit(&self) -> Option<u64> {
        let limit = lock(&self.shared.state).limit;
        limit.and_then(|(rate, seen)| (seen.elapsed() < LIMIT_COUNTS).then_some(rate))
    }

    /// Takes a used buffer back.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        lock(&self.shared.state).keep(buffer);
    }

    /// Waits for the target's word that the epoch is complete.
    pub(super) fn finish(&self) -> Result<Done, LinkError> {
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(over) = &state.over {
                return over.clone();
            }
            state = self.shared.wait(state, TICK);
        }
    }

    /// Ends the link with this side's own failure.
    pub(super) fn fail(&self, error: LinkError) {
        self.shared.end(Err(error));
    }

    fn error(&self) -> LinkError {
        match &lock(&self.shared.state).over {
            Some(Err(error)) => error.clone(),
            _ => LinkError::Cancelled,
        }
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            let text = "a data thread panicked; this is a bug".to_owned();
            self.shared.end(Err(LinkError::Local(text)));
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.end(Err(LinkError::Cancelled));
        self.join();
    }
}

impl Shared {
    fn wait<'s>(
        &self,
        state: std::sync::MutexGuard<'s, State>,
        limit: Duration,
    ) -> std::sync::MutexGuard<'s, State> {
        let (mut state, _) = self
            .changed
            .wait_timeout(state, limit)
            .unwrap_or_else(PoisonError::into_inner);
        if self.setup.progress.is_cancelled() && state.over.is_none() {
            state.over = Some(Err(LinkError::Cancelled));
            self.changed.notify_all();
        }
        state
    }

    fn end(&self, result: Result<Done, LinkError>) {
        let mut state = lock(&self.state);
        if state.over.is_none() {
            state.over = Some(result);
        }
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        lock(&self.state).over.is_some()
    }

    fn release(&self, numbers: impl std::ops::RangeBounds<u64>) {
        let mut state = lock(&self.state);
        let gone: Vec<u64> = state.window.range(numbers).map(|(&n, _)| n).collect();
        for number in gone {
            if let Some(record) = state.window.remove(&number) {
                state.bytes -= record.held();
                state.moved = true;
                if let Some(memory) = Arc::into_inner(record).and_then(Record::into_memory) {
                    state.keep(memory);
                }
            }
        }
        self.changed.notify_all();
    }

    fn run(&self, mut handler: Handler, opened: &SyncSender<Opened>) {
        let options = &self.setup.options;
        let mut attempts = 0;
        let mut first = !self.setup.known;
        let mut away: Option<Instant> = None;
        while !self.is_over() {
            let mut agreed = false;
            let ended = self.connection(&mut handler, opened, &mut agreed);
            let mut state = lock(&self.state);
            if state.over.is_some() {
                break;
            }
            if std::mem::take(&mut state.moved) {
                attempts = 0;
            }
            attempts += 1;
            let last = match ended {
                Err(Ended::Fatal(error)) => {
                    // A device that restarts does not know its plan at once; before anything was
                    // agreed, though, a refusal is a refusal.
                    if first && !agreed || !matches!(error, LinkError::Hello { .. }) {
                        state.over = Some(Err(error));
                        break;
                    }
                    error.to_string()
                }
                Err(Ended::Away(text)) => {
                    let since = *away.get_or_insert_with(Instant::now);
                    if !first && since.elapsed() < options.absence {
                        // When it is back it has tries left.
                        attempts = attempts.min((options.retries / 2).max(1));
                    }
                    text
                }
                Err(Ended::Broken(text)) => text,
                Ok(()) => state.broken.take().unwrap_or_default(),
            };
            first = first && !agreed;
            away = away.filter(|_| !agreed);
            if attempts > options.retries {
                state.over = Some(Err(LinkError::Lost {
                    addr: self.setup.hop.addr,
                    attempts,
                    last,
                }));
                break;
            }
            tracing::warn!(addr = %self.setup.hop.addr, attempts, "data link broke: {last}; reconnecting");
            let pause = options.backoff * 2_u32.saturating_pow(attempts - 1);
            let until = Instant::now() + pause.min(Duration::from_secs(5));
            while Instant::now() < until && state.over.is_none() {
                state = self.wait(state, TICK.min(pause));
            }
        }
        let failed = match &lock(&self.state).over {
            Some(Err(error)) => Some(error.clone()),
            _ => None,
        };
        self.changed.notify_all();
        if let Some(error) = failed {
            // Only records can be unsound.
            let _ = handler(Event::Failed(error));
        }
    }

    /// One connection from greeting to its end.
    fn connection(
        &self,
        handler: &mut Handler,
        opened: &SyncSender<Opened>,
        agreed: &mut bool,
    ) -> Result<(), Ended> {
        let LinkSetup {
            plan,
            hop,
            volume,
            epoch,
            begin,
            options,
            ..
        } = &self.setup;
        let patience = options.patience;
        let socket = TcpStream::connect_timeout(&hop.addr, patience)
            .map_err(|error| Ended::Away(error.to_string()))?;
        connection::tune(&socket, patience).map_err(broken)?;
        connection::mark(&socket, Class::Background).map_err(broken)?;
        let socket = Arc::new(socket);
        let mut greeter = engine(options.engine).map_err(fatal)?;
        let key = hello::call(
            greeter.as_mut(),
            socket.as_fd(),
            plan,
            &hop.link_key,
            patience,
        )
        .map_err(|source| match source {
            HelloError::Link(error) => broken(error),
            source => Ended::Fatal(LinkError::Hello {
                addr: hop.addr,
                source: Arc::new(source),
            }),
        })?;
        drop(greeter);
        let (mut receiver, mut transmitter) =
            connection::split(&socket, &key, true, options.engine, patience).map_err(fatal)?;
        transmitter
            .message(*volume, *epoch, begin)
            .map_err(broken)?;
        let answer = begun(&mut receiver)?;
        *agreed = true;
        self.remembered(&answer)?;
        self.release(..answer.watermark);
        {
            let mut state = lock(&self.state);
            state.broken = None;
            state.unsent = state.window.keys().copied().collect();
        }
        // Only the first connection's answer is awaited.
        let _ = opened.try_send(answer);

        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let broke = self.listen(&mut receiver, handler);
                // Ends a transmission that the peer no longer takes.
                let _ = socket.shutdown(std::net::Shutdown::Both);
                let mut state = lock(&self.state);
                state.broken = Some(broke);
                self.changed.notify_all();
            });
            self.transmit(&mut transmitter, &socket);
            transmitter.shut();
            // A panic in the reader is passed on by the scope.
            let _ = reader.join();
        });
        Ok(())
    }

    /// Fails when the peer does not go on with what was agreed: it was started anew, and records that it
    /// had acknowledged are no longer here to be sent again.
    fn remembered(&self, answer: &Opened) -> Result<(), Ended> {
        let mut state = lock(&self.state);
        let agreed = *state.agreed.get_or_insert((answer.basis, answer.salt));
        if agreed == (answer.basis, answer.salt) && answer.watermark >= state.acknowledged {
            state.acknowledged = answer.watermark;
            return Ok(());
        }
        let text = format!(
            "the device at {} was started anew during the epoch; send the epoch again",
            self.setup.hop.addr
        );
        let code = FailureCode::Forgotten;
        Err(Ended::Fatal(LinkError::Failed(Failure { code, text })))
    }

    /// Sends what waits until the connection or the link is over.
    fn transmit(&self, transmitter: &mut Transmitter, socket: &TcpStream) {
        let heartbeat = self.setup.options.patience / 4;
        let mut quiet_since = Instant::now();
        let mut measured = Measured::begin();
        let mut state = lock(&self.state);
        while state.broken.is_none() && state.over.is_none() {
            let next = state.unsent.pop_front();
            let sent = match next {
                Some(number) => {
                    let Some(record) = state.window.get(&number).cloned() else {
                        continue;
                    };
                    drop(state);
                    let sent = transmitter.record(&record);
                    measured.bytes += record.len() as u64;
                    self.setup
                        .progress
                        .bytes_sent
                        .fetch_add(record.len() as u64, Ordering::Relaxed);
                    sent
                }
                None if quiet_since.elapsed() >= heartbeat => {
                    drop(state);
                    transmitter.message(self.setup.volume, self.setup.epoch, &Message::Ping)
                }
                None => {
                    let idle = Instant::now();
                    state = self.wait(state, TICK);
                    measured.idle += idle.elapsed();
                    continue;
                }
            };
            quiet_since = Instant::now();
            let mut limit = None;
            if quiet_since - measured.since >= MEASURED_EVERY {
                let (peer, sent) = (self.setup.hop.addr.ip(), &mut measured.sent);
                let waits = links::measure(peer, None, socket.as_fd(), sent);
                limit = measured.limit(quiet_since, waits.unwrap_or_default());
            }
            state = lock(&self.state);
            if let Some(rate) = limit {
                state.limit = Some((rate, quiet_since));
            }
            if let Err(error) = sent {
                state.broken.get_or_insert(error.to_string());
            }
        }
    }

    /// Takes in what the peer says until the connection is over; returns why it is.
    fn listen(&self, receiver: &mut connection::Receiver, handler: &mut Handler) -> String {
        let mut buffer = Vec::new();
        loop {
            match receiver.next(std::mem::take(&mut buffer)) {
                Ok(Incoming::Message(_, _, Message::Ack(watermark))) => {
                    self.release(..watermark);
                    let mut state = lock(&self.state);
                    state.acknowledged = state.acknowledged.max(watermark);
                    drop(state);
                    let _ = handler(Event::Ack(watermark));
                }
                Ok(Incoming::Message(_, _, Message::Held(held))) => {
                    let mut state = lock(&self.state);
                    if let Some(answer) = state.answers.get_mut(&held.number) {
                        *answer = Some(held.clone());
                        self.changed.notify_all();
                    }
                    drop(state);
                    let _ = handler(Event::Held(held));
                }
                Ok(Incoming::Message(_, _, Message::Done(done))) => {
                    let _ = handler(Event::Done(done));
                    self.end(Ok(done));
                    return String::new();
                }
                Ok(Incoming::Message(_, _, Message::Failed(failure))) => {
                    if failure.code == FailureCode::Corrupt {
                        return failure.text;
                    }
                    self.end(Err(LinkError::Failed(failure)));
                    return String::new();
                }
                Ok(Incoming::Message(..)) => {}
                Ok(Incoming::Record(header, record)) => {
                    if let Err(error) = handler(Event::Record(header, record)) {
                        return error.to_string();
                    }
                    // What came back sealed need not be sent for sealing again.
                    self.release(header.number..=header.number);
                }
                Err(error) => return silent(error),
            }
            if self.is_over() {
                return String::new();
            }
        }
    }
}

/// What a sender did since the link was last measured.
struct Measured {
    since: Instant,
    bytes: u64,
    /// Nothing was there to be sent.
    idle: Duration,
    waits: Waits,
    sent: Sent,
}

impl Measured {
    fn begin() -> Self {
        Self {
            since: Instant::now(),
            bytes: 0,
            idle: Duration::ZERO,
            waits: Waits::default(),
            sent: Sent::default(),
        }
    }

    /// Begins anew; the bytes a second, if the link was the limit: there was always something to send, and the
    /// peer was not what kept it back.
    fn limit(&mut self, now: Instant, waits: Waits) -> Option<u64> {
        let took = now - self.since;
        let refused = waits.refused_us.saturating_sub(self.waits.refused_us);
        let busy = waits.busy_us.saturating_sub(self.waits.busy_us);
        let limited =
            self.idle.as_millis() * 100 < took.as_millis() * IDLE && refused * 100 < busy * REFUSED;
        let rate = (self.bytes as f64 / took.as_secs_f64()) as u64;
        *self = Self {
            since: now,
            bytes: 0,
            idle: Duration::ZERO,
            waits,
            ..*self
        };
        limited.then_some(rate)
    }
}

/// How a connection ended before records flowed.
enum Ended {
    /// Nobody is there.
    Away(String),
    Broken(String),
    Fatal(LinkError),
}

fn broken(error: impl std::fmt::Display) -> Ended {
    Ended::Broken(error.to_string())
}

fn fatal(error: impl std::fmt::Display) -> Ended {
    Ended::Fatal(LinkError::Local(error.to_string()))
}

fn silent(error: ConnectionError) -> String {
    match error {
        ConnectionError::Io(error) => match error.kind() {
            std::io::ErrorKind::TimedOut => "the peer fell silent".to_owned(),
            std::io::ErrorKind::UnexpectedEof => "the peer closed the connection".to_owned(),
            _ => error.to_string(),
        },
        other => other.to_string(),
    }
}

/// Files and blocks of which it is believed that the target has them: 2 GiB, as much as the longest file takes. More
/// is not kept, and is sent again.
const TOLD_CAP: usize = 64 << 20;

/// Waits for the peer's answer to `Begin`. Acknowledgements before it are signs of life.
fn begun(receiver: &mut connection::Receiver) -> Result<Opened, Ended> {
    let (mut answer, mut told): (Option<Opened>, usize) = (None, 0);
    loop {
        let Incoming::Message(_, _, message) = receiver
            .next(Vec::new())
            .map_err(|e| Ended::Broken(silent(e)))?
        else {
            return Err(Ended::Broken(
                "a record came before the answer to begin".to_owned(),
            ));
        };
        match (message, &mut answer) {
            (
                Message::Begun {
                    watermark,
                    basis,
                    salt,
                    holdings,
                },
                None,
            ) => {
                answer = Some(Opened {
                    watermark,
                    basis,
                    salt,
                    have: Vec::new(),
                    holdings,
                });
            }
            (Message::Have(list), Some(opened)) => {
                told += list.iter().map(|have| 1 + have.blocks.len()).sum::<usize>();
                if told <= TOLD_CAP {
                    opened.have.extend(list);
                }
            }
            (Message::HaveEnd, Some(_)) => {
                if let Some(answer) = answer {
                    return Ok(answer);
                }
            }
            (Message::Ack(_) | Message::Ping, _) => {}
            (Message::Failed(failure), _) if failure.code != FailureCode::Corrupt => {
                return Err(Ended::Fatal(LinkError::Failed(failure)));
            }
            (Message::Failed(failure), _) => return Err(Ended::Broken(failure.text)),
            _ => return Err(Ended::Broken("the peer answered out of order".to_owned())),
        }
    }
}
