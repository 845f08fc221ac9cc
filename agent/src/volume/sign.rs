//! Signatures of blocks: BLAKE3 of the plain bytes, keyed with the fleet key.

use crate::model::ids::Signature;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The fleet's key: only devices of the fleet can compute or check signatures.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct FleetKey(pub [u8; 32]);

impl std::fmt::Debug for FleetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FleetKey(…)")
    }
}

/// The mark that stands in place of a signature for a block of zeros or a hole.
pub const ZERO: Signature = Signature([0; 32]);

/// Size of a volume's blocks, fixed for its whole move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize(u32);

impl BlockSize {
    /// The size for a volume of `bytes`: as small as keeps its signatures (32 bytes a block) within 16 MiB up to
    /// 512 GiB, because a page that changed travels as its block.
    #[must_use]
    pub fn for_volume(bytes: u64) -> Self {
        const GIB: u64 = 1 << 30;
        match bytes.div_ceil(GIB) {
            0..=32 => Self(64 << 10),
            33..=128 => Self(256 << 10),
            _ => Self(1 << 20),
        }
    }

    /// A size from outside; none unless it is a power of two from 64 KiB to 1 MiB.
    #[must_use]
    pub fn new(bytes: u32) -> Option<Self> {
        (bytes.is_power_of_two() && (64 << 10..=1 << 20).contains(&bytes)).then_some(Self(bytes))
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Number of blocks of a file of `size` bytes.
    #[must_use]
    pub fn blocks_of(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// Length of block `index` of a file of `size` bytes; shorter for the last one, 0 past the end.
    #[must_use]
    pub fn length_of(self, size: u64, index: u64) -> usize {
        let start = index.saturating_mul(self.bytes());
        let length = size.saturating_sub(start).min(self.bytes());
        // At most 1 MiB by construction.
        usize::try_from(length).unwrap_or(0)
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        Self::for_volume(0)
    }
}

/// Signature of one block's plain bytes; [`ZERO`] when they are all zero.
#[must_use]
pub fn signature(key: &FleetKey, block: &[u8]) -> Signature {
    if is_zero(block) {
        return ZERO;
    }
    Signature(*blake3::keyed_hash(&key.0, block).as_bytes())
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Data that is not zero nearly always says so in its first bytes; only then a full pass.
    let (head, rest) = bytes.split_at(bytes.len().min(64));
    if head.iter().any(|&byte| byte != 0) {
        return false;
    }
    let mut chunks = rest.chunks_exact(128);
    chunks
        .by_ref()
        .all(|chunk| chunk.iter().fold(0, |all, &byte| all | byte) == 0)
        && chunks.remainder().iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_anywhere_makes_a_block_not_zero() {
        for len in [1, 63, 64, 65, 191, 192, 193, 4096, 65_536] {
            let mut block = vec![0; len];
            assert!(is_zero(&block));
            for at in [0, len / 2, len - 1] {
                block[at] = 0x10;
                assert!(!is_zero(&block), "bit at {at} of {len}");
                block[at] = 0;
            }
        }
    }

    #[test]
    fn blocks_cover_a_file_exactly() {
        let size = BlockSize::default();
        for bytes in [0, 1, 65_535, 65_536, 65_537, 1 << 20] {
            let covered: u64 = (0..size.blocks_of(bytes))
                .map(|index| size.length_of(bytes, index) as u64)
                .sum();
            assert_eq!(covered, bytes);
        }
    }

    #[test]
    fn signatures_stay_within_16_mib_up_to_512_gib() {
        const GIB: u64 = 1 << 30;
        for (gib, kib) in [
            (0, 64),
            (32, 64),
            (33, 256),
            (128, 256),
            (129, 1024),
            (512, 1024),
        ] {
            let size = BlockSize::for_volume(gib * GIB);
            assert_eq!(size.bytes(), kib << 10, "{gib} GiB");
            assert!(size.blocks_of(gib * GIB) * 32 <= 16 << 20, "{gib} GiB");
        }
        assert_eq!(BlockSize::for_volume(32 * GIB + 1).bytes(), 256 << 10);
    }

    #[test]
    fn block_sizes_from_outside_are_powers_of_two_in_range() {
        assert!(BlockSize::new(64 << 10).is_some());
        assert!(BlockSize::new(1 << 20).is_some());
        assert!(BlockSize::new(0).is_none());
        assert!(BlockSize::new(65_537).is_none());
        assert!(BlockSize::new(2 << 20).is_none());
    }
}
