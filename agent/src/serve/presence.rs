//! Which pages of a served volume are here: one bit each, kept over the death of the process and of the host.
//!
//! A page becomes present in memory and in the file `live` at once, and in the file `durable` only after its
//! bytes were made durable. `live` counts as long as the host was not started anew, because the page cache
//! keeps its order then; after that only `durable` does. So no bit ever outlives its bytes. Non-goal: the
//! bytes themselves.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a page: what a write of a database or a file system is a multiple of.
pub const PAGE: u64 = 4096;
/// Pages of a block: its bits are one 16-bit group of a word.
pub const PAGES: u32 = 16;
/// Every page of a block.
pub const WHOLE: u16 = u16::MAX;

const MAGIC: &[u8; 8] = b"LBpages1";
/// Where the bits begin in a file: behind the magic, the id of the boot and a count.
const START: u64 = 64;
/// Words that are made durable together: a page of the file.
const CHUNK: usize = 512;

/// The bits of all blocks of a volume.
pub struct Presence {
    words: Vec<AtomicU64>,
    /// Chunks in which `live` is ahead of `durable`.
    soft: Vec<AtomicBool>,
    live: File,
    durable: Mutex<(Vec<u64>, File)>,
    absent: AtomicU64,
}

impl Presence {
    /// Opens what is known in `directory` about so many blocks; nothing is present when nothing is known.
    /// `real` gives the pages that a block has: the last one of a file has fewer.
    ///
    /// # Errors
    /// The files cannot be read or made.
    pub fn open(
        directory: &Path,
        blocks: u64,
        real: impl Iterator<Item = u16>,
    ) -> io::Result<Self> {
        let boot = boot_id()?;
        let words = usize::try_from(blocks.div_ceil(4)).unwrap_or(usize::MAX);
        let (durable_path, live_path) = (directory.join("durable"), directory.join("live"));
        let mut bits = read(&durable_path, words)?.map_or_else(|| vec![0; words], |(_, bits)| bits);
        let fresh = bits.clone();
        if let Some((of, live)) = read(&live_path, words)?
            && of == boot
        {
            for (word, live) in bits.iter_mut().zip(live) {
                *word |= live;
            }
        }
        let durable = write(&durable_path, &boot, &fresh)?;
        let live = write(&live_path, &boot, &bits)?;
        let soft = bits
            .chunks(CHUNK)
            .zip(fresh.chunks(CHUNK))
            .map(|(live, durable)| AtomicBool::new(live != durable))
            .collect();
        let presence = Self {
            words: bits.into_iter().map(AtomicU64::new).collect(),
            soft,
            live,
            durable: Mutex::new((fresh, durable)),
            absent: AtomicU64::new(0),
        };
        let absent = real
            .zip(0_u64..)
            .map(|(real, block)| u64::from((real & !presence.of(block)).count_ones()))
            .sum();
        presence.absent.store(absent, Ordering::Release);
        Ok(presence)
    }

    /// The bits of a block.
    #[must_use]
    pub fn of(&self, block: u64) -> u16 {
        let (word, shift) = place(block);
        let bits = self.words.get(word);
        // Truncation to the block's own group of the word.
        bits.map_or(0, |bits| (bits.load(Ordering::Acquire) >> shift) as u16)
    }

    /// Pages that are not here.
    #[must_use]
    pub fn absent(&self) -> u64 {
        self.absent.load(Ordering::Acquire)
    }

    /// Marks pages of a block that were absent and are here now.
    ///
    /// # Errors
    /// The mark cannot be kept.
    pub fn mark(&self, block: u64, pages: u16) -> io::Result<()> {
        let (at, shift) = place(block);
        if at < self.words.len() {
            self.add(at, u64::from(pages) << shift);
            self.write_live(at..at + 1)?;
        }
        Ok(())
    }

    /// Marks every page of blocks that have all of them and of which none was here, with one write.
    ///
    /// # Errors
    /// As [`Self::mark`].
    pub fn mark_whole(&self, blocks: Range<u64>) -> io::Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let (first, last) = (place(blocks.start).0, place(blocks.end - 1).0);
        let words = first..(last + 1).min(self.words.len());
        for word in words.clone() {
            let mut bits = u64::MAX;
            for group in 0..4 {
                if !blocks.contains(&(word as u64 * 4 + group)) {
                    bits &= !(u64::from(WHOLE) << (group * 16));
                }
            }
            self.add(word, bits);
        }
        self.write_live(words)
    }

    fn add(&self, word: usize, bits: u64) {
        let before = self.words[word].fetch_or(bits, Ordering::AcqRel);
        self.soft[word / CHUNK].store(true, Ordering::Release);
        let fresh = u64::from((bits & !before).count_ones());
        self.absent.fetch_sub(fresh, Ordering::AcqRel);
    }

    /// Writes words to `live` as they are now.
    fn write_live(&self, words: Range<usize>) -> io::Result<()> {
        let now = || {
            let words = self.words[words.clone()].iter();
            words
                .flat_map(|word| word.load(Ordering::Acquire).to_le_bytes())
                .collect::<Vec<u8>>()
        };
        let mut bytes = now();
        loop {
            self.live
                .write_all_at(&bytes, START + words.start as u64 * 8)?;
            // Two marks of one word may be written in the wrong order; the later bits are then in `durable` or
            // are written again by the next mark. Of what was written here none may be lost, and who writes holds its
            // block's lock but not its neighbours': so the words are written until they are what they are in memory.
            let again = now();
            if again == bytes {
                return Ok(());
            }
            bytes = again;
        }
    }

    /// Which bits of these blocks only `live` has; to be taken before their bytes are made durable.
    #[must_use]
    pub fn soft(&self, blocks: Range<u64>) -> Soft {
        let mut soft = Vec::new();
        if blocks.is_empty() {
            return Soft(soft);
        }
        let (first, last) = (place(blocks.start).0, place(blocks.end - 1).0);
        let mut at = first;
        while at <= last.min(self.words.len().saturating_sub(1)) {
            let chunk = at / CHUNK;
            let end = ((chunk + 1) * CHUNK).min(last + 1).min(self.words.len());
            if self.soft[chunk].load(Ordering::Acquire) {
                for word in at..end {
                    let mut bits = self.words[word].load(Ordering::Acquire);
                    for group in 0..4 {
                        let block = word as u64 * 4 + group;
                        if !blocks.contains(&block) {
                            bits &= !(u64::from(WHOLE) << (group * 16));
                        }
                    }
                    if bits != 0 {
                        soft.push((word, bits));
                    }
                }
            }
            at = end;
        }
        Soft(soft)
    }

    /// Keeps these bits for good; their bytes are durable now.
    ///
    /// # Errors
    /// They cannot be written or synced.
    pub fn harden(&self, Soft(soft): &Soft) -> io::Result<()> {
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        let (bits, file) = &mut *durable;
        let mut chunks = BTreeMap::new();
        for &(word, more) in soft {
            if bits[word] | more != bits[word] {
                let first = word / CHUNK * CHUNK;
                let words = chunks
                    .entry(first)
                    .or_insert_with(|| bits[first..(first + CHUNK).min(bits.len())].to_vec());
                words[word - first] |= more;
            }
        }
        if chunks.is_empty() {
            return Ok(());
        }
        for (first, words) in &chunks {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all_at(&bytes, START + *first as u64 * 8)?;
        }
        // Not the error of a write: what the disk did not take is lost then.
        file.sync_data().map_err(io::Error::other)?;
        for (first, words) in chunks {
            // Off first: a mark that comes in between turns it on again.
            self.soft[first / CHUNK].store(false, Ordering::Release);
            let end = first + words.len();
            let mut live = self.words[first..end].iter().zip(&words);
            if live.any(|(live, word)| live.load(Ordering::Acquire) != *word) {
                self.soft[first / CHUNK].store(true, Ordering::Release);
            }
            bits[first..end].copy_from_slice(&words);
        }
        Ok(())
    }

    /// Whether all of these bits are kept for good.
    #[must_use]
    pub fn is_hard(&self, Soft(soft): &Soft) -> bool {
        let durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        soft.iter()
            .all(|&(word, bits)| durable.0[word] & bits == bits)
    }
}

/// Bits to make durable.
pub struct Soft(Vec<(usize, u64)>);

impl Soft {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn place(block: u64) -> (usize, u64) {
    let word = usize::try_from(block / 4).unwrap_or(usize::MAX);
    (word, block % 4 * 16)
}

/// The id of this boot of the host.
pub(super) fn boot_id() -> io::Result<[u8; 36]> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let id = text.first_chunk().copied();
    id.ok_or_else(|| io::Error::other("the kernel gives no boot id"))
}

/// The boot in which a file was written last and its words; none when it is not there or not whole.
fn read(path: &Path, words: usize) -> io::Result<Option<([u8; 36], Vec<u64>)>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let whole = bytes.len() == START as usize + words * 8 && bytes.starts_with(MAGIC);
    let boot = bytes.get(8..).and_then(|rest| rest.first_chunk().copied());
    Ok(boot.filter(|_| whole).map(|boot| {
        let (words, _) = bytes[START as usize..].as_chunks::<8>();
        (
            boot,
            words.iter().map(|word| u64::from_le_bytes(*word)).collect(),
        )
    }))
}

/// Writes a whole file in the place of the old one and returns it open.
fn write(path: &Path, boot: &[u8; 36], words: &[u64]) -> io::Result<File> {
    let new = path.with_extension("new");
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&new)?;
    let mut head = MAGIC.to_vec();
    head.extend_from_slice(boot);
    head.resize(START as usize, 0);
    let mut out = io::BufWriter::new(&file);
    out.write_all(&head)?;
    for word in words {
        out.write_all(&word.to_le_bytes())?;
    }
    out.flush()?;
    drop(out);
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(directory: &Path) -> Presence {
        let real = (0..3000).map(|block| if block == 2999 { 0b11 } else { WHOLE });
        Presence::open(directory, 3000, real).unwrap()
    }

    #[test]
    fn a_mark_survives_the_process_and_a_durable_one_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let presence = open(directory.path());
        let all = 2999 * 16 + 2;
        assert_eq!(presence.absent(), all);
        presence.mark(7, 0b1001).unwrap();
        presence.mark(2000, WHOLE).unwrap();
        presence.mark(8, 0b1).unwrap();
        let soft = presence.soft(7..8);
        presence.mark(7, 0b10).unwrap();
        presence.harden(&soft).unwrap();
        drop(presence);

        let presence = open(directory.path());
        assert_eq!(
            [7, 8, 9, 2000].map(|block| presence.of(block)),
            [0b1011, 1, 0, WHOLE]
        );
        assert_eq!(presence.absent(), all - 16 - 4);
        drop(presence);

        // As if another boot had written it.
        let live = directory.path().join("live");
        let mut bytes = std::fs::read(&live).unwrap();
        bytes[8..44].copy_from_slice(&[b'x'; 36]);
        std::fs::write(&live, bytes).unwrap();
        let presence = open(directory.path());
        assert_eq!(
            [7, 8, 2000].map(|block| presence.of(block)),
            [0b1001, 0, 0],
            "only what was hardened counts, and only of the block that was"
        );
    }

    #[test]
    fn blocks_that_are_marked_together_are_marked_and_counted_as_one_by_one() {
        let directory = tempfile::tempdir().unwrap();
        let presence = open(directory.path());
        let all = presence.absent();
        presence.mark(2, WHOLE).unwrap();
        presence.mark_whole(3..2503).unwrap();
        presence.mark_whole(7..7).unwrap();
        assert_eq!(presence.absent(), all - 2501 * u64::from(PAGES));
        drop(presence);
        let presence = open(directory.path());
        let marked = (0..3000).filter(|block| presence.of(*block) == WHOLE);
        assert!(marked.eq(2..2503));
        assert_eq!((presence.of(1), presence.of(2503)), (0, 0));
    }

    #[test]
    fn bits_of_other_sizes_or_torn_files_are_as_none() {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path()));
        std::fs::write(directory.path().join("durable"), b"torn").unwrap();
        std::fs::write(directory.path().join("live"), b"torn").unwrap();
        assert_eq!(open(directory.path()).of(7), 0);
    }
}
