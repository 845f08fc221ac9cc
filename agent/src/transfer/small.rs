//! Small files, read side by side straight into the record that carries them.
//!
//! Invariant: a signature describes exactly the bytes that travel. Files that may lie at the target already are
//! offered to it first, apart from that record.

use super::engine::{Engine, Read};
use super::frame::{DATA_CAP, HEADER_LEN};
use super::message::Held;
use super::payload::{self, Block, FILES_DATA, SmallFiles};
use super::queue::lock;
use super::reading::{Fate, Reading, Unit, Waiting, size_of};
use super::record::Record;
use super::source::{SourceError, add};
use super::uring::is_cached;
use crate::model::ids::Signature;
use crate::volume::aligned::{ALIGNMENT, set_direct};
use crate::volume::block_map;
use crate::volume::one::stat_of;
use crate::volume::salvage::is_media_error;
use crate::volume::sign;
use crate::volume::walk::{Found, WalkError, kind_of};
use crate::volume::{Entry, Kind};
use nix::sys::stat::{FileStat, SFlag};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

/// Bytes of small files from which they travel in the memory to which they were read.
const IN_PLACE: usize = 256 << 10;
/// Entries of small files that a record carries at most, unless one alone is larger.
const ENTRIES_FULL: usize = 256 << 10;
/// Attributes up to this size, all together, do not keep a file from being offered.
const OFFERED_ATTRIBUTES: usize = 1024;

/// Small files as they were offered, with their bytes.
#[derive(Default)]
pub(super) struct OfferedFiles {
    files: Vec<(Entry, Vec<Fate>, Range<usize>)>,
    bytes: Vec<u8>,
}

/// What of the small files in a record travels: where their bytes lie, which begin aligned, and their entries.
struct Placed {
    data: Range<usize>,
    entries: Vec<u8>,
}

impl Placed {
    fn behind(head: usize) -> Self {
        Self {
            data: head..head,
            entries: Vec::new(),
        }
    }
}

impl<'s> Reading<'_, 's> {
    /// Reads a batch of small files and sends those that differ in one record, or offers them first.
    pub(super) fn read_small(
        &self,
        engine: &mut dyn Engine,
        files: &[(usize, &'s Found)],
    ) -> Result<Option<Waiting>, SourceError> {
        let local = |path| self.root.local(path).unwrap_or(path);
        let paths: Vec<&[u8]> = files.iter().map(|(_, found)| local(&*found.path)).collect();
        let opened = engine.open_files(self.root.fd(), &paths);
        let mut ready = Vec::with_capacity(files.len());
        let mut total = 0;
        for ((step, found), fd) in files.iter().zip(opened) {
            let stat = fd.and_then(|fd| stat_of(self.root, &fd).map(|stat| (fd, stat)));
            match stat {
                Ok((fd, stat)) if kind_of(&stat) == SFlag::S_IFREG => {
                    // A file that outgrew its batch is read up to the size it was found with, and
                    // again in the next epoch.
                    let size = size_of(&stat).min(size_of(&found.stat));
                    let length = usize::try_from(size).unwrap_or(0);
                    ready.push((*step, *found, File::from(fd), stat, length));
                    total += length;
                }
                Ok(_) => self.vanish(*step, &found.path)?,
                Err(errno) => {
                    let error = WalkError::new(self.root, "open", &found.path, errno);
                    if error.is_loss() {
                        self.defer(Unit::Small(vec![(*step, *found)]));
                    } else if error.vanished() {
                        self.vanish(*step, &found.path)?;
                    } else {
                        return Err(error.into());
                    }
                }
            }
        }
        let padded: usize = ready
            .iter()
            .map(|one| one.4.next_multiple_of(ALIGNMENT))
            .sum();
        let head = [0; HEADER_LEN + FILES_DATA];
        let mut record = Record::with_room(&self.source.outlet.slots, &head, padded);
        let mut rest = &mut record[head.len()..];
        let mut reads: Vec<Read<'_>> = Vec::with_capacity(ready.len());
        for (_, _, file, _, length) in &ready {
            let size = length.next_multiple_of(ALIGNMENT);
            let (buffer, tail) = std::mem::take(&mut rest).split_at_mut(size);
            rest = tail;
            // What is not in the page cache need not go through it.
            let direct = *length > 0
                && self.root.one().is_none()
                && !is_cached(file.as_fd(), 0, *length as u64)
                && set_direct(file, true);
            reads.push(Read {
                file: file.as_fd(),
                offset: 0,
                buffer: if direct {
                    buffer
                } else {
                    &mut buffer[..*length]
                },
                length: *length,
                once: false,
                done: Ok(0),
            });
        }
        engine.read(&mut reads);
        for (read, (_, _, file, ..)) in reads.iter_mut().zip(&ready) {
            let refused = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
            // A disk with larger sectors than 4096 bytes, or a file system that says no only now.
            if read.done.as_ref().is_err_and(refused) && set_direct(file, false) {
                engine.read(std::slice::from_mut(read));
            }
        }
        let mut lengths = Vec::with_capacity(ready.len());
        for (read, (step, found, ..)) in reads.into_iter().zip(&ready) {
            lengths.push(match read.done {
                Err(error) if is_media_error(&error) => {
                    self.defer(Unit::Small(vec![(*step, *found)]));
                    None
                }
                done => {
                    let done =
                        done.map_err(|e| WalkError::new(self.root, "read", &found.path, e))?;
                    Some(done.min(read.length))
                }
            });
        }
        self.source.progress.read(total as u64);
        add(&self.tally.bytes_read, total as u64);
        let mut outcomes = Vec::with_capacity(ready.len());
        let offering = self.source.outlet.offers.is_due();
        let mut offered = OfferedFiles::default();
        // Bytes that travel move up to each other; their entries come behind them.
        let mut sent = Placed::behind(head.len());
        let mut at = head.len();
        for ((step, found, file, stat, length), read) in ready.into_iter().zip(lengths) {
            let start = at;
            at += length.next_multiple_of(ALIGNMENT);
            let Some(read) = read else {
                continue;
            };
            let place = start..start + read;
            let entry = self.small_entry(&found.path, &file, &stat, &record[place.clone()])?;
            if self.source.differs(&entry) {
                add(&self.tally.changed_entries, 1);
                let fates = self.fates(&entry);
                if self.is_offerable(&entry, &fates) && (self.repeats(&entry, &fates) || offering) {
                    let start = offered.bytes.len();
                    offered.bytes.extend_from_slice(&record[place]);
                    let range = start..offered.bytes.len();
                    offered.files.push((entry.clone(), fates, range));
                } else {
                    self.place(&mut record, &mut sent, &entry, &fates, place)?;
                }
            }
            outcomes.push((step, Some(entry)));
        }
        lock(&self.outcomes).extend(outcomes);
        self.emit_placed(record, &sent)?;
        if offered.files.is_empty() {
            return Ok(None);
        }
        let number = self.offer_files(&offered)?;
        Ok(Some(Waiting::Files(number, offered)))
    }

    /// Adds a file whose bytes lie at `from` in the record to those that travel in it.
    fn place(
        &self,
        record: &mut Record,
        sent: &mut Placed,
        entry: &Entry,
        fates: &[Fate],
        from: Range<usize>,
    ) -> Result<(), SourceError> {
        let attributes = entry.xattrs.iter();
        let attributes: usize = attributes.map(|one| one.name.len() + one.value.len()).sum();
        // Large attributes can fill a record early; what is there goes first.
        if !sent.entries.is_empty() && sent.entries.len() + attributes > ENTRIES_FULL {
            let data = &record[sent.data.clone()];
            let full = payload::files(self.source.outlet.buffer(), data, &sent.entries);
            self.source.outlet.emit(full, false, 0)?;
            *sent = Placed::behind(sent.data.start);
        }
        let blocks: Vec<Block<'_>> = self.blocks(entry, fates, &record[from.clone()]).collect();
        let lengths: Vec<Option<usize>> = blocks
            .iter()
            .map(|block| match block {
                Block::Data(_, bytes) => Some(bytes.len()),
                _ => None,
            })
            .collect();
        for block in &blocks {
            self.count(*block, false);
        }
        payload::put_file(&mut sent.entries, entry, &blocks);
        let size = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
        for (length, at) in lengths.into_iter().zip((from.start..).step_by(size)) {
            let Some(length) = length else {
                continue;
            };
            if sent.data.end != at {
                record.copy_within(at..at + length, sent.data.end);
            }
            sent.data.end += length;
        }
        Ok(())
    }

    /// Sends the files whose bytes lie in the record.
    fn emit_placed(&self, mut record: Record, sent: &Placed) -> Result<(), SourceError> {
        let outlet = self.source.outlet;
        if sent.entries.is_empty() {
            return Ok(());
        }
        if sent.data.len() < IN_PLACE {
            let short = payload::files(outlet.buffer(), &record[sent.data.clone()], &sent.entries);
            outlet.emit(short, false, 0)?;
            return Ok(());
        }
        record[HEADER_LEN..sent.data.start].copy_from_slice(&payload::files_head(sent.data.len()));
        record.truncate(sent.data.end);
        record.append(&sent.entries);
        outlet.emit(record, false, 0)?;
        Ok(())
    }

    /// Offers small files: blocks that are worth a question by signature, shorter ones as they are.
    fn offer_files(&self, offered: &OfferedFiles) -> Result<u64, SourceError> {
        let mut files = SmallFiles::default();
        for (entry, fates, range) in &offered.files {
            let blocks = self.blocks(entry, fates, &offered.bytes[range.clone()]);
            let named: Vec<Block<'_>> = blocks
                .map(|block| match block {
                    Block::Data(signature, bytes) if bytes.len() >= block_map::LEAST => {
                        Block::Offered(signature)
                    }
                    other => other,
                })
                .collect();
            files.put(entry, &named);
        }
        let outlet = self.source.outlet;
        Ok(outlet.offer(files.record(outlet.buffer()), 0)?)
    }

    /// Sends those of the offered files that the target could not make of what it holds.
    pub(super) fn send_lacking(
        &self,
        offered: &OfferedFiles,
        answer: &Held,
    ) -> Result<(), SourceError> {
        let mut lacking = SmallFiles::default();
        let mut first = 0;
        for (entry, fates, range) in &offered.files {
            let blocks = first..first + fates.len();
            first = blocks.end;
            let bytes = &offered.bytes[range.clone()];
            if blocks.into_iter().all(|position| answer.has(position)) {
                for block in self.blocks(entry, fates, bytes) {
                    self.count(block, true);
                }
            } else {
                self.put_small(&mut lacking, entry, fates, bytes)?;
            }
        }
        self.emit_small(&mut lacking)
    }

    fn repeats(&self, entry: &Entry, fates: &[Fate]) -> bool {
        let Kind::File { blocks, .. } = &entry.kind else {
            return false;
        };
        let pairs = blocks.iter().zip(fates);
        let data = pairs.filter(|(_, fate)| **fate == Fate::Data);
        let offers = &self.source.outlet.offers;
        offers.repeat(data.map(|(signature, _)| signature))
    }

    /// Whether a small file is worth a question.
    fn is_offerable(&self, entry: &Entry, fates: &[Fate]) -> bool {
        let lengths = (0..).map(|index| self.source.block_size.length_of(entry.size(), index));
        let attributes = entry.xattrs.iter();
        let attributes: usize = attributes.map(|one| one.name.len() + one.value.len()).sum();
        attributes <= OFFERED_ATTRIBUTES
            && fates
                .iter()
                .zip(lengths)
                .any(|(fate, length)| *fate == Fate::Data && length >= block_map::LEAST)
    }

    pub(super) fn small_entry(
        &self,
        path: &[u8],
        file: &File,
        stat: &FileStat,
        bytes: &[u8],
    ) -> Result<Entry, SourceError> {
        let block = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
        let blocks = bytes
            .chunks(block)
            .map(|block| sign::signature(self.source.key, block))
            .collect();
        let size = bytes.len() as u64;
        self.entry(path, file, stat, size, blocks)
    }

    /// Adds a small file with the blocks that travel.
    pub(super) fn put_small(
        &self,
        files: &mut SmallFiles,
        entry: &Entry,
        fates: &[Fate],
        bytes: &[u8],
    ) -> Result<(), SourceError> {
        // Large attributes can fill a record early; what is there goes first.
        if files.len() + bytes.len() > DATA_CAP + (64 << 10) {
            self.emit_small(files)?;
        }
        let blocks: Vec<Block<'_>> = self.blocks(entry, fates, bytes).collect();
        for block in &blocks {
            self.count(*block, false);
        }
        files.put(entry, &blocks);
        Ok(())
    }

    /// Sends the small files that were put together, if there are any.
    pub(super) fn emit_small(&self, files: &mut SmallFiles) -> Result<(), SourceError> {
        let outlet = self.source.outlet;
        if !files.is_empty() {
            outlet.emit(files.record(outlet.buffer()), false, 0)?;
            *files = SmallFiles::default();
        }
        Ok(())
    }

    /// The blocks of a small file.
    fn blocks<'b>(
        &self,
        entry: &'b Entry,
        fates: &'b [Fate],
        bytes: &'b [u8],
    ) -> impl Iterator<Item = Block<'b>> + use<'b> {
        let size = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
        let signatures: &[Signature] = match &entry.kind {
            Kind::File { blocks, .. } => blocks,
            _ => &[],
        };
        let parts = fates.iter().zip(signatures).zip(bytes.chunks(size));
        parts.map(|((fate, signature), bytes)| fate.block(*signature, bytes))
    }
}
