//! Reading the block programs' maps.

use super::Kernel;
use super::mapped::{Mapped, Rows};
use crate::telemetry::block::Request;
use aya::maps::{Array, MapData, Stack};
use lifeboat_ebpf::{BlockKey, BlockRow, BlockStats};
use std::collections::{HashMap, HashSet};
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};

/// The block maps in memory.
pub struct Blocks {
    rows: Rows,
    in_flight: Mapped,
}

/// Words of a row.
const ROW_WORDS: usize = size_of::<BlockRow>() / 8;

/// The word of a row with its device, which is not 0 where the row is somebody's. Few rows are, and a row
/// is half a kilobyte.
const DEVICE_WORD: usize = offset_of!(BlockRow, key.device) / 8;

impl Kernel {
    /// Makes the maps ready for the programs, which take a row for each new (cgroup, disk, op).
    pub(super) fn prepare_block(&mut self) -> Result<(), String> {
        let map = |name| self.map(name).ok_or("it is not in the embedded object");
        self.blocks = Some(Blocks {
            rows: Rows::new(map("BLOCK")?, 1)?,
            in_flight: Mapped::writable(map("IN_FLIGHT")?)?,
        });
        let rows = self.blocks.as_ref().map_or(0, |blocks| blocks.rows.count());
        let mut free = self
            .free_block_rows()
            .ok_or("FREE_BLOCK_ROWS is not in the embedded object")?;
        // The first is taken first.
        for row in (0..rows).rev() {
            free.push(row, 0).map_err(|error| super::chain(&error))?;
        }
        Ok(())
    }

    /// Block I/O, since the start.
    #[must_use]
    pub fn block(&mut self) -> Vec<(BlockKey, BlockStats)> {
        let Some(blocks) = &mut self.blocks else {
            return Vec::new();
        };
        blocks.rows.reach_used(DEVICE_WORD);
        let (rows, _) = blocks.rows.words().as_chunks::<ROW_WORDS>();
        let taken =
            |words: &&[AtomicU64; ROW_WORDS]| words[DEVICE_WORD].load(Ordering::Relaxed) != 0;
        rows.iter()
            .filter(taken)
            .map(row)
            .filter(|row| row.key.device != 0)
            .map(|row| (row.key, row.stats))
            .collect()
    }

    /// Block requests between issue and completion.
    #[must_use]
    pub fn in_flight(&self) -> Vec<Request> {
        let Some(blocks) = &self.blocks else {
            return Vec::new();
        };
        let (rows, _) = blocks.rows.words().as_chunks::<ROW_WORDS>();
        let (places, _) = blocks.in_flight.words().as_chunks::<3>();
        places
            .iter()
            .enumerate()
            .filter_map(|(place, [request, since_ns, row_number])| {
                let number = request.load(Ordering::Relaxed);
                if number == 0 {
                    return None;
                }
                let row_number = row_number.load(Ordering::Relaxed) as u32;
                let key = row(rows.get(row_number as usize)?).key;
                (key.device != 0).then_some(Request {
                    key,
                    since_ns: since_ns.load(Ordering::Relaxed),
                    number,
                    place,
                })
            })
            .collect()
    }

    /// Gives up a request whose end was missed, unless its place has become another's.
    pub fn forget_request(&self, request: &Request) {
        let Some(blocks) = &self.blocks else {
            return;
        };
        let (places, _) = blocks.in_flight.words().as_chunks::<3>();
        if let Some([number, since_ns, _]) = places.get(request.place)
            && since_ns.load(Ordering::Relaxed) == request.since_ns
        {
            let _ =
                number.compare_exchange(request.number, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Puts a request of the first row into the last place.
    #[cfg(test)]
    pub(super) fn put_in_flight(&self, number: u64, since_ns: u64) {
        let blocks = self.blocks.as_ref().expect("the programs run");
        let (places, _) = blocks.in_flight.words().as_chunks::<3>();
        let place = places.last().expect("places");
        for (word, value) in place.iter().zip([number, since_ns, 0]) {
            word.store(value, Ordering::Relaxed);
        }
    }

    pub(super) fn forget_block(&mut self, gone: &HashSet<u64>) {
        // What a cgroup left under way ends first: its row must not be another's by then.
        let busy: HashSet<BlockKey> = self.in_flight().iter().map(|one| one.key).collect();
        let rows: HashMap<BlockKey, u32> = self.entries("BLOCK_ROW").into_iter().collect();
        let ended = |key: &BlockKey| gone.contains(&key.cgroup) && !busy.contains(key);
        for (key, row) in rows.into_iter().filter(|(key, _)| ended(key)) {
            self.remove_keys::<BlockKey, u32>("BLOCK_ROW", |known| *known == key);
            let map = self.ebpf.as_mut().and_then(|ebpf| ebpf.map_mut("BLOCK"));
            let rows = map.and_then(|map| Array::<&mut MapData, BlockRow>::try_from(map).ok());
            // A row that is not cleared is not given back: the next one must count from zero.
            if rows.is_some_and(|mut rows| rows.set(row, BlockRow::FREE, 0).is_ok())
                && let Some(mut free) = self.free_block_rows()
            {
                // It has room for all rows.
                let _ = free.push(row, 0);
            }
        }
    }

    fn free_block_rows(&mut self) -> Option<Stack<&mut MapData, u32>> {
        self.ebpf
            .as_mut()?
            .map_mut("FREE_BLOCK_ROWS")?
            .try_into()
            .ok()
    }
}

/// A row as its words are now.
fn row(words: &[AtomicU64; ROW_WORDS]) -> BlockRow {
    let words = words.each_ref().map(|word| word.load(Ordering::Relaxed));
    // SAFETY: as long as the row, whose fields are integers and arrays of them: any bytes are a value.
    unsafe { std::mem::transmute(words) }
}
