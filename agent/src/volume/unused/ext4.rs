//! ext2, ext3 and ext4: a bitmap for each group of blocks (Documentation/filesystems/ext4 of Linux, `ext4.h`).
//!
//! A group whose checksums or counts disagree counts as used.

use super::{Doubt, Image, Map, Trust, crc32c, number};
use std::ops::Range;

const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xef53;

/// Features under which the bitmaps lie and mean what is read here: file types, extents, 64 bits, multiple mount
/// protection, flexible groups, groups of descriptors, attributes in inodes, checksum seed, large directories,
/// inline data, encryption, case folding; and a journal to be replayed, which is looked at by itself.
const INCOMPAT_KNOWN: u32 = 0x2
    | 0x4
    | 0x10
    | 0x40
    | 0x80
    | 0x100
    | 0x200
    | 0x400
    | 0x2000
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const RO_SPARSE_SUPER: u32 = 0x1;
const RO_GDT_CSUM: u32 = 0x10;
const RO_BIGALLOC: u32 = 0x200;
const RO_METADATA_CSUM: u32 = 0x400;
/// Features that a newer kernel could add must not change where free blocks are told: the known ones, up to orphan
/// files.
const RO_KNOWN: u32 = 0x1_f7ff;
/// `s_state`: unmounted cleanly; errors were found.
const STATE_VALID: u16 = 1;
const STATE_ERROR: u16 = 2;
/// A group's bitmap was never written: only metadata is in use.
const BLOCK_UNINIT: u16 = 2;
/// Groups of an image of 512 TiB.
const GROUPS_CAP: u64 = 1 << 22;

struct Layout {
    block: u64,
    blocks: u64,
    first: u64,
    per_group: u64,
    groups: u64,
    inode_table: u64,
    descriptor: u64,
    reserved: u64,
    first_meta: Option<u64>,
    sparse: Sparse,
    uninit: bool,
    /// Seed of checksums, where the file system has them.
    seed: Option<u32>,
}

enum Sparse {
    All,
    Powers,
    Named([u64; 2]),
}

/// Marks in `map` what is unused; false when this is no such file system.
pub(super) fn read(image: &mut dyn Image, map: &mut Map, trust: Trust) -> Result<bool, Doubt> {
    if image.size() < 2 * SUPERBLOCK {
        return Ok(false);
    }
    let mut head = [0; 2 * SUPERBLOCK as usize];
    image.read(&mut head, 0)?;
    let (boot, sb) = head.split_at(SUPERBLOCK as usize);
    if u16_at(sb, 0x38) != MAGIC {
        return Ok(false);
    }
    if boot[510..512] == [0x55, 0xaa] {
        return Err(Doubt::BootSector);
    }
    let layout = layout(sb, image.size())?;
    let (compat, incompat, state) = (u32_at(sb, 0x5c), u32_at(sb, 0x60), u16_at(sb, 0x3a));
    if state & STATE_ERROR != 0 {
        return Err(Doubt::Damaged(
            "something: the file system has noted errors and",
        ));
    }
    let has_journal = compat & COMPAT_HAS_JOURNAL != 0;
    if trust == Trust::Unmounted
        && (incompat & INCOMPAT_RECOVER != 0 || !has_journal && state & STATE_VALID == 0)
    {
        return Err(Doubt::Journal);
    }
    groups(image, map, &layout, trust)?;
    Ok(true)
}

fn layout(sb: &[u8], size: u64) -> Result<Layout, Doubt> {
    let (compat, incompat, ro) = (u32_at(sb, 0x5c), u32_at(sb, 0x60), u32_at(sb, 0x64));
    let unknown = incompat & !INCOMPAT_KNOWN;
    if unknown != 0 {
        return Err(Doubt::Feature(format!(
            "incompatible features {unknown:#x}"
        )));
    }
    if ro & RO_BIGALLOC != 0 {
        return Err(Doubt::Feature("clusters (bigalloc)".into()));
    }
    if ro & !RO_KNOWN != 0 {
        return Err(Doubt::Feature(format!("features {:#x}", ro & !RO_KNOWN)));
    }
    let seed = match (
        ro & RO_METADATA_CSUM != 0,
        incompat & INCOMPAT_CSUM_SEED != 0,
    ) {
        (false, _) => None,
        (true, true) => Some(u32_at(sb, 0x270)),
        (true, false) => Some(crc32c(!0, &sb[0x68..0x78])),
    };
    if seed.is_some() && crc32c(!0, &sb[..0x3fc]) != u32_at(sb, 0x3fc) {
        return Err(Doubt::Damaged("the checksum of its superblock"));
    }
    let damaged = Err(Doubt::Damaged("its superblock"));
    let (block_log, per_group) = (u32_at(sb, 0x18), u64::from(u32_at(sb, 0x20)));
    if block_log > 6 {
        return damaged;
    }
    let block = 1024_u64 << block_log;
    let wide = incompat & INCOMPAT_64BIT != 0;
    let high = if wide { u32_at(sb, 0x150) } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(u32_at(sb, 0x4));
    let first = u64::from(u32_at(sb, 0x14));
    let descriptor = if wide { u16_at(sb, 0xfe) } else { 32 };
    let inode_size = if u32_at(sb, 0x4c) == 0 {
        128
    } else {
        u16_at(sb, 0x58)
    };
    let inodes = u64::from(u32_at(sb, 0x28));
    let is_possible = blocks.checked_mul(block).is_some_and(|bytes| bytes <= size)
        && first == u64::from(block == 1024)
        && blocks > first
        && (256..=8 * block).contains(&per_group)
        && per_group.is_multiple_of(8)
        && (32..=block as u16).contains(&descriptor)
        && descriptor.is_power_of_two()
        && (!wide || descriptor >= 64)
        && inodes <= 8 * block;
    let groups = (blocks.saturating_sub(first)).div_ceil(per_group.max(1));
    if !is_possible || groups > GROUPS_CAP {
        return damaged;
    }
    Ok(Layout {
        block,
        blocks,
        first,
        per_group,
        groups,
        inode_table: (inodes * u64::from(inode_size)).div_ceil(block),
        descriptor: u64::from(descriptor),
        reserved: u64::from(u16_at(sb, 0xce)),
        first_meta: (incompat & INCOMPAT_META_BG != 0).then(|| u64::from(u32_at(sb, 0x104))),
        sparse: if compat & COMPAT_SPARSE_SUPER2 != 0 {
            Sparse::Named([0x24c, 0x250].map(|at| u64::from(u32_at(sb, at))))
        } else if ro & RO_SPARSE_SUPER != 0 {
            Sparse::Powers
        } else {
            Sparse::All
        },
        uninit: ro & (RO_GDT_CSUM | RO_METADATA_CSUM) != 0,
        seed,
    })
}

/// Goes through the groups. Metadata is kept in the end wherever it lies: a group that was never written has no
/// bitmap that tells of it.
fn groups(
    image: &mut dyn Image,
    map: &mut Map,
    layout: &Layout,
    trust: Trust,
) -> Result<(), Doubt> {
    let mut bitmap = vec![0; layout.block as usize];
    let mut descriptor = vec![0; layout.descriptor as usize];
    let mut metadata: Vec<Range<u64>> = Vec::new();
    let mut free: Range<u64> = 0..0;
    for group in 0..layout.groups {
        image.read(&mut descriptor, layout.descriptor_at(group))?;
        let blocks = layout.blocks_of(group);
        let places = layout.places(&descriptor);
        if places.iter().any(|place| place.end > layout.blocks) {
            return Err(Doubt::Damaged("the descriptor of a group"));
        }
        for place in &places {
            match metadata.last_mut() {
                Some(last) if last.end == place.start => last.end = place.end,
                _ => metadata.push(place.clone()),
            }
        }
        let [bitmap_at, ..] = places;
        let never_written = layout.uninit && u16_at(&descriptor, 0x12) & BLOCK_UNINIT != 0;
        if trust != Trust::Hint && !layout.is_sound(group, &descriptor) {
            continue;
        }
        if never_written {
            metadata.push(layout.base(group));
            extend(map, layout, &mut free, blocks);
            continue;
        }
        image.read(&mut bitmap, bitmap_at.start * layout.block)?;
        let count = blocks.end - blocks.start;
        if trust != Trust::Hint && !layout.agrees(&descriptor, &bitmap, count) {
            continue;
        }
        let is_used = |at: u64| bitmap[(at / 8) as usize] >> (at % 8) & 1 == 1;
        let mut at = 0;
        while at < count {
            if is_used(at) {
                at += 1;
                continue;
            }
            let start = at;
            while at < count && !is_used(at) {
                at += 1;
            }
            extend(
                map,
                layout,
                &mut free,
                blocks.start + start..blocks.start + at,
            );
        }
    }
    extend(map, layout, &mut free, 0..0);
    for range in metadata {
        map.keep(&(range.start * layout.block..range.end * layout.block));
    }
    Ok(())
}

/// Adds a run of free blocks to the one before it, which is released when they do not touch.
fn extend(map: &mut Map, layout: &Layout, free: &mut Range<u64>, run: Range<u64>) {
    if free.end == run.start && run.start > 0 {
        free.end = run.end;
        return;
    }
    map.release(&(free.start * layout.block..free.end * layout.block));
    *free = run;
}

impl Layout {
    fn blocks_of(&self, group: u64) -> Range<u64> {
        let start = self.first + group * self.per_group;
        start..(start + self.per_group).min(self.blocks)
    }

    fn has_super(&self, group: u64) -> bool {
        let is_power = |of: u64| {
            let mut power = of;
            while power < group {
                power *= of;
            }
            power == group
        };
        group == 0
            || match &self.sparse {
                Sparse::All => true,
                Sparse::Powers => group == 1 || [3, 5, 7].into_iter().any(is_power),
                Sparse::Named(groups) => groups.contains(&group),
            }
    }

    /// Offset of a group's descriptor (`descriptor_loc` of fs/ext4/super.c).
    fn descriptor_at(&self, group: u64) -> u64 {
        let per_block = self.block / self.descriptor;
        let number = group / per_block;
        let block = match self.first_meta {
            Some(first) if number >= first => {
                let home = per_block * number;
                self.blocks_of(home).start + u64::from(self.has_super(home))
            }
            _ => self.first + 1 + number,
        };
        block * self.block + group % per_block * self.descriptor
    }

    /// Where a group's bitmaps and its table of inodes lie, in blocks; its own bitmap first.
    fn places(&self, descriptor: &[u8]) -> [Range<u64>; 3] {
        let wide = descriptor.len() >= 64;
        let place = |low: usize, high: usize, length: u64| {
            let high = if wide { u32_at(descriptor, high) } else { 0 };
            let start = u64::from(high) << 32 | u64::from(u32_at(descriptor, low));
            start..start.saturating_add(length)
        };
        [
            place(0x0, 0x20, 1),
            place(0x4, 0x24, 1),
            place(0x8, 0x28, self.inode_table),
        ]
    }

    /// Copies of superblock and descriptors at the beginning of a group.
    fn base(&self, group: u64) -> Range<u64> {
        let start = self.blocks_of(group).start;
        let length = match (self.first_meta, self.has_super(group)) {
            // One copy of its descriptors is in the first, second and last group of a group of groups.
            (Some(_), _) => 2 + self.reserved,
            (None, true) => {
                1 + (self.groups * self.descriptor).div_ceil(self.block) + self.reserved
            }
            (None, false) => 0,
        };
        start..start + length
    }

    /// Whether a group's descriptor has its checksum.
    fn is_sound(&self, group: u64, descriptor: &[u8]) -> bool {
        let Some(seed) = self.seed else {
            return true;
        };
        // Groups are numbered with 32 bits, and there are fewer.
        let crc = crc32c(seed, &(group as u32).to_le_bytes());
        let crc = crc32c(crc, &descriptor[..0x1e]);
        let crc = crc32c(crc32c(crc, &[0; 2]), &descriptor[0x20..]);
        crc as u16 == u16_at(descriptor, 0x1e)
    }

    /// Whether a bitmap has its checksum and as many free blocks as the descriptor counts.
    fn agrees(&self, descriptor: &[u8], bitmap: &[u8], count: u64) -> bool {
        let wide = descriptor.len() >= 64;
        let pair = |low: usize, high: usize| {
            let high = if wide { u16_at(descriptor, high) } else { 0 };
            u32::from(high) << 16 | u32::from(u16_at(descriptor, low))
        };
        let sum = self.seed.is_none_or(|seed| {
            let crc = crc32c(seed, &bitmap[..(self.per_group / 8) as usize]);
            pair(0x18, 0x38) == if wide { crc } else { crc & 0xffff }
        });
        let used = |at: u64| u64::from(bitmap[(at / 8) as usize] >> (at % 8) & 1);
        sum && count - (0..count).map(used).sum::<u64>() == u64::from(pair(0xc, 0x2c))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(number(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(number(bytes, at))
}
