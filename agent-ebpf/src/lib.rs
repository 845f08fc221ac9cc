//! Plain data that the kernel programs and the agent share.
//!
//! Invariants: every type is `#[repr(C)]`, has no implicit padding, and means the same on both sides.
//! Non-goals: behaviour; it lives in the programs and in the agent's `telemetry` room.
#![no_std]

mod connections;
pub mod error;

pub use connections::*;

/// Slots of a latency histogram: four for each power of two, in units of 256 ns, the last one for everything from
/// 15 s up. [`latency_from_ns`] tells where each begins.
pub const SLOTS: usize = 100;

/// log2 of the nanoseconds that a latency's slots can tell apart at all.
pub const LATENCY_SHIFT: u32 = 8;

/// log2 of the slots of each power of two.
pub const LATENCY_STEPS: u32 = 2;

/// The least latency that a slot counts, ns.
#[must_use]
pub const fn latency_from_ns(slot: usize) -> u64 {
    let steps = 1 << LATENCY_STEPS;
    if slot < 2 * steps {
        return (slot as u64) << LATENCY_SHIFT;
    }
    let doubled = slot / steps - 1;
    ((steps + slot % steps) as u64) << (doubled as u32 + LATENCY_SHIFT)
}

/// Deepest cgroup whose ancestors the start-up probe reports.
pub const MAX_LEVEL: usize = 32;

/// A histogram of latencies.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Latency {
    /// Values counted, by slot. The count overflows: only differences between two times mean something.
    pub slots: [u32; SLOTS],
}

impl Latency {
    /// Nothing counted.
    pub const EMPTY: Self = Self { slots: [0; SLOTS] };
}

/// cgroups whose run-queue latency can be counted at once.
pub const RUN_QUEUE_ROWS: u32 = 1_023;

/// Histograms of one row, so that CPUs seldom write to the same memory; their sum counts.
pub const RUN_QUEUE_SHARDS: u32 = 4;

/// Places for tasks; two of which the thread ids are equal modulo this share one.
pub const TASK_PLACES: u32 = 65_536;

/// Places in which the switches of CPUs are counted.
pub const SWITCHES_PLACES: u32 = 256;

/// 64-bit words of each of them: a line of the processor's cache.
pub const SWITCHES_WORDS: usize = 8;

/// A runnable task that waits for a CPU.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Waiting {
    /// Id of its cgroup2.
    pub cgroup: u64,
    /// For how long, ns.
    pub age_ns: u64,
}

/// What a task had waited in all at some time, in one word.
pub struct Delay;

impl Delay {
    /// Bits of the time; the thread id is above them and at most 22 bits wide (`PID_MAX_LIMIT`).
    const TIME_BITS: u32 = 42;
    /// Nanoseconds of the time's unit, as a power of two: 42 bits of 256 ns are 13 days.
    const UNIT_SHIFT: u32 = 8;
    const TIME_MASK: u64 = (1 << Self::TIME_BITS) - 1;

    /// The word of a thread that had waited for so long.
    #[inline(always)]
    #[must_use]
    pub const fn pack(pid: u32, delay_ns: u64) -> u64 {
        (pid as u64) << Self::TIME_BITS | delay_ns >> Self::UNIT_SHIFT & Self::TIME_MASK
    }

    /// Whether a word is of this thread.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(word: u64, pid: u32) -> bool {
        word >> Self::TIME_BITS == pid as u64
    }

    /// How much longer the word's thread has waited by now, ns; nothing when it has waited less, because the word is of
    /// another thread that had the same id.
    #[inline(always)]
    #[must_use]
    pub const fn until(word: u64, delay_ns: u64) -> u64 {
        let more = (delay_ns >> Self::UNIT_SHIFT).wrapping_sub(word) & Self::TIME_MASK;
        if more > Self::TIME_MASK / 2 {
            return 0;
        }
        more << Self::UNIT_SHIFT
    }
}

/// What a block request did, from the kernel's `enum req_op`.
pub mod op {
    /// REQ_OP_READ.
    pub const READ: u32 = 0;
    /// REQ_OP_WRITE.
    pub const WRITE: u32 = 1;
    /// REQ_OP_FLUSH.
    pub const FLUSH: u32 = 2;
    /// REQ_OP_DISCARD.
    pub const DISCARD: u32 = 3;
    /// REQ_OP_SECURE_ERASE.
    pub const SECURE_ERASE: u32 = 5;
    /// REQ_OP_WRITE_ZEROES.
    pub const WRITE_ZEROES: u32 = 9;
    /// From here on, commands that the block layer only passes through (`blk_op_is_passthrough`).
    pub const PASSTHROUGH: u32 = 32;
}

/// Whose block I/O, of which kind, on which disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct BlockKey {
    /// cgroup2 id of the issuer.
    pub cgroup: u64,
    /// Disk as the kernel's dev_t: major << 20 | minor.
    pub device: u32,
    /// `enum req_op`.
    pub op: u32,
}

/// Slots of a size histogram: slot n counts sizes in [512 · 2^n, 512 · 2^(n+1)) bytes, the last one
/// everything from 16 MiB up.
pub const SIZE_SLOTS: usize = 16;

/// log2 of the smallest size counted, a sector.
pub const SECTOR_SHIFT: u32 = 9;

/// Block I/O since the programs were loaded.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BlockStats {
    /// Time from issue to completion.
    pub latency: Latency,
    /// Requests issued, by size; those without data are not counted.
    pub sizes: [u64; SIZE_SLOTS],
    /// Requests that failed, by [`error`].
    pub errors: [u64; error::COUNT],
    /// Sum of all latencies, ns.
    pub busy_ns: u64,
    /// Bytes completed.
    pub bytes: u64,
    /// Requests that failed before they were issued; the others are in `latency`.
    pub unissued: u64,
    /// Requests issued that begin where the one before them ended.
    pub sequential: u64,
    /// First sector after the last request issued.
    pub next_sector: u64,
}

impl BlockStats {
    /// Nothing counted.
    pub const EMPTY: Self = Self {
        latency: Latency::EMPTY,
        sizes: [0; SIZE_SLOTS],
        errors: [0; error::COUNT],
        busy_ns: 0,
        bytes: 0,
        unissued: 0,
        sequential: 0,
        next_sector: 0,
    };
}

/// Whose statistics a row of `BLOCK` holds, and the statistics.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BlockRow {
    /// Whose; its `device` is 0 where the row is free.
    pub key: BlockKey,
    /// What it did.
    pub stats: BlockStats,
}

impl BlockRow {
    /// Nobody's.
    pub const FREE: Self = Self {
        key: BlockKey {
            cgroup: 0,
            device: 0,
            op: 0,
        },
        stats: BlockStats::EMPTY,
    };
}

/// Rows of `BLOCK`.
pub const BLOCK_ROWS: u32 = 4_096;

/// Places for requests between issue and completion, in groups of [`IN_FLIGHT_GROUP`].
pub const IN_FLIGHT_PLACES: u32 = 1 << 14;

/// A request is in one of so many places, which its address's hash names.
pub const IN_FLIGHT_GROUP: u32 = 4;

/// A request between issue and completion.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct InFlight {
    /// What stands for it; 0 in a place without one.
    pub request: u64,
    /// When it was issued, ns of the monotonic clock; 0 while it waits in the kernel's I/O scheduler.
    pub since_ns: u64,
    /// The row of `BLOCK` where its completion is counted.
    pub row: u32,
    /// Zero.
    pub padding: u32,
}

/// What the watch of a block device watches. A global of the programs.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Watched {
    /// First sector on the disk; not 0 for a partition.
    pub first_sector: u64,
    /// Sectors.
    pub sectors: u64,
    /// Disk as the kernel's dev_t: major << 20 | minor.
    pub device: u32,
    /// log2 of the granule that a bit stands for, in bytes; at least 16.
    pub granule_shift: u32,
    /// 64-bit words of an epoch's bitmap.
    pub words: u32,
    /// 1 when the disk takes requests, of which the kernel traces the end; 0 when it takes bios themselves.
    pub takes_requests: u32,
}

/// A write to a watched device between its beginning and its end.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Writing {
    /// First sector on the disk.
    pub sector: u64,
    /// Length.
    pub bytes: u64,
}

/// What an access trace is of. A global of the programs.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Traced {
    /// First sector on the disk; not 0 for a partition.
    pub first_sector: u64,
    /// Sectors.
    pub sectors: u64,
    /// Disk as the kernel's dev_t: major << 20 | minor.
    pub device: u32,
    /// Zero.
    pub padding: u32,
}

/// Accesses that an access trace counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct AccessKey {
    /// cgroup2 id of the cause.
    pub cgroup: u64,
    /// First sector, from the beginning of what is traced.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// [`access`].
    pub kind: u32,
}

/// Bits of [`AccessKey::kind`].
pub mod access {
    /// It writes.
    pub const WRITE: u32 = 1;
    /// It was counted in an epoch with an odd number.
    pub const ODD: u32 = 2;
}

/// Accesses of one [`AccessKey`] in one epoch.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Access {
    /// The first, ns of the monotonic clock.
    pub first_ns: u64,
    /// How many.
    pub count: u64,
}

/// Words of the `STATE` of a watch.
pub mod watch_state {
    /// The current epoch; its lowest bit chooses the bitmap.
    pub const EPOCH: u32 = 0;
    /// Not 0 when everything is dirty in the epochs of the first bitmap; the next word, of the second.
    pub const EVERYTHING: u32 = 1;
    /// How many there are.
    pub const COUNT: u32 = 3;
}

/// The start-up probe's answer: the cgroup2 ids of the agent's own cgroup and its ancestors, root first;
/// 0 past its own level.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ancestors {
    /// Ids by level.
    pub ids: [u64; MAX_LEVEL],
}

/// Longest path of a cgroup that is told, with its NUL.
pub const BORN_PATH: usize = 384;

/// A cgroup that was made.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Born {
    /// cgroup2 id.
    pub id: u64,
    /// Path from the root of the hierarchy, ended by NUL; cut off when it is too long.
    pub path: [u8; BORN_PATH],
}

/// Maps and queues whose failed inserts are counted, in the order of the `LOSSES` array.
pub mod loss {
    /// `RUN_QUEUE`: a cgroup has no histogram.
    pub const RUN_QUEUE: u32 = 0;
    /// `IN_FLIGHT`: a request was not noted.
    pub const IN_FLIGHT: u32 = 1;
    /// `BLOCK`: a (cgroup, disk, op) has no statistics.
    pub const BLOCK: u32 = 2;
    /// `OPEN`: an open connection was not noted.
    pub const OPEN: u32 = 3;
    /// `PORTS`: a kind of connection was not noted.
    pub const PORTS: u32 = 4;
    /// `LISTENING`: a listening port was not noted.
    pub const LISTENING: u32 = 5;
    /// `FIRST_SEEN`: the ring buffer was full.
    pub const FIRST_SEEN: u32 = 6;
    /// `DIRTIERS`: whoever dirtied a file was not noted.
    pub const DIRTIERS: u32 = 7;
    /// `WRITING`: a write to a watched device was not noted; its end marks everything.
    pub const WRITING: u32 = 8;
    /// `ACCESSES`: an access is missing in a trace.
    pub const ACCESSES: u32 = 9;
    /// `BORN`: the ring buffer was full.
    pub const BORN: u32 = 10;
    /// How many there are.
    pub const COUNT: u32 = 11;
}

/// Offsets of kernel fields, in bytes, from the running kernel's BTF; and the scope.
///
/// A field that the kernel lacks is 0 here and its program is not loaded.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Layout {
    /// cgroup2 id of the scope; only read when `scope_level` is not 0.
    pub scope_id: u64,
    /// Level of the scope in the kernel's hierarchy; 0: everything is in scope.
    pub scope_level: u32,
    /// 1 when `cgroup_ancestors` holds ids, 0 when it holds pointers (since Linux 6.1).
    pub ancestors_are_ids: u32,
    /// 1 when block_rq_issue has the queue before the request (before Linux 5.11).
    pub issue_has_queue: u32,
    /// The number of BLK_STS_OFFLINE: 16 since Linux 6.10, 17 before.
    pub status_offline: u32,
    /// Groups of open connections.
    pub open_groups: u32,
    /// 1 when block_bio_queue has the queue before the bio (before Linux 5.11).
    pub queue_has_queue: u32,
    /// 1 when a bio names its disk itself (before Linux 5.12), 0 when its device does.
    pub bio_has_disk: u32,
    /// 1 when a request names its disk itself (before Linux 5.17), 0 when its queue does.
    pub request_has_disk: u32,
    /// task_struct.pid
    pub task_pid: u32,
    /// task_struct.__state, or .state before Linux 5.14
    pub task_state: u32,
    /// task_struct.sched_info.last_queued
    pub task_last_queued: u32,
    /// task_struct.sched_info.run_delay
    pub task_run_delay: u32,
    /// task_struct.se.cfs_rq
    pub task_cfs_rq: u32,
    /// cfs_rq.rq
    pub cfs_rq_rq: u32,
    /// rq.clock
    pub rq_clock: u32,
    /// task_struct.cgroups
    pub task_cgroups: u32,
    /// task_struct.flags
    pub task_flags: u32,
    /// css_set.dfl_cgrp
    pub css_set_dfl_cgrp: u32,
    /// cgroup.root
    pub cgroup_root: u32,
    /// cgroup_root.hierarchy_id
    pub cgroup_root_hierarchy_id: u32,
    /// cgroup.kn
    pub cgroup_kn: u32,
    /// cgroup.level
    pub cgroup_level: u32,
    /// cgroup.ancestors, or .ancestor_ids
    pub cgroup_ancestors: u32,
    /// kernfs_node.id
    pub kernfs_node_id: u32,
    /// request.cmd_flags
    pub request_cmd_flags: u32,
    /// request.__data_len
    pub request_data_len: u32,
    /// request.bio
    pub request_bio: u32,
    /// request.q, or .rq_disk
    pub request_queue_or_disk: u32,
    /// request.__sector
    pub request_sector: u32,
    /// request_queue.disk
    pub queue_disk: u32,
    /// gendisk.major
    pub disk_major: u32,
    /// gendisk.first_minor
    pub disk_first_minor: u32,
    /// bio.bi_blkg; 0 when the kernel has no block cgroups
    pub bio_blkg: u32,
    /// blkcg_gq.blkcg
    pub blkg_blkcg: u32,
    /// blkcg.css.cgroup
    pub blkcg_cgroup: u32,
    /// 1 when the kernel cannot charge write-back to a cgroup2: the block or memory controller is in a
    /// cgroup v1 hierarchy, or there is none.
    pub write_back_uncharged: u32,
    /// bio.bi_io_vec
    pub bio_io_vec: u32,
    /// bio_vec.bv_page
    pub bio_vec_page: u32,
    /// page.compound_head
    pub page_compound_head: u32,
    /// page.mapping
    pub page_mapping: u32,
    /// bio.bi_bdev, or .bi_disk
    pub bio_device: u32,
    /// bio.bi_next
    pub bio_next: u32,
    /// bio.bi_opf
    pub bio_opf: u32,
    /// bio.bi_iter.bi_sector
    pub bio_sector: u32,
    /// bio.bi_iter.bi_size
    pub bio_size: u32,
    /// bio.bi_private
    pub bio_private: u32,
    /// block_device.bd_disk
    pub device_disk: u32,
    /// address_space.host
    pub mapping_host: u32,
    /// inode.i_mode
    pub inode_mode: u32,
    /// sock.sk_cgrp_data.cgroup
    pub sock_cgroup: u32,
    /// 1 when that word is no pointer if one of its two lowest bits is set (before Linux 5.16).
    pub sock_cgroup_is_marked: u32,
    /// sock.__sk_common.skc_family
    pub sock_family: u32,
    /// sock.__sk_common.skc_num
    pub sock_num: u32,
    /// sock.__sk_common.skc_dport
    pub sock_dport: u32,
    /// sock.__sk_common.skc_daddr
    pub sock_daddr: u32,
    /// sock.__sk_common.skc_v6_daddr
    pub sock_v6_daddr: u32,
    /// sock.__sk_common.skc_net.net
    pub sock_net: u32,
    /// net.ns.inum
    pub net_inum: u32,
    /// tcp_sock.bytes_sent
    pub tcp_bytes_sent: u32,
    /// tcp_sock.bytes_retrans
    pub tcp_bytes_retrans: u32,
    /// tcp_sock.bytes_received
    pub tcp_bytes_received: u32,
    /// tcp_sock.total_retrans
    pub tcp_total_retrans: u32,
    /// tcp_sock.srtt_us
    pub tcp_srtt_us: u32,
    /// tcp_sock.tcp_mstamp
    pub tcp_mstamp: u32,
    /// tcp_sock.bytes_acked
    pub tcp_bytes_acked: u32,
    /// tcp_sock.snd_una
    pub tcp_snd_una: u32,
    /// tcp_sock.rcv_nxt
    pub tcp_rcv_nxt: u32,
    /// sock.__sk_common.skc_incoming_cpu
    pub sock_incoming_cpu: u32,
    /// sock.__sk_common.skc_flags
    pub sock_flags: u32,
}

#[cfg(feature = "user")]
mod pod {
    use super::*;
    use aya::Pod;

    // SAFETY: `#[repr(C)]` integers and arrays of them without implicit padding; any bytes are a value.
    unsafe impl Pod for Latency {}
    // SAFETY: as above.
    unsafe impl Pod for BlockKey {}
    // SAFETY: as above.
    unsafe impl Pod for BlockRow {}
    // SAFETY: as above.
    unsafe impl Pod for InFlight {}
    // SAFETY: as above.
    unsafe impl Pod for PortKey {}
    // SAFETY: as above.
    unsafe impl Pod for PortRow {}
    // SAFETY: as above.
    unsafe impl Pod for Open {}
    // SAFETY: as above.
    unsafe impl Pod for ListenKey {}
    // SAFETY: as above.
    unsafe impl Pod for Ancestors {}
    // SAFETY: as above.
    unsafe impl Pod for Watched {}
    // SAFETY: as above.
    unsafe impl Pod for Traced {}
    // SAFETY: as above.
    unsafe impl Pod for AccessKey {}
    // SAFETY: as above.
    unsafe impl Pod for Access {}
    // SAFETY: as above.
    unsafe impl Pod for Layout {}
}
