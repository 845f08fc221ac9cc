//! What a paired device has of a volume: blocks that it fetched from the source, each once, for the target to fetch.
//!
//! Order: what somebody waits for, then what the target asks for besides, then, where that is wanted, everything else.
//! Invariants: of the latter two at most [`WINDOW`] are asked of the source at a time; who asks for what is not here
//! waits in no thread's way, and is told at once when the source is out of reach. What is here is never older than
//! this stock: for another look at the source another one is made. Non-goals: who may ask, and who the source lets in.

use super::hold::Hold;
use super::plan::{Arrivals, Block, Content, FetchError, FetchPlan, Place};
use super::source::Job;
use super::target::Fetcher;
use super::wire::{BLOCK, Class, Refusal};
use crate::model::ids::Signature;
use crate::transfer::Options;
use crate::transfer::queue::{Queue, lock};
use crate::volume::{Entry, Kind};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Questions that nobody waits for which the source has at a time: 1 MiB, so that what somebody waits for soon has its
/// turn without being asked for twice.
const WINDOW: usize = 16;
/// How long nothing that nobody waits for is asked for after the source was out of reach.
const PAUSE: Duration = Duration::from_secs(1);

/// What came for a question that was passed on.
#[derive(Clone)]
pub(super) enum Given {
    /// A block that cannot be kept here.
    Block(Signature, Arc<[u8]>),
    /// The source does not give it.
    Refused(Refusal),
    /// Which of the blocks are holes.
    Holes(Vec<Range<u32>>),
    /// The source is out of reach.
    Away,
}

/// A question that waits for the source, and the connection whose it is.
pub(super) struct Waiter {
    pub(super) jobs: Arc<Queue<Job>>,
    pub(super) job: Job,
}

impl Waiter {
    fn wake(mut self, given: Option<Given>) {
        self.job.given = given;
        // Its connection may be over.
        let _ = self.jobs.put_back(self.job);
    }
}

/// Bytes that a stock took and gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turnover {
    /// Fetched from the source.
    pub fetched: u64,
    /// Of what the target asked for, given to it.
    pub answered: u64,
}

/// The stock of one volume; it ends when it is told to.
pub struct Stock {
    plan: Arc<FetchPlan>,
    options: Options,
    hold: Hold,
    fetcher: Mutex<Option<Arc<Fetcher>>>,
    state: Mutex<State>,
    changed: Condvar,
    fetched: AtomicU64,
    answered: AtomicU64,
    is_unkept: AtomicBool,
}

#[derive(Default)]
struct State {
    paths: Vec<Arc<[u8]>>,
    numbers: HashMap<Arc<[u8]>, u32>,
    asked: HashMap<Place, Asked>,
    maps: HashMap<(Place, u32), Vec<Waiter>>,
    /// What is asked for when there is room.
    later: VecDeque<Place>,
    /// Questions of the background at the source.
    sent: usize,
    waiting: usize,
    fill: Fill,
    paused: Option<Instant>,
    over: bool,
}

#[derive(Default)]
struct Asked {
    waiters: Vec<Waiter>,
    /// Whether the source has it.
    sent: Option<Class>,
}

/// Everything else of the volume.
#[derive(Default)]
struct Fill {
    wanted: bool,
    /// Files and their blocks, once the source has listed them.
    files: Option<Vec<(Arc<[u8]>, u64)>>,
    file: usize,
    block: u64,
}

impl Fill {
    /// The next block in the order of the list.
    fn next(&mut self) -> Option<(Arc<[u8]>, u64)> {
        let files = self.files.as_ref().filter(|_| self.wanted)?;
        loop {
            let Some((path, blocks)) = files.get(self.file) else {
                // Of it the list is not needed any more.
                self.files = Some(Vec::new());
                return None;
            };
            if self.block < *blocks {
                self.block += 1;
                return Some((Arc::clone(path), self.block - 1));
            }
            (self.file, self.block) = (self.file + 1, 0);
        }
    }
}

impl State {
    fn place(&mut self, path: &[u8], block: u64) -> Place {
        if let Some(&file) = self.numbers.get(path) {
            return Place { file, block };
        }
        let path: Arc<[u8]> = path.into();
        // No volume has so many files.
        let file = u32::try_from(self.paths.len()).unwrap_or(u32::MAX);
        self.paths.push(Arc::clone(&path));
        self.numbers.insert(path, file);
        Place { file, block }
    }

    fn path(&self, place: Place) -> Option<Arc<[u8]>> {
        self.paths.get(place.file as usize).map(Arc::clone)
    }

    /// What to ask the source for next, of what nobody waits for; it counts as asked then.
    fn next(&mut self, hold: &Hold) -> Option<Place> {
        while let Some(place) = self.later.pop_front() {
            if let Some(asked) = self.asked.get_mut(&place)
                && asked.sent.is_none()
            {
                asked.sent = Some(Class::Background);
                return Some(place);
            }
        }
        loop {
            let (path, block) = self.fill.next()?;
            let place = self.place(&path, block);
            if hold.has(place) || self.asked.contains_key(&place) {
                continue;
            }
            let asked = Asked {
                sent: Some(Class::Background),
                ..Asked::default()
            };
            self.asked.insert(place, asked);
            return Some(place);
        }
    }

    /// What was asked for a block, which is over.
    fn take(&mut self, place: Place) -> Vec<Waiter> {
        let Some(asked) = self.asked.remove(&place) else {
            return Vec::new();
        };
        if asked.sent == Some(Class::Background) {
            self.sent = self.sent.saturating_sub(1);
        }
        self.waiting = self.waiting.saturating_sub(asked.waiters.len());
        asked.waiters
    }
}

/// Hands on what arrives, for as long as the stock lives.
struct Inlet(Weak<Stock>);

impl Arrivals for Inlet {
    fn arrived(&self, _: Class, place: Place, block: Result<Block<'_>, Refusal>) {
        if let Some(stock) = self.0.upgrade() {
            stock.arrived(place, block);
        }
    }

    fn mapped(&self, first: Place, count: u32, holes: &[Range<u32>]) {
        if let Some(stock) = self.0.upgrade() {
            stock.mapped(first, count, Some(holes));
        }
    }

    fn away(&self, place: Place, holes: Option<u32>) {
        let Some(stock) = self.0.upgrade() else {
            return;
        };
        match holes {
            Some(count) => stock.mapped(place, count, None),
            None => stock.away(place),
        }
    }
}

impl std::fmt::Debug for Stock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stock")
            .field("plan", &self.plan.plan)
            .field("volume", &self.plan.volume)
            .finish_non_exhaustive()
    }
}

impl Stock {
    /// Nothing is here at first; it takes the space of `directory`'s file system.
    ///
    /// # Errors
    /// The files cannot be made, or a thread not be started.
    pub fn start(plan: FetchPlan, options: &Options, directory: &Path) -> io::Result<Arc<Self>> {
        let plan = Arc::new(plan);
        let stock = Arc::new(Self {
            plan: Arc::clone(&plan),
            options: options.clone(),
            hold: Hold::in_directory(directory)?,
            fetcher: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            fetched: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            is_unkept: AtomicBool::new(false),
        });
        let inlet: Arc<dyn Arrivals> = Arc::new(Inlet(Arc::downgrade(&stock)));
        let fetcher = Fetcher::start(plan, options.clone(), &inlet)?;
        *lock(&stock.fetcher) = Some(Arc::new(fetcher));
        let pump = Arc::clone(&stock);
        let spawned = std::thread::Builder::new()
            .name("lifeboat-stock".to_owned())
            .spawn(move || pump.pump());
        if let Err(error) = spawned {
            stock.end();
            return Err(error);
        }
        Ok(stock)
    }

    /// Fetches also what nobody asks for, from now on.
    pub fn fill(&self) {
        lock(&self.state).fill.wanted = true;
        self.changed.notify_all();
    }

    /// What it took and gave so far.
    #[must_use]
    pub fn turnover(&self) -> Turnover {
        Turnover {
            fetched: self.fetched.load(Ordering::Relaxed),
            answered: self.answered.load(Ordering::Relaxed),
        }
    }

    /// Ends its connections to the source; nothing is fetched nor answered any more.
    pub fn end(&self) {
        let dropped = {
            let mut state = lock(&self.state);
            state.over = true;
            state.waiting = 0;
            let maps = std::mem::take(&mut state.maps);
            (std::mem::take(&mut state.asked), maps)
        };
        drop(dropped);
        self.changed.notify_all();
        let fetcher = lock(&self.fetcher).take();
        // It waits for threads that may just be connecting.
        let spawned = std::thread::Builder::new()
            .name("lifeboat-stock".to_owned())
            .spawn(move || drop(fetcher));
        if let Err(error) = spawned {
            tracing::debug!("ending a stock: {error}");
        }
    }

    /// The source's list of the volume as of now.
    pub(super) fn list(&self) -> Result<Vec<Entry>, FetchError> {
        let entries = Fetcher::list(&self.plan, &self.options, &[])?;
        if !lock(&self.state).fill.wanted {
            return Ok(entries);
        }
        let files = entries.iter().filter_map(|entry| match &entry.kind {
            Kind::File { size, .. } if *size > 0 => {
                Some((Arc::from(&*entry.path), size.div_ceil(BLOCK)))
            }
            _ => None,
        });
        let files = Some(files.collect());
        {
            let mut state = lock(&self.state);
            state.fill = Fill {
                wanted: state.fill.wanted,
                files,
                ..Fill::default()
            };
        }
        self.changed.notify_all();
        Ok(entries)
    }

    pub(super) fn place(&self, path: &[u8], block: u64) -> Place {
        lock(&self.state).place(path, block)
    }

    /// Signature and length of a block that is here, which is read into `buffer`.
    pub(super) fn read(
        &self,
        place: Place,
        buffer: &mut [u8],
    ) -> io::Result<Option<(Signature, usize)>> {
        self.hold.read(place, buffer)
    }

    pub(super) fn answered(&self, bytes: usize) {
        self.answered.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Waits until fewer than `cap` questions wait for the source.
    pub(super) fn room(&self, cap: usize) {
        let mut state = lock(&self.state);
        while state.waiting >= cap && !state.over {
            state = self.wait(state, PAUSE);
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, longest: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, longest);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Lets a question wait for a block that is not here, and asks the source for it unless that has it already.
    pub(super) fn want(&self, class: Class, place: Place, waiter: Waiter) {
        let urgent = {
            let mut state = lock(&self.state);
            if state.over {
                return;
            }
            // It is put there before it counts as arrived.
            if self.hold.has(place) {
                drop(state);
                return waiter.wake(None);
            }
            state.waiting += 1;
            let State { asked, later, .. } = &mut *state;
            let asked = asked.entry(place).or_insert_with(|| {
                if class == Class::Background {
                    later.push_back(place);
                }
                Asked::default()
            });
            asked.waiters.push(waiter);
            let urgent = class == Class::Demand && asked.sent.is_none();
            if urgent {
                asked.sent = Some(Class::Demand);
            }
            urgent
        };
        if urgent {
            self.ask(Class::Demand, place);
        } else {
            self.changed.notify_all();
        }
    }

    /// Lets a question wait for the source to say which blocks are holes.
    pub(super) fn map(&self, first: Place, count: u32, waiter: Waiter) {
        let path = {
            let mut state = lock(&self.state);
            if state.over {
                return;
            }
            state.waiting += 1;
            let waiters = state.maps.entry((first, count)).or_default();
            waiters.push(waiter);
            let is_first = waiters.len() == 1;
            state.path(first).filter(|_| is_first)
        };
        let fetcher = lock(&self.fetcher).clone();
        if let Some((path, fetcher)) = path.zip(fetcher) {
            fetcher.ask_holes(first, count, &path);
        }
    }

    fn ask(&self, class: Class, place: Place) {
        let path = lock(&self.state).path(place);
        let fetcher = lock(&self.fetcher).clone();
        if let Some((path, fetcher)) = path.zip(fetcher) {
            fetcher.ask(class, place, &path, None);
        }
    }

    /// Asks the source for what nobody waits for, until it is over.
    fn pump(&self) {
        let mut state = lock(&self.state);
        while !state.over {
            if state.sent >= WINDOW {
                state = self.wait(state, PAUSE);
                continue;
            }
            let now = Instant::now();
            if let Some(until) = state.paused.filter(|until| *until > now) {
                state = self.wait(state, until - now);
                continue;
            }
            if let Some(place) = state.next(&self.hold) {
                state.sent += 1;
                drop(state);
                self.ask(Class::Background, place);
                state = lock(&self.state);
                continue;
            }
            if state.fill.wanted && state.fill.files.is_none() {
                drop(state);
                let listed = self.list();
                state = lock(&self.state);
                if let Err(error) = listed {
                    tracing::info!(plan = %self.plan.plan, "what it answers the target with is not fetched ahead: {error}; trying again");
                    state.paused = Some(Instant::now() + PAUSE);
                }
                continue;
            }
            state = self.wait(state, PAUSE);
        }
    }

    fn arrived(&self, place: Place, block: Result<Block<'_>, Refusal>) {
        let given = match block {
            Ok(Block { signature, content }) => {
                // Only whole blocks are asked for.
                let Content::Bytes(bytes) = content else {
                    return self.away(place);
                };
                let length = bytes.len() as u64;
                self.fetched.fetch_add(length, Ordering::Relaxed);
                match self.hold.put(place, signature, bytes) {
                    Ok(()) => None,
                    Err(error) => {
                        if !self.is_unkept.swap(true, Ordering::Relaxed) {
                            tracing::warn!(plan = %self.plan.plan, volume = %self.plan.volume, "what is fetched for the target is passed on and not kept here: {error}");
                        }
                        // Fetched ahead it would be fetched for nothing.
                        lock(&self.state).fill.wanted = false;
                        Some(Given::Block(signature, Arc::from(bytes)))
                    }
                }
            }
            Err(why) => Some(Given::Refused(why)),
        };
        let waiters = lock(&self.state).take(place);
        self.changed.notify_all();
        for waiter in waiters {
            waiter.wake(given.clone());
        }
    }

    fn mapped(&self, first: Place, count: u32, holes: Option<&[Range<u32>]>) {
        let waiters = {
            let mut state = lock(&self.state);
            let waiters = state.maps.remove(&(first, count)).unwrap_or_default();
            state.waiting = state.waiting.saturating_sub(waiters.len());
            waiters
        };
        self.changed.notify_all();
        for waiter in waiters {
            let given = holes.map_or(Given::Away, |holes| Given::Holes(holes.to_vec()));
            waiter.wake(Some(given));
        }
    }

    /// The source is out of reach: who waits for the block is told, and it is asked for again some time where
    /// everything is wanted.
    fn away(&self, place: Place) {
        let waiters = {
            let mut state = lock(&self.state);
            let waiters = state.take(place);
            state.paused = Some(Instant::now() + PAUSE);
            if state.fill.wanted && !state.over {
                state.asked.entry(place).or_default();
                state.later.push_back(place);
            }
            waiters
        };
        self.changed.notify_all();
        for waiter in waiters {
            waiter.wake(Some(Given::Away));
        }
    }
}
