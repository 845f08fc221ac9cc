//! Run-queue latency: from runnable to running, by the cgroup of the task that waited.

use crate::kernel::{Object, layout, load, lost, record};
use crate::scope::{cgroup_id, place_by_hash, scoped_id, task_cgroup};
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST};
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, Stack};
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{
    Latency, RUN_QUEUE_ROWS, RUN_QUEUE_SHARDS, SWITCHES_PLACES, SWITCHES_WORDS, WAITING_PLACES,
    Waiting, loss,
};

// These run at every wake-up and switch of the host, so the common path looks up arrays only: that is a
// few instructions in line and takes no lock, where a hash map costs a call of some 50 ns each time.

/// Runnable tasks that wait for a CPU now, each in the place of its thread id modulo the length.
#[map]
static WAITING: Array<Waiting> = Array::with_max_entries(WAITING_PLACES, BPF_F_MMAPABLE);

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

#[btf_tracepoint(function = "sched_wakeup")]
pub fn sched_wakeup(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's argument is a task.
    unsafe { woken(ctx.arg(0)) }
}

#[btf_tracepoint(function = "sched_wakeup_new")]
pub fn sched_wakeup_new(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's argument is a task.
    unsafe { woken(ctx.arg(0)) }
}

#[inline(always)]
unsafe fn woken(task: Object) -> i32 {
    // SAFETY: `task` is the tracepoint's task.
    unsafe {
        // A task woken before it left its CPU never waits.
        // An int, or one byte of it since Linux 7.2.
        let on_cpu: u8 = load(task, layout!(task_on_cpu));
        let pid: u32 = load(task, layout!(task_pid));
        if on_cpu == 0 && pid != 0 {
            enqueue(task, pid, bpf_ktime_get_ns());
        }
    }
    0
}

#[inline(always)]
unsafe fn enqueue(task: Object, pid: u32, now: u64) {
    // SAFETY: `task` is a tracepoint's task; the place is a map value, which lives for the program run.
    unsafe {
        let row = row(task_cgroup(task));
        if row == NO_ROW {
            return;
        }
        let Some(place) = place(pid) else {
            lost(loss::WAITING);
            return;
        };
        let before = (*place).task;
        if before != 0 && !Waiting::is_of(before, pid) {
            lost(loss::WAITING);
        }
        (*place).row = row;
        (*place).task = Waiting::pack(pid, now);
    }
}

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

#[inline(always)]
fn place(pid: u32) -> Option<*mut Waiting> {
    WAITING.get_ptr_mut(pid % WAITING_PLACES)
}

#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's arguments are (preempt, prev, next, …); map values live for the program run.
    unsafe {
        let preempted: u64 = ctx.arg(0);
        let previous: Object = ctx.arg(1);
        let next: Object = ctx.arg(2);
        let cpu = bpf_get_smp_processor_id();
        if let Some(count) = SWITCHES.get_ptr_mut(cpu % SWITCHES_PLACES) {
            (*count)[0] += 1;
        }
        let mut now = 0;
        let pid: u32 = load(previous, layout!(task_pid));
        if pid != 0 {
            // `__state` is 32 bits wide and `state` was a long whose low half holds every flag.
            let state: u32 = load(previous, layout!(task_state));
            if preempted & 1 != 0 || state == 0 {
                now = bpf_ktime_get_ns();
                enqueue(previous, pid, now);
            }
        }
        let pid: u32 = load(next, layout!(task_pid));
        if pid == 0 {
            return 0;
        }
        let Some(place) = place(pid) else {
            return 0;
        };
        let waiting = (*place).task;
        if !Waiting::is_of(waiting, pid) {
            return 0;
        }
        (*place).task = 0;
        if now == 0 {
            now = bpf_ktime_get_ns();
        }
        let shard = cpu % RUN_QUEUE_SHARDS;
        if let Some(latency) = RUN_QUEUE.get_ptr_mut((*place).row * RUN_QUEUE_SHARDS + shard) {
            record(latency, Waiting::age(waiting, now));
        }
    }
    0
}
