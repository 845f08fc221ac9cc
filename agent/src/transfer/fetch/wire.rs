//! What both ends of a fetching connection say: questions as authenticated messages, answers as sealed
//! records.
//!
//! Invariants: decoding never panics; a question is small, an answer at most one block or one batch of
//! entries.

use super::piece::{BITS_MAX, PIECES_CAP};
use crate::model::ids::Signature;
use crate::transfer::seal::Salt;
use crate::volume::Entry;
use crate::volume::codec::{Malformed, Reader, put_short};
use crate::volume::mirror::LogId;
use crate::volume::sign::ZERO;
use crate::volume::tree::checked_path;
use std::ops::Range;

/// Bytes that one question asks for: small enough for random reads, large enough for bulk.
pub const BLOCK: u64 = 64 << 10;

/// Questions in one message.
const WANTS_CAP: usize = 64;

/// Blocks of which the holes are asked for at a time: the 4 GiB that one NBD request can name, and one more for its
/// edges.
pub const MAP_CAP: u32 = (1 << 16) + 1;

/// Runs of holes in one answer: with fewer, the rest counts as data.
pub const RUNS_CAP: usize = 4096;

/// How urgent the questions of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// Nobody does yet.
    Background,
}

/// One block of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Names the question in its answer.
    pub number: u64,
    /// Path below the volume.
    pub path: Box<[u8]>,
    /// Number of the block in the file.
    pub block: u64,
    /// Signature of what the target has there already; a block that bears it comes without its bytes.
    pub held: Option<Signature>,
}

/// A message of a fetching connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// Target: what this connection is for.
    Open(Class),
    /// Source: ready; the salt of its records.
    Opened(Salt),
    /// Target: list the volume; pieces of its list, as it is cut there at `1 << bits` entries on average, may be named.
    List {
        /// How it is cut.
        bits: u8,
        /// Pieces that are here.
        pieces: Vec<Signature>,
    },
    /// Target: send these.
    Want(Vec<Want>),
    /// Target: send the signatures of these, without their bytes.
    Sign(Vec<Want>),
    /// Target: say which of so many blocks from this one on are holes.
    Map {
        /// The first.
        first: Want,
        /// How many.
        count: u32,
    },
    /// Target: this connection carries changes of the volume; the name of their log, the salt of their records.
    Mirror {
        /// Log.
        log: LogId,
        /// Salt.
        salt: Salt,
    },
    /// Source: every change up to this one is durable here; 0 for none.
    Mirrored(u64),
    /// Target: make durable what was sent, and say so.
    Sync,
    /// Source: it keeps no changes, and why.
    Refused(String),
}

/// Longest reason, bytes.
const REASON_CAP: usize = 1024;

impl Fetch {
    /// Whether programs wait for what goes over the connection that it opens: blocks on demand, and changes that a
    /// sync sends.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        matches!(self, Self::Open(Class::Demand) | Self::Mirror { .. })
    }

    /// Appends its layout.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Open(class) => out.extend_from_slice(&[1, u8::from(*class == Class::Background)]),
            Self::Opened(salt) => {
                out.push(2);
                out.extend_from_slice(salt);
            }
            Self::List { bits, pieces } => {
                out.extend_from_slice(&[3, *bits]);
                put_signatures(out, pieces);
            }
            Self::Want(wants) | Self::Sign(wants) => {
                let any_held = wants.iter().any(|want| want.held.is_some());
                out.push(match self {
                    Self::Sign(_) => 5,
                    _ if any_held => 10,
                    _ => 4,
                });
                let count = u16::try_from(wants.len()).unwrap_or(u16::MAX);
                out.extend_from_slice(&count.to_le_bytes());
                for want in wants {
                    out.extend_from_slice(&want.number.to_le_bytes());
                    out.extend_from_slice(&want.block.to_le_bytes());
                    put_short(out, &want.path);
                    if any_held {
                        // Zeros come without their bytes anyway.
                        out.extend_from_slice(&want.held.unwrap_or(ZERO).0);
                    }
                }
            }
            Self::Mirror { log, salt } => {
                out.push(6);
                out.extend_from_slice(log);
                out.extend_from_slice(salt);
            }
            Self::Mirrored(number) => {
                out.push(7);
                out.extend_from_slice(&number.to_le_bytes());
            }
            Self::Sync => out.push(8),
            Self::Refused(why) => {
                out.push(9);
                put_short(out, &why.as_bytes()[..why.len().min(REASON_CAP)]);
            }
            Self::Map { first, count } => {
                out.push(11);
                out.extend_from_slice(&first.number.to_le_bytes());
                out.extend_from_slice(&first.block.to_le_bytes());
                put_short(out, &first.path);
                out.extend_from_slice(&count.to_le_bytes());
            }
        }
    }

    /// From its layout.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match reader.u8()? {
            1 => Self::Open(match reader.u8()? {
                0 => Class::Demand,
                1 => Class::Background,
                _ => return Err(Malformed("a class of fetching is unknown")),
            }),
            2 => Self::Opened(reader.array()?),
            3 => {
                let bits = reader.u8()?;
                if bits > BITS_MAX {
                    return Err(Malformed("a list is cut into pieces larger than any list"));
                }
                let pieces = signatures(reader)?;
                Self::List { bits, pieces }
            }
            kind @ (4 | 5 | 10) => {
                let count = usize::from(reader.u16()?);
                if count > WANTS_CAP {
                    return Err(Malformed("more blocks are wanted at once than the cap"));
                }
                let mut wants = Vec::with_capacity(count);
                for _ in 0..count {
                    let want = want(reader)?;
                    let held = match kind {
                        10 => Some(Signature(reader.array()?)),
                        _ => None,
                    };
                    let held = held.filter(|held| *held != ZERO);
                    wants.push(Want { held, ..want });
                }
                match kind {
                    5 => Self::Sign(wants),
                    _ => Self::Want(wants),
                }
            }
            6 => Self::Mirror {
                log: reader.array()?,
                salt: reader.array()?,
            },
            7 => Self::Mirrored(reader.u64()?),
            8 => Self::Sync,
            9 => {
                let why = reader.short()?;
                let why = &why[..why.len().min(REASON_CAP)];
                Self::Refused(String::from_utf8_lossy(why).into_owned())
            }
            11 => {
                let (first, count) = (want(reader)?, reader.u32()?);
                if count > MAP_CAP {
                    return Err(Malformed(
                        "more blocks are asked about at once than the cap",
                    ));
                }
                Self::Map { first, count }
            }
            _ => return Err(Malformed("a fetching message is of an unknown kind")),
        })
    }
}

fn put_signatures(out: &mut Vec<u8>, signatures: &[Signature]) {
    let count = u16::try_from(signatures.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&count.to_le_bytes());
    for signature in signatures.iter().take(usize::from(count)) {
        out.extend_from_slice(&signature.0);
    }
}

fn signatures(reader: &mut Reader<'_>) -> Result<Vec<Signature>, Malformed> {
    let count = usize::from(reader.u16()?);
    if count > PIECES_CAP {
        return Err(Malformed("a list has more pieces than the cap"));
    }
    let signatures = (0..count).map(|_| Ok(Signature(reader.array()?)));
    signatures.collect()
}

/// A wanted block that is not here in any other form.
fn want(reader: &mut Reader<'_>) -> Result<Want, Malformed> {
    let (number, block) = (reader.u64()?, reader.u64()?);
    if block > i64::MAX as u64 / BLOCK {
        return Err(Malformed("a block lies where no file can reach"));
    }
    let path = checked_path(reader.short()?)?;
    Ok(Want {
        number,
        path,
        block,
        held: None,
    })
}

/// Why a block does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its file is not there any more.
    Gone,
    /// It cannot be read.
    Unreadable,
}

/// The plain content of a sealed record.
#[derive(Debug)]
pub enum Answer<'a> {
    /// Entries of the volume in path order; the last of them in the `last` batch.
    Entries {
        /// Whether no more follow.
        last: bool,
        /// The entries; files without block signatures.
        entries: Vec<Entry>,
    },
    /// Pieces of the list, in order, that the target has.
    Same(Vec<Signature>),
    /// A block: its bytes, none for zeros, for what the target has already, and where only its signature was asked
    /// for.
    Block {
        /// Number of the question.
        number: u64,
        /// Signature of the bytes.
        signature: Signature,
        /// The bytes, fewer than a block at the end of the file.
        bytes: &'a [u8],
    },
    /// It does not come.
    Refused {
        /// Number of the question.
        number: u64,
        /// Why.
        why: Refusal,
    },
    /// The paired device lacks it, and cannot have it from the source now.
    Away {
        /// Number of the question.
        number: u64,
    },
    /// Which of the blocks that were asked about are holes.
    Map {
        /// Number of the question.
        number: u64,
        /// Runs of them in order, apart, each counted from the first block of the question.
        holes: Vec<Range<u32>>,
    },
}

impl<'a> Answer<'a> {
    /// Appends its layout.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Entries { last, entries } => {
                out.extend_from_slice(&[1, u8::from(*last)]);
                for entry in entries {
                    entry.encode(out);
                }
            }
            Self::Same(pieces) => {
                out.push(5);
                put_signatures(out, pieces);
            }
            Self::Block {
                number,
                signature,
                bytes,
            } => {
                out.push(2);
                out.extend_from_slice(&number.to_le_bytes());
                out.extend_from_slice(&signature.0);
                out.extend_from_slice(bytes);
            }
            Self::Refused { number, why } => {
                out.push(3);
                out.extend_from_slice(&number.to_le_bytes());
                out.push(u8::from(*why == Refusal::Unreadable));
            }
            Self::Away { number } => {
                out.push(6);
                out.extend_from_slice(&number.to_le_bytes());
            }
            Self::Map { number, holes } => {
                out.push(4);
                out.extend_from_slice(&number.to_le_bytes());
                for run in holes {
                    out.extend_from_slice(&run.start.to_le_bytes());
                    out.extend_from_slice(&run.end.to_le_bytes());
                }
            }
        }
    }

    /// From its layout.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let answer = match reader.u8()? {
            1 => {
                let last = reader.u8()? != 0;
                let mut entries = Vec::new();
                while !reader.is_empty() {
                    entries.push(Entry::decode(&mut reader)?);
                }
                Self::Entries { last, entries }
            }
            2 => {
                let number = reader.u64()?;
                let signature = Signature(reader.array()?);
                let rest = &bytes[1 + 8 + 32..];
                reader.bytes(rest.len())?;
                if rest.len() as u64 > BLOCK {
                    return Err(Malformed("a fetched block is longer than a block"));
                }
                Self::Block {
                    number,
                    signature,
                    bytes: rest,
                }
            }
            3 => Self::Refused {
                number: reader.u64()?,
                why: match reader.u8()? {
                    0 => Refusal::Gone,
                    _ => Refusal::Unreadable,
                },
            },
            4 => {
                let number = reader.u64()?;
                let (mut holes, mut last) = (Vec::new(), 0);
                while !reader.is_empty() {
                    let run = reader.u32()?..reader.u32()?;
                    if run.start < last || run.is_empty() || run.end > MAP_CAP {
                        return Err(Malformed("holes are out of order or beyond what was asked"));
                    }
                    if holes.len() == RUNS_CAP {
                        return Err(Malformed("an answer has more holes than the cap"));
                    }
                    last = run.end;
                    holes.push(run);
                }
                Self::Map { number, holes }
            }
            5 => Self::Same(signatures(&mut reader)?),
            6 => Self::Away {
                number: reader.u64()?,
            },
            _ => return Err(Malformed("an answer is of an unknown kind")),
        };
        if !reader.is_empty() {
            return Err(Malformed("bytes are left over after an answer"));
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_and_answers_survive_their_layout() {
        let wants: Vec<Want> = (0..3)
            .map(|n| Want {
                number: n,
                path: b"a/b".as_slice().into(),
                block: n << 20,
                held: None,
            })
            .collect();
        let held = |want: &Want| Want {
            held: (want.number > 0).then_some(Signature([8; 32])),
            ..want.clone()
        };
        let some_held = wants.iter().map(held).collect();
        for message in [
            Fetch::Open(Class::Demand),
            Fetch::Open(Class::Background),
            Fetch::Opened([3; 32]),
            Fetch::List {
                bits: BITS_MAX,
                pieces: vec![Signature([9; 32]); PIECES_CAP],
            },
            Fetch::Want(Vec::clone(&wants)),
            Fetch::Map {
                first: wants[1].clone(),
                count: MAP_CAP,
            },
            Fetch::Sign(wants),
            Fetch::Want(some_held),
            Fetch::Mirror {
                log: [4; 16],
                salt: [5; 32],
            },
            Fetch::Mirrored(7),
            Fetch::Sync,
            Fetch::Refused("no room".to_owned()),
        ] {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            let mut reader = Reader::new(&bytes);
            assert_eq!(Fetch::decode(&mut reader).unwrap(), message);
            assert!(reader.is_empty());
        }
    }

    #[test]
    fn a_wanted_path_that_leaves_the_volume_is_malformed() {
        for path in [b"../etc".as_slice(), b"/etc", b"a//b", b"a/.."] {
            let mut bytes = Vec::new();
            Fetch::Want(vec![Want {
                number: 1,
                path: path.into(),
                block: 0,
                held: None,
            }])
            .encode(&mut bytes);
            assert!(Fetch::decode(&mut Reader::new(&bytes)).is_err());
        }
    }

    #[test]
    fn holes_that_overlap_or_lie_beyond_the_question_are_malformed() {
        let told = |holes: Vec<Range<u32>>| {
            let mut bytes = Vec::new();
            let told = Answer::Map {
                number: 1,
                holes: holes.clone(),
            };
            told.encode(&mut bytes);
            let decoded = Answer::decode(&bytes);
            decoded.is_ok_and(|answer| {
                matches!(answer, Answer::Map { number: 1, holes: found } if found == holes)
            })
        };
        assert!(told(vec![]) && told(vec![0..1, 1..9, 100..MAP_CAP]));
        let (empty, beyond) = (7..7, 5..MAP_CAP + 1);
        for holes in [vec![0..5, 4..9], vec![empty], vec![beyond]] {
            assert!(!told(holes));
        }
        assert!(!told((0..=RUNS_CAP as u32).map(|n| n..n + 1).collect()));
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Fetch::decode(&mut Reader::new(&bytes));
            if let Ok(answer) = Answer::decode(&bytes) {
                let mut again = Vec::new();
                answer.encode(&mut again);
                prop_assert!(again.len() <= bytes.len());
            }
        }
    }
}
