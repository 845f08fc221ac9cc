//! Run-queue latency: from runnable to running, by the cgroup of the task that waited.
//!
//! The kernel notes itself since when a task waits (`sched_info.last_queued`, by the clock of its run queue), so nothing
//! runs at a wake-up. A task that is moved to another CPU while it waits begins anew there; what it waited before is
//! added to its `run_delay` then, which is therefore noted when a task leaves its CPU.

use crate::kernel::{Object, layout, load, lost, record};
use crate::scope::{cgroup_id, place_by_hash, scoped_id, task_cgroup};
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST, seq_file};
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_seq_write};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, Stack};
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{
    Delay, Latency, RUN_QUEUE_ROWS, RUN_QUEUE_SHARDS, SWITCHES_PLACES, SWITCHES_WORDS, TASK_PLACES,
    Waiting, loss,
};

// This runs at every switch of the host, so the common path looks up arrays only: that is a few instructions in line
// and takes no lock, where a hash map costs a call of some 50 ns each time.

/// What tasks had waited in all when they last left a CPU, each in the place of its thread id modulo the length. Of
/// two that meet there, one that is moved while it waits is known from its move on.
#[map]
static DELAYS: Array<u64> = Array::with_max_entries(TASK_PLACES, BPF_F_MMAPABLE);

/// Run-queue latency by row and shard.
#[map]
static RUN_QUEUE: Array<Latency> =
    Array::with_max_entries(RUN_QUEUE_ROWS * RUN_QUEUE_SHARDS, BPF_F_MMAPABLE);

/// Row by cgroup2 id.
#[map]
static ROWS: HashMap<u64, u32> = HashMap::with_max_entries(RUN_QUEUE_ROWS, 0);

/// Rows without a cgroup: filled by the agent, which also gives back those of cgroups that are gone.
#[map]
static FREE_ROWS: Stack<u32> = Stack::with_max_entries(RUN_QUEUE_ROWS, 0);

/// The rows looked up last, each in the place of its cgroup id's hash: the id and below it the row, in
/// one word. An id's highest bits are a generation that never gets there.
#[map]
static KNOWN_ROWS: Array<u64> = Array::with_max_entries(1 << KNOWN_BITS, 0);

/// Switches since the start, whosoever, in the place of the CPU modulo the length; of a place only the first word
/// counts, so that no two CPUs write to the same line of memory.
#[map]
static SWITCHES: Array<[u64; SWITCHES_WORDS]> =
    Array::with_max_entries(SWITCHES_PLACES, BPF_F_MMAPABLE);

const KNOWN_BITS: u32 = 11;
const ROW_BITS: u32 = 10;
const ROW_MASK: u64 = (1 << ROW_BITS) - 1;

/// The row of a cgroup beyond the scope.
const NO_ROW: u32 = RUN_QUEUE_ROWS;
const _: () = assert!(NO_ROW as u64 == ROW_MASK);

/// The row of a cgroup; [`NO_ROW`] beyond the scope and when there is no room.
#[inline(always)]
unsafe fn row(cgroup: Object) -> u32 {
    // SAFETY: the caller passes a task's cgroup; the known row is one aligned word of a map.
    unsafe {
        let id = cgroup_id(cgroup);
        let Some(known) = KNOWN_ROWS.get_ptr_mut(place_by_hash(id, KNOWN_BITS)) else {
            return NO_ROW;
        };
        let word = *known;
        if word >> ROW_BITS == id << ROW_BITS >> ROW_BITS {
            return (word & ROW_MASK) as u32;
        }
        let row = match scoped_id(cgroup) {
            None => NO_ROW,
            Some(id) => {
                let row = row_of(id);
                if row == NO_ROW {
                    // Not remembered: the agent may make room.
                    lost(loss::RUN_QUEUE);
                    return NO_ROW;
                }
                row
            }
        };
        *known = id << ROW_BITS | u64::from(row);
        row
    }
}

/// The row of a cgroup id, a new one when it has none; [`NO_ROW`] when there is none left.
#[inline(never)]
fn row_of(id: u64) -> u32 {
    // SAFETY: the value is one word, which is written once.
    if let Some(row) = unsafe { ROWS.get(&id) } {
        return *row;
    }
    let Ok(Some(row)) = FREE_ROWS.pop() else {
        return NO_ROW;
    };
    if ROWS.insert(&id, &row, u64::from(BPF_NOEXIST)).is_ok() {
        return row;
    }
    // Another CPU was faster.
    let _ = FREE_ROWS.push(row, 0);
    // SAFETY: as above.
    unsafe { ROWS.get(&id).copied().unwrap_or(NO_ROW) }
}

/// Where [`DELAYS`] has a thread.
#[inline(always)]
fn place(pid: u32) -> Option<*mut u64> {
    DELAYS.get_ptr_mut(pid % TASK_PLACES)
}

/// Since when a task waits, by the clock of its run queue; 0 when it does not.
#[inline(always)]
unsafe fn queued(task: Object) -> u64 {
    // SAFETY: `task` is a task that the verifier knows.
    unsafe { load(task, layout!(task_last_queued)) }
}

/// How long a task has waited by now that waits `since` then, ns.
#[inline(always)]
unsafe fn waited(task: Object, pid: u32, since: u64) -> u64 {
    // SAFETY: as for `queued`; the place is one aligned word of a map.
    unsafe {
        let cfs: Object = load(task, layout!(task_cfs_rq));
        let queue: Object = load(cfs, layout!(cfs_rq_rq));
        let now: u64 = load(queue, layout!(rq_clock));
        let mut before = 0;
        if let Some(place) = place(pid) {
            let noted = *place;
            if Delay::is_of(noted, pid) {
                before = Delay::until(noted, load(task, layout!(task_run_delay)));
            }
        }
        now.saturating_sub(since) + before
    }
}

#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's arguments are (preempt, prev, next, …); map values live for the program run.
    unsafe {
        let previous: Object = ctx.arg(1);
        let next: Object = ctx.arg(2);
        let cpu = bpf_get_smp_processor_id();
        if let Some(count) = SWITCHES.get_ptr_mut(cpu % SWITCHES_PLACES) {
            (*count)[0] += 1;
        }
        let pid: u32 = load(previous, layout!(task_pid));
        if pid != 0
            && let Some(place) = place(pid)
        {
            *place = Delay::pack(pid, load(previous, layout!(task_run_delay)));
        }
        let pid: u32 = load(next, layout!(task_pid));
        if pid == 0 {
            return 0;
        }
        let since = queued(next);
        if since == 0 {
            return 0;
        }
        let row = row(task_cgroup(next));
        if row == NO_ROW {
            return 0;
        }
        let shard = cpu % RUN_QUEUE_SHARDS;
        if let Some(latency) = RUN_QUEUE.get_ptr_mut(row * RUN_QUEUE_SHARDS + shard) {
            record(latency, waited(next, pid, since));
        }
    }
    0
}

/// What an iterator over tasks is called with: `struct bpf_iter__task` of kernel/bpf/task_iter.c.
#[repr(C)]
pub struct TaskContext {
    meta: Object,
    task: Object,
}

/// Run on demand by the agent, for each task: writes down one that waits.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn sched_waiting(ctx: *const TaskContext) -> i32 {
    // SAFETY: the kernel passes the context; the verifier knows both pointers, and asks that the task is checked.
    unsafe {
        let task = core::ptr::read_volatile(&raw const (*ctx).task);
        // After the last one.
        if task.is_null() {
            return 0;
        }
        // Since Linux 6.12 one that was moved after it had begun to sleep may look as if it waited.
        let state: u32 = load(task, layout!(task_state));
        let since = queued(task);
        if state != 0 || since == 0 {
            return 0;
        }
        let Some(cgroup) = scoped_id(task_cgroup(task)) else {
            return 0;
        };
        let pid: u32 = load(task, layout!(task_pid));
        let age_ns = waited(task, pid, since);
        // It was moved or began to run meanwhile.
        if queued(task) != since {
            return 0;
        }
        let waiting = Waiting { cgroup, age_ns };
        let meta = core::ptr::read_volatile(&raw const (*ctx).meta);
        // `seq` is its first field.
        let seq: *mut seq_file = load(meta, 0);
        let length = size_of::<Waiting>() as u32;
        // Where it finds no room, the kernel makes some and comes back to this task.
        bpf_seq_write(seq, (&raw const waiting).cast(), length);
    }
    0
}
