//! Block I/O: latency from issue to completion, by the cgroup that caused it.

use crate::kernel::{Object, add, layout, load, lost, record};
use crate::scope::{scoped_id, task_cgroup};
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::{bpf_get_current_task_btf, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{BlockKey, BlockStats, InFlight, loss};

/// Requests between issue and completion, by their address.
#[map]
static IN_FLIGHT: HashMap<u64, InFlight> = HashMap::with_max_entries(10_240, 0);

/// Statistics by (cgroup, disk, op).
#[map]
static BLOCK: HashMap<BlockKey, BlockStats> = HashMap::with_max_entries(4_096, 0);

static EMPTY: BlockStats = BlockStats::EMPTY;

/// REQ_OP_MASK
const OP_MASK: u32 = 0xff;

#[btf_tracepoint(function = "block_rq_issue")]
pub fn block_rq_issue(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's arguments are (request), or (queue, request) on old kernels.
    unsafe {
        if layout!(issue_has_queue) != 0 {
            issue(ctx.arg(1));
        } else {
            issue(ctx.arg(0));
        }
    }
    0
}

#[inline(always)]
unsafe fn issue(request: Object) {
    // SAFETY: `request` is the tracepoint's request.
    unsafe {
        let Some(cgroup) = issuer(request) else {
            return;
        };
        let mut disk: Object = load(request, layout!(request_queue_or_disk));
        if layout!(request_has_disk) == 0 {
            disk = load(disk, layout!(queue_disk));
        }
        if disk.is_null() {
            return;
        }
        let major: u32 = load(disk, layout!(disk_major));
        let minor: u32 = load(disk, layout!(disk_first_minor));
        let flags: u32 = load(request, layout!(request_cmd_flags));
        let entry = InFlight {
            key: BlockKey {
                cgroup,
                device: major << 20 | minor,
                op: flags & OP_MASK,
            },
            since_ns: bpf_ktime_get_ns(),
        };
        if IN_FLIGHT.insert(&(request as u64), &entry, 0).is_err() {
            lost(loss::IN_FLIGHT);
        }
    }
}

/// The cgroup the bio is charged to (the dirtier, for write-back) when block cgroups live in cgroup2;
/// with a v1 block controller, the task that issues.
#[inline(always)]
unsafe fn issuer(request: Object) -> Option<u64> {
    // SAFETY: `request` is the tracepoint's request.
    unsafe {
        if layout!(bio_blkg) != 0 {
            let bio: Object = load(request, layout!(request_bio));
            if !bio.is_null() {
                let blkg: Object = load(bio, layout!(bio_blkg));
                if !blkg.is_null() {
                    let blkcg: Object = load(blkg, layout!(blkg_blkcg));
                    let cgroup: Object = load(blkcg, layout!(blkcg_cgroup));
                    let root: Object = load(cgroup, layout!(cgroup_root));
                    let hierarchy: i32 = load(root, layout!(cgroup_root_hierarchy_id));
                    if !root.is_null() && hierarchy == 0 {
                        return scoped_id(cgroup);
                    }
                }
            }
        }
        scoped_id(task_cgroup(bpf_get_current_task_btf() as Object))
    }
}

#[btf_tracepoint(function = "block_rq_complete")]
pub fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    let request: Object = ctx.arg(0);
    let error: i32 = ctx.arg(1);
    let bytes: u32 = ctx.arg(2);
    // SAFETY: the tracepoint's arguments are (request, error, bytes); values are read before removal.
    unsafe {
        let address = request as u64;
        let Some(entry) = IN_FLIGHT.get(&address) else {
            return 0;
        };
        let InFlight { key, since_ns } = *entry;
        let stats = match BLOCK.get_ptr_mut(&key) {
            Some(stats) => stats,
            None => {
                // Another CPU may insert it first; what counts is that it is there.
                let _ = BLOCK.insert(&key, &EMPTY, u64::from(BPF_NOEXIST));
                let Some(stats) = BLOCK.get_ptr_mut(&key) else {
                    lost(loss::BLOCK);
                    let _ = IN_FLIGHT.remove(&address);
                    return 0;
                };
                stats
            }
        };
        add(&raw mut (*stats).bytes, u64::from(bytes));
        // A request may complete in parts; it is one request and one latency, at its last part.
        let left: u32 = load(request, layout!(request_data_len));
        if error == 0 && bytes < left {
            return 0;
        }
        let _ = IN_FLIGHT.remove(&address);
        add(&raw mut (*stats).requests, 1);
        if error != 0 {
            add(&raw mut (*stats).errors, 1);
        }
        record(
            &raw mut (*stats).latency,
            bpf_ktime_get_ns().saturating_sub(since_ns),
        );
    }
    0
}
