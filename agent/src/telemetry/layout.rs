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
    /// TCP connections.
    Ports,
    /// UDP.
    Datagrams,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sched, Self::Block, Self::Ports, Self::Datagrams];

    /// Name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sched => "sched",
            Self::Block => "block",
            Self::Ports => "ports",
            Self::Datagrams => "datagrams",
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
    }
    &[Family::Sched, Family::Block] => {
        "task_struct.cgroups" => task_cgroups,
        "css_set.dfl_cgrp" => css_set_dfl_cgrp,
    }
    &[Family::Sched] => {
        "task_struct.pid" => task_pid,
        "task_struct.on_cpu" => task_on_cpu,
    }
    &[Family::Block] => {
        "request.cmd_flags" => request_cmd_flags,
        "request.__data_len" => request_data_len,
        "request.bio" => request_bio,
        "gendisk.major" => disk_major,
        "gendisk.first_minor" => disk_first_minor,
    }
    &[Family::Ports, Family::Datagrams] => {
        "sock.__sk_common.skc_num" => sock_num,
        "sock.__sk_common.skc_net.net" => sock_net,
        "net.ns.inum" => net_inum,
    }
    &[Family::Datagrams] => {
        "sock.__sk_common.skc_incoming_cpu" => sock_incoming_cpu,
    }
    &[Family::Ports] => {
        "sock.sk_cgrp_data.cgroup" => sock_cgroup,
        "sock.__sk_common.skc_family" => sock_family,
        "sock.__sk_common.skc_dport" => sock_dport,
        "sock.__sk_common.skc_daddr" => sock_daddr,
        "sock.__sk_common.skc_v6_daddr" => sock_v6_daddr,
        "sock.sk_protocol" => sock_protocol,
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
    if let Err(error) = find_disk(types, &mut layout).and_then(|()| find_blkg(types, &mut layout)) {
        miss(Family::Block, &error);
    }
    // Before Linux 5.11 the queue came first.
    layout.issue_has_queue = u32::from(types.tracepoint_arguments("block_rq_issue") == Some(2));
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
    // A kernel without block cgroups charges nobody: the issuing task is all there is.
    let Ok(bio_blkg) = types.offset("bio.bi_blkg") else {
        return Ok(());
    };
    layout.blkg_blkcg = types.offset("blkcg_gq.blkcg")?;
    layout.blkcg_cgroup = types.offset("blkcg.css.cgroup")?;
    layout.cgroup_root = types.offset("cgroup.root")?;
    layout.cgroup_root_hierarchy_id = types.offset("cgroup_root.hierarchy_id")?;
    layout.bio_blkg = bio_blkg;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
