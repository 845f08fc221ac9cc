//! The memory of a record that is to be sent: place for the header, then the payload, at an address from which a
//! disk can be read straight to where the bytes travel.

use super::frame::{DATA_CAP, HEADER_LEN};
use super::queue::lock;
use super::seal::{SEAL_LEN, TAG_LEN};
use super::uring::{prefer_huge_pages, release_pages};
use crate::volume::aligned::ALIGNMENT;
use bytes::BytesMut;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// Memory of a record that carries as much data as one may, with the entries of some hundred small files; whole
/// pages of every architecture.
pub(super) const SLOT: usize = DATA_CAP + (64 << 10);
/// Slots that are taken from the kernel together: whole huge pages.
const TOGETHER: usize = 32;
/// A huge page of every architecture with pages of 4 KiB.
const HUGE: usize = 2 << 20;
/// A record that fills less of its memory than one part of this many leaves it.
const SPARSE: usize = 4;
/// Free slots that keep their memory. Of more, which a link that became slow leaves behind, it goes back to the kernel.
const WARM: usize = 16;

/// Slots for the records of one epoch: used again by whoever comes next, and in huge pages where the kernel has
/// them, for a fault for each 4 KiB and the pinning of as many pages for each direct read cost more than copying.
#[derive(Debug, Default)]
pub struct Slots {
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    /// With memory, up to [`WARM`].
    warm: Vec<BytesMut>,
    /// Without.
    cold: Vec<BytesMut>,
}

impl Slots {
    fn take(self: &Arc<Self>) -> Slot {
        let mut free = lock(&self.free);
        let taken = free.warm.pop().or_else(|| free.cold.pop());
        let bytes = taken.unwrap_or_else(|| {
            let mut memory = BytesMut::zeroed(TOGETHER * SLOT + HUGE);
            let address = memory.as_ptr().addr();
            let _ = memory.split_to(address.next_multiple_of(HUGE) - address);
            prefer_huge_pages(&mut memory[..TOGETHER * SLOT]);
            let others = (1..TOGETHER).map(|_| memory.split_to(SLOT));
            free.cold.extend(others);
            memory.split_to(SLOT)
        });
        let slots = Arc::clone(self);
        Slot { bytes, slots }
    }
}

/// One slot, which goes back when it is dropped.
#[derive(Debug)]
struct Slot {
    bytes: BytesMut,
    slots: Arc<Slots>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        let mut free = lock(&self.slots.free);
        if free.warm.len() < WARM {
            free.warm.push(bytes);
        } else {
            release_pages(&mut bytes);
            free.cold.push(bytes);
        }
    }
}

#[derive(Debug)]
enum Memory {
    Own(Vec<u8>),
    Slot(Slot),
}

/// A record. What is at a multiple of [`ALIGNMENT`] in the payload of one made by [`Record::with_room`] is so in
/// memory, until bytes beyond its room, a seal and a tag are added.
#[derive(Debug)]
pub struct Record {
    /// May go on behind the record.
    memory: Memory,
    start: usize,
    end: usize,
}

impl Record {
    /// A record that begins with `head`, then `room` bytes of any content.
    #[must_use]
    pub fn with_room(slots: &Arc<Slots>, head: &[u8], room: usize) -> Self {
        let length = head.len() + room;
        let wanted = ALIGNMENT + length + SEAL_LEN + TAG_LEN;
        let mut memory = if (SLOT / SPARSE..=SLOT).contains(&wanted) {
            Memory::Slot(slots.take())
        } else {
            Memory::Own(vec![0; wanted])
        };
        let payload = memory.as_ptr().addr() + HEADER_LEN;
        let start = payload.next_multiple_of(ALIGNMENT) - payload;
        memory[start..start + head.len()].copy_from_slice(head);
        Self {
            memory,
            start,
            end: start + length,
        }
    }

    /// Cuts it to `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        self.end = self.end.min(self.start + length);
    }

    /// Adds bytes at its end.
    pub fn append(&mut self, bytes: &[u8]) {
        let end = self.end + bytes.len();
        if end > self.memory.len() {
            // It may be aligned differently; nothing is read to there any more.
            let wanted = end + SEAL_LEN + TAG_LEN;
            match &mut self.memory {
                Memory::Own(memory) => {
                    memory.reserve_exact(wanted - memory.len());
                    memory.resize(end, 0);
                }
                Memory::Slot(slot) => {
                    let mut memory = Vec::with_capacity(wanted);
                    memory.extend_from_slice(&slot.bytes[..self.end]);
                    memory.resize(end, 0);
                    self.memory = Memory::Own(memory);
                }
            }
        }
        self.memory[self.end..end].copy_from_slice(bytes);
        self.end = end;
    }

    /// Bytes of memory that it holds.
    #[must_use]
    pub fn held(&self) -> usize {
        match &self.memory {
            Memory::Own(memory) => memory.capacity(),
            Memory::Slot(slot) => slot.bytes.len(),
        }
    }

    /// The same record; what is short leaves its memory to another.
    #[must_use]
    pub fn dense(self) -> Self {
        if self.held() < SPARSE * self.len().max(ALIGNMENT) {
            return self;
        }
        let mut memory = Vec::with_capacity(self.len() + SEAL_LEN + TAG_LEN);
        memory.extend_from_slice(&self);
        memory.into()
    }

    /// Its memory, for another record, unless it is a slot's; what is in it has no meaning.
    #[must_use]
    pub fn into_memory(self) -> Option<Vec<u8>> {
        match self.memory {
            Memory::Own(memory) => Some(memory),
            Memory::Slot(_) => None,
        }
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(memory) => memory,
            Self::Slot(slot) => &slot.bytes,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Own(memory) => memory,
            Self::Slot(slot) => &mut slot.bytes,
        }
    }
}

impl From<Vec<u8>> for Record {
    fn from(memory: Vec<u8>) -> Self {
        let end = memory.len();
        Self {
            memory: Memory::Own(memory),
            start: 0,
            end,
        }
    }
}

impl Deref for Record {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }
}

impl DerefMut for Record {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.end]
    }
}

impl<'a> Extend<&'a u8> for Record {
    fn extend<I: IntoIterator<Item = &'a u8>>(&mut self, bytes: I) {
        for byte in bytes {
            self.append(std::slice::from_ref(byte));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(slots: &Slots) -> usize {
        let free = lock(&slots.free);
        free.warm.len() + free.cold.len()
    }

    #[test]
    fn the_payload_is_aligned_in_new_and_in_used_memory() {
        let slots = Arc::default();
        for room in [8192, 100, 300_000, DATA_CAP, 4096, DATA_CAP, 2 * DATA_CAP] {
            let head = vec![7; HEADER_LEN + ALIGNMENT];
            let mut record = Record::with_room(&slots, &head, room);
            assert_eq!(record[..head.len()], head);
            assert_eq!(record.len(), head.len() + room);
            record.extend(&[9; TAG_LEN]);
            assert_eq!(record[HEADER_LEN..].as_ptr().addr() % ALIGNMENT, 0);
            assert!(record.ends_with(&[9; TAG_LEN]));
            record.truncate(head.len());
            assert_eq!(record[..], head);
        }
        assert_eq!(
            free(&slots),
            TOGETHER,
            "all came back, and no more were needed"
        );
    }

    #[test]
    fn a_record_goes_on_beyond_its_slot_and_a_short_one_leaves_it() {
        let slots = Arc::default();
        let mut record = Record::with_room(&slots, &[1; HEADER_LEN], DATA_CAP);
        let more = vec![2; SLOT];
        record.append(&more);
        assert_eq!(record.len(), HEADER_LEN + DATA_CAP + SLOT);
        assert!(record.ends_with(&more) && record.starts_with(&[1; HEADER_LEN]));
        let mut record = Record::with_room(&slots, &[3; HEADER_LEN], DATA_CAP);
        record.truncate(HEADER_LEN);
        let record = record.dense();
        assert_eq!(record[..], [3; HEADER_LEN]);
        assert!(record.held() < ALIGNMENT);
        assert_eq!(free(&slots), TOGETHER);
    }

    #[test]
    fn packed_records_hold_no_more_than_they_need_and_idle_slots_little() {
        let mut packed = Vec::with_capacity(SLOT);
        packed.extend([4; 50_000]);
        let record = Record::from(packed).dense();
        assert!(record.held() < 51_000 && record[..] == [4; 50_000]);
        // Room for what seals it is used, and not more taken.
        let mut record = record;
        record.append(&[5; SEAL_LEN + TAG_LEN]);
        assert!(record.held() < 51_000 && record.ends_with(&[5; SEAL_LEN + TAG_LEN]));

        let slots = Arc::default();
        let full: Vec<Record> = (0..2 * TOGETHER)
            .map(|_| {
                let mut record = Record::with_room(&slots, &[6; HEADER_LEN], DATA_CAP);
                record.fill(6);
                record
            })
            .collect();
        drop(full);
        assert_eq!(lock(&slots.free).warm.len(), WARM);
        assert_eq!(free(&slots), 2 * TOGETHER);
        let cold = &lock(&slots.free).cold;
        assert!(cold.iter().all(|slot| slot.iter().all(|byte| *byte == 0)));
    }
}
