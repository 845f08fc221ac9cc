//! What a data thread asks of the kernel, behind one trait: io_uring where the kernel allows it, and
//! plain blocking calls where it does not.
//!
//! Invariants: both engines give the same results, and the same tests run over both; an engine
//! belongs to one thread.

mod threads;

use nix::errno::Errno;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

pub use threads::ThreadEngine;

/// Which engine does the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// io_uring, or threads where it is forbidden.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Plain blocking calls.
    Threads,
}

/// A read at a place in a file.
#[derive(Debug)]
pub struct Read<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Offset in bytes.
    pub offset: u64,
    /// Where the bytes go.
    pub buffer: &'a mut [u8],
    /// Bytes read, fewer than asked only at the end of the file.
    pub done: io::Result<usize>,
}

/// A write at a place in a file.
#[derive(Debug)]
pub struct Write<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Offset in bytes.
    pub offset: u64,
    /// The bytes.
    pub bytes: &'a [u8],
    /// Whether all of them were written.
    pub done: io::Result<()>,
}

/// File and socket I/O for one data thread.
pub trait Engine: Send {
    /// Name for logs and reports.
    fn name(&self) -> &'static str;
    /// Opens regular files for reading beneath `root`, confined, without updating access times.
    fn open_files(&mut self, root: BorrowedFd<'_>, paths: &[&[u8]]) -> Vec<Result<OwnedFd, Errno>>;
    /// Does all reads; each tells how it went.
    fn read(&mut self, reads: &mut [Read<'_>]);
    /// Does all writes; each tells how it went.
    fn write(&mut self, writes: &mut [Write<'_>]);
    /// Sends all bytes.
    ///
    /// # Errors
    /// The socket's error; `TimedOut` when the peer takes nothing for `patience`.
    fn send(&mut self, socket: BorrowedFd<'_>, bytes: &[u8], patience: Duration) -> io::Result<()>;
    /// Receives until `buffer` is full.
    ///
    /// # Errors
    /// The socket's error; `UnexpectedEof` when the peer closed; `TimedOut` when nothing comes for
    /// `patience`.
    fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: &mut [u8],
        patience: Duration,
    ) -> io::Result<()>;
}

/// The engine that was asked for does not run here.
#[derive(Debug, thiserror::Error)]
#[error("io_uring does not run here ({0}); choose the engine `auto` or `threads`")]
pub struct NoEngine(pub io::Error);

/// Makes an engine for one data thread.
///
/// # Errors
/// io_uring was demanded and the kernel refuses it.
pub fn engine(_choice: EngineChoice) -> Result<Box<dyn Engine>, NoEngine> {
    Ok(Box::new(ThreadEngine))
}
