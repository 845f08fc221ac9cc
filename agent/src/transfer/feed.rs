//! One connection feeding one session: records opened and applied side by side, acknowledgements out.
//!
//! Invariants: a record behind a barrier is applied only when everything before it was; a record is
//! acknowledged only once it is applied, and applied once.

use super::connection::{ConnectionError, Receiver, Transmitter};
use super::engine::{Engine, EngineChoice, engine};
use super::finder::{self, Finder};
use super::frame::{FrameKind, Header};
use super::message::{Done, Failure, FailureCode, Held, Message};
use super::payload::{self, Payload, PayloadKind};
use super::queue::{OnPanic, Queue, lock};
use super::rebuild::RebuildError;
use super::receive::{Complete, Reception, Session, Volume};
use super::sender::proof;
use crate::model::ids::{Epoch, Signature, VolumeId};
use crate::volume::ScanError;
use crate::volume::aligned::Aligned;
use crate::volume::apply::{ApplyError, Parent};
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Which record numbers have arrived.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrived {
    watermark: u64,
    above: BTreeSet<u64>,
}

impl Arrived {
    /// Everything below `watermark`.
    pub(super) fn below(watermark: u64) -> Self {
        Self {
            watermark,
            above: BTreeSet::new(),
        }
    }

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

    pub(super) fn is_empty(&self) -> bool {
        self.watermark == 0 && self.above.is_empty()
    }
}

/// Why an epoch or a connection stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
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
    #[error("volume {volume}, epoch {epoch}: another attempt took the place of this one")]
    Replaced { volume: String, epoch: Epoch },
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
    pub(super) fn failure(&self) -> Failure {
        let code = match self {
            Self::Corrupt { .. } | Self::Rebuild(RebuildError::WrongSignature { .. }) => {
                FailureCode::Corrupt
            }
            Self::Protocol { .. } | Self::Rebuild(RebuildError::Disagree { .. }) => {
                FailureCode::Protocol
            }
            // What is here is looked at anew, and what it lacks sent whole.
            Self::Replaced { .. } | Self::Rebuild(RebuildError::Altered { .. }) => {
                FailureCode::Forgotten
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
pub(super) struct Feed<'a> {
    pub(super) reception: &'a Reception,
    pub(super) volume: &'a Volume,
    pub(super) session: &'a Session,
    pub(super) voice: &'a Voice,
}

/// What one thread uses to apply records.
struct Hand {
    engine: Box<dyn Engine>,
    parent: Parent,
    /// Where records are unpacked.
    unpacked: Aligned,
    finder: Finder,
    /// Where blocks of which pages came are put together.
    space: Aligned,
}

impl Hand {
    fn new(choice: EngineChoice) -> Result<Self, ReceiveError> {
        Ok(Self {
            engine: engine(choice).map_err(|error| ReceiveError::Local(error.to_string()))?,
            parent: Parent::default(),
            unpacked: Aligned::default(),
            finder: Finder::default(),
            space: Aligned::default(),
        })
    }
}

/// Records waiting for a worker: enough that none is idle, and few, for they are lost with this process and come
/// again.
const WAITING_CAP: usize = 4;
/// How often the target looks whether much is to be written back.
const WRITE_BACK_STEP: Duration = Duration::from_millis(20);

impl Feed<'_> {
    pub(super) fn run(&self, receiver: &mut Receiver) -> Result<(), ReceiveError> {
        let queue: Queue<(Header, Aligned)> = Queue::new(WAITING_CAP);
        let spare: Mutex<Vec<Aligned>> = Mutex::default();
        let failed: Mutex<Option<ReceiveError>> = Mutex::default();
        let fail = |error: ReceiveError| {
            let mut first = lock(&failed);
            // What fails because of the first failure is not told.
            if first.is_none() {
                let failure = error.failure();
                lock(&self.volume.state).failure = Some(failure.text.clone());
                // The peer then ends the connection, which wakes the receiving thread.
                self.voice.say(&Message::Failed(failure));
                *first = Some(error);
            }
            queue.close();
        };
        let worker = || {
            // The receiving thread waits for the peer, and the peer for an answer to what this thread took.
            let _end = OnPanic(|| {
                queue.abandon();
                self.voice.end();
            });
            let mut hand = match Hand::new(self.reception.options.engine) {
                Ok(hand) => hand,
                Err(error) => return fail(error),
            };
            while let Some((header, mut record)) = queue.take() {
                let result = self.record(&mut hand, &header, &mut record);
                lock(&spare).push(record);
                // Before it counts as done: a barrier that waits for it would miss it and tell of that.
                let ended = result.map_err(fail).is_err();
                queue.done();
                if ended {
                    return;
                }
            }
        };
        let mut done = false;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    if let Err(error) = self.session.rebuild.write_back() {
                        return fail(error.into());
                    }
                    std::thread::sleep(WRITE_BACK_STEP);
                }
            });
            for _ in 0..self.reception.options.workers.max(1) {
                scope.spawn(worker);
            }
            match self.take_in(receiver, &queue, &spare) {
                Ok(ended) => done = ended,
                Err(error) => fail(error),
            }
            queue.close();
            over.store(true, Ordering::Release);
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
        queue: &Queue<(Header, Aligned)>,
        spare: &Mutex<Vec<Aligned>>,
    ) -> Result<bool, ReceiveError> {
        let mut hand = Hand::new(self.reception.options.engine)?;
        loop {
            let mut record = lock(spare).pop().unwrap_or_default();
            let header = match receiver.next_record(&mut record) {
                Ok(header) => header,
                Err(ConnectionError::Io(error)) => {
                    tracing::debug!(
                        volume = self.volume.spec.name,
                        "data connection ended: {error}"
                    );
                    return Ok(false);
                }
                Err(error) => {
                    // What cannot be read names no record: it is one that had not arrived yet.
                    let next = lock(&self.session.arrived).watermark();
                    return Err(self.corrupt(next, error.to_string()));
                }
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
                // Nobody vouches for a header before its record was opened: the number may be wrong.
                let what = "records before this barrier are missing".to_owned();
                return Err(self.corrupt(header.number, what));
            }
            hand.parent.forget();
            if self.record(&mut hand, &header, &mut record)? {
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
        hand: &mut Hand,
        header: &Header,
        record: &mut Aligned,
    ) -> Result<bool, ReceiveError> {
        let bytes = self
            .session
            .opener
            .open(header, record.space(header.length as usize))
            .map_err(|error| self.corrupt(header.number, error.to_string()))?;
        let rebuild = &self.session.rebuild;
        let malformed = |_| self.protocol("a record is malformed");
        let unpacked = &mut hand.unpacked;
        let bytes = payload::unpack(bytes, |len| unpacked.space(len)).map_err(malformed)?;
        let kind = PayloadKind::of(bytes).map_err(malformed)?;
        if kind.is_parallel() == header.barrier {
            return Err(self.protocol("a record stands on the wrong side of a barrier"));
        }
        let mut payload = Payload::decode(bytes, rebuild.block_size).map_err(malformed)?;
        let offers = finder::offers(&payload);
        let mut memories = [bytes, &[]];
        if offers {
            let map = rebuild.map.as_deref();
            let key = &self.reception.plan.fleet_key;
            let (memory, found) = hand.finder.find(map, key, rebuild.block_size, &payload);
            payload = finder::filled(&payload, memory, found);
            memories[1] = memory;
        }
        let engine = hand.engine.as_mut();
        let (parent, space) = (&mut hand.parent, &mut hand.space);
        let held = rebuild.apply(engine, parent, memories, space, &payload)?;
        if offers {
            let answer = Held::new(header.number, held);
            lock(&self.session.answers).keep(answer.clone());
            self.voice.say(&Message::Held(answer));
        }
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
            entries: tree.entries(),
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
