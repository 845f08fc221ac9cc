//! Block I/O: latency from issue to completion, sizes, order and errors, by the cgroup that caused it.

use crate::attribution::causer;
use crate::kernel::{Object, add, layout, load, log2, lost, record};
use crate::scope::place_by_hash;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, Stack};
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{
    BLOCK_ROWS, BlockKey, BlockRow, BlockStats, IN_FLIGHT_GROUP, IN_FLIGHT_PLACES, InFlight,
    SECTOR_SHIFT, SIZE_SLOTS, error, loss, op,
};

// These run twice for every request, so the common path looks up arrays only: that is a few instructions in
// line and takes no lock, where a hash map costs a call each time.

/// Requests between issue and completion, each in a place of the group that its address's hash names. Two
/// that take the same place at the same instant are one: the other is not counted.
#[map]
static IN_FLIGHT: Array<InFlight> = Array::with_max_entries(IN_FLIGHT_PLACES, BPF_F_MMAPABLE);

/// Statistics by row.
#[map]
static BLOCK: Array<BlockRow> = Array::with_max_entries(BLOCK_ROWS, BPF_F_MMAPABLE);

/// Row by (cgroup, disk, op).
#[map]
static BLOCK_ROW: HashMap<BlockKey, u32> = HashMap::with_max_entries(BLOCK_ROWS, 0);

/// Rows of nobody: filled by the agent, which also gives back those of cgroups that are gone.
#[map]
static FREE_BLOCK_ROWS: Stack<u32> = Stack::with_max_entries(BLOCK_ROWS, 0);

/// The rows looked up last, each in the place of its key's hash. Whose a row is stands in the row itself.
#[map]
static KNOWN_BLOCK_ROWS: Array<u32> = Array::with_max_entries(1 << KNOWN_BITS, 0);

const KNOWN_BITS: u32 = 9;

const GROUP_BITS: u32 = (IN_FLIGHT_PLACES / IN_FLIGHT_GROUP).trailing_zeros();

/// REQ_OP_MASK
const OP_MASK: u32 = 0xff;

/// A request enters the kernel's I/O scheduler, in the context of who submits it; whoever issues it later
/// may be another. Only attached where the kernel does not charge requests to a cgroup2.
#[btf_tracepoint(function = "block_rq_insert")]
pub fn block_rq_insert(ctx: BtfTracePointContext) -> i32 {
    let request = request_of(&ctx);
    // SAFETY: `request` is the tracepoint's request.
    unsafe {
        if let Some(row) = key(request).and_then(|key| row(&key)) {
            note(request, row, 0);
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
            inserted = in_flight(request).map(|entry| (*entry).row);
        }
        let Some(row) = inserted.or_else(|| key(request).and_then(|key| row(&key))) else {
            return 0;
        };
        let Some(stats) = stats(row) else {
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
        note(request, row, bpf_ktime_get_ns());
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

/// What stands for a request as a number: how far it is from a place in memory that never moves. The verifier
/// allows no other arithmetic on its address.
#[inline(always)]
fn number(request: Object) -> Option<u64> {
    let fixed = IN_FLIGHT.get_ptr_mut(0)?;
    Some((request as u64).wrapping_sub(fixed as u64))
}

/// The first place of a request's group.
#[inline(always)]
fn group(number: u64) -> u32 {
    place_by_hash(number, GROUP_BITS) * IN_FLIGHT_GROUP
}

/// The place that has a request.
#[inline(always)]
fn in_flight(request: Object) -> Option<*mut InFlight> {
    let number = number(request)?;
    let group = group(number);
    for offset in 0..IN_FLIGHT_GROUP {
        let place = IN_FLIGHT.get_ptr_mut(group + offset)?;
        // SAFETY: a place is a map value, which lives for the program run.
        if unsafe { (*place).request } == number {
            return Some(place);
        }
    }
    None
}

/// Notes a request in its own place, or in the first free one.
#[inline(always)]
fn note(request: Object, row: u32, since_ns: u64) {
    let Some(number) = number(request) else {
        return;
    };
    let group = group(number);
    let mut found = None;
    for offset in 0..IN_FLIGHT_GROUP {
        let Some(place) = IN_FLIGHT.get_ptr_mut(group + offset) else {
            return;
        };
        // SAFETY: a place is a map value, which lives for the program run.
        let taken = unsafe { (*place).request };
        if taken == number {
            found = Some(place);
            break;
        }
        if taken == 0 && found.is_none() {
            found = Some(place);
        }
    }
    let Some(place) = found else {
        lost(loss::IN_FLIGHT);
        return;
    };
    // SAFETY: as above.
    unsafe {
        (*place).row = row;
        (*place).since_ns = since_ns;
        (*place).request = number;
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
fn stats(row: u32) -> Option<*mut BlockStats> {
    // SAFETY: the pointer is to a map value, of which this is a field.
    BLOCK
        .get_ptr_mut(row)
        .map(|row| unsafe { &raw mut (*row).stats })
}

/// The row of a key, a new one when it has none.
#[inline(always)]
fn row(key: &BlockKey) -> Option<u32> {
    let mixed = key.cgroup << 32 ^ u64::from(key.device) << 8 ^ u64::from(key.op);
    let known = KNOWN_BLOCK_ROWS.get_ptr_mut(place_by_hash(mixed, KNOWN_BITS))?;
    // SAFETY: map values live for the program run; a known row is one aligned word.
    unsafe {
        let row = *known;
        let whose = &raw const (*BLOCK.get_ptr_mut(row)?).key;
        if (*whose).cgroup == key.cgroup && (*whose).device == key.device && (*whose).op == key.op {
            return Some(row);
        }
        let row = row_of(key);
        if row >= BLOCK_ROWS {
            lost(loss::BLOCK);
            return None;
        }
        *known = row;
        Some(row)
    }
}

/// The row of a key, by the hash map; [`BLOCK_ROWS`] when there is none left.
#[inline(never)]
fn row_of(key: &BlockKey) -> u32 {
    // SAFETY: the value is one word, which is written once.
    if let Some(row) = unsafe { BLOCK_ROW.get(key) } {
        return *row;
    }
    let Ok(Some(row)) = FREE_BLOCK_ROWS.pop() else {
        return BLOCK_ROWS;
    };
    let Some(new) = BLOCK.get_ptr_mut(row) else {
        return BLOCK_ROWS;
    };
    // SAFETY: the pointer is to a map value, which nobody else has: the row was free.
    unsafe { (*new).key = *key };
    if BLOCK_ROW.insert(key, &row, u64::from(BPF_NOEXIST)).is_ok() {
        return row;
    }
    // Another CPU was faster.
    // SAFETY: as above.
    unsafe { (*new).key.device = 0 };
    let _ = FREE_BLOCK_ROWS.push(row, 0);
    // SAFETY: as for the first look.
    unsafe { BLOCK_ROW.get(key).copied().unwrap_or(BLOCK_ROWS) }
}

#[btf_tracepoint(function = "block_rq_complete")]
pub fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    let request: Object = ctx.arg(0);
    let status: i32 = ctx.arg(1);
    let bytes: u32 = ctx.arg(2);
    // SAFETY: the tracepoint's arguments are (request, error, bytes); map values live for the program run.
    unsafe {
        let Some(entry) = in_flight(request) else {
            return 0;
        };
        let since_ns = (*entry).since_ns;
        let Some(stats) = stats((*entry).row) else {
            return 0;
        };
        add(&raw mut (*stats).bytes, u64::from(bytes));
        // A request may complete in parts; it is one request and one latency, at its last part.
        let left: u32 = load(request, layout!(request_data_len));
        if status == 0 && bytes < left {
            return 0;
        }
        (*entry).request = 0;
        if status != 0 {
            if let Some(class) = error::class(status, layout!(status_offline) as i32) {
                add((&raw mut (*stats).errors).cast::<u64>().add(class), 1);
            }
        }
        // One that fails before it was issued never was at the device.
        if since_ns == 0 {
            add(&raw mut (*stats).unissued, 1);
            return 0;
        }
        let latency = bpf_ktime_get_ns().saturating_sub(since_ns);
        add(&raw mut (*stats).busy_ns, latency);
        record(&raw mut (*stats).latency, latency);
    }
    0
}
