//! The frame every record and message travels in: a fixed header, then a body of checked length.
//!
//! Invariants: a length is compared with its cap before a byte is allocated for it; decoding never
//! panics.

use crate::model::ids::{Epoch, VolumeId};
use crate::volume::codec::{Malformed, Reader};

/// Length of an encoded header in bytes.
pub const HEADER_LEN: usize = 36;
/// Plain file bytes that one record carries at most.
pub const DATA_CAP: usize = 1 << 20;
/// Longest body: the data, its descriptors, one entry with its attributes, and a seal.
pub const BODY_CAP: usize = DATA_CAP + (640 << 10);
/// Longest body of a control message.
pub const CONTROL_CAP: usize = 512 << 10;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A control message with its authentication tag.
    Control,
    /// A record sealed for the target.
    Sealed,
    /// A plain record with its tag, on a trusted link.
    Tagged,
    /// A sealed record with a tag for this link, so that a device that cannot open it still notices
    /// what was changed on the way to it.
    Carried,
}

/// Header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the body is.
    pub kind: FrameKind,
    /// Whether every record before it must be applied first, and it before any later one.
    pub barrier: bool,
    /// Bytes of the body.
    pub length: u32,
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// The epoch it belongs to.
    pub epoch: Epoch,
    /// Number of the record in its session, or of the message on its connection.
    pub number: u64,
    /// First block in the record, for a piece of one file; else 0.
    pub first_block: u64,
}

impl Header {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = match self.kind {
            FrameKind::Control => 1,
            FrameKind::Sealed => 2,
            FrameKind::Tagged => 3,
            FrameKind::Carried => 4,
        };
        bytes[1..3].copy_from_slice(b"LB");
        bytes[3] = u8::from(self.barrier);
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.volume.0.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.number.to_le_bytes());
        bytes[28..36].copy_from_slice(&self.first_block.to_le_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// Another protocol, an unknown kind, or a length above the kind's cap.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let kind = match reader.u8()? {
            1 => FrameKind::Control,
            2 => FrameKind::Sealed,
            3 => FrameKind::Tagged,
            4 => FrameKind::Carried,
            _ => return Err(Malformed("a frame is of an unknown kind")),
        };
        if reader.bytes(2)? != b"LB" {
            return Err(Malformed("this is not the data protocol"));
        }
        let barrier = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(Malformed("a frame has unknown flags")),
        };
        let header = Self {
            kind,
            barrier,
            length: reader.u32()?,
            volume: VolumeId(reader.u32()?),
            epoch: Epoch(reader.u64()?),
            number: reader.u64()?,
            first_block: reader.u64()?,
        };
        let cap = match kind {
            FrameKind::Control => CONTROL_CAP,
            FrameKind::Sealed | FrameKind::Tagged | FrameKind::Carried => BODY_CAP,
        };
        if header.length as usize > cap {
            return Err(Malformed("a frame is longer than its cap"));
        }
        Ok(header)
    }

    /// Body length of a record whose payload follows the header's place, with `extra` bytes added.
    #[must_use]
    pub fn length_for(&self, record: &[u8], extra: usize) -> u32 {
        // Records are built below BODY_CAP; the receiver would refuse a longer one.
        u32::try_from(record.len() - HEADER_LEN + extra).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_its_layout(length in 0..CONTROL_CAP as u32, volume in any::<u32>(), epoch in any::<u64>(), number in any::<u64>(), first_block in any::<u64>(), barrier in any::<bool>()) {
            for kind in [FrameKind::Control, FrameKind::Sealed, FrameKind::Tagged, FrameKind::Carried] {
                let header = Header { kind, barrier, length, volume: VolumeId(volume), epoch: Epoch(epoch), number, first_block };
                prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
            }
        }

        #[test]
        fn no_header_promises_more_than_the_cap(bytes in any::<[u8; HEADER_LEN]>(), kind in 1..5_u8) {
            let mut bytes = bytes;
            bytes[0] = kind;
            bytes[1..4].copy_from_slice(b"LB\0");
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.length as usize <= BODY_CAP);
            }
        }
    }
}
