//! Which cgroups the agent may see, and where it lies itself.

use crate::kernel::{Object, layout, load, probe};
use aya_ebpf::helpers::bpf_get_current_ancestor_cgroup_id;
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::RawTracePointContext;
use lifeboat_ebpf::{Ancestors, MAX_LEVEL};

#[map]
static ANCESTORS: Array<Ancestors> = Array::with_max_entries(1, 0);

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

/// The id of a cgroup2 cgroup within the scope; none outside of it.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn scoped_id(cgroup: Object) -> Option<u64> {
    // SAFETY: the caller's contract.
    unsafe {
        let level = layout!(scope_level);
        if level != 0 {
            let own_level: i32 = load(cgroup, layout!(cgroup_level));
            if own_level < level as i32 || ancestor_id(cgroup, level)? != layout!(scope_id) {
                return None;
            }
        }
        let kn: Object = load(cgroup, layout!(cgroup_kn));
        Some(load(kn, layout!(kernfs_node_id)))
    }
}

/// The array is a flexible one, for which the verifier has no typed load.
#[inline(always)]
fn ancestor_id(cgroup: Object, level: u32) -> Option<u64> {
    let slot = layout!(cgroup_ancestors) + level * 8;
    if layout!(ancestors_are_ids) != 0 {
        return probe(cgroup, slot);
    }
    let ancestor: Object = probe(cgroup, slot)?;
    let kn: Object = probe(ancestor, layout!(cgroup_kn))?;
    probe(kn, layout!(kernfs_node_id))
}
