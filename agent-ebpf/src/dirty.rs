//! Dirty extents of one watched block device, as a bitmap that swaps by epochs.
//!
//! Invariants: what is written, zeroed or discarded is marked before the device sees it and once more when
//! it is done, so that a write under way while the epochs swap is in the new one too. What cannot be told
//! (a write seen only at its end, a command that is only passed through) marks the whole device. Bios are
//! seen where they enter a device and where a stacked one hands them down.

use crate::kernel::{Object, fetch_or, layout, load, lost, set_by_agent};
use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{SECTOR_SHIFT, Watched, Writing, loss, op, watch_state};

/// Replaced by the agent before loading, and which map sizes go with it.
#[unsafe(no_mangle)]
static WATCHED: Watched = Watched {
    first_sector: 0,
    sectors: 0,
    device: 0,
    granule_shift: 0,
    words: 0,
    takes_requests: 0,
};

/// Both epochs' bitmaps, one after the other.
#[map]
static DIRTY: Array<u64> = Array::with_max_entries(2, BPF_F_MMAPABLE);

/// What [`watch_state`] names.
#[map]
static STATE: Array<u64> = Array::with_max_entries(watch_state::COUNT, BPF_F_MMAPABLE);

/// Writes between their beginning and their end, by the address of the bio.
#[map]
static WRITING: HashMap<u64, Writing> = HashMap::with_max_entries(16_384, 0);

/// REQ_OP_MASK
const OP_MASK: u32 = 0xff;

/// Words that one bio can touch: its size is a 32-bit number, and a granule is at least 64 KiB.
const MOST_WORDS: u32 = (1 << (32 - 16)) / 64 + 1;

macro_rules! watched {
    ($field:ident) => {
        set_by_agent(&WATCHED.$field)
    };
}

#[btf_tracepoint(function = "block_bio_queue")]
pub fn block_bio_queue(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's argument is a bio.
    unsafe { begin(ctx.arg(0)) }
}

/// A stacked device hands a bio down: the same one, or its copy.
#[btf_tracepoint(function = "block_bio_remap")]
pub fn block_bio_remap(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's arguments are (bio, …).
    unsafe { begin(ctx.arg(0)) }
}

/// # Safety
/// `bio` must be a bio of a tracepoint.
#[inline(always)]
unsafe fn begin(bio: Object) -> i32 {
    // SAFETY: `bio` is the tracepoint's bio.
    unsafe {
        if !changes(bio) || !is_watched(bio) {
            return 0;
        }
        let writing = Writing {
            sector: load(bio, layout!(bio_sector)),
            bytes: u64::from(load::<u32>(bio, layout!(bio_size))),
        };
        // Without room its end is that of an unknown write, which marks everything.
        if watched!(takes_requests) == 0 && WRITING.insert(&(bio as u64), &writing, 0).is_err() {
            lost(loss::WRITING);
        }
        mark(&writing);
    }
    0
}

/// The end of a bio that is no part of a request; the end of a request is traced instead of its bios'.
#[btf_tracepoint(function = "block_bio_complete")]
pub fn block_bio_complete(ctx: BtfTracePointContext) -> i32 {
    let bio: Object = ctx.arg(1);
    // SAFETY: the tracepoint's arguments are (queue, bio); the value is copied before it is removed.
    unsafe {
        if watched!(takes_requests) != 0 || !changes(bio) {
            return 0;
        }
        let key = bio as u64;
        if let Some(writing) = WRITING.get(&key) {
            let writing = *writing;
            let _ = WRITING.remove(&key);
            mark(&writing);
            return 0;
        }
        // A part that the kernel split off ends before its whole, which is known.
        let whole: u64 = load(bio, layout!(bio_private));
        if is_watched(bio) && WRITING.get(&whole).is_none() {
            mark_everything();
        }
    }
    0
}

/// The end of a request, or of a part of it.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn watched_rq_complete(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's arguments are (request, error, bytes).
    unsafe {
        let request: Object = ctx.arg(0);
        let flags: u32 = load(request, layout!(request_cmd_flags));
        if watched!(takes_requests) == 0
            || matches!(flags & OP_MASK, op::READ | op::FLUSH)
            || !is_watched_disk(disk_of(request))
        {
            return 0;
        }
        let bio: Object = load(request, layout!(request_bio));
        if flags & OP_MASK == op::DISCARD && !bio.is_null() {
            let next: Object = load(bio, layout!(bio_next));
            // Merged discards need not touch each other.
            if !next.is_null() {
                mark_everything();
                return 0;
            }
        }
        let bytes: u32 = ctx.arg(2);
        mark(&Writing {
            sector: load(request, layout!(request_sector)),
            bytes: u64::from(bytes),
        });
    }
    0
}

/// Commands that the block layer only passes through may write anywhere.
#[btf_tracepoint(function = "block_rq_issue")]
pub fn watched_rq_issue(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's argument is a request.
    unsafe {
        let request: Object = ctx.arg(0);
        let flags: u32 = load(request, layout!(request_cmd_flags));
        // The direction is the lowest bit.
        if flags & OP_MASK >= op::PASSTHROUGH && flags & 1 != 0 {
            if is_watched_disk(disk_of(request)) {
                mark_everything();
            }
        }
    }
    0
}

/// Whether a bio is neither a read nor a mere flush.
///
/// # Safety
/// `bio` must be a bio of a tracepoint.
#[inline(always)]
unsafe fn changes(bio: Object) -> bool {
    // SAFETY: `bio` is a tracepoint's bio.
    let flags: u32 = unsafe { load(bio, layout!(bio_opf)) };
    !matches!(flags & OP_MASK, op::READ | op::FLUSH)
}

/// # Safety
/// `bio` must be a bio of a tracepoint.
#[inline(always)]
unsafe fn is_watched(bio: Object) -> bool {
    // SAFETY: `bio` is a tracepoint's bio.
    unsafe {
        let device: Object = load(bio, layout!(bio_device));
        is_watched_disk(load(device, layout!(device_disk)))
    }
}

/// # Safety
/// `request` must be a request of a tracepoint.
#[inline(always)]
unsafe fn disk_of(request: Object) -> Object {
    // SAFETY: `request` is a tracepoint's request.
    unsafe {
        let disk: Object = load(request, layout!(request_queue_or_disk));
        if layout!(request_has_disk) != 0 {
            return disk;
        }
        load(disk, layout!(queue_disk))
    }
}

/// # Safety
/// `disk` must be null or a pointer to a disk whose type the verifier knows.
#[inline(always)]
unsafe fn is_watched_disk(disk: Object) -> bool {
    // SAFETY: `disk` is a typed load; the kernel turns a fault into 0.
    unsafe {
        let major: u32 = load(disk, layout!(disk_major));
        let minor: u32 = load(disk, layout!(disk_first_minor));
        major << 20 | minor == watched!(device)
    }
}

/// Marks what a write touches, in the epoch that is current when it is marked: who swaps the epochs first
/// names the new one and then reads the old one, so looking again afterwards misses no swap.
#[inline(always)]
unsafe fn mark(writing: &Writing) {
    let first = writing.sector.max(watched!(first_sector));
    let end = writing.sector + (writing.bytes >> SECTOR_SHIFT);
    let end = end.min(watched!(first_sector) + watched!(sectors));
    if first >= end {
        return;
    }
    let shift = watched!(granule_shift) - SECTOR_SHIFT;
    let first = (first - watched!(first_sector)) >> shift;
    let last = (end - 1 - watched!(first_sector)) >> shift;
    let Some(epoch) = STATE.get_ptr_mut(watch_state::EPOCH) else {
        return;
    };
    // SAFETY: the pointer is to a map's word, which lives for the program run.
    unsafe {
        let before = core::ptr::read_volatile(epoch);
        mark_in(before, first, last);
        let after = core::ptr::read_volatile(epoch);
        if after != before {
            mark_in(after, first, last);
        }
    }
}

/// Few branches, each of which ends it: the verifier walks every way through the loop.
#[inline(always)]
fn mark_in(epoch: u64, first: u64, last: u64) {
    let base = if epoch & 1 == 0 { 0 } else { watched!(words) };
    let (first_word, last_word) = (base + (first >> 6) as u32, base + (last >> 6) as u32);
    let from = u64::MAX << (first & 63);
    let to = u64::MAX >> (63 - (last & 63));
    if first_word == last_word {
        mark_word(first_word, from & to);
        return;
    }
    mark_word(first_word, from);
    mark_word(last_word, to);
    for step in 1..MOST_WORDS {
        let word = first_word + step;
        if word >= last_word {
            return;
        }
        let Some(bits) = DIRTY.get_ptr_mut(word) else {
            return;
        };
        fetch_or(bits, u64::MAX);
    }
}

#[inline(always)]
fn mark_word(word: u32, mask: u64) {
    if let Some(bits) = DIRTY.get_ptr_mut(word) {
        fetch_or(bits, mask);
    }
}

#[inline(always)]
unsafe fn mark_everything() {
    let Some(epoch) = STATE.get_ptr_mut(watch_state::EPOCH) else {
        return;
    };
    // SAFETY: the pointer is to a map's word, which lives for the program run.
    unsafe {
        let before = core::ptr::read_volatile(epoch);
        mark_everything_in(before);
        let after = core::ptr::read_volatile(epoch);
        if after != before {
            mark_everything_in(after);
        }
    }
}

#[inline(always)]
fn mark_everything_in(epoch: u64) {
    if let Some(everything) = STATE.get_ptr_mut(watch_state::EVERYTHING + (epoch & 1) as u32) {
        fetch_or(everything, 1);
    }
}
