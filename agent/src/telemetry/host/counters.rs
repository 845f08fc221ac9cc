//! Counters of the kernel to events since they were last read.

use std::collections::HashMap;

/// Remembers counters by name and subject. What is not read between two turns is forgotten: a disk or
/// container that is gone must not be compared with one that comes back under its name.
#[derive(Default)]
pub struct Counters {
    turn: u64,
    seen: HashMap<(&'static str, String), (u64, u64)>,
}

impl Counters {
    /// Begins a reading of everything.
    pub fn turn(&mut self) {
        let last = self.turn;
        self.seen.retain(|_, (turn, _)| *turn == last);
        self.turn += 1;
    }

    /// Events since the turn before; none when there was no value then. A counter that went back was
    /// started anew and counts from zero.
    pub fn more(&mut self, name: &'static str, subject: &str, now: u64) -> Option<u64> {
        let before = self
            .seen
            .insert((name, subject.to_owned()), (self.turn, now));
        before.map(|(_, before)| now.checked_sub(before).unwrap_or(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_yields_what_was_added_and_starts_anew_after_a_gap_or_a_reset() {
        let mut counters = Counters::default();
        let mut read = |value: Option<u64>| {
            counters.turn();
            value.and_then(|value| counters.more("errors", "sda", value))
        };
        assert_eq!(read(Some(7)), None);
        assert_eq!(read(Some(9)), Some(2));
        assert_eq!(read(Some(3)), Some(3));
        assert_eq!(read(None), None);
        assert_eq!(read(Some(50)), None);
    }
}
