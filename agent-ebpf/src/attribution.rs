//! Whose block I/O it is: the cgroup that caused it, not the thread that happens to issue it.

use crate::kernel::{Object, layout, load, lost, probe};
use crate::scope::{ancestor_id, cgroup_id, own_cgroup, own_scoped_id, running, scoped_id};
use aya_ebpf::helpers::bpf_get_current_cgroup_id;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::BtfTracePointContext;
use lifeboat_ebpf::{loss, op};

/// The cgroup that last dirtied a file, by the file's address_space; 0: one outside of the scope. The
/// oldest give way; only filled where the kernel does not charge write-back itself.
#[map]
static DIRTIERS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(16_384, 0);

/// A kernel thread (include/linux/sched.h).
const PF_KTHREAD: u32 = 0x0020_0000;

const S_IFMT: u16 = 0o170_000;
const S_IFBLK: u16 = 0o060_000;

/// The scoped id of the cgroup that caused a bio.
///
/// The kernel charges a bio to the nearest cgroup2 with the io controller, write-back to the dirtier's. A
/// task below that cgroup is named itself; a thread that issues for others is not. With a v1 block
/// controller it is the task, and for kernel threads whoever dirtied the page.
///
/// # Safety
/// `bio` must be null or a pointer whose type the verifier knows.
#[inline(always)]
pub unsafe fn causer(bio: Object, operation: u32) -> Option<u64> {
    // SAFETY: the caller's contract.
    unsafe {
        if !bio.is_null() {
            if layout!(write_back_uncharged) == 0 {
                let charged = charged_to(bio);
                if !charged.is_null() && !is_of_running(charged) {
                    return scoped_id(charged);
                }
            } else if operation == op::WRITE && runs_kernel_thread() {
                if let Some(dirtier) = dirtier(bio) {
                    return (dirtier != 0).then_some(dirtier);
                }
            }
        }
    }
    own_scoped_id()
}

#[inline(always)]
fn runs_kernel_thread() -> bool {
    let flags: Option<u32> = probe(running(), layout!(task_flags));
    flags.is_none_or(|flags| flags & PF_KTHREAD != 0)
}

/// Whether the running task's cgroup is this one or lies below it, and the task is no kernel thread.
///
/// # Safety
/// `cgroup` must be a pointer to a cgroup whose type the verifier knows.
#[inline(always)]
unsafe fn is_of_running(cgroup: Object) -> bool {
    // SAFETY: the caller's contract; the helper takes nothing.
    let (id, own, level): (u64, u64, u32) = unsafe {
        (
            cgroup_id(cgroup),
            bpf_get_current_cgroup_id(),
            load(cgroup, layout!(cgroup_level)),
        )
    };
    if id == own {
        // A kernel thread in it is nobody else.
        return true;
    }
    !runs_kernel_thread() && own_cgroup().is_some_and(|own| ancestor_id(own, level) == id)
}

/// The cgroup2 cgroup that the kernel charges; null when there is none.
///
/// # Safety
/// `bio` must be null or a pointer to a bio whose type the verifier knows.
#[inline(always)]
unsafe fn charged_to(bio: Object) -> Object {
    // SAFETY: `bio` is typed; the kernel turns a fault into 0.
    unsafe {
        let blkg: Object = load(bio, layout!(bio_blkg));
        let blkcg: Object = load(blkg, layout!(blkg_blkcg));
        load(blkcg, layout!(blkcg_cgroup))
    }
}

/// The cgroup that dirtied the first page of a bio.
///
/// # Safety
/// `bio` must be null or a pointer to a bio whose type the verifier knows.
#[inline(always)]
unsafe fn dirtier(bio: Object) -> Option<u64> {
    // SAFETY: `bio` is typed. These words of a page are unions, which only the checking helper reads.
    unsafe {
        let vector: Object = load(bio, layout!(bio_io_vec));
        let page: Object = load(vector, layout!(bio_vec_page));
        let head: u64 = probe(page, layout!(page_compound_head))?;
        // A tail page has its head's address here, marked by the lowest bit.
        let folio = if head & 1 != 0 {
            (head - 1) as Object
        } else {
            page
        };
        let mapping: u64 = probe(folio, layout!(page_mapping))?;
        DIRTIERS.get(&mapping).copied()
    }
}

/// A page becomes dirty in the context of who dirties it. Called `writeback_dirty_page` before Linux 5.18.
#[btf_tracepoint(function = "writeback_dirty_folio")]
pub fn writeback_dirty_folio(ctx: BtfTracePointContext) -> i32 {
    let mapping: Object = ctx.arg(1);
    // SAFETY: the tracepoint's arguments are (folio or page, address_space); map values live for the
    // program run and an id is one aligned word.
    unsafe {
        if mapping.is_null() {
            return 0;
        }
        let inode: Object = load(mapping, layout!(mapping_host));
        let mode: u16 = load(inode, layout!(inode_mode));
        // The pages of a block device are the metadata of a file system: everybody dirties them.
        if mode & S_IFMT == S_IFBLK {
            return 0;
        }
        let cgroup = own_scoped_id().unwrap_or(0);
        let key = mapping as u64;
        match DIRTIERS.get_ptr_mut(&key) {
            Some(known) if *known == cgroup => {}
            // A kernel thread that marks a page dirty again did not change it.
            _ if runs_kernel_thread() => {}
            Some(known) => *known = cgroup,
            None => {
                if DIRTIERS.insert(&key, &cgroup, 0).is_err() {
                    lost(loss::DIRTIERS);
                }
            }
        }
    }
    0
}
