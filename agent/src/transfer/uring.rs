//! The io_uring engine: batches of file operations in one system call, sockets with time limits.
//!
//! Invariants: a call returns only when every operation it submitted has completed, so the kernel
//! never holds a pointer into memory that the caller got back; an engine is used by one thread at a
//! time. Non-goals: polling threads, zero-copy sends (measured elsewhere, not worth their notifications
//! at these sizes).

use super::engine::{Engine, Read, Write, write_whole};
use crate::volume::confined::confining;
use bytes::BytesMut;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::mman::{MmapAdvise, madvise};
use nix::sys::stat::Mode;
use nix::unistd::{SysconfVar, sysconf};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

/// Entries of a ring: a batch of small files in one submission.
const ENTRIES: u32 = 256;
/// `RWF_DONTCACHE` of linux/fs.h (kernel 6.14): serves from the page cache but adds nothing to it.
const RWF_DONTCACHE: i32 = 0x80;
/// Marks the completion of a cancellation.
const CANCEL: u64 = u64::MAX;

/// One ring and its thread's use of it.
pub struct UringEngine {
    ring: IoUring,
    /// A read that leaves the page cache alone was refused: older kernel or file system.
    caches: bool,
}

impl UringEngine {
    /// Sets up a ring and checks that the kernel knows every operation used here.
    ///
    /// # Errors
    /// `EPERM` or `ENOSYS` where io_uring is forbidden or missing; `Unsupported` for an old kernel.
    pub fn new() -> io::Result<Self> {
        // Completions are looked for by the submitting thread anyway; without the flag (before
        // kernel 5.19) it is only interrupted more often.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .build(ENTRIES)
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::new(ENTRIES),
                _ => Err(error),
            })?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::OpenAt2::CODE,
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Send::CODE,
            opcode::Recv::CODE,
            opcode::AsyncCancel::CODE,
        ];
        let known = needed.iter().all(|&code| probe.is_supported(code));
        if !known || !ring.params().is_feature_ext_arg() {
            let text = "this kernel's io_uring lacks operations (5.11 has them)";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        Ok(Self {
            ring,
            caches: false,
        })
    }

    /// Runs operations to completion, at most a ring full of them; results in the same order.
    ///
    /// # Safety
    /// Every pointer in `operations` must stay valid, and every buffer that the kernel writes must
    /// not be touched otherwise, until this returns.
    unsafe fn run(&mut self, operations: &[squeue::Entry]) -> Vec<i32> {
        let count = operations.len();
        let mut results = vec![0; count];
        for (entry, index) in operations.iter().zip(0..) {
            let entry = entry.clone().user_data(index);
            // SAFETY: the caller keeps the operation's memory valid until this returns, and this
            // returns only after all completions.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            assert!(pushed.is_ok(), "a batch is never longer than the ring");
        }
        let mut left = count;
        while left > 0 {
            self.enter(left);
            for completion in self.ring.completion() {
                if let Ok(index) = usize::try_from(completion.user_data())
                    && index < count
                {
                    results[index] = completion.result();
                    left -= 1;
                }
            }
        }
        results
    }

    /// Submits and waits for completions. There is no way on while the kernel may still write to
    /// borrowed memory, so an error that is not a hint to try again ends the process.
    fn enter(&mut self, want: usize) {
        if let Err(error) = self.ring.submit_and_wait(want) {
            retry_or_abort(&error);
        }
    }

    /// Runs one operation with a time limit; `ETIMEDOUT` when it was cancelled for that.
    ///
    /// # Safety
    /// As [`UringEngine::run`].
    unsafe fn run_within(
        &mut self,
        operation: squeue::Entry,
        patience: Duration,
    ) -> io::Result<usize> {
        let entry = operation.user_data(0);
        // SAFETY: as promised by the caller; the loop below leaves only after the completion.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the ring is empty between calls");
        let until = Instant::now() + patience;
        let mut result = None;
        let mut cancelled = false;
        let mut cancelling = false;
        while result.is_none() || cancelling {
            let entered = if cancelled {
                self.ring.submit_and_wait(1)
            } else {
                // A call that submitted something does not say that the time is over.
                let left = until.saturating_duration_since(Instant::now());
                let limit = types::Timespec::from(left);
                let arguments = types::SubmitArgs::new().timespec(&limit);
                self.ring.submitter().submit_with_args(1, &arguments)
            };
            match entered {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ETIME) && !cancelled => {
                    let cancel = opcode::AsyncCancel::new(0).build().user_data(CANCEL);
                    // SAFETY: a cancellation points to no memory.
                    let pushed = unsafe { self.ring.submission().push(&cancel) };
                    assert!(pushed.is_ok(), "the ring holds one operation");
                    cancelled = true;
                    cancelling = true;
                }
                Err(error) => retry_or_abort(&error),
            }
            for completion in self.ring.completion() {
                if completion.user_data() == CANCEL {
                    cancelling = false;
                } else {
                    result = Some(completion.result());
                }
            }
        }
        match result.unwrap_or(-libc::ECANCELED) {
            code if code == -libc::ECANCELED && cancelled => Err(io::ErrorKind::TimedOut.into()),
            code => outcome(code),
        }
    }
}

/// Whether at least half of a range of a file lies in the page cache, so that it is better read from there
/// than from the disk. Before kernel 6.5 nobody can tell, and it is taken as not cached.
pub(super) fn is_cached(file: BorrowedFd<'_>, offset: u64, length: u64) -> bool {
    /// `cachestat` is 451 on every architecture; libc has no name for it yet.
    const CACHESTAT: libc::c_long = 451;
    // `struct cachestat_range` and `struct cachestat` of linux/mman.h.
    let range = [offset, length];
    let mut counts = [0_u64; 5];
    // SAFETY: the kernel reads two words and writes five, all of which live until it returns.
    let code = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            range.as_ptr(),
            counts.as_mut_ptr(),
            0,
        )
    };
    let [cached, ..] = counts;
    code == 0 && cached * 2 * page_size() as u64 >= length
}

fn page_size() -> usize {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.and_then(|bytes| usize::try_from(bytes).ok())
        .unwrap_or(4096)
}

/// Asks for huge pages beneath memory that nothing was written to yet; the kernel gives small ones where it has none.
pub(super) fn prefer_huge_pages(memory: &mut [u8]) {
    let start = NonNull::from(&mut *memory).cast();
    // SAFETY: the advice is about memory that is borrowed here, and changes nothing that is in it.
    let _ = unsafe { madvise(start, memory.len(), MmapAdvise::MADV_HUGEPAGE) };
}

/// Gives the whole pages of memory of the heap back to the kernel: they hold zeros when they are used again.
pub(super) fn release_pages(memory: &mut BytesMut) {
    let (page, address) = (page_size(), memory.as_ptr().addr());
    let start = address.next_multiple_of(page) - address;
    let end = ((address + memory.len()) / page * page).saturating_sub(address);
    let Some(pages) = memory.get_mut(start..end).filter(|pages| !pages.is_empty()) else {
        return;
    };
    let start = NonNull::from(&mut *pages).cast();
    // SAFETY: the pages are private, exclusively borrowed and whole, and zeros are bytes like others.
    let _ = unsafe { madvise(start, pages.len(), MmapAdvise::MADV_DONTNEED) };
}

fn retry_or_abort(error: &io::Error) {
    match error.raw_os_error() {
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => {}
        _ => {
            tracing::error!("io_uring cannot be waited for: {error}; memory is at stake, stopping");
            std::process::abort();
        }
    }
}

/// A completion's result: a count, or an error number below zero.
fn outcome(code: i32) -> io::Result<usize> {
    usize::try_from(code).map_err(|_| io::Error::from_raw_os_error(-code))
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// A length as an operation takes it; longer ones are done in several.
fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(1 << 30).min(1 << 30)
}

impl Engine for UringEngine {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn open_files(&mut self, root: BorrowedFd<'_>, paths: &[&[u8]]) -> Vec<Result<OwnedFd, Errno>> {
        let flags = OFlag::O_RDONLY
            | OFlag::O_NONBLOCK
            | OFlag::O_NOATIME
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC;
        // Flag bits are not negative.
        let how = types::OpenHow::new()
            .flags(u64::from(flags.bits().unsigned_abs()))
            .mode(Mode::empty().bits().into())
            .resolve(confining().bits());
        let mut opened = Vec::with_capacity(paths.len());
        for batch in paths.chunks(ENTRIES as usize) {
            let mut names = Vec::with_capacity(batch.iter().map(|path| path.len() + 1).sum());
            let mut starts = Vec::with_capacity(batch.len());
            for path in batch {
                starts.push(names.len());
                names.extend_from_slice(path);
                names.push(0);
            }
            let operations: Vec<squeue::Entry> = starts
                .iter()
                .map(|&start| {
                    let name = names[start..].as_ptr().cast();
                    opcode::OpenAt2::new(types::Fd(root.as_raw_fd()), name, &raw const how).build()
                })
                .collect();
            // SAFETY: `names` and `how` outlive the call and are not changed meanwhile.
            let results = unsafe { self.run(&operations) };
            for (code, path) in results.into_iter().zip(batch) {
                opened.push(match outcome(code) {
                    // SAFETY: the kernel has just made this descriptor for us alone.
                    Ok(_) => Ok(unsafe { OwnedFd::from_raw_fd(code) }),
                    // Not the owner (no O_NOATIME), or a race that asks for a retry: the long way.
                    Err(error)
                        if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EAGAIN)) =>
                    {
                        super::engine::open_for_reading(root, path)
                    }
                    Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(0))),
                });
            }
        }
        opened
    }

    fn read(&mut self, reads: &mut [Read<'_>]) {
        for batch in reads.chunks_mut(ENTRIES as usize) {
            let mut left: Vec<(usize, usize)> = (0..batch.len())
                .filter(|&index| !batch[index].buffer.is_empty())
                .map(|index| (index, 0))
                .collect();
            for read in &mut *batch {
                read.done = Ok(0);
            }
            while !left.is_empty() {
                // Of several that are refused, the first one changes what the next round asks for.
                let caches = self.caches;
                let operations: Vec<squeue::Entry> = left
                    .iter()
                    .map(|&(index, done)| {
                        let read = &mut batch[index];
                        let rest = &mut read.buffer[done..];
                        let file = types::Fd(read.file.as_raw_fd());
                        let once = read.once && !caches;
                        opcode::Read::new(file, rest.as_mut_ptr(), length(rest.len()))
                            .offset(read.offset + done as u64)
                            .rw_flags(if once { RWF_DONTCACHE } else { 0 })
                            .build()
                    })
                    .collect();
                // SAFETY: the buffers are exclusively borrowed by `batch` and not touched until all
                // reads have completed.
                let results = unsafe { self.run(&operations) };
                let mut again = Vec::new();
                for ((index, done), code) in left.into_iter().zip(results) {
                    let read = &mut batch[index];
                    match outcome(code) {
                        Ok(count) => {
                            read.done = Ok(done + count);
                            if count > 0 && done + count < read.length {
                                again.push((index, done + count));
                            }
                        }
                        Err(error) if is_retry(&error) => again.push((index, done)),
                        Err(error)
                            if error.raw_os_error() == Some(libc::EOPNOTSUPP)
                                && read.once
                                && !caches =>
                        {
                            self.caches = true;
                            again.push((index, done));
                        }
                        Err(error) => read.done = Err(error),
                    }
                }
                left = again;
            }
        }
    }

    fn write(&mut self, writes: &mut [Write<'_>]) {
        for batch in writes.chunks_mut(ENTRIES as usize) {
            let mut left: Vec<(usize, usize)> = (0..batch.len())
                .filter(|&index| batch[index].direct && !batch[index].bytes.is_empty())
                .map(|index| (index, 0))
                .collect();
            for write in &mut *batch {
                // Most file systems write to the page cache only from a thread that may wait: the kernel
                // would hand each one to a worker of its own.
                write.done = if write.direct {
                    Ok(())
                } else {
                    write_whole(write)
                };
            }
            while !left.is_empty() {
                let operations: Vec<squeue::Entry> = left
                    .iter()
                    .map(|&(index, done)| {
                        let write = &batch[index];
                        let rest = &write.bytes[done..];
                        let file = types::Fd(write.file.as_raw_fd());
                        opcode::Write::new(file, rest.as_ptr(), length(rest.len()))
                            .offset(write.offset + done as u64)
                            .build()
                    })
                    .collect();
                // SAFETY: the bytes are borrowed by `batch` until all writes have completed.
                let results = unsafe { self.run(&operations) };
                let mut again = Vec::new();
                for ((index, done), code) in left.into_iter().zip(results) {
                    let write = &mut batch[index];
                    match outcome(code) {
                        Ok(0) => write.done = Err(io::ErrorKind::WriteZero.into()),
                        Ok(count) if done + count < write.bytes.len() => {
                            again.push((index, done + count));
                        }
                        Ok(_) => {}
                        Err(error) if is_retry(&error) => again.push((index, done)),
                        Err(error) => write.done = Err(error),
                    }
                }
                left = again;
            }
        }
    }

    fn send(&mut self, socket: BorrowedFd<'_>, bytes: &[u8], patience: Duration) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let operation = opcode::Send::new(
                types::Fd(socket.as_raw_fd()),
                rest.as_ptr(),
                length(rest.len()),
            )
            .flags(libc::MSG_NOSIGNAL)
            .build();
            // SAFETY: `bytes` is borrowed until the call returns.
            match unsafe { self.run_within(operation, patience) } {
                Ok(count) => done += count,
                Err(error) if is_retry(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: &mut [u8],
        patience: Duration,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let rest = &mut buffer[done..];
            let operation = opcode::Recv::new(
                types::Fd(socket.as_raw_fd()),
                rest.as_mut_ptr(),
                length(rest.len()),
            )
            .build();
            // SAFETY: `buffer` is exclusively borrowed until the call returns.
            match unsafe { self.run_within(operation, patience) } {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(error) if is_retry(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
