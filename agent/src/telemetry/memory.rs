//! What the C library's allocator keeps of this process's memory.

/// Has threads share heaps: with one for each thread, the usual, every heap keeps what its busiest moment took. Meant
/// for the start of the process, before there are threads.
pub fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number in the allocator, from any thread at any time.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Returns what is free, in pieces that the allocator would keep. Walks its lists: under a millisecond.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only gives free pages back to the kernel, from any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
