//! Reading kernel memory, and the maps and helpers all families use.

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_probe_read_kernel};
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use core::arch::asm;
use lifeboat_ebpf::{LATENCY_SHIFT, LATENCY_STEPS, Latency, Layout, SLOTS, loss};

#[map]
static LOSSES: Array<u64> = Array::with_max_entries(loss::COUNT, 0);

/// Replaced by the agent before loading; read-only from then on, so that the verifier knows each value.
#[unsafe(no_mangle)]
pub static LAYOUT: Layout = Layout {
    scope_id: 0,
    scope_level: 0,
    ancestors_are_ids: 0,
    issue_has_queue: 0,
    status_offline: 0,
    open_groups: 0,
    queue_has_queue: 0,
    bio_has_disk: 0,
    request_has_disk: 0,
    task_pid: 0,
    task_state: 0,
    task_last_queued: 0,
    task_run_delay: 0,
    task_cfs_rq: 0,
    cfs_rq_rq: 0,
    rq_clock: 0,
    task_cgroups: 0,
    task_flags: 0,
    css_set_dfl_cgrp: 0,
    cgroup_root: 0,
    cgroup_root_hierarchy_id: 0,
    cgroup_kn: 0,
    cgroup_level: 0,
    cgroup_ancestors: 0,
    kernfs_node_id: 0,
    request_cmd_flags: 0,
    request_data_len: 0,
    request_bio: 0,
    request_queue_or_disk: 0,
    request_sector: 0,
    queue_disk: 0,
    disk_major: 0,
    disk_first_minor: 0,
    bio_blkg: 0,
    blkg_blkcg: 0,
    blkcg_cgroup: 0,
    write_back_uncharged: 0,
    bio_io_vec: 0,
    bio_vec_page: 0,
    page_compound_head: 0,
    page_mapping: 0,
    bio_device: 0,
    bio_next: 0,
    bio_opf: 0,
    bio_sector: 0,
    bio_size: 0,
    bio_private: 0,
    device_disk: 0,
    mapping_host: 0,
    inode_mode: 0,
    sock_cgroup: 0,
    sock_cgroup_is_marked: 0,
    sock_family: 0,
    sock_num: 0,
    sock_dport: 0,
    sock_daddr: 0,
    sock_v6_daddr: 0,
    sock_net: 0,
    net_inum: 0,
    tcp_bytes_sent: 0,
    tcp_bytes_retrans: 0,
    tcp_bytes_received: 0,
    tcp_total_retrans: 0,
    tcp_srtt_us: 0,
    tcp_mstamp: 0,
    tcp_bytes_acked: 0,
    tcp_snd_una: 0,
    tcp_rcv_nxt: 0,
    sock_incoming_cpu: 0,
    sock_flags: 0,
};

/// A value of [`LAYOUT`], as the agent set it.
macro_rules! layout {
    ($field:ident) => {
        $crate::kernel::set_by_agent(&$crate::kernel::LAYOUT.$field)
    };
}
pub(crate) use layout;

#[inline(always)]
pub fn set_by_agent<T: Copy>(placeholder: &T) -> T {
    // SAFETY: a reference is valid to read; volatile, because the compiler must not fold the placeholder.
    unsafe { core::ptr::read_volatile(placeholder) }
}

/// An object in the kernel; never dereferenced as a Rust reference.
pub type Object = *const u8;

/// Loads a field from a pointer whose kernel type the verifier knows.
///
/// # Safety
/// `object` must come from a tp_btf argument or from a typed load of such; the kernel turns a fault into 0.
#[inline(always)]
pub unsafe fn load<T: Copy>(object: Object, offset: u32) -> T {
    // SAFETY: the caller's contract; the verifier rejects the program when the field does not fit its type.
    unsafe { core::ptr::read_volatile(object.byte_add(offset as usize).cast()) }
}

/// Reads a field from any kernel address; none when the address is bad.
#[inline(always)]
pub fn probe<T>(object: Object, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address and copies; T is a plain integer or pointer at every use.
    unsafe { bpf_probe_read_kernel(object.wrapping_byte_add(offset as usize).cast()) }.ok()
}

/// Now, ns of the monotonic clock.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// Counts a failed insert or reserve.
#[inline(always)]
pub fn lost(index: u32) {
    if let Some(counter) = LOSSES.get_ptr_mut(index) {
        add(counter, 1);
    }
}

/// Adds to a counter in a map, which other CPUs may do at the same time.
///
/// Assembly, because Rust's BPF target has no atomic read-modify-write in `core`.
#[inline(always)]
pub fn add(counter: *mut u64, value: u64) {
    // SAFETY: every caller passes an aligned counter within a map value, which lives for the whole
    // program run (maps free under RCU).
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {value}",
            counter = in(reg) counter,
            value = in(reg) value,
            options(nostack),
        );
    }
}

/// Whether this object may have the atomic instructions of Linux 5.12, which return what was there. Older
/// kernels refuse them also in code that is never reached.
const EXCHANGES: bool = !matches!(env!("CARGO_BIN_NAME").as_bytes(), b"lifeboat-plain");

/// Puts `value` into a counter in a map and returns what was there. Where the kernel cannot do that at once,
/// two CPUs that do it to the same counter within nanoseconds may both get what was there.
#[inline(always)]
pub fn exchange(counter: *mut u64, value: u64) -> u64 {
    if !EXCHANGES {
        // SAFETY: as for `add`; volatile, so that each is one load or store.
        unsafe {
            let before = core::ptr::read_volatile(counter);
            core::ptr::write_volatile(counter, value);
            return before;
        }
    }
    let before;
    // SAFETY: as for `add`.
    unsafe {
        asm!(
            "{value} = xchg_64({counter} + 0, {value})",
            counter = in(reg) counter,
            value = inout(reg) value => before,
            options(nostack),
        );
    }
    before
}

/// Puts `new` into a word in a map if `expected` is there; whether it was. Where the kernel cannot do that at once,
/// two CPUs that do it to the same word within nanoseconds may both be told so.
#[inline(always)]
pub fn compare_exchange(word: *mut u64, expected: u64, new: u64) -> bool {
    if !EXCHANGES {
        // SAFETY: as for `exchange`.
        unsafe {
            let is_expected = core::ptr::read_volatile(word) == expected;
            if is_expected {
                core::ptr::write_volatile(word, new);
            }
            return is_expected;
        }
    }
    let before: u64;
    // SAFETY: as for `add`.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word,
            new = in(reg) new,
            inout("r0") expected => before,
            options(nostack),
        );
    }
    before == expected
}

/// Sets bits of a word in a map; a full memory barrier (Linux 5.12).
#[inline(always)]
pub fn fetch_or(word: *mut u64, bits: u64) {
    // SAFETY: as for `add`.
    unsafe {
        asm!(
            "{bits} = atomic_fetch_or((u64 *)({word} + 0), {bits})",
            word = in(reg) word,
            bits = inout(reg) bits => _,
            options(nostack),
        );
    }
}

/// Counts a latency in its slot.
#[inline(always)]
pub fn record(latency: *mut Latency, nanoseconds: u64) {
    let value = nanoseconds >> LATENCY_SHIFT;
    // Values below the steps of the first power of two are slots themselves.
    let doubled = log2(value | 1 << LATENCY_STEPS) as u64 - u64::from(LATENCY_STEPS);
    let mut slot = ((doubled << LATENCY_STEPS) + (value >> doubled)) as usize;
    if slot >= SLOTS {
        slot = SLOTS - 1;
    }
    // SAFETY: `latency` points into a map value, in which `slot` is below SLOTS.
    unsafe {
        let counter = (&raw mut (*latency).slots).cast::<u32>().add(slot);
        asm!(
            "lock *(u32 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1u64,
            options(nostack),
        );
    }
}

/// Index of the highest set bit; 0 for 0. The BPF instruction set has no count-leading-zeros, and
/// branches on a latency would be mispredicted: the bits below the highest one are set and counted.
#[inline(always)]
pub fn log2(mut value: u64) -> usize {
    value |= value >> 1;
    value |= value >> 2;
    value |= value >> 4;
    value |= value >> 8;
    value |= value >> 16;
    value |= value >> 32;
    value >>= 1;
    value -= value >> 1 & 0x5555_5555_5555_5555;
    value = (value & 0x3333_3333_3333_3333) + (value >> 2 & 0x3333_3333_3333_3333);
    value = (value + (value >> 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    (value.wrapping_mul(0x0101_0101_0101_0101) >> 56) as usize
}
