//! Run-queue latency: from runnable to running, by the cgroup of the task that waited.

use crate::kernel::{Object, layout, load, lost, record};
use crate::scope::{scoped_id, task_cgroup};
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{Latency, Waiting, loss};

/// Runnable tasks that wait for a CPU now, by thread id.
#[map]
static WAITING: HashMap<u32, Waiting> = HashMap::with_max_entries(10_240, 0);

/// Run-queue latency by cgroup2 id.
#[map]
static RUN_QUEUE: HashMap<u64, Latency> = HashMap::with_max_entries(1_024, 0);

static EMPTY: Latency = Latency::EMPTY;

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
        let on_cpu: i32 = load(task, layout!(task_on_cpu));
        if on_cpu == 0 {
            enqueue(task);
        }
    }
    0
}

#[inline(always)]
unsafe fn enqueue(task: Object) {
    // SAFETY: `task` is a tracepoint's task.
    unsafe {
        let pid: u32 = load(task, layout!(task_pid));
        if pid == 0 {
            return;
        }
        let Some(cgroup) = scoped_id(task_cgroup(task)) else {
            return;
        };
        let waiting = Waiting {
            since_ns: bpf_ktime_get_ns(),
            cgroup,
        };
        if WAITING.insert(&pid, &waiting, 0).is_err() {
            lost(loss::WAITING);
        }
    }
}

#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's arguments are (preempt, prev, next, …).
    unsafe {
        let preempted: u64 = ctx.arg(0);
        let previous: Object = ctx.arg(1);
        // `__state` is 32 bits wide and `state` was a long whose low half holds every flag.
        let state: u32 = load(previous, layout!(task_state));
        if preempted & 1 != 0 || state == 0 {
            enqueue(previous);
        }
        running(ctx.arg(2));
    }
    0
}

#[inline(always)]
unsafe fn running(task: Object) {
    // SAFETY: `task` is the tracepoint's task; values are read before they are removed.
    unsafe {
        let pid: u32 = load(task, layout!(task_pid));
        if pid == 0 {
            return;
        }
        let Some(waiting) = WAITING.get(&pid) else {
            return;
        };
        let Waiting { since_ns, cgroup } = *waiting;
        let _ = WAITING.remove(&pid);
        let latency = match RUN_QUEUE.get_ptr_mut(&cgroup) {
            Some(latency) => latency,
            None => {
                // Another CPU may insert it first; what counts is that it is there.
                let _ = RUN_QUEUE.insert(&cgroup, &EMPTY, u64::from(BPF_NOEXIST));
                let Some(latency) = RUN_QUEUE.get_ptr_mut(&cgroup) else {
                    lost(loss::RUN_QUEUE);
                    return;
                };
                latency
            }
        };
        record(latency, bpf_ktime_get_ns().saturating_sub(since_ns));
    }
}
