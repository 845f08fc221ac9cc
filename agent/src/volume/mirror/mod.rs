//! The mirror of a tree that is served before all of its data is here: every change of it, in order, as a log that
//! the source keeps beside its frozen data and can write over it.
//!
//! Invariants: a change names paths as they were when it was made and says what was there after it, so that a log
//! that is replayed from its beginning leads to the same tree, also over the data of a replay that was interrupted;
//! decoding never panics and no path leaves the tree. Non-goals: the wire, and when the log is written back.

mod back;
mod log;

pub use back::{WriteBackError, write_back};
pub use log::{Log, LogId, Mark, Record};

use super::codec::{Malformed, Reader, put_short};
use super::tree::{Entry, Timestamp, checked_path};

/// Most bytes that one change writes.
pub const WRITE_CAP: usize = 1 << 20;

/// What was done.
#[derive(Clone, Debug)]
pub enum Act {
    /// An entry was made: what it was then; a file with its size alone.
    Made(Entry),
    /// What is at `from` got the further name `to`.
    Linked {
        /// Known name.
        from: Box<[u8]>,
        /// New name.
        to: Box<[u8]>,
    },
    /// A name was removed.
    Removed(Box<[u8]>),
    /// A name was moved, onto another or in exchange with it.
    Renamed {
        /// Old name.
        from: Box<[u8]>,
        /// New name.
        to: Box<[u8]>,
        /// Whether what was at `to` is at `from` now.
        exchange: bool,
    },
    /// Bytes of a file.
    Written {
        /// File.
        path: Box<[u8]>,
        /// First byte.
        offset: u64,
        /// The bytes.
        bytes: Box<[u8]>,
    },
    /// A range of a file reads as zeros; its size stays.
    Zeroed {
        /// File.
        path: Box<[u8]>,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Metadata of an entry, and a file's size.
    State(Entry),
}

/// One change.
#[derive(Clone, Debug)]
pub struct Change {
    /// What was done.
    pub act: Act,
    /// Modification times after it.
    pub times: Vec<(Box<[u8]>, Timestamp)>,
}

impl Change {
    /// Appends its layout.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let count = u8::try_from(self.times.len()).unwrap_or(u8::MAX);
        out.push(count);
        for (path, time) in &self.times[..usize::from(count)] {
            put_short(out, path);
            out.extend_from_slice(&time.seconds.to_le_bytes());
            out.extend_from_slice(&time.nanoseconds.to_le_bytes());
        }
        match &self.act {
            Act::Made(entry) => {
                out.push(1);
                entry.encode(out);
            }
            Act::Linked { from, to } => {
                out.push(2);
                put_short(out, from);
                put_short(out, to);
            }
            Act::Removed(path) => {
                out.push(3);
                put_short(out, path);
            }
            Act::Renamed { from, to, exchange } => {
                out.extend_from_slice(&[4, u8::from(*exchange)]);
                put_short(out, from);
                put_short(out, to);
            }
            Act::Written {
                path,
                offset,
                bytes,
            } => {
                out.push(5);
                put_short(out, path);
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
            }
            Act::Zeroed {
                path,
                offset,
                length,
            } => {
                out.push(6);
                put_short(out, path);
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(&length.to_le_bytes());
            }
            Act::State(entry) => {
                out.push(7);
                entry.encode(out);
            }
        }
    }

    /// From its layout.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let count = reader.u8()?;
        let mut times = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let path = checked_path(reader.short()?)?;
            let (seconds, nanoseconds) = (reader.i64()?, reader.u32()?);
            if nanoseconds > 999_999_999 {
                return Err(Malformed("nanoseconds of a mirrored time are out of range"));
            }
            let time = Timestamp {
                seconds,
                nanoseconds,
            };
            times.push((path, time));
        }
        let path = |reader: &mut Reader<'_>| checked_path(reader.short()?);
        let act = match reader.u8()? {
            1 => Act::Made(Entry::decode(&mut reader)?),
            2 => Act::Linked {
                from: named(path(&mut reader)?)?,
                to: named(path(&mut reader)?)?,
            },
            3 => Act::Removed(named(path(&mut reader)?)?),
            4 => Act::Renamed {
                exchange: reader.u8()? != 0,
                from: named(path(&mut reader)?)?,
                to: named(path(&mut reader)?)?,
            },
            5 => {
                let (path, offset) = (named(path(&mut reader)?)?, reader.u64()?);
                let rest = reader.rest();
                if rest.len() > WRITE_CAP {
                    return Err(Malformed("a mirrored write is longer than its cap"));
                }
                Act::Written {
                    path,
                    offset,
                    bytes: reader.bytes(rest.len())?.into(),
                }
            }
            6 => Act::Zeroed {
                path: named(path(&mut reader)?)?,
                offset: reader.u64()?,
                length: reader.u64()?,
            },
            7 => Act::State(Entry::decode(&mut reader)?),
            _ => return Err(Malformed("a mirrored change is of an unknown kind")),
        };
        if !reader.is_empty() {
            return Err(Malformed("bytes are left over after a mirrored change"));
        }
        Ok(Self { act, times })
    }
}

/// A path of something below the tree's own directory.
fn named(path: Box<[u8]>) -> Result<Box<[u8]>, Malformed> {
    if path.is_empty() {
        return Err(Malformed("a mirrored change names the volume itself"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn changes() -> Vec<Change> {
        let entry = Entry {
            path: b"d/f".as_slice().into(),
            mode: 0o640,
            uid: 1,
            gid: 2,
            mtime: Timestamp {
                seconds: -3,
                nanoseconds: 4,
            },
            xattrs: Vec::new(),
            kind: super::super::Kind::File {
                size: 77,
                blocks: Vec::new(),
            },
            seen: super::super::tree::Seen::default(),
        };
        let path = |path: &[u8]| -> Box<[u8]> { path.into() };
        let acts = [
            Act::Made(entry.clone()),
            Act::Linked {
                from: path(b"a"),
                to: path(b"d/b"),
            },
            Act::Removed(path(b"a")),
            Act::Renamed {
                from: path(b"a"),
                to: path(b"b"),
                exchange: true,
            },
            Act::Written {
                path: path(b"a"),
                offset: 1 << 40,
                bytes: path(b"bytes"),
            },
            Act::Zeroed {
                path: path(b"a"),
                offset: 5,
                length: 6,
            },
            Act::State(entry),
        ];
        let times = vec![
            (path(b""), Timestamp::default()),
            (path(b"d"), Timestamp::default()),
        ];
        let change = |act| Change {
            act,
            times: times.clone(),
        };
        acts.into_iter().map(change).collect()
    }

    #[test]
    fn changes_survive_their_layout_and_none_leaves_the_tree() {
        for change in changes() {
            let mut bytes = Vec::new();
            change.encode(&mut bytes);
            let decoded = Change::decode(&bytes).unwrap();
            let mut again = Vec::new();
            decoded.encode(&mut again);
            assert_eq!(again, bytes, "{change:?}");
        }
        for path in [b"../a".as_slice(), b"/a", b"", b"a/.."] {
            let mut bytes = Vec::new();
            plain(Act::Removed(path.into())).encode(&mut bytes);
            assert!(Change::decode(&bytes).is_err(), "{path:?}");
        }
    }

    fn plain(act: Act) -> Change {
        Change {
            act,
            times: Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_never_panics(
            at in 0..7_usize,
            cut in 0..200_usize,
            flips in proptest::collection::vec((0..200_usize, any::<u8>()), 0..4),
        ) {
            let mut bytes = Vec::new();
            changes()[at].encode(&mut bytes);
            for (place, bits) in flips {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= bits;
                }
            }
            bytes.truncate(cut);
            let _ = Change::decode(&bytes);
        }
    }
}
