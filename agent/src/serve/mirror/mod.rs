//! The mirror of what is written to a served tree, at the target: every change goes to a log here and from there to
//! the source, so that losing either side loses nothing that was acknowledged.
//!
//! Invariants: changes are made and logged one at a time, in one order; what was to be changed is noted first, so
//! that a change is in the log also when the process died before it was; a sync is answered when the source has
//! everything before it durably, or when it is durably noted here that writes go unmirrored; that note goes when
//! the source has everything. Where a change cannot be logged, or the host died with changes that nobody synced,
//! the mirror is lost for good and says so. Non-goal: writing it back (`volume::mirror`).

mod intent;
mod line;

pub use intent::Intent;
pub(super) use intent::joined;

use super::origins::StoreError;
use super::store::Store;
use crate::transfer::Options;
use crate::transfer::fetch::FetchPlan;
use crate::transfer::seal::random;
use crate::volume::codec::{Malformed, Reader};
use crate::volume::mirror::Log;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How far a mirror is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mirrored {
    /// Changes that were made here.
    pub changes: u64,
    /// Of these, how many the source has durably.
    pub acknowledged: u64,
    /// Why what is acknowledged to programs may not be on the source; none while it is.
    pub unmirrored: Option<String>,
}

/// Names of the files in the mirror's directory: what is being changed, that writes go unmirrored, that the mirror
/// is lost, and the boot in which it was used last.
const PENDING: &str = "intended";
/// As an agent before that noted it, without how far the log was.
const FORMER: &str = "pending";
const UNMIRRORED: &str = "unmirrored";
const LOST: &str = "lost";
const BOOT: &str = "boot";
/// In the place of a boot: it was closed with everything on the disk.
const CLOSED: &str = "closed";

struct State {
    log: Log,
    /// Last change that the source has durably.
    acknowledged: u64,
    /// Last change that somebody waits for.
    wanted: u64,
    /// Why the source cannot be reached, since it cannot.
    down: Option<String>,
    unmirrored: bool,
    lost: Option<String>,
    over: bool,
    socket: Option<Arc<TcpStream>>,
}

struct Shared {
    directory: PathBuf,
    plan: Arc<FetchPlan>,
    options: Options,
    patience: Duration,
    pending: File,
    /// Held while something is changed.
    turn: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
    /// As the state says, for who must not wait.
    is_lost: AtomicBool,
}

/// The mirror of one store; dropped, its connection ends and its log is closed.
pub(super) struct Mirror {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Mirror {
    /// Opens the mirror in `directory`, or makes it, and starts to send what the source lacks.
    ///
    /// # Errors
    /// Its files cannot be used.
    pub(super) fn open(
        directory: &Path,
        store: &Store,
        plan: Arc<FetchPlan>,
        options: Options,
        patience: Duration,
    ) -> Result<Self, StoreError> {
        let failed = |error| StoreError::File {
            doing: "keep the mirror",
            directory: directory.to_owned(),
            error,
        };
        let shared = Shared::open(directory, plan, options, patience).map_err(failed)?;
        let shared = Arc::new(shared);
        shared.heal(store);
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lifeboat-mirror".to_owned())
            .spawn(move || for_thread.run())
            .map_err(failed)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Whether it is lost: nothing need be logged any more.
    pub(super) fn is_lost(&self) -> bool {
        self.shared.is_lost.load(Ordering::Acquire)
    }

    /// The right to change something; nobody else does meanwhile.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.shared
            .turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that a write of so many bytes can be logged; the turn is held.
    ///
    /// # Errors
    /// The disk is full: the write must not be done, or the mirror is lost.
    pub(super) fn reserve(&self, bytes: usize) -> io::Result<()> {
        self.shared.state().log.reserve(bytes as u64)
    }

    /// Notes what will be changed; the turn is held.
    pub(super) fn intend(&self, intent: &Intent) {
        let mut state = self.shared.state();
        if let Err(error) = self.shared.write_pending(&state, Some(intent)) {
            let why = format!("cannot note what is being changed: {error}");
            self.shared.lose(&mut state, &why);
        }
    }

    /// Logs what was changed: `bytes` are those of a write that was done wholly.
    pub(super) fn log(&self, store: &Store, intent: &Intent, bytes: Option<&[u8]>) {
        self.shared.log(store, intent, bytes);
    }

    /// Nothing is mirrored from now on, as nobody needs it.
    pub(super) fn end(&self) {
        let mut state = self.shared.state();
        state.over = true;
        state.lost = Some("the volume is whole".to_owned());
        self.shared.is_lost.store(true, Ordering::Release);
        if let Some(socket) = state.socket.take() {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// Waits until all that was changed is durable at the source, or durably noted to be unmirrored.
    ///
    /// # Errors
    /// That cannot be noted.
    pub(super) fn sync(&self) -> io::Result<()> {
        let shared = &*self.shared;
        let mut state = match shared.await_all(shared.patience, true) {
            Ok(()) => return Ok(()),
            Err(state) => state,
        };
        if state.lost.is_some() || state.unmirrored {
            return Ok(());
        }
        let why = state.down.clone();
        let why = why.unwrap_or_else(|| "the source did not answer in time".to_owned());
        note(&shared.directory.join(UNMIRRORED), &why)?;
        state.unmirrored = true;
        tracing::warn!(plan = %shared.plan.plan, volume = %shared.plan.volume, "writes are not mirrored to the source for now: {why}");
        Ok(())
    }

    /// Waits until the source has all that was changed, for as long as `patience`.
    ///
    /// # Errors
    /// Why it has not.
    pub(super) fn settle(&self, patience: Duration) -> Result<(), String> {
        let settled = self.shared.await_all(patience, false);
        settled.map_err(|state| {
            let why = state.lost.clone().or_else(|| state.down.clone());
            why.unwrap_or_else(|| "the source did not answer in time".to_owned())
        })
    }

    /// How far it is.
    pub(super) fn figures(&self) -> Mirrored {
        let state = self.shared.state();
        let for_now = || {
            let unknown = || "the source was not reached".to_owned();
            state
                .unmirrored
                .then(|| state.down.clone().unwrap_or_else(unknown))
        };
        Mirrored {
            changes: state.log.last(),
            acknowledged: state.acknowledged,
            unmirrored: state.lost.clone().or_else(for_now),
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state();
            state.over = true;
            if let Some(socket) = state.socket.take() {
                // It may be closed already.
                let _ = socket.shutdown(Shutdown::Both);
            }
            self.shared.changed.notify_all();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the mirror of a served volume panicked; this is a bug");
        }
        if let Err(error) = self.shared.close() {
            tracing::warn!(directory = %self.shared.directory.display(), "the mirror is not closed cleanly: {error}");
        }
    }
}

impl Shared {
    fn open(
        directory: &Path,
        plan: Arc<FetchPlan>,
        options: Options,
        patience: Duration,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let log = Log::open(&directory.join("log"), || {
            random().map_err(io::Error::other)
        })?;
        let before = read_note(&directory.join(BOOT))?;
        let mut lost = read_note(&directory.join(LOST))?;
        if lost.is_none() && before.is_some_and(|before| before != CLOSED && before != boot) {
            let why = "the host was started anew while changes were made that may not be in it";
            note(&directory.join(LOST), why)?;
            lost = Some(why.to_owned());
        }
        // What cannot be read is told of when it is healed.
        let noted = read_intent(&directory.join(PENDING), true).map_or(0, |(last, _)| last);
        // Somebody else may have been told that the disk did not take it.
        if lost.is_none() && (log.is_torn() || log.last() < noted) {
            let why = "the disk did not take all of its log, and changes that were made here are not in it any more";
            note(&directory.join(LOST), why)?;
            lost = Some(why.to_owned());
        }
        note(&directory.join(BOOT), &boot)?;
        let unmirrored = read_note(&directory.join(UNMIRRORED))?;
        let pending = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(directory.join(PENDING))?;
        // What is trimmed is what was acknowledged.
        let acknowledged = log.start().next() - 1;
        Ok(Self {
            directory: directory.to_owned(),
            plan,
            options,
            patience,
            pending,
            turn: Mutex::default(),
            is_lost: AtomicBool::new(lost.is_some()),
            state: Mutex::new(State {
                wanted: log.last(),
                log,
                acknowledged,
                down: None,
                unmirrored: unmirrored.is_some(),
                lost,
                over: false,
                socket: None,
            }),
            changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how far the log is, and what is changed next.
    fn write_pending(&self, state: &State, intent: Option<&Intent>) -> io::Result<()> {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&state.log.last().to_le_bytes());
        if let Some(intent) = intent {
            intent.encode(&mut bytes);
            // Two paths at most.
            let length = (bytes.len() - PENDING_HEAD) as u32;
            bytes[..4].copy_from_slice(&length.to_le_bytes());
        }
        self.pending.write_all_at(&bytes, 0)
    }

    /// Logs what a process that died was about to change, as it is now.
    fn heal(&self, store: &Store) {
        self.heal_former(store);
        match read_intent(&self.directory.join(PENDING), true) {
            Ok((_, None)) => {}
            Ok((noted, Some(intent))) => {
                let mut state = self.state();
                // It died behind it: once more, that rename would be of a name that is not there, or back.
                if matches!(intent, Intent::Renamed { .. }) && state.log.last() > noted {
                    if let Err(error) = self.write_pending(&state, None) {
                        let why = format!("cannot note that nothing is being changed: {error}");
                        self.lose(&mut state, &why);
                    }
                    return;
                }
                drop(state);
                self.log(store, &intent, None);
            }
            Err(error) => {
                let why = format!("what was being changed when the agent died is unknown: {error}");
                self.lose(&mut self.state(), &why);
            }
        }
    }

    /// As [`Self::heal`], of what an agent before left; nothing of it is left then.
    fn heal_former(&self, store: &Store) {
        let path = self.directory.join(FORMER);
        let why = match read_intent(&path, false) {
            Ok((_, None)) => None,
            // Nobody knows whether it is in the log: once more it may be of a name that is not there, or back.
            Ok((_, Some(Intent::Renamed { .. }))) => Some("a rename".to_owned()),
            Ok((_, Some(intent))) => {
                self.log(store, &intent, None);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = why {
            let why = format!("what an earlier agent changed when it died is unknown: {why}");
            self.lose(&mut self.state(), &why);
        }
        if self.is_lost.load(Ordering::Acquire) && !self.directory.join(LOST).exists() {
            // Nothing else tells the next life.
            return;
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let why = format!("cannot remove what an earlier agent noted: {error}");
                self.lose(&mut self.state(), &why);
            }
            _ => {}
        }
    }

    fn log(&self, store: &Store, intent: &Intent, bytes: Option<&[u8]>) {
        if self.is_lost.load(Ordering::Acquire) {
            return;
        }
        let described = intent.changes(store, bytes);
        let mut state = self.state();
        let mut content = Vec::new();
        let logged = described.and_then(|changes| {
            for change in changes {
                content.clear();
                change.encode(&mut content);
                state.log.append(&content)?;
            }
            self.write_pending(&state, None)
        });
        if let Err(error) = logged {
            self.lose(&mut state, &format!("a change cannot be logged: {error}"));
        }
        self.changed.notify_all();
    }

    fn lose(&self, state: &mut State, why: &str) {
        if state.lost.is_some() {
            return;
        }
        tracing::error!(plan = %self.plan.plan, volume = %self.plan.volume, "writes are not mirrored to the source any more: {why}");
        if let Err(error) = note(&self.directory.join(LOST), why) {
            tracing::error!(directory = %self.directory.display(), "cannot note that: {error}");
        }
        state.lost = Some(why.to_owned());
        self.is_lost.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until the source has all that is in the log now; gives the state when it has not by then, or, when
    /// that is enough, once writes are noted to go unmirrored.
    fn await_all(
        &self,
        patience: Duration,
        is_noted_enough: bool,
    ) -> Result<(), MutexGuard<'_, State>> {
        let until = Instant::now() + patience;
        let mut state = self.state();
        let last = state.log.last();
        state.wanted = state.wanted.max(last);
        self.changed.notify_all();
        loop {
            if state.lost.is_some() {
                return Err(state);
            }
            if state.acknowledged >= last && !state.unmirrored {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || state.over || is_noted_enough && state.unmirrored {
                return Err(state);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Puts all on the disk and says so, so that another boot can go on with it.
    fn close(&self) -> io::Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        nix::unistd::syncfs(File::open(&self.directory)?)?;
        note(&self.directory.join(BOOT), CLOSED)
    }
}

/// Bytes before the intent: its length, and the number of the last change in the log.
const PENDING_HEAD: usize = 4 + 8;

/// The last change that was in the log when it was noted, and what was changed then, if anything was. An agent before
/// noted no number, which is 0 then.
fn read_intent(path: &Path, is_numbered: bool) -> io::Result<(u64, Option<Intent>)> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    if bytes.is_empty() {
        return Ok((0, None));
    }
    let malformed = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut reader = Reader::new(&bytes);
    let mut read = || {
        let length = reader.u32()?;
        let last = if is_numbered { reader.u64()? } else { 0 };
        let intent = reader.bytes(length as usize)?;
        let intent = (length > 0).then(|| Intent::decode(intent)).transpose()?;
        Ok::<_, Malformed>((last, intent))
    };
    read().map_err(malformed)
}

/// Writes a small file durably in the place of the old one.
fn note(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, path)?;
    sync_directory(path)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent()
        .map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

fn read_note(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}
