//! What a store lacks: asking the source for it, waiting, and keeping what arrives.
//!
//! Invariant: a block is asked for once by whoever wants it first, and again only with more haste. Non-goal: the
//! signatures' root (`proof`).

use super::{Asked, Store, Wanted, locked, signed};
use crate::model::ids::Signature;
use crate::serve::origins::{Origin, mask};
use crate::serve::presence::{PAGE, PAGES};
use crate::transfer::fetch::{Arrivals, BLOCK, Block, Class, Content, Place, Refusal};
use crate::volume::scan::read_full;
use crate::volume::sign::{ZERO, signature};
use crate::volume::tree::shown;
use nix::fcntl::{FallocateFlags, fallocate};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, Weak};
use std::time::{Duration, Instant};

/// Files of which the rest is fetched next, because somebody reads them.
const RECENT_CAP: usize = 64;
/// What the source does not give is asked for again after this time, and each time after twice as long.
const PUT_OFF: Duration = Duration::from_millis(500);
/// At most after this: its disk may be dying, and each try takes long there.
const PUT_OFF_MAX: Duration = Duration::from_secs(60);

/// Blocks that wait each by itself: where there are more the disk is dying, and all of its blocks wait together.
const WAITING_CAP: usize = 64;

/// Blocks that the source did not give to the background, which have not come since.
#[derive(Default)]
pub(super) struct Withheld {
    pub(super) places: BTreeMap<Place, Wait>,
    /// There are more than these.
    all: Option<Wait>,
}

/// How long something is not asked for.
#[derive(Clone, Copy)]
pub(super) struct Wait {
    why: Refusal,
    until: Instant,
    pause: Duration,
}

impl Wait {
    fn since(now: Instant, why: Refusal) -> Self {
        Self {
            why,
            until: now + PUT_OFF,
            pause: PUT_OFF,
        }
    }

    /// It was not given again; what was asked for at the same time counts once.
    fn again(&mut self, now: Instant) {
        if self.until <= now {
            self.pause = (self.pause * 2).min(PUT_OFF_MAX);
            self.until = now + self.pause;
        }
    }

    fn lasts(&self, now: Instant) -> bool {
        now < self.until
    }
}

impl Withheld {
    fn refused(&mut self, now: Instant, place: Place, why: Refusal) {
        let is_full = self.places.len() >= WAITING_CAP;
        let wait = match self.places.get_mut(&place) {
            Some(wait) => Some(wait),
            None if is_full => self.all.as_mut(),
            None => None,
        };
        match wait {
            Some(wait) => wait.again(now),
            None if is_full => self.all = Some(Wait::since(now, why)),
            None => {
                self.places.insert(place, Wait::since(now, why));
            }
        }
    }

    fn given(&mut self, place: Place) {
        if self.places.remove(&place).is_some() {
            self.all = None;
        }
    }

    fn waits(&self, now: Instant, place: Place) -> bool {
        self.waits_itself(now, place) || self.all.is_some_and(|wait| wait.lasts(now))
    }

    fn waits_itself(&self, now: Instant, place: Place) -> bool {
        self.places.get(&place).is_some_and(|wait| wait.lasts(now))
    }

    /// Whether nothing of it is due.
    fn all_wait(&self, now: Instant) -> bool {
        let mut waits = self.places.values();
        let all = self.all.is_some_and(|wait| wait.lasts(now));
        all || (!self.places.is_empty() && waits.all(|wait| wait.lasts(now)))
    }
}

/// Hands on what arrives, for as long as the store lives.
pub(super) struct Inlet(pub(super) Weak<Store>);

impl Arrivals for Inlet {
    fn arrived(&self, class: Class, place: Place, block: Result<Block<'_>, Refusal>) {
        if let Some(store) = self.0.upgrade() {
            store.arrived(class, place, block);
        }
    }

    fn mapped(&self, first: Place, _count: u32, holes: &[Range<u32>]) {
        if let Some(store) = self.0.upgrade() {
            store.mapped(first, holes);
        }
    }
}

impl Store {
    /// Blocks of the range of which pages of the range are absent.
    pub(super) fn absent_blocks(&self, origin: &Origin, offset: u64, length: u64) -> Vec<u64> {
        let end = offset.saturating_add(length).min(origin.size);
        if offset >= end || self.presence.absent() == 0 {
            return Vec::new();
        }
        let blocks = offset / BLOCK..end.div_ceil(BLOCK);
        blocks
            .filter(|&block| {
                let start = block * BLOCK;
                let first = offset.saturating_sub(start) / PAGE;
                let pages = mask(first, (end - start).min(BLOCK).div_ceil(PAGE));
                pages & self.missing(origin, block) != 0
            })
            .collect()
    }

    /// Asks for blocks that somebody waits for.
    pub(super) fn ask_for(&self, number: u32, blocks: Vec<u64>) -> Option<Wanted> {
        if blocks.is_empty() {
            return None;
        }
        self.note_recent(number);
        for &block in &blocks {
            self.ask(Class::Demand, number, block);
        }
        Some(Wanted {
            number,
            blocks,
            until: Instant::now() + self.patience,
        })
    }

    /// Waits until what was asked for is here.
    ///
    /// # Errors
    /// It did not come within the patience, or the source does not give it (`EIO`).
    pub fn wait(&self, wanted: &Wanted) -> io::Result<()> {
        for &block in &wanted.blocks {
            let place = Place {
                file: wanted.number,
                block,
            };
            let shard = self.shard(place);
            let mut asked = locked(&shard.asked);
            loop {
                match asked.get(&place) {
                    // It came, or everything of it was written here.
                    None => break,
                    Some(Asked::Refused(_)) => {
                        return Err(nix::errno::Errno::EIO.into());
                    }
                    Some(Asked::For(_)) => {}
                }
                let left = wanted.until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(nix::errno::Errno::EIO.into());
                }
                let waited = shard.changed.wait_timeout(asked, left);
                asked = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Ok(())
    }

    pub(super) fn note_recent(&self, number: u32) {
        let mut recent = locked(&self.recent);
        if recent.back() != Some(&number) {
            recent.retain(|known| *known != number);
            recent.push_back(number);
            if recent.len() > RECENT_CAP {
                recent.pop_front();
            }
        }
    }

    /// Asks for a block that somebody will want soon, unless it was asked for by anybody.
    pub(super) fn ask_first(&self, number: u32, block: u64) {
        let place = Place {
            file: number,
            block,
        };
        if !locked(&self.shard(place).asked).contains_key(&place) {
            self.ask(Class::Demand, number, block);
        }
    }

    /// Whether something of a block is still to come.
    pub(in crate::serve) fn lacks(&self, number: u32, block: u64) -> bool {
        let origin = self.origins.get(number as usize);
        origin.is_some_and(|origin| self.missing(origin, block) != 0)
    }

    /// Asks the source for a block unless it was; whether it was asked for now.
    pub(in crate::serve) fn ask(&self, class: Class, number: u32, block: u64) -> bool {
        let place = Place {
            file: number,
            block,
        };
        let Some(origin) = self.origins.get(number as usize) else {
            return false;
        };
        // Where all wait, who began to ask for everything goes on: what lies behind a bad region may be good.
        let waits = || locked(&self.withheld).waits_itself(Instant::now(), place);
        if class == Class::Background && waits() {
            return false;
        }
        {
            let mut asked = locked(&self.shard(place).asked);
            if self.missing(origin, block) == 0 {
                return false;
            }
            match (asked.get(&place), class) {
                (Some(Asked::For(Class::Demand)), _) | (Some(Asked::For(_)), Class::Background) => {
                    return false;
                }
                _ => asked.insert(place, Asked::For(class)),
            };
        }
        let fetcher = locked(&self.fetcher).clone();
        match fetcher {
            Some(fetcher) => {
                let held = self.held_before(origin, place);
                fetcher.ask(class, place, &origin.path, held);
            }
            // Detached: nothing will come any more.
            None => self.take(class, place, Err(Refusal::Gone)),
        }
        true
    }

    fn length_of(&self, place: Place) -> u64 {
        let size = self
            .origins
            .get(place.file as usize)
            .map_or(0, |origin| origin.size);
        size.saturating_sub(place.block * BLOCK).min(BLOCK)
    }

    /// Signature of what an earlier copy left of a block of which nothing is here for good; none for zeros.
    fn held_before(&self, origin: &Origin, place: Place) -> Option<Signature> {
        let real = origin.real(place.block);
        if !self.reuses || self.missing(origin, place.block) != real {
            return None;
        }
        let mut bytes = vec![0; self.length_of(place) as usize];
        let read = self
            .origin_file(place.file)
            .and_then(|file| read_full(&file, &mut bytes, place.block * BLOCK))
            .ok()?;
        let held = signature(&self.plan.fleet_key, &bytes[..read]);
        (held != ZERO).then_some(held)
    }

    /// Takes note of what the source gives or does not.
    fn note_withheld(&self, class: Class, place: Place, refused: Option<Refusal>) {
        let mut withheld = locked(&self.withheld);
        let now = Instant::now();
        match refused {
            None => withheld.given(place),
            // Who waits for it asks as often as it likes.
            Some(_) if class == Class::Demand => {}
            Some(why) => withheld.refused(now, place, why),
        }
    }

    /// Whether the source is not asked for a block for now, as it did not give it.
    pub(super) fn is_put_off(&self, place: Place) -> bool {
        locked(&self.withheld).waits(Instant::now(), place)
    }

    /// Whether the source did not give something, and nothing of that is asked for again yet.
    pub(super) fn waits_for_source(&self) -> bool {
        locked(&self.withheld).all_wait(Instant::now())
    }

    /// What the source does not give, for people; none while it gives everything.
    #[must_use]
    pub fn withheld(&self) -> Option<String> {
        let withheld = locked(&self.withheld);
        let (place, Wait { why, .. }) = withheld.places.first_key_value()?;
        let more = match withheld.places.len() - 1 {
            0 => String::new(),
            _ if withheld.all.is_some() => " and many more blocks".to_owned(),
            more => format!(" and {more} more block(s)"),
        };
        let path = shown(&self.origins.get(place.file as usize)?.path);
        let why = match why {
            Refusal::Gone => "the file is not there any more; see who removed it",
            Refusal::Unreadable => "it cannot be read there; look for disk errors",
        };
        Some(format!(
            "volume {}: the source does not give `{path}` at offset {}{more}: {why}; it is asked again and again, or `lifeboat \
             abort` on the source brings everything back there",
            self.name,
            place.block * BLOCK
        ))
    }

    fn arrived(&self, class: Class, place: Place, block: Result<Block<'_>, Refusal>) {
        self.note_withheld(class, place, block.as_ref().err().copied());
        if self.mends(place, &block) {
            return;
        }
        let known = self.origins.get(place.file as usize);
        if let (Some(proof), Some(origin), Ok(block)) = (&self.proof, known, &block)
            && let Err(error) = proof.note(origin.first + place.block, block.signature)
        {
            // It is asked for again.
            tracing::error!(directory = %self.directory.display(), "cannot keep a signature: {error}");
        }
        let bytes = match block {
            Ok(block) => match block.content {
                Content::Bytes(bytes) => Some(Ok(Some(bytes))),
                Content::Held => Some(Ok(None)),
                Content::Unasked => None,
            },
            Err(why) => {
                let signed = locked(&self.signing).contains(&place);
                (!signed).then_some(Err(why))
            }
        };
        match bytes {
            Some(bytes) => self.take(class, place, bytes),
            None => {
                locked(&self.signing).remove(&place);
            }
        }
    }

    /// Takes what arrived; none: it is what an earlier copy left.
    fn take(&self, class: Class, place: Place, block: Result<Option<&[u8]>, Refusal>) {
        let is_held = matches!(block, Ok(None));
        let taken = block.map(|bytes| self.keep(place, bytes));
        let shard = self.shard(place);
        {
            let mut asked = locked(&shard.asked);
            match taken {
                Ok(Ok(())) => {
                    let (counter, more) = match class {
                        _ if is_held => (&self.held_before, self.length_of(place)),
                        Class::Demand => (&self.on_demand, 1),
                        Class::Background => (&self.ahead, 1),
                    };
                    counter.fetch_add(more, Ordering::Relaxed);
                    asked.remove(&place);
                    locked(&self.unkept).take();
                }
                Ok(Err(error)) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    self.cannot_keep(&error);
                    asked.insert(place, Asked::Refused(Refusal::Unreadable));
                }
                Err(why) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    asked.insert(place, Asked::Refused(why));
                }
            }
            shard.changed.notify_all();
        }
        if class == Class::Background {
            let mut open = locked(&self.window.open);
            *open = open.saturating_sub(1);
            self.window.changed.notify_all();
        }
    }

    /// Says once why nothing can be kept, as a full disk may refuse every block of a volume.
    fn cannot_keep(&self, error: &io::Error) {
        let why = format!(
            "volume {}: what arrives cannot be kept in {}: {error}; free space or repair the file system there, and it \
             goes on",
            self.name,
            self.directory.display()
        );
        if locked(&self.unkept).replace(why.clone()).is_none() {
            tracing::error!("{why}");
        }
    }

    /// Writes the pages of an arrived block that are absent; without bytes they are as an earlier copy left them.
    pub(super) fn keep(&self, place: Place, bytes: Option<&[u8]>) -> io::Result<()> {
        let Some(origin) = self.origins.get(place.file as usize) else {
            return Ok(());
        };
        let cut = self.cut(place.file);
        let _cut = cut.write().unwrap_or_else(PoisonError::into_inner);
        let file = match self.origin_file(place.file) {
            // It was let go of meanwhile: whole, or removed with nobody to read it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let _turn = locked(&self.shard(place).asked);
        let missing = self.missing(origin, place.block);
        if missing == 0 {
            return Ok(());
        }
        let Some(bytes) = bytes else {
            return self.presence.mark(origin.first + place.block, missing);
        };
        self.unseen(place.file, &file, || {
            self.write_missing(&file, origin, place.block, missing, bytes)
        })?;
        self.presence.mark(origin.first + place.block, missing)
    }

    /// Writes the pages `missing` of a block.
    fn write_missing(
        &self,
        file: &File,
        origin: &Origin,
        block: u64,
        missing: u16,
        bytes: &[u8],
    ) -> io::Result<()> {
        let start = block * BLOCK;
        let mut page = 0;
        while page < PAGES {
            let run = (missing >> page).trailing_ones();
            if run == 0 {
                page += 1;
                continue;
            }
            let from = u64::from(page) * PAGE;
            let to = (u64::from(page + run) * PAGE).min(origin.size - start);
            page += run;
            // A file that shrank on the source since it was listed ends in zeros.
            let there = bytes.len() as u64;
            if from < there {
                let part = &bytes[from as usize..to.min(there) as usize];
                file.write_all_at(part, start + from)?;
            }
            if to > there {
                let zeros = from.max(there);
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                match fallocate(file, flags, signed(start + zeros), signed(to - zeros)) {
                    Ok(()) => {}
                    Err(nix::errno::Errno::EOPNOTSUPP) if self.reuses => {
                        let zeros = vec![0; (to - zeros) as usize];
                        file.write_all_at(&zeros, start + to - zeros.len() as u64)?;
                    }
                    // Absent pages are holes that were never written: zeros already.
                    Err(nix::errno::Errno::EOPNOTSUPP) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_is_asked_for_again_after_longer_and_longer_pauses() {
        let now = Instant::now();
        let mut wait = Wait::since(now, Refusal::Gone);
        let mut pauses = vec![wait.until - now];
        for _ in 0..9 {
            let asked = wait.until;
            for later in 0..3 {
                wait.again(asked + Duration::from_millis(later));
            }
            pauses.push(wait.until - asked);
        }
        assert!(pauses.is_sorted());
        assert_eq!(pauses[..3], [PUT_OFF, PUT_OFF * 2, PUT_OFF * 4]);
        assert_eq!(pauses[9], PUT_OFF_MAX);
    }

    #[test]
    fn a_block_that_is_not_given_holds_no_other_up_and_very_many_hold_up_all() {
        let mut now = Instant::now();
        let place = |block| Place { file: 0, block };
        let mut withheld = Withheld::default();
        assert!(!withheld.all_wait(now));
        for _ in 0..9 {
            withheld.refused(now, place(0), Refusal::Unreadable);
            now = withheld.places[&place(0)].until;
        }
        withheld.refused(now, place(0), Refusal::Unreadable);
        assert!(withheld.waits(now, place(0)) && !withheld.waits(now, place(1)));
        assert!(withheld.all_wait(now));
        // The next one is due long before it.
        withheld.refused(now, place(1), Refusal::Gone);
        now += PUT_OFF;
        assert!(withheld.waits(now, place(0)) && !withheld.waits(now, place(1)));
        assert!(!withheld.all_wait(now), "one of them is due");
        withheld.given(place(1));
        for block in 1..2 * WAITING_CAP as u64 {
            withheld.refused(now, place(block), Refusal::Unreadable);
        }
        assert_eq!(withheld.places.len(), WAITING_CAP);
        assert!(withheld.waits(now, place(1 << 20)) && withheld.all_wait(now));
        withheld.given(place(1));
        assert!(!withheld.waits(now, place(1 << 20)));
    }
}
