//! The engine of plain blocking system calls.

use super::{Engine, Read, Write};
use crate::volume::confined::open_beneath;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::stat::Mode;
use nix::sys::uio::{pread, pwrite};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Stateless: each call blocks its thread.
#[derive(Debug, Default)]
pub struct ThreadEngine;

impl Engine for ThreadEngine {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn open_files(&mut self, root: BorrowedFd<'_>, paths: &[&[u8]]) -> Vec<Result<OwnedFd, Errno>> {
        paths
            .iter()
            .map(|path| open_for_reading(root, path))
            .collect()
    }

    fn read(&mut self, reads: &mut [Read<'_>]) {
        for read in reads {
            let mut done = 0;
            read.done = loop {
                let offset = i64::try_from(read.offset + done as u64).unwrap_or(i64::MAX);
                match pread(read.file, &mut read.buffer[done..], offset) {
                    Ok(0) => break Ok(done),
                    Ok(n) => done += n,
                    Err(Errno::EINTR) => {}
                    Err(error) => break Err(error.into()),
                }
                if done >= read.length {
                    break Ok(done);
                }
            };
        }
    }

    fn write(&mut self, writes: &mut [Write<'_>]) {
        for write in writes {
            write.done = write_whole(write);
        }
    }

    fn send(&mut self, socket: BorrowedFd<'_>, bytes: &[u8], patience: Duration) -> io::Result<()> {
        let mut done = 0;
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        while done < bytes.len() {
            match send(socket.as_raw_fd(), &bytes[done..], flags) {
                Ok(n) => done += n,
                Err(Errno::EAGAIN) => wait(socket, PollFlags::POLLOUT, patience)?,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
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
            match recv(
                socket.as_raw_fd(),
                &mut buffer[done..],
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(Errno::EAGAIN) => wait(socket, PollFlags::POLLIN, patience)?,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Writes all bytes of one write.
pub(in super::super) fn write_whole(write: &Write<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < write.bytes.len() {
        let offset = i64::try_from(write.offset + done as u64).unwrap_or(i64::MAX);
        match pwrite(write.file, &write.bytes[done..], offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits until the socket is ready for `events`, or fails, or `patience` is over.
fn wait(socket: BorrowedFd<'_>, events: PollFlags, patience: Duration) -> io::Result<()> {
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(socket, events)], timeout) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens one file as every engine does: confined, never waiting for a FIFO's writer, and without
/// touching its access time where that is allowed.
pub(in crate::transfer) fn open_for_reading(
    root: BorrowedFd<'_>,
    path: &[u8],
) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    match open_beneath(root, path, flags | OFlag::O_NOATIME, Mode::empty()) {
        Err(Errno::EPERM) => open_beneath(root, path, flags, Mode::empty()),
        other => other,
    }
}
