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

#[cfg(test)]
mod tests {
    use lifeboat_ebpf::error::{self, class};
    use nix::libc;

    /// `blk_errors` of block/blk-core.c: name, errno, and the class that it is told as.
    const ERRORS: [(&str, i32, Option<usize>); 17] = [
        ("OK", 0, None),
        ("NOTSUPP", libc::EOPNOTSUPP, None),
        ("TIMEOUT", libc::ETIMEDOUT, Some(error::TIMEOUT)),
        ("NOSPC", libc::ENOSPC, Some(error::NO_SPACE)),
        ("TRANSPORT", libc::ENOLINK, Some(error::TRANSPORT)),
        ("TARGET", libc::EREMOTEIO, Some(error::TARGET)),
        // Called NEXUS before Linux 6.5.
        ("RESV_CONFLICT", libc::EBADE, Some(error::TARGET)),
        ("MEDIUM", libc::ENODATA, Some(error::MEDIA)),
        ("PROTECTION", libc::EILSEQ, Some(error::PROTECTION)),
        ("RESOURCE", libc::ENOMEM, Some(error::OTHER)),
        ("IOERR", libc::EIO, Some(error::OTHER)),
        ("DM_REQUEUE", libc::EREMCHG, None),
        ("AGAIN", libc::EAGAIN, None),
        ("DEV_RESOURCE", libc::EBUSY, None),
        ("ZONE_OPEN_RESOURCE", libc::ETOOMANYREFS, Some(error::OTHER)),
        ("ZONE_ACTIVE_RESOURCE", libc::EOVERFLOW, Some(error::OTHER)),
        ("OFFLINE", libc::ENODEV, Some(error::TRANSPORT)),
    ];
    const LATER: [(&str, i32, Option<usize>); 2] = [
        ("DURATION_LIMIT", libc::ETIME, Some(error::TIMEOUT)),
        ("INVAL", libc::EINVAL, None),
    ];

    fn expected(name: &str) -> Option<usize> {
        let mut known = ERRORS.iter().chain(&LATER);
        known.find(|(known, ..)| *known == name).expect(name).2
    }

    #[test]
    fn every_number_of_every_kernel_is_the_class_of_its_name() {
        // include/linux/blk_types.h: up to DEV_RESOURCE, 13, they never moved.
        let stay: Vec<(i32, &str)> = (0..14).zip(ERRORS.map(|(name, ..)| name)).collect();
        // Linux 5.16 (the first that gives the tracepoint numbers) to 6.4, as 6.1; OFFLINE since 5.18.
        let older = [
            (15, "ZONE_OPEN_RESOURCE"),
            (16, "ZONE_ACTIVE_RESOURCE"),
            (17, "OFFLINE"),
        ];
        // 6.5 to 6.9.
        let limited = [&older[..], &[(18, "DURATION_LIMIT")]].concat();
        // From 6.10 on, as 6.12, without ZONE_RESOURCE; INVAL since 6.11.
        let newer = [
            (14, "ZONE_OPEN_RESOURCE"),
            (15, "ZONE_ACTIVE_RESOURCE"),
            (16, "OFFLINE"),
            (17, "DURATION_LIMIT"),
            (19, "INVAL"),
        ];
        for (offline, moved) in [(17, &older[..]), (17, &limited), (16, &newer)] {
            for &(number, name) in stay.iter().chain(moved) {
                assert_eq!(class(number, offline), expected(name), "{number} is {name}");
            }
        }
    }

    #[test]
    fn before_linux_5_16_every_errno_is_the_class_of_its_name() {
        for (name, errno, expected) in ERRORS.iter().chain(&LATER) {
            // 17 is OFFLINE where numbers come, and no errno.
            assert_eq!(class(-errno, 17), *expected, "{name}");
        }
    }
}
