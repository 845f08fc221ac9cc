//! Which cgroups the agent may see, and where it lies itself.

use crate::kernel::{Object, layout, load, probe};
use aya_ebpf::helpers::bpf_get_current_ancestor_cgroup_id;
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
    let Some(answer) = ANCESTORS.get_ptr_mut(0) else {
        return 0;
    };
    for level in 0..MAX_LEVEL {
        // SAFETY: the helper takes any level; `answer` points to a map value with MAX_LEVEL ids.
        unsafe { (*answer).ids[level] = bpf_get_current_ancestor_cgroup_id(level as i32) };
    }
    0
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
    // SAFETY: the caller's contract; the answer is one aligned word of a map.
    unsafe {
        let id = cgroup_id(cgroup);
        if layout!(scope_level) == 0 {
            return Some(id);
        }
        let answer = ANSWERS.get_ptr_mut(place_by_hash(id, ANSWERS_BITS))?;
        let known = *answer;
        if known << 1 == id << 1 {
            return (known >> 63 == 1).then_some(id);
        }
        let within = is_within(cgroup);
        *answer = id << 1 >> 1 | u64::from(within) << 63;
        within.then_some(id)
    }
}

/// Asks the cgroup itself, which takes three helper calls.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
unsafe fn is_within(cgroup: Object) -> bool {
    let level = layout!(scope_level);
    // SAFETY: the caller's contract.
    let own_level: i32 = unsafe { load(cgroup, layout!(cgroup_level)) };
    own_level >= level as i32 && ancestor_id(cgroup, level) == Some(layout!(scope_id))
}

/// The id of a cgroup's ancestor at a level, which must not be below its own.
///
/// The array is a flexible one, for which the verifier has no typed load.
#[inline(always)]
pub fn ancestor_id(cgroup: Object, level: u32) -> Option<u64> {
    let slot = layout!(cgroup_ancestors) + level * 8;
    if layout!(ancestors_are_ids) != 0 {
        return probe(cgroup, slot);
    }
    let ancestor: Object = probe(cgroup, slot)?;
    let kn: Object = probe(ancestor, layout!(cgroup_kn))?;
    probe(kn, layout!(kernfs_node_id))
}
