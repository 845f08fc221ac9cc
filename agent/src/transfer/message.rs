//! Control messages between two ends of a data connection, as values.
//!
//! Invariants: every message is authenticated with a key of its own connection and its position in
//! it, so none can be forged, changed, replayed or reordered; decoding never panics.

use super::fetch::wire::Fetch;
use super::frame::{FrameKind, HEADER_LEN, Header};
use super::seal::{OpenFailed, Salt, TAG_LEN, derived};
use crate::model::ids::{Epoch, Signature, VolumeId};
use crate::volume::BlockSize;
use crate::volume::codec::{Malformed, Reader, put_short};

/// Identifies one attempt to send one epoch across reconnections.
pub type SessionId = [u8; 16];

/// Why a receiver gives up on an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureCode {
    /// No room on the target's disk.
    NoSpace,
    /// Any other failure to write.
    Write,
    /// A record or block was not what it should be; sending it again can help.
    Corrupt,
    /// The peer broke the protocol.
    Protocol,
    /// A device behind the relay could not be reached.
    Unreachable,
    /// The relay's own disk does not take what it is to forward.
    Spool,
    /// A device on the path was started anew and does not know the attempt; what it holds it says when the
    /// epoch is begun again.
    Forgotten,
}

/// A receiver's reason to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Class.
    pub code: FailureCode,
    /// For people.
    pub text: String,
}

/// What the receiver can build upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// It holds exactly the tree that the sender named: send what changed.
    Known,
    /// It does not: send every entry; a list of the blocks it has follows.
    Everything,
}

/// Whether it pays to offer the receiver blocks by their signature before sending them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Holdings {
    /// It has no block map, or a spool stands between and the sender should not wait: never.
    #[default]
    Closed,
    /// Its block map is empty so far.
    Empty,
    /// Its block map has entries.
    Filled,
}

/// The receiver's answer to a record with offered blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Number of the record.
    pub number: u64,
    /// A bit for each block of the record, lowest first: whether it is in its place now.
    pub bits: Vec<u8>,
}

impl Held {
    /// Whether the block at this position in the record is in its place.
    #[must_use]
    pub fn has(&self, position: usize) -> bool {
        let byte = self.bits.get(position / 8);
        byte.is_some_and(|byte| byte >> (position % 8) & 1 == 1)
    }

    /// From one truth a block.
    #[must_use]
    pub fn new(number: u64, blocks: impl IntoIterator<Item = bool>) -> Self {
        let mut bits = Vec::new();
        for (position, held) in blocks.into_iter().enumerate() {
            if position % 8 == 0 {
                bits.push(0);
            }
            if let Some(byte) = bits.last_mut() {
                *byte |= u8::from(held) << (position % 8);
            }
        }
        Self { number, bits }
    }
}

/// The answers that were given last. A sender waits for fewer at a time than are kept, so those that were
/// lost with a connection can all be repeated.
#[derive(Debug, Default)]
pub struct Answers(std::collections::VecDeque<Held>);

impl Answers {
    const KEPT: usize = 256;

    /// Keeps one.
    pub fn keep(&mut self, held: Held) {
        if self.0.len() == Self::KEPT {
            self.0.pop_front();
        }
        self.0.push_back(held);
    }

    /// All of them, as they are said again.
    pub fn messages(&self) -> impl Iterator<Item = Message> {
        self.0.iter().cloned().map(Message::Held)
    }
}

/// The target's word that an epoch is applied, verified and durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Root that the target computed from what it wrote and verified.
    pub root: Signature,
    /// Entries in its tree.
    pub entries: u64,
    /// Keyed with the fleet key over plan, volume, epoch and root: relays cannot forge it.
    pub proof: [u8; 32],
}

/// Blocks of one file that the receiver already has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Have {
    /// Keyed hash of the path, so that a relay learns no names.
    pub path_hash: [u8; 32],
    /// Length of the file, bytes.
    pub size: u64,
    /// Index of the first block in `blocks`.
    pub first: u64,
    /// Signatures.
    pub blocks: Vec<Signature>,
}

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Sender: starts or resumes an epoch.
    Begin {
        /// Attempt.
        session: SessionId,
        /// Salt of the sealing session; replaced by a paired device that seals.
        salt: Salt,
        /// Block size of the volume.
        block_size: BlockSize,
        /// Root of the tree the sender wants to build upon.
        basis: Option<Signature>,
    },
    /// Receiver: ready.
    Begun {
        /// All records below this number have arrived.
        watermark: u64,
        /// What to build upon.
        basis: Basis,
        /// Salt of the sealing session, for a sender whose records another device seals.
        salt: Salt,
        /// Whether to offer blocks.
        holdings: Holdings,
    },
    /// Receiver: blocks it has; several follow each other.
    Have(Vec<Have>),
    /// Receiver: the list is complete.
    HaveEnd,
    /// Receiver: all records below the number have arrived (also sent as a sign of life).
    Ack(u64),
    /// Receiver: the epoch is complete.
    Done(Done),
    /// Receiver: the epoch cannot go on.
    Failed(Failure),
    /// Sender: a sign of life.
    Ping,
    /// Receiver: which offered blocks it had.
    Held(Held),
    /// Either end of a connection that fetches on demand.
    Fetch(Fetch),
}

const HAVE_CAP: usize = 4096;

impl Message {
    /// Appends its layout.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Begin {
                session,
                salt,
                block_size,
                basis,
            } => {
                out.push(1);
                out.extend_from_slice(session);
                out.extend_from_slice(salt);
                let size = u32::try_from(block_size.bytes()).unwrap_or(0);
                out.extend_from_slice(&size.to_le_bytes());
                out.push(u8::from(basis.is_some()));
                out.extend_from_slice(&basis.map_or([0; 32], |root| root.0));
            }
            Self::Begun {
                watermark,
                basis,
                salt,
                holdings,
            } => {
                out.push(2);
                out.extend_from_slice(&watermark.to_le_bytes());
                out.push(u8::from(*basis == Basis::Everything));
                out.extend_from_slice(salt);
                out.push(match holdings {
                    Holdings::Closed => 0,
                    Holdings::Empty => 1,
                    Holdings::Filled => 2,
                });
            }
            Self::Have(list) => {
                out.push(3);
                let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
                out.extend_from_slice(&count.to_le_bytes());
                for have in list {
                    out.extend_from_slice(&have.path_hash);
                    out.extend_from_slice(&have.size.to_le_bytes());
                    out.extend_from_slice(&have.first.to_le_bytes());
                    let count = u32::try_from(have.blocks.len()).unwrap_or(u32::MAX);
                    out.extend_from_slice(&count.to_le_bytes());
                    for block in &have.blocks {
                        out.extend_from_slice(&block.0);
                    }
                }
            }
            Self::HaveEnd => out.push(4),
            Self::Ack(watermark) => {
                out.push(5);
                out.extend_from_slice(&watermark.to_le_bytes());
            }
            Self::Done(done) => {
                out.push(6);
                out.extend_from_slice(&done.root.0);
                out.extend_from_slice(&done.entries.to_le_bytes());
                out.extend_from_slice(&done.proof);
            }
            Self::Failed(failure) => {
                out.push(7);
                out.push(match failure.code {
                    FailureCode::NoSpace => 0,
                    FailureCode::Write => 1,
                    FailureCode::Corrupt => 2,
                    FailureCode::Protocol => 3,
                    FailureCode::Unreachable => 4,
                    FailureCode::Forgotten => 5,
                    FailureCode::Spool => 6,
                });
                put_short(out, failure.text.as_bytes());
            }
            Self::Ping => out.push(8),
            Self::Held(held) => {
                out.push(9);
                out.extend_from_slice(&held.number.to_le_bytes());
                put_short(out, &held.bits);
            }
            Self::Fetch(fetch) => {
                out.push(10);
                fetch.encode(out);
            }
        }
    }

    /// From its layout.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let message = match reader.u8()? {
            1 => {
                let session = reader.array()?;
                let salt = reader.array()?;
                let block_size = BlockSize::new(reader.u32()?).ok_or(Malformed(
                    "the block size is not a power of two from 64 KiB to 1 MiB",
                ))?;
                let known = reader.u8()? != 0;
                let root = Signature(reader.array()?);
                Self::Begin {
                    session,
                    salt,
                    block_size,
                    basis: known.then_some(root),
                }
            }
            2 => Self::Begun {
                watermark: reader.u64()?,
                basis: if reader.u8()? == 0 {
                    Basis::Known
                } else {
                    Basis::Everything
                },
                salt: reader.array()?,
                holdings: match reader.u8()? {
                    0 => Holdings::Closed,
                    1 => Holdings::Empty,
                    2 => Holdings::Filled,
                    _ => return Err(Malformed("the holdings are of an unknown kind")),
                },
            },
            3 => {
                let count = reader.u32()? as usize;
                if count > HAVE_CAP {
                    return Err(Malformed("a list of held files is longer than its cap"));
                }
                let mut list = Vec::with_capacity(count);
                for _ in 0..count {
                    let path_hash = reader.array()?;
                    let size = reader.u64()?;
                    let first = reader.u64()?;
                    let blocks = reader.u32()? as usize;
                    let bytes = reader.bytes(blocks.saturating_mul(32))?;
                    let blocks = bytes
                        .as_chunks::<32>()
                        .0
                        .iter()
                        .map(|chunk| Signature(*chunk))
                        .collect();
                    list.push(Have {
                        path_hash,
                        size,
                        first,
                        blocks,
                    });
                }
                Self::Have(list)
            }
            4 => Self::HaveEnd,
            5 => Self::Ack(reader.u64()?),
            6 => Self::Done(Done {
                root: Signature(reader.array()?),
                entries: reader.u64()?,
                proof: reader.array()?,
            }),
            7 => Self::Failed(Failure {
                code: match reader.u8()? {
                    0 => FailureCode::NoSpace,
                    1 => FailureCode::Write,
                    2 => FailureCode::Corrupt,
                    3 => FailureCode::Protocol,
                    4 => FailureCode::Unreachable,
                    5 => FailureCode::Forgotten,
                    6 => FailureCode::Spool,
                    _ => return Err(Malformed("an unknown failure code")),
                },
                text: String::from_utf8_lossy(reader.short()?).into_owned(),
            }),
            8 => Self::Ping,
            9 => Self::Held(Held {
                number: reader.u64()?,
                bits: reader.short()?.to_vec(),
            }),
            10 => Self::Fetch(Fetch::decode(&mut reader)?),
            _ => return Err(Malformed("a message is of an unknown kind")),
        };
        if !reader.is_empty() {
            return Err(Malformed("bytes are left over after a message"));
        }
        Ok(message)
    }
}

/// Splits a list of held blocks into messages of bounded size.
pub fn have_messages(
    files: impl IntoIterator<Item = ([u8; 32], u64, Vec<Signature>)>,
) -> impl Iterator<Item = Message> {
    const BLOCKS: usize = 8192;
    let mut pieces = files.into_iter().flat_map(|(path_hash, size, blocks)| {
        let chunks: Vec<Have> = blocks
            .chunks(BLOCKS)
            .zip(0_u64..)
            .map(|(chunk, index)| Have {
                path_hash,
                size,
                first: index * BLOCKS as u64,
                blocks: chunk.to_vec(),
            })
            .collect();
        chunks
    });
    let mut waiting: Option<Have> = None;
    std::iter::from_fn(move || {
        let mut list = Vec::new();
        let mut count = 0;
        while let Some(piece) = waiting.take().or_else(|| pieces.next()) {
            if list.len() == HAVE_CAP || (count > 0 && count + piece.blocks.len() > BLOCKS) {
                waiting = Some(piece);
                break;
            }
            count += piece.blocks.len();
            list.push(piece);
        }
        (!list.is_empty()).then_some(Message::Have(list))
    })
}

/// Authenticates the messages of one direction of one connection.
#[derive(Debug)]
pub struct MessageSeal {
    key: super::seal::LinkKey,
    next: u64,
}

impl MessageSeal {
    /// For a connection's key and a direction; `to_receiver` on the side of the sender's messages.
    #[must_use]
    pub fn new(connection_key: &[u8; 32], to_receiver: bool) -> Self {
        let side = [u8::from(to_receiver)];
        let key = derived("lifeboat 2026 control messages", &[connection_key, &side]);
        Self {
            key: super::seal::LinkKey(*key),
            next: 0,
        }
    }

    /// The next message as a whole frame.
    #[must_use]
    pub fn frame(&mut self, volume: VolumeId, epoch: Epoch, message: &Message) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN];
        message.encode(&mut frame);
        let mut header = Header {
            kind: FrameKind::Control,
            barrier: false,
            length: 0,
            volume,
            epoch,
            number: self.next,
            first_block: 0,
        };
        self.next += 1;
        header.length = header.length_for(&frame, TAG_LEN);
        frame[..HEADER_LEN].copy_from_slice(&header.encode());
        let tag = blake3::keyed_hash(&self.key.0, &frame);
        frame.extend_from_slice(tag.as_bytes());
        frame
    }

    /// Checks and decodes the next message.
    ///
    /// # Errors
    /// [`MessageError`] when it is forged, out of order or malformed.
    pub fn open(&mut self, header: &Header, body: &[u8]) -> Result<Message, MessageError> {
        let at = body.len().checked_sub(TAG_LEN).ok_or(OpenFailed)?;
        let tag: [u8; TAG_LEN] = body[at..].try_into().map_err(|_| OpenFailed)?;
        let mut hasher = blake3::Hasher::new_keyed(&self.key.0);
        hasher.update(&header.encode()).update(&body[..at]);
        if hasher.finalize() != blake3::Hash::from(tag) || header.number != self.next {
            return Err(OpenFailed.into());
        }
        self.next += 1;
        Ok(Message::decode(&body[..at])?)
    }
}

/// A control message was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not authentic.
    #[error(
        "a control message is not authentic: it was changed on the way or comes from elsewhere"
    )]
    Forged(#[from] OpenFailed),
    /// Authentic but not understood.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_tells_of_each_block() {
        let held = Held::new(1, (0..19).map(|n| n % 3 == 0));
        assert!((0..40).all(|n| held.has(n) == (n < 19 && n % 3 == 0)));
    }

    fn samples() -> Vec<Message> {
        vec![
            Message::Begin {
                session: [1; 16],
                salt: [2; 32],
                block_size: BlockSize::default(),
                basis: Some(Signature([3; 32])),
            },
            Message::Begun {
                watermark: 9,
                basis: Basis::Everything,
                salt: [4; 32],
                holdings: Holdings::Filled,
            },
            Message::Have(vec![Have {
                path_hash: [5; 32],
                size: 13,
                first: 6,
                blocks: vec![Signature([7; 32]); 3],
            }]),
            Message::HaveEnd,
            Message::Ack(8),
            Message::Done(Done {
                root: Signature([9; 32]),
                entries: 10,
                proof: [11; 32],
            }),
            Message::Failed(Failure {
                code: FailureCode::NoSpace,
                text: "full".to_owned(),
            }),
            Message::Ping,
            Message::Held(Held::new(12, (0..19).map(|n| n % 3 == 0))),
        ]
    }

    fn open(seal: &mut MessageSeal, frame: &[u8]) -> Result<Message, MessageError> {
        let header = Header::decode(frame[..HEADER_LEN].try_into().unwrap()).unwrap();
        seal.open(&header, &frame[HEADER_LEN..])
    }

    #[test]
    fn every_message_survives_its_layout() {
        let mut there = MessageSeal::new(&[1; 32], true);
        let mut here = MessageSeal::new(&[1; 32], true);
        for message in samples() {
            let frame = there.frame(VolumeId(1), Epoch(2), &message);
            assert_eq!(open(&mut here, &frame).unwrap(), message);
        }
    }

    #[test]
    fn a_message_replayed_reordered_or_turned_round_is_refused() {
        let mut there = MessageSeal::new(&[1; 32], true);
        let first = there.frame(VolumeId(1), Epoch(2), &Message::Ack(1));
        let second = there.frame(VolumeId(1), Epoch(2), &Message::Ack(2));
        let mut here = MessageSeal::new(&[1; 32], true);
        assert!(open(&mut here, &second).is_err());
        assert!(open(&mut here, &first).is_ok());
        assert!(open(&mut here, &first).is_err());
        let mut back = MessageSeal::new(&[1; 32], false);
        assert!(open(&mut back, &first).is_err());
    }

    #[test]
    fn long_lists_are_split_below_the_cap_and_stay_whole() {
        let files: Vec<_> = (0..30_u8)
            .map(|n| ([n; 32], 9, vec![Signature([n; 32]); usize::from(n) * 1000]))
            .collect();
        let mut seal = MessageSeal::new(&[1; 32], false);
        let mut total = 0;
        for message in have_messages(files) {
            let frame = seal.frame(VolumeId(0), Epoch(0), &message);
            assert!(Header::decode(frame[..HEADER_LEN].try_into().unwrap()).is_ok());
            if let Message::Have(list) = message {
                total += list.iter().map(|have| have.blocks.len()).sum::<usize>();
            }
        }
        assert_eq!(total, (0..30).sum::<usize>() * 1000);
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(message) = Message::decode(&bytes) {
                let mut again = Vec::new();
                message.encode(&mut again);
                prop_assert_eq!(Message::decode(&again), Ok(message));
            }
        }
    }
}
