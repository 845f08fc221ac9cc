//! An array map in this process's memory: reading it takes no system call.

use aya::maps::Map;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// An array map with `BPF_F_MMAPABLE`, of which the values are whole 64-bit words.
pub struct Mapped {
    start: NonNull<AtomicU64>,
    bytes: NonZeroUsize,
}

// SAFETY: the memory stays mapped as long as this value lives, and is used by atomic operations only.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Maps it to read from.
    ///
    /// # Errors
    /// It is no array, or the kernel refuses (before Linux 5.5).
    pub fn new(map: &Map) -> Result<Self, String> {
        Self::with(map, ProtFlags::PROT_READ)
    }

    /// Maps it to read from and write to, by atomic operations.
    ///
    /// # Errors
    /// As for [`Mapped::new`].
    pub fn writable(map: &Map) -> Result<Self, String> {
        Self::with(map, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    fn with(map: &Map, access: ProtFlags) -> Result<Self, String> {
        let Map::Array(data) = map else {
            return Err("it is no array".to_owned());
        };
        let info = data.info().map_err(|error| error.to_string())?;
        let bytes = info.max_entries() as usize * info.value_size() as usize;
        let bytes = NonZeroUsize::new(bytes).ok_or("it is empty")?;
        let fd = data.fd().as_fd();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, fd, 0) };
        let start = start.map_err(|errno| format!("it cannot be mapped: {errno}"))?;
        Ok(Self {
            start: start.cast(),
            bytes,
        })
    }

    /// Its values, one after the other.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped by `new` with this length; the kernel programs write to it too, by whole words.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes.get() / 8) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no reference into it outlives this value.
        let _ = unsafe { munmap(self.start.cast(), self.bytes.get()) };
    }
}
