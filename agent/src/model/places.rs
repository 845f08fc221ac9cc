//! Places for peers that have proven nothing yet: bounded, and a newcomer always gets one.
//!
//! When all are taken, the oldest peer of the address that holds the most makes room. So a flood from one
//! address crowds out itself, and whoever proves itself soon is never refused.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

/// Peers that wait to prove themselves; `T` is the handle by which one can be sent away.
#[derive(Debug)]
pub struct Places<T> {
    cap: usize,
    next: u64,
    /// Oldest first.
    waiting: VecDeque<(u64, IpAddr, T)>,
}

impl<T> Places<T> {
    /// With `cap` places, at least one.
    #[must_use]
    pub fn new(cap: usize) -> Self {
        Self {
            cap: cap.max(1),
            next: 0,
            waiting: VecDeque::new(),
        }
    }

    /// Gives a newcomer a place. Returns its number, and the peer that has to go if all were taken.
    pub fn take(&mut self, from: IpAddr, handle: T) -> (u64, Option<T>) {
        let sent_away = (self.waiting.len() >= self.cap)
            .then(|| self.make_room())
            .flatten();
        let number = self.next;
        self.next += 1;
        self.waiting.push_back((number, from, handle));
        (number, sent_away)
    }

    fn make_room(&mut self) -> Option<T> {
        let mut held: HashMap<IpAddr, usize> = HashMap::new();
        for (_, from, _) in &self.waiting {
            *held.entry(*from).or_default() += 1;
        }
        let most = held.values().copied().max()?;
        let oldest = self
            .waiting
            .iter()
            .position(|(_, from, _)| held[from] == most)?;
        self.waiting.remove(oldest).map(|(.., handle)| handle)
    }

    /// Gives a place back; false when its peer had been sent away.
    pub fn leave(&mut self, number: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|(waiting, ..)| *waiting != number);
        self.waiting.len() < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn a_flood_from_one_address_crowds_out_itself() {
        let mut places = Places::new(4);
        let (honest, _) = places.take(address(1), "honest");
        for n in 0..3 {
            assert_eq!(places.take(address(2), "flood").1, None, "{n}");
        }
        for _ in 0..100 {
            assert_eq!(places.take(address(2), "flood").1, Some("flood"));
        }
        assert!(places.leave(honest), "the honest peer was sent away");
    }

    #[test]
    fn among_equals_the_oldest_goes() {
        let mut places = Places::new(3);
        let numbers: Vec<u64> = (1..=3)
            .map(|last| places.take(address(last), last).0)
            .collect();
        assert_eq!(places.take(address(4), 4).1, Some(1));
        assert!(!places.leave(numbers[0]));
        assert!(places.leave(numbers[1]));
        assert_eq!(places.take(address(5), 5).1, None);
    }

    proptest! {
        #[test]
        fn a_newcomer_always_gets_a_place_and_no_more_than_the_cap_wait(cap in 0..6_usize, arrivals in proptest::collection::vec((0..4_u8, any::<bool>()), 0..60)) {
            let mut places = Places::new(cap);
            for (from, stays) in arrivals {
                let (number, _) = places.take(address(from), ());
                prop_assert!(places.waiting.len() <= cap.max(1));
                if !stays {
                    prop_assert!(places.leave(number));
                }
            }
        }
    }
}
