//! Which cgroups the agent may see, and where it lies itself.

use crate::kernel::{Object, exchange, layout, load, probe};
use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_get_current_task};
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::RawTracePointContext;
use lifeboat_ebpf::{Ancestors, MAX_LEVEL};

#[map]
static ANCESTORS: Array<Ancestors> = Array::with_max_entries(1, 0);

/// Whether a cgroup lies in the scope, remembered in the place of its id's hash: the id, and the answer
/// in its highest bit. A cgroup never moves, and ids are not used again while a kernel runs.
#[map]
static ANSWERS: Array<u64> = Array::with_max_entries(1 << ANSWERS_BITS, 0);

const ANSWERS_BITS: u32 = 12;

/// A place of 2^`bits` for an id, by Fibonacci hashing: ids of cgroups differ by regular steps.
#[inline(always)]
pub fn place_by_hash(id: u64, bits: u32) -> u32 {
    (id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - bits)) as u32
}

/// Run on demand by the agent: writes down the ids of the agent's own cgroup and its ancestors.
#[raw_tracepoint]
pub fn scope_probe(_ctx: RawTracePointContext) -> i32 {
    let (Some(answer), Some(cgroup)) = (ANCESTORS.get_ptr_mut(0), own_cgroup()) else {
        return 0;
    };
    for level in 0..MAX_LEVEL {
        let id = ancestor_id(cgroup, level as u32);
        // SAFETY: `answer` points to a map value with MAX_LEVEL ids.
        let place = unsafe { &raw mut (*answer).ids[level] };
        // A kernel that lacks the instruction refuses this object already here.
        exchange(place, id);
    }
    0
}

/// The cgroup2 cgroup of the running task, as an address that only [`probe`] reads: a typed task can be
/// had from the helper of Linux 5.11 alone.
#[inline(always)]
pub fn own_cgroup() -> Option<Object> {
    let css_set: Object = probe(running(), layout!(task_cgroups))?;
    probe(css_set, layout!(css_set_dfl_cgrp))
}

/// The running task, likewise.
#[inline(always)]
pub fn running() -> Object {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_get_current_task() as Object }
}

/// The id of the running task's cgroup within the scope; none outside of it.
#[inline(always)]
pub fn own_scoped_id() -> Option<u64> {
    // SAFETY: the helper takes nothing.
    let id = unsafe { bpf_get_current_cgroup_id() };
    scoped(id, || own_cgroup().is_some_and(is_within))
}

/// The cgroup2 id of a task.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn task_cgroup(task: Object) -> Object {
    // SAFETY: the caller's contract.
    unsafe {
        let css_set: Object = load(task, layout!(task_cgroups));
        load(css_set, layout!(css_set_dfl_cgrp))
    }
}

/// The id of a cgroup2 cgroup.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn cgroup_id(cgroup: Object) -> u64 {
    // SAFETY: the caller's contract.
    unsafe {
        let kn: Object = load(cgroup, layout!(cgroup_kn));
        load(kn, layout!(kernfs_node_id))
    }
}

/// The id of a cgroup2 cgroup within the scope; none outside of it.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn scoped_id(cgroup: Object) -> Option<u64> {
    // SAFETY: the caller's contract.
    scoped(unsafe { cgroup_id(cgroup) }, || is_within(cgroup))
}

/// As [`scoped_id`], for a cgroup that is a mere address.
#[inline(always)]
pub fn probed_scoped_id(cgroup: Object) -> Option<u64> {
    scoped(probed_id(cgroup)?, || is_within(cgroup))
}

/// The id of a cgroup when that is in the scope; `is_within` is asked about one that is not known.
#[inline(always)]
fn scoped(id: u64, is_within: impl FnOnce() -> bool) -> Option<u64> {
    if layout!(scope_level) == 0 {
        return Some(id);
    }
    let answer = ANSWERS.get_ptr_mut(place_by_hash(id, ANSWERS_BITS))?;
    // SAFETY: the answer is one aligned word of a map.
    unsafe {
        let known = *answer;
        if known << 1 == id << 1 {
            return (known >> 63 == 1).then_some(id);
        }
        let within = is_within();
        *answer = id << 1 >> 1 | u64::from(within) << 63;
        within.then_some(id)
    }
}

/// Asks the cgroup itself, which takes four helper calls.
#[inline(always)]
fn is_within(cgroup: Object) -> bool {
    ancestor_id(cgroup, layout!(scope_level)) == layout!(scope_id)
}

#[inline(always)]
fn probed_id(cgroup: Object) -> Option<u64> {
    let kn: Object = probe(cgroup, layout!(cgroup_kn))?;
    probe(kn, layout!(kernfs_node_id))
}

/// The id of a cgroup's ancestor at a level, or its own; 0 below its own. No `Option`, of which the compiler
/// would compare the value also where there is none, and the verifier refuses to read what was not written.
#[inline(always)]
pub fn ancestor_id(cgroup: Object, level: u32) -> u64 {
    let own_level: i32 = probe(cgroup, layout!(cgroup_level)).unwrap_or(-1);
    if own_level < level as i32 {
        return 0;
    }
    // The array is a flexible one, for which the verifier has no typed load.
    let slot = layout!(cgroup_ancestors) + level * 8;
    if layout!(ancestors_are_ids) != 0 {
        return probe(cgroup, slot).unwrap_or(0);
    }
    probe(cgroup, slot).and_then(probed_id).unwrap_or(0)
}
