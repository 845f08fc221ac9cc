//! XFS: a tree of free extents, by their first block, in each allocation group (`xfs_format.h`, `xfs_log_format.h`).
//!
//! A group whose tree does not hold together counts as used. Blocks kept for the tree itself are in none of its
//! extents, and so count as used too.

use super::{Doubt, Image, Map, Trust, crc32c, number};
use std::ops::Range;

/// Features that leave the trees where they are: file types, sparse inodes, other UUID for metadata, large times,
/// large counts of extents, exchange of ranges, parent pointers.
const INCOMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80;
const INCOMPAT_META_UUID: u32 = 0x4;
/// Trees of inodes, reverse mappings, shared extents, counts of inodes.
const RO_KNOWN: u32 = 0xf;
const GROUPS_CAP: u32 = 1 << 20;
/// `XFS_BTREE_MAXLEVELS`.
const LEVELS_CAP: u32 = 9;
/// `NULLAGBLOCK`.
const NONE: u32 = !0;
/// The log is counted in sectors of 512 bytes, whatever the disk's are.
const SECTOR: u64 = 512;
const RECORD: u32 = 0xfeed_babe;
/// `XLOG_UNMOUNT_TRANS`.
const UNMOUNT: u8 = 0x20;
/// Sectors of the longest record of a log: 256 KiB and its headers.
const RECORD_CAP: u64 = 512 + 8;

struct Layout {
    block: u64,
    sector: u64,
    blocks: u64,
    group_blocks: u64,
    groups: u32,
    /// Version 5: everything has a checksum and this UUID.
    uuid: Option<[u8; 16]>,
}

/// Marks in `map` what is unused; false when this is no such file system.
pub(super) fn read(image: &mut dyn Image, map: &mut Map, trust: Trust) -> Result<bool, Doubt> {
    if image.size() < SECTOR {
        return Ok(false);
    }
    let mut sb = vec![0; SECTOR as usize];
    image.read(&mut sb, 0)?;
    if &sb[..4] != b"XFSB" {
        return Ok(false);
    }
    let layout = layout(image, &mut sb)?;
    if trust == Trust::Unmounted {
        clean(image, &sb, &layout)?;
    }
    for group in 0..layout.groups {
        let Some(free) = free_of(image, &layout, group, map.block_size.bytes(), trust)? else {
            continue;
        };
        let start = u64::from(group) * layout.group_blocks;
        for run in free {
            map.release(&((start + run.start) * layout.block..(start + run.end) * layout.block));
        }
    }
    Ok(true)
}

fn layout(image: &mut dyn Image, sb: &mut Vec<u8>) -> Result<Layout, Doubt> {
    let damaged = Err(Doubt::Damaged("its superblock"));
    let version = u16_at(sb, 100) & 0xf;
    let sector = u64::from(u16_at(sb, 102));
    if !sector.is_power_of_two() || !(512..=32 << 10).contains(&sector) || sector > image.size() {
        return damaged;
    }
    sb.resize(sector as usize, 0);
    image.read(sb, 0)?;
    let uuid = match version {
        4 => None,
        5 => {
            let (ro, incompat) = (u32_at(sb, 212), u32_at(sb, 216));
            let (ro_unknown, unknown) = (ro & !RO_KNOWN, incompat & !INCOMPAT_KNOWN);
            if unknown != 0 || ro_unknown != 0 {
                let which = format!("features {ro_unknown:#x} and {unknown:#x}");
                return Err(Doubt::Feature(which));
            }
            if !has_checksum(sb, 224) {
                return Err(Doubt::Damaged("the checksum of its superblock"));
            }
            let at = if incompat & INCOMPAT_META_UUID != 0 {
                248
            } else {
                32
            };
            Some(number(sb, at))
        }
        other => return Err(Doubt::Feature(format!("version {other}"))),
    };
    let (block, blocks) = (u64::from(u32_at(sb, 4)), u64_at(sb, 8));
    let (group_blocks, groups) = (u64::from(u32_at(sb, 84)), u32_at(sb, 88));
    let is_possible = block.is_power_of_two()
        && (512..=64 << 10).contains(&block)
        && blocks.checked_mul(block).is_some_and(|bytes| bytes <= image.size())
        && group_blocks >= 64
        && (1..=GROUPS_CAP).contains(&groups)
        && blocks > u64::from(groups - 1) * group_blocks
        && blocks <= u64::from(groups) * group_blocks
        && group_blocks * block >= 4 * sector
        // Being made, or grown.
        && sb[126] == 0;
    if !is_possible {
        return damaged;
    }
    Ok(Layout {
        block,
        sector,
        blocks,
        group_blocks,
        groups,
        uuid,
    })
}

/// The free extents of a group that hold at least one whole block of `least` bytes; none when its tree does not
/// hold together. Those of one whose count may lag behind are a hint.
fn free_of(
    image: &mut dyn Image,
    layout: &Layout,
    group: u32,
    least: u64,
    trust: Trust,
) -> Result<Option<Vec<Range<u64>>>, Doubt> {
    let first = u64::from(group) * layout.group_blocks;
    let mut head = vec![0; layout.sector as usize];
    image.read(&mut head, first * layout.block + layout.sector)?;
    let (length, root, levels) = (u32_at(&head, 12), u32_at(&head, 16), u32_at(&head, 28));
    let is_sound = &head[..4] == b"XAGF"
        && u32_at(&head, 4) == 1
        && u32_at(&head, 8) == group
        && u64::from(length) == layout.group_blocks.min(layout.blocks - first)
        && (1..=LEVELS_CAP).contains(&levels)
        && layout
            .uuid
            .is_none_or(|uuid| head[64..80] == uuid && has_checksum(&head, 216));
    if !is_sound {
        return Ok(None);
    }
    let mut block = vec![0; layout.block as usize];
    let mut at = root;
    for level in (1..levels).rev() {
        let Some((header, count)) = read_node(image, layout, group, at, level, length, &mut block)?
        else {
            return Ok(None);
        };
        // Behind as many keys as there can be: a key has 8 bytes, a pointer 4.
        let most = (block.len() - header) / 12;
        if count == 0 || count > most {
            return Ok(None);
        }
        at = u32_at(&block, header + most * 8);
    }
    let (mut free, mut total, mut last) = (Vec::new(), 0_u64, 0_u64);
    // Extents come in order, so that no leaf comes twice.
    loop {
        let Some((header, count)) = read_node(image, layout, group, at, 0, length, &mut block)?
        else {
            return Ok(None);
        };
        if count == 0 || count > (block.len() - header) / 8 {
            // A tree without extents is one leaf without records.
            let is_empty = count == 0 && total == 0 && u32_at(&block, 12) == NONE;
            return Ok((is_empty && u32_at(&head, 52) == 0).then_some(free));
        }
        for record in block[header..].chunks_exact(8).take(count) {
            let start = u64::from(u32_at(record, 0));
            let end = start + u64::from(u32_at(record, 4));
            if start < last || end <= start || end > u64::from(length) {
                return Ok(None);
            }
            last = end;
            total += end - start;
            if (end - start) * layout.block >= least {
                free.push(start..end);
            }
        }
        at = u32_at(&block, 12);
        if at == NONE {
            break;
        }
    }
    let agrees = trust == Trust::Hint || total == u64::from(u32_at(&head, 52));
    Ok(agrees.then_some(free))
}

/// Reads a block of a group's tree; the length of its header and its number of records, none when it is not what it
/// should be.
fn read_node(
    image: &mut dyn Image,
    layout: &Layout,
    group: u32,
    at: u32,
    level: u32,
    length: u32,
    block: &mut [u8],
) -> Result<Option<(usize, usize)>, Doubt> {
    if at >= length {
        return Ok(None);
    }
    let place = (u64::from(group) * layout.group_blocks + u64::from(at)) * layout.block;
    image.read(block, place)?;
    let (magic, header) = match layout.uuid {
        None => (b"ABTB", 16),
        Some(_) => (b"AB3B", 56),
    };
    let is_sound = &block[..4] == magic
        && u32::from(u16_at(block, 4)) == level
        && layout.uuid.is_none_or(|uuid| {
            u64_at(block, 16) == place / SECTOR
                && block[32..48] == uuid
                && u32_at(block, 48) == group
                && has_checksum(block, 52)
        });
    Ok(is_sound.then(|| (header, usize::from(u16_at(block, 6)))))
}

/// Whether the log ends with the record of an unmount: then nothing is to be replayed. As `xlog_find_tail` of
/// fs/xfs/xfs_log_recover.c does it; where records wrap around the end of the log it is not looked at closer.
fn clean(image: &mut dyn Image, sb: &[u8], layout: &Layout) -> Result<(), Doubt> {
    let (start, group_log) = (u64_at(sb, 48), u32::from(sb[124]));
    let sectors = u64::from(u32_at(sb, 96)) * layout.block / SECTOR;
    if start == 0 {
        return Err(Doubt::ExternalJournal);
    }
    if group_log >= 32 || sectors == 0 || start >> group_log >= u64::from(layout.groups) {
        return Err(Doubt::Damaged("its superblock"));
    }
    let start = (start >> group_log) * layout.group_blocks + (start & ((1 << group_log) - 1));
    let is_within =
        start < layout.blocks && sectors * SECTOR <= (layout.blocks - start) * layout.block;
    if !is_within {
        return Err(Doubt::Damaged("its superblock"));
    }
    let mut sector = [0; SECTOR as usize];
    let mut read = |at: u64| -> Result<[u8; SECTOR as usize], Doubt> {
        image.read(&mut sector, start * layout.block + at * SECTOR)?;
        Ok(sector)
    };
    let mut cycle = |at: u64| -> Result<u32, Doubt> {
        let sector = read(at)?;
        let is_head = u32_at(&sector, 0) == RECORD;
        Ok(u32_at(&sector, if is_head { 4 } else { 0 }))
    };
    // Each turn through the log stamps its sectors with a higher number than the one before.
    let current = cycle(0)?;
    let (mut written, mut head) = (0, sectors);
    while written + 1 < head {
        let middle = written + (head - written) / 2;
        if cycle(middle)? == current {
            written = middle;
        } else {
            head = middle;
        }
    }
    for at in (head.saturating_sub(RECORD_CAP)..head).rev() {
        let record = read(at)?;
        if u32_at(&record, 0) != RECORD {
            continue;
        }
        let (length, size) = (
            u64::from(u32_at(&record, 12)),
            u64::from(u32_at(&record, 320)),
        );
        let heads = if u32_at(&record, 8) & 2 != 0 {
            size.div_ceil(32 << 10).max(1)
        } else {
            1
        };
        let ends = at + heads + length / SECTOR == head && length.is_multiple_of(SECTOR);
        let is_last = current != 0
            && ends
            && u32_at(&record, 4) == current
            && u32_at(&record, 40) == 1
            && record[304..320] == sb[32..48];
        if is_last && read(at + heads)?[9] & UNMOUNT != 0 {
            return Ok(());
        }
        break;
    }
    Err(Doubt::Journal)
}

/// Whether the little-endian CRC-32C at `at` is that of all else.
fn has_checksum(bytes: &[u8], at: usize) -> bool {
    let crc = crc32c(crc32c(!0, &bytes[..at]), &[0; 4]);
    !crc32c(crc, &bytes[at + 4..]) == u32::from_le_bytes(number(bytes, at))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(number(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(number(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(number(bytes, at))
}
