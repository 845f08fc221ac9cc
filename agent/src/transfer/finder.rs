//! Finding offered blocks among those that this device holds.

use super::payload::{Block, Payload, Segment};
use crate::model::ids::Signature;
use crate::volume::aligned::Aligned;
use crate::volume::block_map::{BlockReader, Wanted};
use crate::volume::{BlockMap, BlockSize, Entry, FleetKey};
use std::ops::Range;

/// One thread's means to read held blocks.
#[derive(Default)]
pub(super) struct Finder {
    reader: BlockReader,
    plain: Aligned,
}

/// Blocks of one file in a record.
pub(super) type Blocks<'b> = Vec<Block<'b>>;

impl Finder {
    /// Reads what is held of the blocks that a record offers: the memory they lie in, and for each offered
    /// block in order its bytes there.
    pub(super) fn find(
        &mut self,
        map: Option<&BlockMap>,
        key: &FleetKey,
        block_size: BlockSize,
        payload: &Payload<'_>,
    ) -> (&[u8], Vec<Option<Range<usize>>>) {
        let mut total = 0;
        let place = |(signature, length)| {
            let start = total;
            total += length;
            (signature, start..total)
        };
        let wanted: Vec<Wanted> = offered(block_size, payload)
            .into_iter()
            .map(place)
            .collect();
        let memory = self.plain.space(total);
        let held = match map {
            Some(map) => self.reader.read(map, key, &wanted, memory),
            None => vec![false; wanted.len()],
        };
        let found = wanted.into_iter().zip(held);
        let found = found.map(|((_, place), held)| held.then_some(place));
        (memory, found.collect())
    }
}

/// Signature and length of each block that is offered, in order.
pub(super) fn offered(block_size: BlockSize, payload: &Payload<'_>) -> Vec<(Signature, usize)> {
    let of_file = |size: u64, first: u64, blocks: &[Block<'_>]| -> Vec<(Signature, usize)> {
        let pairs = blocks.iter().zip(first..);
        pairs
            .filter_map(|(block, index)| match block {
                Block::Offered(signature) => Some((*signature, block_size.length_of(size, index))),
                _ => None,
            })
            .collect()
    };
    match payload {
        Payload::Files(files) => files
            .iter()
            .flat_map(|(entry, blocks)| of_file(entry.size(), 0, blocks))
            .collect(),
        Payload::Segment(segment) => of_file(segment.size, segment.first, &segment.blocks),
        _ => Vec::new(),
    }
}

/// The payload with the blocks that were found in the places of their offers.
pub(super) fn filled<'b>(
    payload: &Payload<'b>,
    memory: &'b [u8],
    found: Vec<Option<Range<usize>>>,
) -> Payload<'b> {
    let mut found = found.into_iter();
    let mut fill = |blocks: &[Block<'b>]| -> Blocks<'b> {
        let blocks = blocks.iter().map(|block| match block {
            Block::Offered(signature) => match found.next().flatten() {
                Some(place) => Block::Found(*signature, &memory[place]),
                None => *block,
            },
            other => *other,
        });
        blocks.collect()
    };
    match payload {
        Payload::Files(files) => {
            let files = files.iter();
            let filled: Vec<(Entry, Blocks<'b>)> = files
                .map(|(entry, blocks)| (entry.clone(), fill(blocks)))
                .collect();
            Payload::Files(filled)
        }
        Payload::Segment(segment) => Payload::Segment(Segment {
            blocks: fill(&segment.blocks),
            ..segment.clone()
        }),
        other => other.clone(),
    }
}

/// Whether a payload offers blocks.
pub(super) fn offers(payload: &Payload<'_>) -> bool {
    match payload {
        Payload::Files(files) => files
            .iter()
            .any(|(_, blocks)| blocks.iter().any(Block::is_lacking)),
        Payload::Segment(segment) => segment.blocks.iter().any(Block::is_lacking),
        _ => false,
    }
}
