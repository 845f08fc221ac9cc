//! Whether and how records are packed with LZ4 before they are sealed.
//!
//! A record is packed only while the link is the limit, and only as long as that saves more time on the link
//! than it costs the source's processor: a sick host with a fast link pays nothing, not even for trying.
//! What a volume's records gain and cost is learnt from those that were packed; where it does not pay, one
//! record of some is tried again.

use super::frame::HEADER_LEN;
use super::payload::pack;
use super::queue::lock;
use super::record::Record;
use super::spent::thread_time;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Seconds on the link that a second of the processor must save.
const GAIN: f64 = 2.0;
/// One record of this many is tried where it does not pay.
const RARELY: u64 = 32;
/// Weight of the newest record in what was learnt.
const NEWEST: f64 = 0.2;
/// Records shorter than this are not worth the question.
const LEAST: usize = 1024;

/// What packing does for the records of one volume; shared by the threads of an epoch.
#[derive(Debug, Default)]
pub(super) struct Packing {
    learnt: Mutex<Option<Learnt>>,
    turn: AtomicU64,
    /// Bytes of payloads that were packed, before and after.
    pub(super) before: AtomicU64,
    pub(super) after: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Learnt {
    /// Bytes left of each byte.
    left: f64,
    /// Processor seconds for each byte.
    cost: f64,
}

impl Learnt {
    /// Whether packing pays on a link that takes `rate` bytes a second.
    fn pays(self, rate: f64) -> bool {
        (1.0 - self.left) / rate > GAIN * self.cost
    }
}

impl Packing {
    /// The record packed into `space` when that pays on a link that takes `rate` bytes a second, if the link
    /// is the limit at all; the buffer that is not used comes back as the second.
    pub(super) fn pack(
        &self,
        record: Record,
        rate: Option<u64>,
        space: impl FnOnce() -> Vec<u8>,
    ) -> (Record, Option<Vec<u8>>) {
        let due = rate.is_some_and(|rate| self.is_due(rate as f64));
        if !due || record.len() < HEADER_LEN + LEAST {
            return (record, None);
        }
        let began = thread_time();
        let packed = pack(&record, space());
        let cost = thread_time().saturating_sub(began);
        let (before, after) = (record.len(), packed.len().min(record.len()));
        self.learn(before, after, cost);
        // Unpacking costs the target something, too.
        if after * 16 > before * 15 {
            return (record, Some(packed));
        }
        self.before.fetch_add(before as u64, Ordering::Relaxed);
        self.after.fetch_add(after as u64, Ordering::Relaxed);
        (packed.into(), record.into_memory())
    }

    fn is_due(&self, rate: f64) -> bool {
        lock(&self.learnt).is_none_or(|learnt| learnt.pays(rate))
            || self.turn.fetch_add(1, Ordering::Relaxed) % RARELY == RARELY - 1
    }

    fn learn(&self, before: usize, after: usize, cost: Duration) {
        let newest = Learnt {
            left: after as f64 / before as f64,
            cost: cost.as_secs_f64() / before as f64,
        };
        let mut learnt = lock(&self.learnt);
        let old = learnt.unwrap_or(newest);
        let mixed = |old: f64, new: f64| old + NEWEST * (new - old);
        *learnt = Some(Learnt {
            left: mixed(old.left, newest.left),
            cost: mixed(old.cost, newest.cost),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::payload::{PayloadKind, start, unpack};
    use super::*;

    fn record(bytes: &[u8]) -> Vec<u8> {
        let mut record = start(Vec::new(), PayloadKind::Files);
        record.extend_from_slice(bytes);
        record
    }

    fn text() -> Vec<u8> {
        (0..20_000)
            .flat_map(|n: u32| format!("line {n}\n").into_bytes())
            .collect()
    }

    /// xorshift: nothing to gain.
    fn noise() -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        (0..20_000).flat_map(|_| next()).collect()
    }

    const SLOW: Option<u64> = Some(1_000_000);

    #[test]
    fn a_packed_record_is_smaller_and_unpacks_to_what_it_was() {
        let packing = Packing::default();
        let plain = record(&text());
        let (packed, _) = packing.pack(plain.clone().into(), SLOW, Vec::new);
        assert!(packed.len() * 2 < plain.len(), "{} bytes", packed.len());
        let mut space = vec![0; plain.len()];
        let unpacked = unpack(&packed[HEADER_LEN..], |len| &mut space[..len]).unwrap();
        assert_eq!(unpacked, &plain[HEADER_LEN..]);
    }

    #[test]
    fn nothing_is_packed_while_the_link_is_not_the_limit() {
        let packing = Packing::default();
        for _ in 0..3 * RARELY {
            let plain = record(&text());
            let untouched = || panic!("no attempt was due");
            let (sent, unused) = packing.pack(plain.clone().into(), None, untouched);
            assert_eq!((&*sent, unused), (&*plain, None));
        }
    }

    #[test]
    fn a_link_faster_than_packing_gains_is_left_alone_but_for_rare_attempts() {
        let packing = Packing::default();
        packing.learn(1000, 400, Duration::from_micros(1));
        let attempts = |rate| (0..320).filter(|_| packing.is_due(rate)).count();
        assert_eq!(attempts(1e8), 320, "6 ns a byte saved for 1 ns");
        assert_eq!(attempts(1e9), 10, "0.6 ns a byte saved for 1 ns");
    }

    #[test]
    fn what_does_not_shrink_is_sent_as_it_is_and_rarely_tried() {
        let packing = Packing::default();
        let plain = record(&noise());
        let (sent, _) = packing.pack(plain.clone().into(), SLOW, Vec::new);
        assert_eq!(*sent, *plain);
        let attempts = (0..320).filter(|_| packing.is_due(1e6)).count();
        assert_eq!(attempts, 10);
    }
}
