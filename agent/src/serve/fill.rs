//! The background: fetches what nobody has asked for yet, and lets go of the source when all is here.
//!
//! Order: what the access trace found hottest, then the rest of files that are being read, then the rest.
//! Invariant: at most [`WINDOW`] questions are open, so that the source's disk and the link stay free for what
//! somebody waits for.

use super::store::Store;
use crate::model::trace::FetchOrder;
use crate::transfer::fetch::{BLOCK, Class};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Questions of the background that are open at a time: 4 MiB.
const WINDOW: u64 = 64;
/// Pause between two questions while what arrives cannot be kept.
const UNKEPT_PAUSE: Duration = Duration::from_secs(1);
/// How soon a filler hears that it must stop.
const STEP: Duration = Duration::from_millis(100);

/// A running background.
pub struct Filler {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    /// Fills `store`, what is `hot` first, until it is whole or this is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(store: &Arc<Store>, hot: FetchOrder) -> std::io::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let (for_thread, store) = (Arc::clone(&over), Arc::clone(store));
        let thread = std::thread::Builder::new()
            .name("lifeboat-fill".to_owned())
            .spawn(move || {
                Fill {
                    store,
                    over: for_thread,
                }
                .run(&hot);
            })?;
        Ok(Self {
            over,
            thread: Some(thread),
        })
    }
}

impl Filler {
    /// Whether it has asked for everything.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the background of a served volume panicked; this is a bug");
        }
    }
}

struct Fill {
    store: Arc<Store>,
    over: Arc<AtomicBool>,
}

/// It was told to stop.
struct Stopped;

impl Fill {
    fn run(&self, hot: &FetchOrder) {
        if matches!(self.all(hot), Ok(true)) && !self.store.proves() {
            tracing::info!(
                "every page of a served volume is here; the source is not needed any more"
            );
            self.store.detach();
        }
    }

    /// Whether everything is here at the end.
    fn all(&self, hot: &FetchOrder) -> Result<bool, Stopped> {
        let origins = &self.store.origins;
        let by_path: HashMap<&[u8], u32> = origins
            .iter()
            .zip(0..)
            .map(|(origin, number)| (&*origin.path, number))
            .collect();
        for (path, bytes) in hot.ranges() {
            let number = by_path.get(path);
            if let Some(number) = number.filter(|number| !self.store.is_removed(**number)) {
                let blocks = origins[*number as usize].blocks();
                for block in bytes.start / BLOCK..bytes.end.div_ceil(BLOCK).min(blocks) {
                    self.ask(*number, block)?;
                }
            }
        }
        for number in 0..u32::try_from(origins.len()).unwrap_or(u32::MAX) {
            self.file(number)?;
        }
        // What is under way comes before the source is let go of.
        self.room(0)?;
        if self.store.unsafe_here().is_some() {
            return Ok(false);
        }
        let (mut whole, mut failed) = (true, false);
        for number in 0..u32::try_from(origins.len()).unwrap_or(u32::MAX) {
            loop {
                match self.settle(number) {
                    Ok(true) => break,
                    Ok(false)
                        if !self.store.is_whole(number) && self.store.figures().refused == 0 => {}
                    Ok(false) => {
                        whole = false;
                        break;
                    }
                    Err(error) => {
                        self.store.stay_apart(&error);
                        failed = true;
                        break;
                    }
                }
                // It had been removed, and somebody opened it just then: its pages are wanted.
                self.file(number)?;
                self.room(0)?;
                std::thread::sleep(STEP);
            }
        }
        if !failed {
            self.store.stay_apart_no_more();
        }
        Ok(whole && !failed)
    }

    fn file(&self, number: u32) -> Result<(), Stopped> {
        if self.store.is_removed(number) {
            return Ok(());
        }
        for block in 0..self.store.origins[number as usize].blocks() {
            self.ask(number, block)?;
            self.recent(number)?;
        }
        Ok(())
    }

    /// The rest of files that are being read, before going on with `current`.
    fn recent(&self, current: u32) -> Result<(), Stopped> {
        loop {
            let next = {
                let mut recent = self
                    .store
                    .recent
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                recent.pop_back()
            };
            let Some(number) = next.filter(|number| *number != current) else {
                return Ok(());
            };
            for block in 0..self.store.origins[number as usize].blocks() {
                self.ask(number, block)?;
            }
        }
    }

    fn ask(&self, number: u32, block: u64) -> Result<(), Stopped> {
        if self.over.load(Ordering::Acquire) {
            return Err(Stopped);
        }
        // What is here already waits for nothing.
        if !self.store.lacks(number, block) {
            return Ok(());
        }
        self.room(WINDOW - 1)?;
        let until = Instant::now() + UNKEPT_PAUSE;
        while self.store.unkept().is_some() && Instant::now() < until {
            if self.over.load(Ordering::Acquire) {
                return Err(Stopped);
            }
            std::thread::sleep(STEP);
        }
        let window = &self.store.window;
        *window.open.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        if !self.store.ask(Class::Background, number, block) {
            *window.open.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        }
        Ok(())
    }

    /// Waits until at most `most` questions are open.
    fn room(&self, most: u64) -> Result<(), Stopped> {
        let window = &self.store.window;
        let mut open = window.open.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.over.load(Ordering::Acquire) {
                return Err(Stopped);
            }
            if *open <= most {
                return Ok(());
            }
            let waited = window.changed.wait_timeout(open, STEP);
            open = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether nothing of this file is wanted from the source any more.
    fn settle(&self, number: u32) -> std::io::Result<bool> {
        if !self.store.is_whole(number) && !self.store.is_removed(number) {
            return Ok(false);
        }
        self.store.settle(number)
    }
}
