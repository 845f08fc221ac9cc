//! The memory of a record that is to be sent: place for the header, then the payload, at an address from which a
//! disk can be read straight to where the bytes travel.

use super::frame::HEADER_LEN;
use super::seal::TAG_LEN;
use crate::volume::aligned::ALIGNMENT;
use std::ops::{Deref, DerefMut};

/// A record. What is at a multiple of [`ALIGNMENT`] in the payload of one made by [`Record::with_room`] is so in
/// memory, until bytes beyond a seal or a tag are added.
#[derive(Debug, Default)]
pub struct Record {
    /// May go on behind the record, so that memory which is used again need not be cleared.
    memory: Vec<u8>,
    start: usize,
    end: usize,
}

impl Record {
    /// A record that begins with `head`, then `room` bytes of any content, in the memory of a used one.
    #[must_use]
    pub fn with_room(mut memory: Vec<u8>, head: &[u8], room: usize) -> Self {
        let length = head.len() + room;
        let wanted = ALIGNMENT + length + TAG_LEN;
        if memory.capacity() < wanted {
            // The kernel's own zeros: nothing is written.
            memory = vec![0; wanted];
        }
        let payload = memory.as_ptr().addr() + HEADER_LEN;
        let start = payload.next_multiple_of(ALIGNMENT) - payload;
        let end = start + length;
        if memory.len() < end {
            memory.resize(end, 0);
        }
        memory[start..start + head.len()].copy_from_slice(head);
        Self { memory, start, end }
    }

    /// Cuts it to `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        self.end = self.end.min(self.start + length);
    }

    /// Its memory, for another record; what is in it has no meaning.
    #[must_use]
    pub fn into_memory(self) -> Vec<u8> {
        self.memory
    }
}

impl From<Vec<u8>> for Record {
    fn from(memory: Vec<u8>) -> Self {
        let end = memory.len();
        Self {
            memory,
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
        self.memory.truncate(self.end);
        self.memory.extend(bytes);
        self.end = self.memory.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_aligned_in_new_and_in_used_memory() {
        let mut memory = Vec::new();
        for room in [8192, 100, 50_000, 4096] {
            let head = vec![7; HEADER_LEN + ALIGNMENT];
            let mut record = Record::with_room(memory, &head, room);
            assert_eq!(record[..head.len()], head);
            assert_eq!(record.len(), head.len() + room);
            record.extend(&[9; TAG_LEN]);
            assert_eq!(record[HEADER_LEN..].as_ptr().addr() % ALIGNMENT, 0);
            record.truncate(head.len());
            assert_eq!(record[..], head);
            memory = record.into_memory();
        }
    }
}
