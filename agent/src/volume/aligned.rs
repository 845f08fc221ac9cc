//! Memory and files for direct I/O.

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Alignment of memory, offsets and lengths that direct I/O asks for on every usual disk.
pub const ALIGNMENT: usize = 4096;

/// Memory whose start is aligned.
#[derive(Debug, Default)]
pub struct Aligned {
    memory: Vec<u8>,
}

impl Aligned {
    /// `len` bytes of it.
    pub fn space(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + ALIGNMENT {
            self.memory.resize(len + ALIGNMENT, 0);
        }
        let address = self.memory.as_ptr().addr();
        let start = address.next_multiple_of(ALIGNMENT) - address;
        &mut self.memory[start..start + len]
    }
}

/// Makes an open file be read past the page cache from now on, or through it again; false where its file system
/// refuses that.
#[must_use]
pub fn set_direct(file: &File, direct: bool) -> bool {
    let mut flags = OFlag::O_NONBLOCK | OFlag::O_NOATIME;
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags)).is_ok()
}

/// Opens a file a second time, past the page cache; none where its file system refuses that.
#[must_use]
pub fn open_direct(file: &File) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = libc::O_DIRECT | libc::O_NOATIME;
    File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .ok()
}
