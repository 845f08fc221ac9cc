//! Which sectors of one device are accessed, by whom, how often and when first; in an object of their own:
//! the programs cost nothing while nobody traces.
//!
//! Invariants: as in the object of the senses; memory is bounded by the map, which the agent empties again
//! and again: what is counted in one epoch is read in the next, so that no count is read while it changes.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(
    dead_code,
    reason = "the modules below are shared with the object of the senses, which uses the rest"
)]

mod attribution;
mod kernel;
mod object;
mod scope;

use attribution::causer;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::BtfTracePointContext;
use kernel::{Object, add, layout, load, lost, now_ns, set_by_agent};
use lifeboat_ebpf::{Access, AccessKey, SECTOR_SHIFT, Traced, access, loss, op};

/// Replaced by the agent before loading.
#[unsafe(no_mangle)]
static TRACED: Traced = Traced {
    first_sector: 0,
    sectors: 0,
    device: 0,
    padding: 0,
};

/// Accesses of the current epoch, and of the one before until the agent has read them.
#[map]
static ACCESSES: HashMap<AccessKey, Access> = HashMap::with_max_entries(65_536, 0);

/// The current epoch.
#[map]
static EPOCH: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// REQ_OP_MASK
const OP_MASK: u32 = 0xff;

macro_rules! traced {
    ($field:ident) => {
        set_by_agent(&TRACED.$field)
    };
}

/// A bio enters a device, in the context of who submits it.
#[btf_tracepoint(function = "block_bio_queue")]
pub fn traced_bio_queue(ctx: BtfTracePointContext) -> i32 {
    // The arguments are (bio), or (queue, bio) on old kernels.
    let bio: Object = if layout!(queue_has_queue) != 0 {
        ctx.arg(1)
    } else {
        ctx.arg(0)
    };
    // SAFETY: `bio` is the tracepoint's bio.
    unsafe {
        let flags: u32 = load(bio, layout!(bio_opf));
        let operation = flags & OP_MASK;
        if !matches!(operation, op::READ | op::WRITE) {
            return 0;
        }
        let mut disk: Object = load(bio, layout!(bio_device));
        if layout!(bio_has_disk) == 0 {
            disk = load(disk, layout!(device_disk));
        }
        let major: u32 = load(disk, layout!(disk_major));
        let minor: u32 = load(disk, layout!(disk_first_minor));
        let sector: u64 = load(bio, layout!(bio_sector));
        let bytes: u32 = load(bio, layout!(bio_size));
        if major << 20 | minor != traced!(device)
            || bytes == 0
            || sector.wrapping_sub(traced!(first_sector)) >= traced!(sectors)
        {
            return 0;
        }
        let Some(cgroup) = causer(bio, operation) else {
            return 0;
        };
        let epoch = EPOCH
            .get_ptr_mut(0)
            .map_or(0, |epoch| core::ptr::read_volatile(epoch));
        count(&AccessKey {
            cgroup,
            sector: sector - traced!(first_sector),
            sectors: bytes >> SECTOR_SHIFT,
            kind: if operation == op::WRITE {
                access::WRITE
            } else {
                0
            } | if epoch & 1 == 1 { access::ODD } else { 0 },
        });
    }
    0
}

#[inline(always)]
fn count(key: &AccessKey) {
    if again(key) {
        return;
    }
    let first = Access {
        first_ns: now_ns(),
        count: 1,
    };
    // Another CPU may have been faster.
    if ACCESSES
        .insert(key, &first, u64::from(BPF_NOEXIST))
        .is_err()
        && !again(key)
    {
        lost(loss::ACCESSES);
    }
}

#[inline(always)]
fn again(key: &AccessKey) -> bool {
    let Some(known) = ACCESSES.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: the pointer is to a map value, which lives for the program run.
    add(unsafe { &raw mut (*known).count }, 1);
    true
}
