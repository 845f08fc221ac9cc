//! Memory for direct I/O.

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
