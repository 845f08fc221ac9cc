//! Which kernel fields the programs read, and where the running kernel has them.

use super::btf::{BtfError, KernelTypes};
use crate::model::telemetry::Disabled;
use lifeboat_ebpf::Layout;

/// A set of programs that need the same fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Run-queue latency.
    Sched,
    /// Block I/O.
    Block,
    /// Who dirtied what kernel threads write back, where the kernel does not charge it to a cgroup2.
    WriteBack,
    /// Dirty extents of a watched device; in an object of their own.
    Watch,
    /// Accesses to a traced device; in an object of their own.
    Trace,
    /// TCP connections.
    Ports,
    /// UDP.
    Datagrams,
    /// Which cgroups were made.
    Births,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Sched,
        Self::Block,
        Self::WriteBack,
        Self::Watch,
        Self::Trace,
        Self::Ports,
        Self::Datagrams,
        Self::Births,
    ];

    /// Name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sched => "sched",
            Self::Block => "block",
            Self::WriteBack => "write-back",
            Self::Watch => "watch",
            Self::Trace => "trace",
            Self::Ports => "ports",
            Self::Datagrams => "datagrams",
            Self::Births => "births",
        }
    }
}

struct Field {
    families: &'static [Family],
    path: &'static str,
    set: fn(&mut Layout) -> &mut u32,
}

macro_rules! fields {
    ($($families:expr => { $($path:literal => $slot:ident),+ $(,)? })+) => {
        &[$($(Field { families: $families, path: $path, set: |layout| &mut layout.$slot }),+),+]
    };
}

const FIELDS: &[Field] = fields! {
    &Family::ALL => {
        "cgroup.kn" => cgroup_kn,
        "cgroup.level" => cgroup_level,
        "kernfs_node.id" => kernfs_node_id,
        "task_struct.cgroups" => task_cgroups,
        "css_set.dfl_cgrp" => css_set_dfl_cgrp,
    }
    &[Family::Sched] => {
        "task_struct.pid" => task_pid,
        "task_struct.sched_info.last_queued" => task_last_queued,
        "task_struct.sched_info.run_delay" => task_run_delay,
        "task_struct.se.cfs_rq" => task_cfs_rq,
        "cfs_rq.rq" => cfs_rq_rq,
        "rq.clock" => rq_clock,
    }
    &[Family::Block, Family::WriteBack, Family::Trace] => {
        "task_struct.flags" => task_flags,
    }
    &[Family::Block] => {
        "request.__data_len" => request_data_len,
    }
    &[Family::WriteBack] => {
        "bio.bi_io_vec" => bio_io_vec,
        "bio_vec.bv_page" => bio_vec_page,
        "page.compound_head" => page_compound_head,
        "page.mapping" => page_mapping,
        "address_space.host" => mapping_host,
        "inode.i_mode" => inode_mode,
    }
    &[Family::Watch] => {
        // Since Linux 5.12, as are the atomic operations that these programs need.
        "bio.bi_bdev" => bio_device,
        "block_device.bd_disk" => device_disk,
        "bio.bi_next" => bio_next,
        "bio.bi_private" => bio_private,
    }
    &[Family::Watch, Family::Trace] => {
        "bio.bi_opf" => bio_opf,
        "bio.bi_iter.bi_sector" => bio_sector,
        "bio.bi_iter.bi_size" => bio_size,
    }
    &[Family::Block, Family::Watch] => {
        "request.__sector" => request_sector,
        "request.bio" => request_bio,
        "request.cmd_flags" => request_cmd_flags,
    }
    &[Family::Block, Family::Watch, Family::Trace] => {
        "gendisk.major" => disk_major,
        "gendisk.first_minor" => disk_first_minor,
    }
    &[Family::Ports, Family::Datagrams] => {
        "sock.__sk_common.skc_num" => sock_num,
        "sock.__sk_common.skc_net.net" => sock_net,
        "net.ns.inum" => net_inum,
    }
    &[Family::Births] => {
        "cgroup.root" => cgroup_root,
        "cgroup_root.hierarchy_id" => cgroup_root_hierarchy_id,
    }
    &[Family::Datagrams] => {
        "sock.__sk_common.skc_incoming_cpu" => sock_incoming_cpu,
    }
    &[Family::Ports] => {
        "sock.__sk_common.skc_family" => sock_family,
        "sock.__sk_common.skc_flags" => sock_flags,
        "sock.__sk_common.skc_dport" => sock_dport,
        "sock.__sk_common.skc_daddr" => sock_daddr,
        "sock.__sk_common.skc_v6_daddr" => sock_v6_daddr,
        "tcp_sock.tcp_mstamp" => tcp_mstamp,
        "tcp_sock.bytes_acked" => tcp_bytes_acked,
        "tcp_sock.snd_una" => tcp_snd_una,
        "tcp_sock.rcv_nxt" => tcp_rcv_nxt,
        "tcp_sock.bytes_sent" => tcp_bytes_sent,
        "tcp_sock.bytes_retrans" => tcp_bytes_retrans,
        "tcp_sock.bytes_received" => tcp_bytes_received,
        "tcp_sock.total_retrans" => tcp_total_retrans,
        "tcp_sock.srtt_us" => tcp_srtt_us,
    }
};

/// Finds every field. A family of which one is missing is in the second list, once, with the field.
#[must_use]
pub fn find(types: &KernelTypes) -> (Layout, Vec<(Family, Disabled)>) {
    let mut layout = Layout::default();
    let mut disabled: Vec<(Family, Disabled)> = Vec::new();
    let mut miss = |family: Family, error: &BtfError| {
        if disabled.iter().all(|(known, _)| *known != family) {
            let reason = Disabled {
                what: family.name().to_owned(),
                why: error.to_string(),
            };
            disabled.push((family, reason));
        }
    };
    for field in FIELDS {
        match types.offset(field.path) {
            Ok(offset) => *(field.set)(&mut layout) = offset,
            Err(error) => field
                .families
                .iter()
                .for_each(|&family| miss(family, &error)),
        }
    }
    // A pointer since Linux 5.16.
    match types.offset("sock.sk_cgrp_data.cgroup") {
        Ok(offset) => layout.sock_cgroup = offset,
        Err(error) => match types.offset("sock.sk_cgrp_data.val") {
            Ok(offset) => {
                layout.sock_cgroup = offset;
                layout.sock_cgroup_is_marked = 1;
            }
            Err(_) => miss(Family::Ports, &error),
        },
    }
    // Renamed in Linux 5.14.
    match types
        .offset("task_struct.__state")
        .or_else(|_| types.offset("task_struct.state"))
    {
        Ok(offset) => layout.task_state = offset,
        Err(error) => miss(Family::Sched, &error),
    }
    // Ids until Linux 6.0, pointers since.
    match types.offset("cgroup.ancestors") {
        Ok(offset) => layout.cgroup_ancestors = offset,
        Err(error) => match types.offset("cgroup.ancestor_ids") {
            Ok(offset) => {
                layout.cgroup_ancestors = offset;
                layout.ancestors_are_ids = 1;
            }
            Err(_) => Family::ALL.iter().for_each(|&family| miss(family, &error)),
        },
    }
    if let Err(error) = find_disk(types, &mut layout) {
        miss(Family::Block, &error);
        miss(Family::Watch, &error);
    }
    if let Err(error) = find_blkg(types, &mut layout) {
        miss(Family::Block, &error);
        miss(Family::Trace, &error);
    }
    // A bio named its disk until Linux 5.11.
    if layout.bio_device == 0 {
        match types.offset("bio.bi_disk") {
            Ok(offset) => (layout.bio_device, layout.bio_has_disk) = (offset, 1),
            Err(error) => miss(Family::Trace, &error),
        }
    }
    // Zones have write plugs since Linux 6.10, which then took a status out, and those above it moved down.
    layout.status_offline = if types.has_name("BIO_ZONE_WRITE_PLUGGING") {
        16
    } else {
        17
    };
    // Before Linux 5.11 the queue came first.
    let has_queue = |tracepoint| u32::from(types.tracepoint_arguments(tracepoint) == Some(2));
    layout.issue_has_queue = has_queue("block_rq_issue");
    layout.queue_has_queue = has_queue("block_bio_queue");
    (layout, disabled)
}

fn find_disk(types: &KernelTypes, layout: &mut Layout) -> Result<(), BtfError> {
    // The request named its disk until Linux 5.16.
    if let Ok(offset) = types.offset("request.rq_disk") {
        layout.request_queue_or_disk = offset;
        layout.request_has_disk = 1;
        return Ok(());
    }
    layout.request_queue_or_disk = types.offset("request.q")?;
    layout.queue_disk = types.offset("request_queue.disk")?;
    Ok(())
}

fn find_blkg(types: &KernelTypes, layout: &mut Layout) -> Result<(), BtfError> {
    // A kernel without block cgroups, or without their write-back, charges nobody.
    let Ok(bio_blkg) = types.offset("bio.bi_blkg") else {
        layout.write_back_uncharged = 1;
        return Ok(());
    };
    layout.write_back_uncharged = u32::from(types.offset("inode.i_wb").is_err());
    layout.blkg_blkcg = types.offset("blkcg_gq.blkcg")?;
    layout.blkcg_cgroup = types.offset("blkcg.css.cgroup")?;
    layout.bio_blkg = bio_blkg;
    Ok(())
}

/// Whether the block or the memory controller is in a cgroup v1 hierarchy, by `/proc/self/cgroup`: the
/// kernel then charges write-back to no cgroup2 (`inode_cgwb_enabled` of include/linux/backing-dev.h).
#[must_use]
pub fn has_v1_write_back(proc_self_cgroup: &str) -> bool {
    proc_self_cgroup.lines().any(|line| {
        let mut fields = line.split(':').skip(1);
        let mut controllers = fields.next().unwrap_or_default().split(',');
        controllers.any(|name| matches!(name, "blkio" | "memory"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_v1_block_or_memory_controller_is_seen() {
        assert!(has_v1_write_back("9:name=systemd:/\n7:blkio:/a\n0::/\n"));
        assert!(has_v1_write_back("3:cpu,memory:/\n"));
        assert!(!has_v1_write_back("3:cpu:/memory\n0::/blkio\n"));
    }

    #[test]
    fn this_kernel_has_every_field() {
        let Ok(data) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            println!("not run: this kernel has no BTF");
            return;
        };
        let types = KernelTypes::parse(data).expect("the kernel's own BTF is well-formed");
        let (layout, disabled) = find(&types);
        assert!(disabled.is_empty(), "{disabled:?}");
        assert_ne!(layout.tcp_bytes_received, layout.tcp_bytes_sent);
        assert_ne!(layout.task_cgroups, 0);
    }

    #[test]
    fn an_empty_kernel_disables_every_family_with_a_field() {
        // A header alone: no types, no strings.
        let mut data = 0xeb9fu16.to_ne_bytes().to_vec();
        data.extend([1, 0]);
        for word in [24u32, 0, 0, 0, 0] {
            data.extend(word.to_ne_bytes());
        }
        let types = KernelTypes::parse(data).expect("well-formed and empty");
        let (_, disabled) = find(&types);
        assert_eq!(disabled.len(), Family::ALL.len());
        assert!(
            disabled[0].1.why.contains("no struct cgroup"),
            "{disabled:?}"
        );
    }
}
