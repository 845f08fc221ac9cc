//! The rings over which ublk is spoken: commands to its control device, and the requests of a device's only queue.
//!
//! Unsafe code of this room is here alone: the crate cannot know that what a command points to lives on, and what
//! the driver shares is a mapping. Invariants: a control command has ended when its call returns; commands of the
//! queue point to no memory.

use super::abi;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

/// The control device.
pub(super) struct Control {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    device: File,
}

impl Control {
    /// # Errors
    /// The device is not there (`NotFound`), or io_uring is missing, forbidden or too old.
    pub(super) fn open() -> io::Result<Self> {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/ublk-control")?;
        let ring = IoUring::builder().build(1)?;
        Ok(Self { ring, device })
    }

    /// Sends a command about the device `id` with its buffer, and waits for its end.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn command(
        &mut self,
        operation: u32,
        id: u32,
        data: u64,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let length = u16::try_from(buffer.len()).map_err(io::Error::other)?;
        let bytes = abi::control(id, data, buffer.as_mut_ptr().addr() as u64, length);
        let device = types::Fd(self.device.as_raw_fd());
        let entry = opcode::UringCmd80::new(device, operation)
            .cmd(bytes)
            .build();
        // SAFETY: the buffer is exclusively borrowed until the completion, which is waited for below.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the ring is empty between calls");
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if !is_retry(&error) => {
                    tracing::error!(
                        "io_uring cannot be waited for: {error}; memory is at stake, stopping"
                    );
                    std::process::abort();
                }
                _ => {}
            }
            if let Some(done) = self.ring.completion().next() {
                return outcome(done.result());
            }
        }
    }
}

/// What the queue has to tell.
pub(super) enum Event {
    /// A request is there.
    Request(u16, abi::Request),
    /// No request will come with one more of the tags.
    Over,
    /// What is watched can be read.
    Readable,
}

/// Marks the completion of the watch.
const WATCH: u64 = u64::MAX;

/// The only queue of a device; everything of it is done by one thread, as the driver wants it.
pub(super) struct Queue<'f> {
    ring: IoUring,
    device: &'f File,
    depth: u16,
    descriptions: NonNull<[u8; abi::DESCRIPTION]>,
    mapped: usize,
}

impl<'f> Queue<'f> {
    /// The queue of the character device `device`, with so many requests at a time, all of which are fetched.
    ///
    /// # Errors
    /// The driver's, or io_uring's.
    pub(super) fn open(device: &'f File, depth: u16) -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?;
        let page = page.and_then(|bytes| usize::try_from(bytes).ok());
        let length = usize::from(depth) * abi::DESCRIPTION;
        let mapped = length.next_multiple_of(page.unwrap_or(4096));
        let size = NonZeroUsize::new(mapped).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let descriptions = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                device,
                0,
            )
        }?;
        let entries = u32::from(depth + 1).next_power_of_two();
        let ring = IoUring::new(entries).inspect_err(|_| {
            // SAFETY: nothing points into the mapping.
            let _ = unsafe { munmap(descriptions, mapped) };
        })?;
        let mut queue = Self {
            ring,
            device,
            depth,
            descriptions: descriptions.cast(),
            mapped,
        };
        for tag in 0..depth {
            queue.command(abi::FETCH_REQ, tag, 0);
        }
        queue.ring.submit()?;
        // Nothing is asked before the start: what has ended was refused.
        let refused = queue.ring.completion().next();
        match refused {
            None => Ok(queue),
            Some(refused) => Err(io::Error::from_raw_os_error(-refused.result())),
        }
    }

    /// Tells the result of a request and fetches the next one, at the next [`Self::wait`].
    pub(super) fn commit(&mut self, tag: u16, result: i32) {
        self.command(abi::COMMIT_AND_FETCH_REQ, tag, result);
    }

    fn command(&mut self, operation: u32, tag: u16, result: i32) {
        let device = types::Fd(self.device.as_raw_fd());
        let entry = opcode::UringCmd16::new(device, operation)
            .cmd(abi::queue(tag, result))
            .build()
            .user_data(u64::from(tag));
        self.push(&entry);
    }

    /// Tells once, from the next [`Self::wait`] on, that `file` can be read; it must stay open until then.
    pub(super) fn watch(&mut self, file: impl AsFd) {
        let fd = types::Fd(file.as_fd().as_raw_fd());
        let readable = u32::from(libc::POLLIN.unsigned_abs());
        self.push(&opcode::PollAdd::new(fd, readable).build().user_data(WATCH));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: neither the commands of a queue nor a poll point to memory.
        let pushed = unsafe { self.ring.submission().push(entry) };
        assert!(pushed.is_ok(), "a tag has one command at a time");
    }

    /// Waits until something can be told.
    ///
    /// # Errors
    /// io_uring's.
    pub(super) fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Err(error) if !is_retry(&error) => return Err(error),
            _ => {}
        }
        let completions: Vec<_> = self.ring.completion().collect();
        for done in completions {
            events.push(match u16::try_from(done.user_data()) {
                Err(_) => Event::Readable,
                Ok(tag) if done.result() == 0 && tag < self.depth => {
                    Event::Request(tag, self.request(tag))
                }
                Ok(_) => Event::Over,
            });
        }
        Ok(())
    }

    fn request(&self, tag: u16) -> abi::Request {
        // SAFETY: `tag` is below the depth for which the mapping was made; the driver wrote the description before
        // it completed the command and leaves it alone until the commit.
        let bytes = unsafe { self.descriptions.add(usize::from(tag)).read_volatile() };
        abi::Request::decode(&bytes)
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        // SAFETY: nothing points into the mapping but this.
        if let Err(error) = unsafe { munmap(self.descriptions.cast(), self.mapped) } {
            tracing::error!("cannot unmap a queue of ublk: {error}");
        }
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

fn outcome(code: i32) -> io::Result<()> {
    if code < 0 {
        return Err(io::Error::from_raw_os_error(-code));
    }
    Ok(())
}
