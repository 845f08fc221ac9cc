//! When to offer blocks by their signature instead of sending them.
//!
//! An offer costs 35 bytes a block, a look into the target's memory, and a round trip that other work fills: so
//! a target that holds anything is offered everything. One that held nothing when the epoch began is offered what was
//! sent before in the same epoch, and a sample of the rest, as it may take other volumes at the same time.

use super::message::Holdings;
use super::queue::lock;
use crate::model::ids::Signature;
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Of records for a target that held nothing, one of this many is offered, until an offer is taken.
const RARELY: u64 = 16;
/// Blocks of an epoch that are remembered as sent: 8 bytes each.
const REMEMBERED: usize = 1 << 20;

/// Whether the next record is offered first; shared by the threads of an epoch.
#[derive(Debug)]
pub(super) struct Offers {
    open: bool,
    /// Whether the target holds anything.
    pays: AtomicBool,
    turn: AtomicU64,
    /// Beginnings of the signatures of this epoch's blocks.
    seen: Mutex<HashSet<u64>>,
}

impl Offers {
    pub(super) fn new(holdings: Holdings) -> Self {
        Self {
            open: holdings != Holdings::Closed,
            pays: AtomicBool::new(holdings == Holdings::Filled),
            turn: AtomicU64::new(0),
            seen: Mutex::default(),
        }
    }

    /// Whether to offer the next record.
    pub(super) fn is_due(&self) -> bool {
        let sampled = || self.turn.fetch_add(1, Ordering::Relaxed) % RARELY == RARELY - 1;
        self.open && (self.pays.load(Ordering::Relaxed) || sampled())
    }

    /// Takes note of blocks that travel and tells whether one of them did before.
    pub(super) fn repeat<'s>(&self, blocks: impl IntoIterator<Item = &'s Signature>) -> bool {
        if !self.open {
            return false;
        }
        let mut seen = lock(&self.seen);
        let mut repeats = false;
        for signature in blocks {
            let (beginning, _) = signature.0.split_at(8);
            let beginning = beginning
                .iter()
                .fold(0, |all, &byte| all << 8 | u64::from(byte));
            repeats |= if seen.len() < REMEMBERED {
                !seen.insert(beginning)
            } else {
                seen.contains(&beginning)
            };
        }
        repeats
    }

    /// Takes note of whether an offer was taken.
    pub(super) fn learn(&self, taken: bool) {
        if taken {
            self.pays.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_holds_anything_is_offered_everything() {
        let filled = Offers::new(Holdings::Filled);
        for _ in 0..100 {
            assert!(filled.is_due());
            filled.learn(false);
        }
        let empty = Offers::new(Holdings::Empty);
        let due = (0..10 * RARELY).filter(|_| empty.is_due()).count();
        assert_eq!(due, 10);
        empty.learn(true);
        assert!((0..100).all(|_| empty.is_due()));
        let closed = Offers::new(Holdings::Closed);
        assert!((0..100).all(|_| !closed.is_due()));
    }
}
