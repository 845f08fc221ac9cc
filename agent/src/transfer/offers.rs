//! When to offer blocks by their signature instead of sending them.
//!
//! An offer costs 35 bytes a block and a round trip that other work fills. Where the target holds nothing
//! of the volume that would be for nothing, so a run of vain offers makes them rare and one that is taken
//! makes them the rule again. A block that was sent before in the same epoch is offered in any case.

use super::message::Holdings;
use super::queue::lock;
use crate::model::ids::Signature;
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Vain offers in a row after which they become rare.
const PATIENCE: u64 = 8;
/// Then one record of this many is offered.
const RARELY: u64 = 16;
/// Blocks of an epoch that are remembered as sent: 8 bytes each.
const REMEMBERED: usize = 1 << 20;

/// Whether the next record is offered first; shared by the threads of an epoch.
#[derive(Debug)]
pub(super) struct Offers {
    open: bool,
    /// Vain offers that are still allowed.
    credit: AtomicU64,
    turn: AtomicU64,
    /// Beginnings of the signatures of this epoch's blocks.
    seen: Mutex<HashSet<u64>>,
}

impl Offers {
    pub(super) fn new(holdings: Holdings) -> Self {
        let credit = if holdings == Holdings::Filled {
            PATIENCE
        } else {
            0
        };
        Self {
            open: holdings != Holdings::Closed,
            credit: AtomicU64::new(credit),
            turn: AtomicU64::new(0),
            seen: Mutex::default(),
        }
    }

    /// Whether to offer the next record.
    pub(super) fn is_due(&self) -> bool {
        let pays = || self.credit.load(Ordering::Relaxed) > 0;
        self.open && (pays() || self.turn.fetch_add(1, Ordering::Relaxed) % RARELY == RARELY - 1)
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
            self.credit.store(PATIENCE, Ordering::Relaxed);
        } else {
            let spend = |credit: u64| credit.checked_sub(1);
            // None left is as rare as it gets.
            let _ = self
                .credit
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vain_offers_become_rare_and_a_taken_one_makes_them_the_rule() {
        let offers = Offers::new(Holdings::Filled);
        for _ in 0..PATIENCE {
            assert!(offers.is_due());
            offers.learn(false);
        }
        let due = (0..10 * RARELY).filter(|_| offers.is_due()).count();
        assert_eq!(due, 10);
        offers.learn(true);
        assert!((0..100).all(|_| offers.is_due()));
        let closed = Offers::new(Holdings::Closed);
        assert!((0..100).all(|_| !closed.is_due()));
    }
}
