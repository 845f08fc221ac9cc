//! Births of cgroups: id and path, which nobody can be asked for once they are gone.

use crate::kernel::{Object, layout, load, lost};
use crate::scope::scoped_id;
use aya_ebpf::helpers::bpf_probe_read_kernel_str_bytes;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::RingBuf;
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{BORN_PATH, Born, loss};

#[map]
static BORN: RingBuf = RingBuf::with_byte_size(128 * 1024, 0);

#[btf_tracepoint(function = "cgroup_mkdir")]
pub fn cgroup_mkdir(ctx: BtfTracePointContext) -> i32 {
    let cgroup: Object = ctx.arg(0);
    let path: Object = ctx.arg(1);
    // SAFETY: the tracepoint's arguments are (cgroup, path); a reserved entry is ours until it is submitted.
    unsafe {
        let root: Object = load(cgroup, layout!(cgroup_root));
        let hierarchy: i32 = load(root, layout!(cgroup_root_hierarchy_id));
        // Those of cgroup v1 have numbers of their own, which are not those of cgroup2.
        if hierarchy != 0 {
            return 0;
        }
        let Some(id) = scoped_id(cgroup) else {
            return 0;
        };
        let Some(mut entry) = BORN.reserve::<Born>(0) else {
            lost(loss::BORN);
            return 0;
        };
        let born = entry.as_mut_ptr();
        (*born).id = id;
        (*born).path[0] = 0;
        let text = &mut *(&raw mut (*born).path).cast::<[u8; BORN_PATH]>();
        // Left empty when it cannot be read.
        let _ = bpf_probe_read_kernel_str_bytes(path, text);
        entry.submit(0);
    }
    0
}
