//! The thread that brings the log to the source.

use super::{Shared, State, UNMIRRORED, sync_directory};
use crate::transfer::fetch::{MIRROR_BATCH, MirrorReceiver, MirrorSender, mirror_to};
use crate::volume::mirror::Mark;
use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest pause between two tries to reach the source.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Bytes after which the source is asked to make them durable though nobody waits for it.
const SYNC_EVERY: u64 = 16 << 20;
/// Time after which it is, too.
const SYNC_AFTER: Duration = Duration::from_secs(1);

/// Marks behind what was sent, oldest first: where the log is trimmed when that is durable.
type Sent = Mutex<VecDeque<Mark>>;

impl Shared {
    pub(super) fn run(&self) {
        let mut backoff = self.options.backoff;
        loop {
            {
                let mut state = self.state();
                while !state.over && state.lost.is_none() && is_settled(&state) {
                    state = self.wait(state, SYNC_AFTER);
                }
                if state.over || state.lost.is_some() {
                    return;
                }
            }
            let before = self.state().acknowledged;
            let ended = self.connected();
            let mut state = self.state();
            state.socket = None;
            if state.over || state.lost.is_some() {
                return;
            }
            if state.acknowledged > before {
                backoff = self.options.backoff;
            }
            tracing::info!(plan = %self.plan.plan, volume = %self.plan.volume, "mirroring to the source: {ended}; trying again");
            state.down = Some(ended);
            self.changed.notify_all();
            let until = Instant::now() + backoff;
            while Instant::now() < until && !state.over {
                state = self.wait(state, until.saturating_duration_since(Instant::now()));
            }
            drop(state);
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// One connection from its beginning to its end, and why it ended.
    fn connected(&self) -> String {
        let id = self.state().log.id();
        let (sender, mut receiver, durable) = match mirror_to(&self.plan, &self.options, id) {
            Ok(connected) => connected,
            Err(error) => return error,
        };
        let from = {
            let mut state = self.state();
            state.socket = Some(sender.socket());
            if durable < state.acknowledged || durable > state.log.last() {
                self.lose(
                    &mut state,
                    "the source does not have the changes that it had",
                );
                return String::new();
            }
            let mut at = state.log.start();
            let mut record = Vec::new();
            while at.next() <= durable {
                match state.log.read(at, 0, &mut record) {
                    Ok(next) if next != at => at = next,
                    read => {
                        let why = format!("the log cannot be read: {read:?}");
                        self.lose(&mut state, &why);
                        return String::new();
                    }
                }
            }
            state.down = None;
            at
        };
        let sent = Sent::default();
        sent.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(from);
        self.acknowledge(durable, &sent);
        let ended = Mutex::new(None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let why = self.hear(&mut receiver, &sent);
                // Under the lock of who waits for it.
                let _state = self.state();
                *ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                self.changed.notify_all();
            });
            let failed = self.send(sender, from, &sent, &ended);
            let heard = ended.lock().unwrap_or_else(PoisonError::into_inner).take();
            heard.unwrap_or_else(|| {
                failed.map_or_else(|error| error.to_string(), |()| String::new())
            })
        })
    }

    fn hear(&self, receiver: &mut MirrorReceiver, sent: &Sent) -> String {
        loop {
            match receiver.durable() {
                Ok(durable) => self.acknowledge(durable, sent),
                Err(why) => return why,
            }
        }
    }

    /// The source has everything up to this change durably.
    fn acknowledge(&self, durable: u64, sent: &Sent) {
        let mut state = self.state();
        if durable > state.log.last() {
            return;
        }
        state.acknowledged = state.acknowledged.max(durable);
        let mut trimmed = None;
        {
            let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
            while sent.front().is_some_and(|mark| mark.next() <= durable + 1) {
                trimmed = sent.pop_front();
            }
        }
        if let Some(mark) = trimmed
            && let Err(error) = state.log.trim(mark)
        {
            tracing::warn!(directory = %self.directory.display(), "the log of a mirror is not trimmed: {error}");
        }
        if state.unmirrored && is_all(&state) {
            let path = self.directory.join(UNMIRRORED);
            let removed = std::fs::remove_file(&path).and_then(|()| sync_directory(&path));
            match removed {
                Ok(()) => {
                    state.unmirrored = false;
                    tracing::info!(plan = %self.plan.plan, volume = %self.plan.volume, "the source has all changes again");
                }
                Err(error) => {
                    tracing::warn!(directory = %self.directory.display(), "stays unmirrored: {error}");
                }
            }
        }
        self.changed.notify_all();
    }

    fn send(
        &self,
        mut sender: MirrorSender,
        from: Mark,
        sent: &Sent,
        ended: &Mutex<Option<String>>,
    ) -> io::Result<()> {
        let (mut at, mut batch) = (from, Vec::new());
        // What the source was asked to make durable last, and what was sent since.
        let (mut asked, mut unsynced) = (from.next() - 1, 0);
        let mut last_word = Instant::now();
        loop {
            let sync = {
                let mut state = self.state();
                loop {
                    let is_over = ended
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .is_some();
                    if state.over || state.lost.is_some() || is_over {
                        return Ok(());
                    }
                    if at.next() <= state.log.last() {
                        break;
                    }
                    let quiet = last_word.elapsed() >= SYNC_AFTER;
                    if asked < at.next() - 1 && (quiet || state.wanted > asked) {
                        break;
                    }
                    if last_word.elapsed() >= self.options.patience / 4 {
                        break;
                    }
                    let step = SYNC_AFTER.min(self.options.patience / 4);
                    state = self.wait(state, step);
                }
                let next = state.log.read(at, MIRROR_BATCH, &mut batch)?;
                at = next;
                let all = at.next() > state.log.last();
                let wanted = state.wanted > asked && at.next() > state.wanted;
                asked < at.next() - 1 && (wanted || all && batch.is_empty())
            };
            if !batch.is_empty() {
                sender.send(&batch)?;
                unsynced += batch.len() as u64;
                sent.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_back(at);
            }
            if sync || unsynced >= SYNC_EVERY {
                sender.sync()?;
                (asked, unsynced) = (at.next() - 1, 0);
            } else if batch.is_empty() {
                sender.ping()?;
            }
            last_word = Instant::now();
        }
    }
}

/// Whether the source has all changes, and nothing says otherwise.
fn is_settled(state: &State) -> bool {
    is_all(state) && !state.unmirrored
}

fn is_all(state: &State) -> bool {
    state.acknowledged >= state.log.last()
}
