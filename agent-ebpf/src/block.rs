//! Block I/O: latency from issue to completion, sizes, order and errors, by the cgroup that caused it.

use crate::attribution::causer;
use crate::kernel::{Object, add, layout, load, log2, lost, record};
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{BlockKey, BlockStats, InFlight, SECTOR_SHIFT, SIZE_SLOTS, error, loss, op};

/// Requests between issue and completion, by their address.
#[map]
static IN_FLIGHT: HashMap<u64, InFlight> = HashMap::with_max_entries(10_240, 0);

/// Statistics by (cgroup, disk, op).
#[map]
static BLOCK: HashMap<BlockKey, BlockStats> = HashMap::with_max_entries(4_096, 0);

static EMPTY: BlockStats = BlockStats::EMPTY;

/// REQ_OP_MASK
const OP_MASK: u32 = 0xff;

/// A request enters the kernel's I/O scheduler, in the context of who submits it; whoever issues it later
/// may be another. Only attached where the kernel does not charge requests to a cgroup2.
#[btf_tracepoint(function = "block_rq_insert")]
pub fn block_rq_insert(ctx: BtfTracePointContext) -> i32 {
    let request = request_of(&ctx);
    // SAFETY: `request` is the tracepoint's request.
    unsafe {
        if let Some(key) = key(request) {
            note(request, &InFlight { key, since_ns: 0 });
        }
    }
    0
}

#[btf_tracepoint(function = "block_rq_issue")]
pub fn block_rq_issue(ctx: BtfTracePointContext) -> i32 {
    let request = request_of(&ctx);
    // SAFETY: `request` is the tracepoint's request; map values live for the program run.
    unsafe {
        let mut inserted = None;
        if layout!(write_back_uncharged) != 0 {
            inserted = IN_FLIGHT.get(&(request as u64)).map(|entry| entry.key);
        }
        let Some(key) = inserted.or_else(|| key(request)) else {
            return 0;
        };
        let Some(stats) = stats(&key) else {
            return 0;
        };
        let sector: u64 = load(request, layout!(request_sector));
        let bytes: u32 = load(request, layout!(request_data_len));
        if bytes != 0 {
            if (*stats).next_sector == sector {
                add(&raw mut (*stats).sequential, 1);
            }
            (*stats).next_sector = sector + u64::from(bytes >> SECTOR_SHIFT);
            let mut slot = log2(u64::from(bytes >> SECTOR_SHIFT));
            if slot >= SIZE_SLOTS {
                slot = SIZE_SLOTS - 1;
            }
            add((&raw mut (*stats).sizes).cast::<u64>().add(slot), 1);
        }
        let since_ns = bpf_ktime_get_ns();
        note(request, &InFlight { key, since_ns });
    }
    0
}

#[inline(always)]
fn request_of(ctx: &BtfTracePointContext) -> Object {
    // The arguments are (request), or (queue, request) on old kernels.
    if layout!(issue_has_queue) != 0 {
        ctx.arg(1)
    } else {
        ctx.arg(0)
    }
}

#[inline(always)]
fn note(request: Object, entry: &InFlight) {
    if IN_FLIGHT.insert(&(request as u64), entry, 0).is_err() {
        lost(loss::IN_FLIGHT);
    }
}

/// Where a request is counted; nowhere when it is out of scope, has no disk or is only passed through.
///
/// # Safety
/// `request` must be a request of a tracepoint.
#[inline(always)]
unsafe fn key(request: Object) -> Option<BlockKey> {
    // SAFETY: `request` is the tracepoint's request.
    unsafe {
        let flags: u32 = load(request, layout!(request_cmd_flags));
        let operation = flags & OP_MASK;
        if operation >= op::PASSTHROUGH {
            return None;
        }
        let mut disk: Object = load(request, layout!(request_queue_or_disk));
        if layout!(request_has_disk) == 0 {
            disk = load(disk, layout!(queue_disk));
        }
        if disk.is_null() {
            return None;
        }
        let cgroup = causer(load(request, layout!(request_bio)), operation)?;
        let major: u32 = load(disk, layout!(disk_major));
        let minor: u32 = load(disk, layout!(disk_first_minor));
        Some(BlockKey {
            cgroup,
            device: major << 20 | minor,
            op: operation,
        })
    }
}

#[inline(always)]
fn stats(key: &BlockKey) -> Option<*mut BlockStats> {
    if let Some(stats) = BLOCK.get_ptr_mut(key) {
        return Some(stats);
    }
    // Another CPU may insert it first; what counts is that it is there.
    let _ = BLOCK.insert(key, &EMPTY, u64::from(BPF_NOEXIST));
    let stats = BLOCK.get_ptr_mut(key);
    if stats.is_none() {
        lost(loss::BLOCK);
    }
    stats
}

#[btf_tracepoint(function = "block_rq_complete")]
pub fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    let request: Object = ctx.arg(0);
    let status: i32 = ctx.arg(1);
    let bytes: u32 = ctx.arg(2);
    // SAFETY: the tracepoint's arguments are (request, error, bytes); values are read before removal.
    unsafe {
        let address = request as u64;
        let Some(entry) = IN_FLIGHT.get(&address) else {
            return 0;
        };
        let InFlight { key, since_ns } = *entry;
        let Some(stats) = stats(&key) else {
            let _ = IN_FLIGHT.remove(&address);
            return 0;
        };
        add(&raw mut (*stats).bytes, u64::from(bytes));
        // A request may complete in parts; it is one request and one latency, at its last part.
        let left: u32 = load(request, layout!(request_data_len));
        if status == 0 && bytes < left {
            return 0;
        }
        let _ = IN_FLIGHT.remove(&address);
        add(&raw mut (*stats).requests, 1);
        if let Some(class) = class(status) {
            add((&raw mut (*stats).errors).cast::<u64>().add(class), 1);
        }
        // One that fails before it was issued never was at the device.
        if since_ns != 0 {
            let latency = bpf_ktime_get_ns().saturating_sub(since_ns);
            add(&raw mut (*stats).busy_ns, latency);
            record(&raw mut (*stats).latency, latency);
        }
    }
    0
}

/// The class of a request's end: a `blk_status_t`, or a negative errno before Linux 5.16. None for success,
/// and for what says nothing about the device: an operation that it does not have, and one to try again.
#[inline(always)]
fn class(status: i32) -> Option<usize> {
    match status {
        // BLK_STS_NOTSUPP and _AGAIN; EOPNOTSUPP and EAGAIN.
        0 | 1 | 12 | -95 | -11 => None,
        // BLK_STS_TIMEOUT; ETIMEDOUT.
        2 | -110 => Some(error::TIMEOUT),
        // BLK_STS_NOSPC; ENOSPC.
        3 | -28 => Some(error::NO_SPACE),
        // BLK_STS_TRANSPORT and _OFFLINE; ENOLINK.
        4 | 16 | -67 => Some(error::TRANSPORT),
        // BLK_STS_TARGET; EREMOTEIO.
        5 | -121 => Some(error::TARGET),
        // BLK_STS_MEDIUM; ENODATA.
        7 | -61 => Some(error::MEDIA),
        // BLK_STS_PROTECTION; EILSEQ.
        8 | -84 => Some(error::PROTECTION),
        _ => Some(error::OTHER),
    }
}
