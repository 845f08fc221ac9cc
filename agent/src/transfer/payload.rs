//! What a record says once it is opened: removals, entries, file contents, and the end of an epoch.
//!
//! Order in an epoch, for one window of paths after the other: removals → entries (directories, special
//! files, the start of each large file) → files and segments in any order → finishes (large files, hard
//! links); after the last window the end. Each arrow is a barrier. A payload may be packed. Invariants:
//! every count is checked against the bytes that are there before anything is
//! allocated; decoding never panics.

use super::finder;
use super::frame::{BODY_CAP, DATA_CAP, HEADER_LEN};
use crate::model::ids::Signature;
use crate::volume::BlockSize;
use crate::volume::aligned::ALIGNMENT;
use crate::volume::codec::{Malformed, Reader, put_short};
use crate::volume::pages::{self, Pages};
use crate::volume::tree::{Entry, Kind, checked_path};
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

/// Kind of a payload: its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadKind {
    /// Paths to remove, deepest first.
    Removals = 1,
    /// Directories, special files, starts of large files.
    Entries = 2,
    /// Small files, whole.
    Files = 3,
    /// A run of blocks of one large file.
    Segment = 4,
    /// Final metadata of large files; hard links.
    Finish = 5,
    /// The end with the sender's root.
    End = 6,
}

impl PayloadKind {
    /// Whether records of this kind may be applied side by side.
    #[must_use]
    pub fn is_parallel(self) -> bool {
        matches!(self, Self::Files | Self::Segment)
    }

    /// Kind of an opened payload.
    ///
    /// # Errors
    /// Empty or unknown.
    pub fn of(payload: &[u8]) -> Result<Self, Malformed> {
        match payload.first() {
            Some(1) => Ok(Self::Removals),
            Some(2) => Ok(Self::Entries),
            Some(3) => Ok(Self::Files),
            Some(4) => Ok(Self::Segment),
            Some(5) => Ok(Self::Finish),
            Some(6) => Ok(Self::End),
            _ => Err(Malformed("a record is of an unknown kind")),
        }
    }
}

/// In the first byte of a payload: the rest is its length, then an LZ4 block.
const PACKED: u8 = 0x80;
/// Bytes before the LZ4 block of a packed payload.
const PACKED_HEAD: usize = 5;

/// The record with its payload packed, in the memory of `space`.
#[must_use]
pub fn pack(record: &[u8], mut space: Vec<u8>) -> Vec<u8> {
    let (header, payload) = record.split_at(HEADER_LEN);
    let Some((kind, rest)) = payload.split_first() else {
        return record.to_vec();
    };
    let at = HEADER_LEN + PACKED_HEAD;
    space.resize(at + get_maximum_output_size(rest.len()), 0);
    space[..HEADER_LEN].copy_from_slice(header);
    space[HEADER_LEN] = kind | PACKED;
    // Records are far below 4 GiB.
    let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    space[HEADER_LEN + 1..at].copy_from_slice(&length.to_le_bytes());
    // Cannot fail: there is as much room as it may need.
    let packed = compress_into(rest, &mut space[at..]).unwrap_or(usize::MAX);
    space.truncate(at.saturating_add(packed));
    space
}

/// The payload as it was before packing; `space` gives room for it.
///
/// # Errors
/// It promises more than a record can hold, or does not unpack to what it promises.
pub fn unpack<'p>(
    payload: &'p [u8],
    space: impl FnOnce(usize) -> &'p mut [u8],
) -> Result<&'p [u8], Malformed> {
    let Some((first, rest)) = payload
        .split_first()
        .filter(|(first, _)| **first & PACKED != 0)
    else {
        return Ok(payload);
    };
    let mut reader = Reader::new(rest);
    let length = reader.u32()? as usize;
    if length >= BODY_CAP {
        return Err(Malformed(
            "a packed record promises more than a record can hold",
        ));
    }
    let unpacked = space(1 + length);
    unpacked[0] = first & !PACKED;
    match decompress_into(&rest[PACKED_HEAD - 1..], &mut unpacked[1..]) {
        Ok(found) if found == length => Ok(unpacked),
        _ => Err(Malformed(
            "a packed record does not unpack to what it promises",
        )),
    }
}

/// One block as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block<'a> {
    /// All zero.
    Zero,
    /// The receiver's block at this place is right.
    Same,
    /// New bytes and their signature.
    Data(Signature, &'a [u8]),
    /// Pages of a block that is otherwise the receiver's at this place, and the signature of the whole.
    Pages(Signature, Pages, &'a [u8]),
    /// A signature without bytes: the receiver puts the block in its place if it holds one, and tells.
    Offered(Signature),
    /// An offered block that was found and checked; never on the wire.
    Found(Signature, &'a [u8]),
}

impl Block<'_> {
    /// Whether it was offered and not found.
    #[must_use]
    pub fn is_lacking(&self) -> bool {
        matches!(self, Self::Offered(_))
    }
}

/// Bytes of one block's descriptor.
pub const DESCRIPTOR_LEN: usize = 35;

const FLAG_ZERO: u8 = 0;
const FLAG_DATA: u8 = 1;
const FLAG_SAME: u8 = 2;
const FLAG_OFFERED: u8 = 3;
const FLAG_PAGES: u8 = 4;
/// Where the signature stands in a descriptor, after the flag and before the pages.
const SIGNATURE: std::ops::Range<usize> = 1..33;

/// A descriptor of a block in a record.
#[must_use]
pub fn descriptor(block: Block<'_>) -> [u8; DESCRIPTOR_LEN] {
    let mut bytes = [0; DESCRIPTOR_LEN];
    match block {
        Block::Zero => bytes[0] = FLAG_ZERO,
        Block::Same => bytes[0] = FLAG_SAME,
        Block::Data(signature, _) => {
            bytes[0] = FLAG_DATA;
            bytes[SIGNATURE].copy_from_slice(&signature.0);
        }
        Block::Pages(signature, pages, _) => {
            bytes[0] = FLAG_PAGES;
            bytes[SIGNATURE].copy_from_slice(&signature.0);
            bytes[SIGNATURE.end..].copy_from_slice(&pages.to_le_bytes());
        }
        Block::Offered(signature) | Block::Found(signature, _) => {
            bytes[0] = FLAG_OFFERED;
            bytes[SIGNATURE].copy_from_slice(&signature.0);
        }
    }
    bytes
}

/// An item of [`PayloadKind::Entries`].
#[derive(Clone, Debug)]
pub enum EntryItem {
    /// A directory or special file.
    Entry(Entry),
    /// A large file whose segments follow.
    Start {
        /// Its path.
        path: Box<[u8]>,
        /// Its size in bytes when it was found.
        size: u64,
        /// Whether it has no holes, so that its space can be reserved.
        dense: bool,
    },
}

/// A run of blocks of one file.
#[derive(Clone, Debug)]
pub struct Segment<'a> {
    /// The file.
    pub path: Box<[u8]>,
    /// Its size in bytes.
    pub size: u64,
    /// Index of the first block.
    pub first: u64,
    /// The blocks.
    pub blocks: Vec<Block<'a>>,
}

/// A record under construction: place for the header, then the payload.
#[must_use]
pub fn start(mut buffer: Vec<u8>, kind: PayloadKind) -> Vec<u8> {
    buffer.clear();
    buffer.resize(HEADER_LEN, 0);
    buffer.push(kind as u8);
    buffer
}

/// Appends a path to remove.
pub fn put_removal(record: &mut Vec<u8>, path: &[u8]) {
    put_short(record, path);
}

/// Appends a directory or special file.
pub fn put_entry(record: &mut Vec<u8>, entry: &Entry) {
    record.push(0);
    entry.encode(record);
}

/// Appends the start of a large file.
pub fn put_start(record: &mut Vec<u8>, path: &[u8], size: u64, dense: bool) {
    record.push(1);
    put_short(record, path);
    record.extend_from_slice(&size.to_le_bytes());
    record.push(u8::from(dense));
}

/// Small files for one record: the bytes of their blocks, and the entries that say where these go.
#[derive(Debug, Default)]
pub struct SmallFiles {
    data: Vec<u8>,
    entries: Vec<u8>,
}

impl SmallFiles {
    /// Adds a file whose blocks are `blocks`.
    pub fn put(&mut self, entry: &Entry, blocks: &[Block<'_>]) {
        put_file(&mut self.entries, entry, blocks);
        for block in blocks {
            if let Block::Data(_, bytes) = block {
                self.data.extend_from_slice(bytes);
            }
        }
    }

    /// Bytes of a record of them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.data.len() + self.entries.len()
    }

    /// Whether there is no file.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Their record, in the memory of `buffer`.
    #[must_use]
    pub fn record(&self, buffer: Vec<u8>) -> Vec<u8> {
        files(buffer, &self.data, &self.entries)
    }
}

/// Where the data of small files begins in a payload for which it was read in its place.
pub const FILES_DATA: usize = ALIGNMENT;
/// Bytes of that payload before the data, without what fills them up.
const FILES_HEAD: usize = 7;

/// Appends to the entries of small files one whose blocks are `blocks`, without their bytes.
pub fn put_file(entries: &mut Vec<u8>, entry: &Entry, blocks: &[Block<'_>]) {
    entry.encode(entries);
    for block in blocks {
        entries.extend_from_slice(&descriptor(*block));
    }
}

/// A record of small files from the bytes of their blocks, in order, and their entries.
#[must_use]
pub fn files(buffer: Vec<u8>, data: &[u8], entries: &[u8]) -> Vec<u8> {
    let mut record = start(buffer, PayloadKind::Files);
    put_short(&mut record, &[]);
    // Below BODY_CAP.
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    record.extend_from_slice(&length.to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(entries);
    record
}

/// The first [`FILES_DATA`] bytes of the payload of small files with so many bytes of data.
#[must_use]
pub fn files_head(data: usize) -> [u8; FILES_DATA] {
    let mut head = [0; FILES_DATA];
    head[0] = PayloadKind::Files as u8;
    // Both below their types' limits.
    let padding = u16::try_from(FILES_DATA - FILES_HEAD).unwrap_or(0);
    let length = u32::try_from(data).unwrap_or(u32::MAX);
    head[1..3].copy_from_slice(&padding.to_le_bytes());
    head[FILES_DATA - 4..].copy_from_slice(&length.to_le_bytes());
    head
}

/// Appends the head of a segment and room for `count` descriptors and returns where these begin; the
/// data of its blocks follows them, at a multiple of [`ALIGNMENT`] in the payload, so that the target can
/// write it past its page cache.
pub fn put_segment(record: &mut Vec<u8>, path: &[u8], size: u64, first: u64, count: u32) -> usize {
    put_short(record, path);
    record.extend_from_slice(&size.to_le_bytes());
    record.extend_from_slice(&first.to_le_bytes());
    record.extend_from_slice(&count.to_le_bytes());
    let descriptors = count as usize * DESCRIPTOR_LEN;
    let unpadded = record.len() - HEADER_LEN + 2 + descriptors;
    let padding = unpadded.next_multiple_of(ALIGNMENT) - unpadded;
    // Below ALIGNMENT.
    let padding = u16::try_from(padding).unwrap_or(0);
    record.extend_from_slice(&padding.to_le_bytes());
    let at = record.len() + usize::from(padding);
    record.resize(at + descriptors, 0);
    at
}

/// Where the data of an opened segment begins, if the signatures before it vouch for all of it; none for every other
/// payload.
#[must_use]
pub fn data_of_segment(payload: &[u8]) -> Option<usize> {
    let (&kind, rest) = payload.split_first()?;
    if kind != PayloadKind::Segment as u8 {
        return None;
    }
    let mut reader = Reader::new(rest);
    let path = reader.short().ok()?;
    reader.bytes(16).ok()?;
    let count = reader.u32().ok()? as usize;
    let padding = reader.short().ok()?;
    let head = 1 + 2 + path.len() + 16 + 4 + 2 + padding.len();
    let data = head.checked_add(count.checked_mul(DESCRIPTOR_LEN)?)?;
    let descriptors = payload.get(head..data)?.chunks(DESCRIPTOR_LEN);
    // Of a block of which pages travel the rest is elsewhere.
    let whole = descriptors.into_iter().all(|one| one[0] != FLAG_PAGES);
    whole.then_some(data)
}

/// Appends the final metadata of a large file, or a hard link.
pub fn put_finish(record: &mut Vec<u8>, entry: &Entry) {
    entry.encode(record);
}

/// Appends the end of the epoch.
pub fn put_end(record: &mut Vec<u8>, root: Signature, entries: u64) {
    record.extend_from_slice(&root.0);
    record.extend_from_slice(&entries.to_le_bytes());
}

/// An opened payload.
#[derive(Clone, Debug)]
pub enum Payload<'a> {
    /// See [`PayloadKind::Removals`].
    Removals(Vec<Box<[u8]>>),
    /// See [`PayloadKind::Entries`].
    Entries(Vec<EntryItem>),
    /// See [`PayloadKind::Files`].
    Files(Vec<(Entry, Vec<Block<'a>>)>),
    /// See [`PayloadKind::Segment`].
    Segment(Segment<'a>),
    /// See [`PayloadKind::Finish`].
    Finish(Vec<Entry>),
    /// See [`PayloadKind::End`].
    End {
        /// The sender's root.
        root: Signature,
        /// Entries in the sender's tree.
        entries: u64,
    },
}

impl<'a> Payload<'a> {
    /// Decodes an opened payload of a volume with this block size.
    ///
    /// # Errors
    /// [`Malformed`] for anything that breaks the layout.
    pub fn decode(payload: &'a [u8], block_size: BlockSize) -> Result<Self, Malformed> {
        let kind = PayloadKind::of(payload)?;
        let mut reader = Reader::new(&payload[1..]);
        let decoded = match kind {
            PayloadKind::Removals => {
                let mut paths = Vec::new();
                while !reader.is_empty() {
                    let path = checked_path(reader.short()?)?;
                    if path.is_empty() {
                        return Err(Malformed("the volume itself cannot be removed"));
                    }
                    paths.push(path);
                }
                Self::Removals(paths)
            }
            PayloadKind::Entries => {
                let mut items = Vec::new();
                while !reader.is_empty() {
                    items.push(entry_item(&mut reader)?);
                }
                Self::Entries(items)
            }
            PayloadKind::Files => {
                reader.short()?;
                let length = reader.u32()? as usize;
                let mut data = Reader::new(reader.bytes(length)?);
                let mut files = Vec::new();
                while !reader.is_empty() {
                    let entry = Entry::decode(&mut reader)?;
                    let Kind::File { size, .. } = entry.kind else {
                        return Err(Malformed("a small file is not a file"));
                    };
                    let count = block_size.blocks_of(size);
                    let named = descriptors(&mut reader, block_size, size, 0, count)?;
                    let blocks = blocks(named, &mut data, block_size, size, 0)?;
                    if blocks.iter().any(|block| matches!(block, Block::Pages(..))) {
                        return Err(Malformed("a small file comes in pages"));
                    }
                    files.push((entry, blocks));
                }
                if !data.is_empty() {
                    return Err(Malformed("bytes of small files belong to none"));
                }
                Self::Files(files)
            }
            PayloadKind::Segment => {
                let path = checked_path(reader.short()?)?;
                let (size, first) = (reader.u64()?, reader.u64()?);
                let count = u64::from(reader.u32()?);
                reader.short()?;
                let named = descriptors(&mut reader, block_size, size, first, count)?;
                let blocks = blocks(named, &mut reader, block_size, size, first)?;
                // Whoever puts blocks together from pages makes room for all of them.
                let in_pages = blocks
                    .iter()
                    .filter(|block| matches!(block, Block::Pages(..)));
                if in_pages.count() as u64 * block_size.bytes() > DATA_CAP as u64 {
                    return Err(Malformed(
                        "more blocks come in pages than a record may carry",
                    ));
                }
                Self::Segment(Segment {
                    path,
                    size,
                    first,
                    blocks,
                })
            }
            PayloadKind::Finish => {
                let mut entries = Vec::new();
                while !reader.is_empty() {
                    let entry = Entry::decode(&mut reader)?;
                    if !matches!(entry.kind, Kind::File { .. } | Kind::HardLink(_)) {
                        return Err(Malformed("only files and hard links are finished"));
                    }
                    entries.push(entry);
                }
                Self::Finish(entries)
            }
            PayloadKind::End => Self::End {
                root: Signature(reader.array()?),
                entries: reader.u64()?,
            },
        };
        if !reader.is_empty() {
            return Err(Malformed("bytes are left over after a record"));
        }
        // Whoever holds what is offered makes room for all of it.
        let offered = finder::offered(block_size, &decoded);
        if offered.iter().map(|(_, length)| length).sum::<usize>() > DATA_CAP {
            return Err(Malformed("more is offered than a record may carry"));
        }
        Ok(decoded)
    }
}

fn entry_item(reader: &mut Reader<'_>) -> Result<EntryItem, Malformed> {
    match reader.u8()? {
        0 => {
            let entry = Entry::decode(reader)?;
            if matches!(entry.kind, Kind::File { .. } | Kind::HardLink(_)) {
                return Err(Malformed("a file stands among directories"));
            }
            Ok(EntryItem::Entry(entry))
        }
        1 => {
            let path = checked_path(reader.short()?)?;
            let size = reader.u64()?;
            let dense = reader.u8()? != 0;
            if path.is_empty() || size > i64::MAX as u64 {
                return Err(Malformed("a large file has an impossible path or size"));
            }
            Ok(EntryItem::Start { path, size, dense })
        }
        _ => Err(Malformed("an entry item is of an unknown kind")),
    }
}

fn descriptors<'a>(
    reader: &mut Reader<'a>,
    block_size: BlockSize,
    size: u64,
    first: u64,
    count: u64,
) -> Result<&'a [[u8; DESCRIPTOR_LEN]], Malformed> {
    let past = first.checked_add(count);
    if past.is_none_or(|past| past > block_size.blocks_of(size)) {
        return Err(Malformed("a block lies past the end of its file"));
    }
    let bytes = usize::try_from(count)
        .unwrap_or(usize::MAX)
        .saturating_mul(DESCRIPTOR_LEN);
    Ok(reader.bytes(bytes)?.as_chunks().0)
}

/// The blocks that follow each other in a file from `first` on, with their bytes, which come next in `data`.
fn blocks<'a>(
    descriptors: &[[u8; DESCRIPTOR_LEN]],
    data: &mut Reader<'a>,
    block_size: BlockSize,
    size: u64,
    first: u64,
) -> Result<Vec<Block<'a>>, Malformed> {
    let mut blocks = Vec::with_capacity(descriptors.len());
    for (descriptor, index) in descriptors.iter().zip(first..) {
        let (flag, signature) = (descriptor[0], &descriptor[SIGNATURE]);
        let named = || {
            let mut bytes = [0; 32];
            bytes.copy_from_slice(signature);
            Signature(bytes)
        };
        blocks.push(match flag {
            FLAG_ZERO => Block::Zero,
            FLAG_SAME => Block::Same,
            FLAG_DATA => {
                let bytes = data.bytes(block_size.length_of(size, index))?;
                Block::Data(named(), bytes)
            }
            FLAG_PAGES => {
                let [.., low, high] = *descriptor;
                let (changed, length) = (
                    Pages::from_le_bytes([low, high]),
                    block_size.length_of(size, index),
                );
                if changed == 0 || length as u64 != block_size.bytes() {
                    return Err(Malformed("a block has no such pages"));
                }
                let lengths = pages::ranges(changed, length).map(|range| range.len());
                Block::Pages(named(), changed, data.bytes(lengths.sum())?)
            }
            FLAG_OFFERED => Block::Offered(named()),
            _ => return Err(Malformed("a block is of an unknown kind")),
        });
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_any_bytes_never_panics(kind in 0..8_u8, rest in proptest::collection::vec(any::<u8>(), 0..500)) {
            let mut bytes = vec![kind];
            bytes.extend(rest);
            let decoded = Payload::decode(&bytes, BlockSize::default());
            prop_assert!(decoded.is_err() || (1..=6).contains(&kind));
        }
    }

    proptest! {
        #[test]
        fn decoding_changed_small_files_never_panics(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let entry = file(b"a", 70_000);
            let offered = Block::Offered(Signature([9; 32]));
            let mut small = SmallFiles::default();
            small.put(&entry, &[offered, Block::Data(Signature([8; 32]), &[7; 70_000 - 65_536])]);
            let mut payload = small.record(Vec::new())[HEADER_LEN..].to_vec();
            prop_assert!(Payload::decode(&payload, BlockSize::default()).is_ok());
            for (place, byte) in changes {
                let place = place.index(payload.len());
                payload[place] = byte;
            }
            let _ = Payload::decode(&payload, BlockSize::default());
        }
    }

    proptest! {
        #[test]
        fn unpacking_any_bytes_never_panics_nor_takes_more_than_a_record(
            kind in 0x80..0x88_u8,
            length in prop_oneof![0..2000_u32, any::<u32>()],
            rest in proptest::collection::vec(any::<u8>(), 0..500),
        ) {
            let mut bytes = vec![kind];
            bytes.extend(length.to_le_bytes());
            bytes.extend(rest);
            let mut space = Vec::new();
            let unpacked = unpack(&bytes, |asked| {
                assert!(asked <= BODY_CAP);
                space.resize(asked, 0);
                &mut space
            });
            if let Ok(unpacked) = unpacked {
                prop_assert_eq!(unpacked.len(), 1 + length as usize);
                prop_assert_eq!(unpacked[0] & PACKED, 0);
            }
        }
    }

    fn file(path: &[u8], length: u64) -> Entry {
        Entry {
            path: path.into(),
            mode: 0o640,
            uid: 1,
            gid: 2,
            mtime: crate::volume::Timestamp::default(),
            xattrs: Vec::new(),
            kind: Kind::File {
                size: length,
                blocks: Vec::new(),
            },
            seen: crate::volume::tree::Seen::default(),
        }
    }

    #[test]
    fn offers_of_more_than_a_record_may_carry_are_refused() {
        let size = BlockSize::default();
        let blocks = DATA_CAP as u64 / size.bytes();
        for (count, holds) in [(blocks, true), (blocks + 1, false)] {
            let offered = vec![Block::Offered(Signature([9; 32])); count as usize];
            let mut small = SmallFiles::default();
            small.put(&file(b"a", count * size.bytes()), &offered);
            let record = small.record(Vec::new());
            assert_eq!(Payload::decode(&record[HEADER_LEN..], size).is_ok(), holds);
        }
    }

    #[test]
    fn small_files_come_back_as_they_were_put_with_their_data_in_place_or_not() {
        let size = BlockSize::default();
        let signature = Signature([9; 32]);
        let long = vec![7; 65_536];
        let files = [
            (file(b"a", 3), vec![Block::Data(signature, b"abc")]),
            (file(b"b", 0), vec![]),
            (
                file(b"c", 65_540),
                vec![Block::Data(signature, &long), Block::Same],
            ),
        ];
        let mut small = SmallFiles::default();
        for (entry, blocks) in &files {
            small.put(entry, blocks);
        }
        let apart = small.record(vec![1; 10]);
        let mut placed = vec![0; HEADER_LEN];
        placed.extend(files_head(small.data.len()));
        placed.extend(small.data.iter().chain(&small.entries));
        for record in [&apart, &placed] {
            let payload = &record[HEADER_LEN..];
            let Payload::Files(found) = Payload::decode(payload, size).unwrap() else {
                panic!("not small files");
            };
            for ((entry, blocks), (put, expected)) in found.iter().zip(&files) {
                assert_eq!((&entry.path, entry.size()), (&put.path, put.size()));
                assert_eq!(blocks, expected);
            }
            assert_eq!(found.len(), files.len());
            for cut in [1, 40, payload.len() - 5] {
                assert!(Payload::decode(&payload[..payload.len() - cut], size).is_err());
            }
        }
        let stray = super::files(Vec::new(), b"stray", &small.entries[..0]);
        assert!(Payload::decode(&stray[HEADER_LEN..], size).is_err());
    }

    #[test]
    fn a_segment_comes_back_as_it_was_put() {
        let size = 3 * 65_536 + 10;
        let data = vec![7; 10];
        let signature = Signature([9; 32]);
        let mut record = start(Vec::new(), PayloadKind::Segment);
        let at = put_segment(&mut record, b"dir/file", size, 2, 2);
        record[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor(Block::Zero));
        record[at + DESCRIPTOR_LEN..at + 2 * DESCRIPTOR_LEN]
            .copy_from_slice(&descriptor(Block::Data(signature, &data)));
        record.extend_from_slice(&data);
        let payload = Payload::decode(&record[HEADER_LEN..], BlockSize::default()).unwrap();
        let Payload::Segment(segment) = payload else {
            panic!("not a segment");
        };
        assert_eq!(&*segment.path, b"dir/file");
        assert_eq!((segment.size, segment.first), (size, 2));
        let offset = record.len() - data.len() - HEADER_LEN;
        assert_eq!(offset % ALIGNMENT, 0, "the data is aligned");
        assert_eq!(segment.blocks, [Block::Zero, Block::Data(signature, &data)]);
    }

    /// A segment of a file of so many blocks, all of which come in these pages.
    fn in_pages(changed: Pages, blocks: u32, size: u64) -> Vec<u8> {
        let mut record = start(Vec::new(), PayloadKind::Segment);
        let at = put_segment(&mut record, b"table", size, 0, blocks);
        let page = vec![7; 4096 * changed.count_ones() as usize];
        for at in (at..).step_by(DESCRIPTOR_LEN).take(blocks as usize) {
            let named = descriptor(Block::Pages(Signature([9; 32]), changed, &page));
            record[at..at + DESCRIPTOR_LEN].copy_from_slice(&named);
            record.extend_from_slice(&page);
        }
        record
    }

    #[test]
    fn blocks_come_back_in_their_pages() {
        let record = in_pages(0b1001, 2, 2 << 16);
        let payload = &record[HEADER_LEN..];
        let Ok(Payload::Segment(segment)) = Payload::decode(payload, BlockSize::default()) else {
            panic!("not a segment");
        };
        let block = Block::Pages(Signature([9; 32]), 0b1001, &[7; 8192]);
        assert_eq!(segment.blocks, [block, block]);
        assert_eq!(
            data_of_segment(payload),
            None,
            "their signatures do not vouch for their pages"
        );
    }

    #[test]
    fn pages_of_a_short_block_of_none_and_of_more_than_a_record_may_carry_are_refused() {
        for (changed, blocks, size, holds) in [
            (1, 16, 16 << 16, true),
            (1, 17, 17 << 16, false),
            (0, 1, 1 << 16, false),
            (1, 1, (1 << 16) - 1, false),
        ] {
            let record = in_pages(changed, blocks, size);
            let decoded = Payload::decode(&record[HEADER_LEN..], BlockSize::default());
            assert_eq!(decoded.is_ok(), holds, "{changed} {blocks} {size}");
        }
        let mut small = SmallFiles::default();
        let block = Block::Pages(Signature([9; 32]), 1, &[7; 4096]);
        small.put(&file(b"a", 1 << 16), &[block]);
        small.data.extend([7; 4096]);
        let record = small.record(Vec::new());
        assert!(Payload::decode(&record[HEADER_LEN..], BlockSize::default()).is_err());
    }

    #[test]
    fn blocks_past_the_end_of_a_file_are_refused() {
        let mut record = start(Vec::new(), PayloadKind::Segment);
        put_segment(&mut record, b"f", 65_536, u64::MAX, 2);
        assert!(Payload::decode(&record[HEADER_LEN..], BlockSize::default()).is_err());
        let mut record = start(Vec::new(), PayloadKind::Segment);
        put_segment(&mut record, b"f", 65_536, 1, 1);
        assert!(Payload::decode(&record[HEADER_LEN..], BlockSize::default()).is_err());
    }
}
