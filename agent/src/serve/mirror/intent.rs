//! What is about to be changed, and what was changed, read from the tree afterwards.
//!
//! Invariant: the changes describe the tree as it is after the call, also when the call failed half way or the
//! process died in it; for a name that is not as it was meant to be there is no change.

use crate::serve::presence::PAGE;
use crate::serve::store::Store;
use crate::volume::codec::{Malformed, Reader, put_short};
use crate::volume::confined::split;
use crate::volume::mirror::{Act, Change, WRITE_CAP};
use crate::volume::scan::{open_file, read_full};
use crate::volume::walk::{Found, bare_entry, kind_of, read_xattrs, special_entry, timestamp};
use crate::volume::{Confined, Entry, Kind, Timestamp};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, SFlag, fstat, fstatat};
use std::ffi::OsStr;
use std::io;

/// A change of a path, or of two, that is about to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Something is made there.
    Made(Vec<u8>),
    /// A file gets one more name.
    Linked {
        /// One that it has.
        from: Vec<u8>,
        /// The new one.
        to: Vec<u8>,
    },
    /// A name is removed.
    Removed(Vec<u8>),
    /// Something is renamed.
    Renamed {
        /// Its name.
        from: Vec<u8>,
        /// Its new name.
        to: Vec<u8>,
        /// Whether what is there takes its place.
        exchange: bool,
        /// Inode of what is at `from`.
        inode: u64,
    },
    /// Bytes are written.
    Written {
        /// File.
        path: Vec<u8>,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A range becomes zeros.
    Zeroed {
        /// File.
        path: Vec<u8>,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Size, owner, mode, times or attributes are changed.
    State(Vec<u8>),
}

impl Intent {
    /// Appends its layout.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, paths, numbers): (u8, [&[u8]; 2], [u64; 2]) = match self {
            Self::Made(path) => (1, [path, b""], [0; 2]),
            Self::Linked { from, to } => (2, [from, to], [0; 2]),
            Self::Removed(path) => (3, [path, b""], [0; 2]),
            Self::Renamed {
                from,
                to,
                exchange,
                inode,
            } => (4, [from, to], [u64::from(*exchange), *inode]),
            Self::Written {
                path,
                offset,
                length,
            } => (5, [path, b""], [*offset, *length]),
            Self::Zeroed {
                path,
                offset,
                length,
            } => (6, [path, b""], [*offset, *length]),
            Self::State(path) => (7, [path, b""], [0; 2]),
        };
        out.push(kind);
        for number in numbers {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for path in paths {
            put_short(out, path);
        }
    }

    /// From its layout.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let kind = reader.u8()?;
        let (offset, length) = (reader.u64()?, reader.u64()?);
        let path = reader.short()?.to_vec();
        let to = reader.short()?.to_vec();
        Ok(match kind {
            1 => Self::Made(path),
            2 => Self::Linked { from: path, to },
            3 => Self::Removed(path),
            4 => Self::Renamed {
                from: path,
                to,
                exchange: offset != 0,
                inode: length,
            },
            5 => Self::Written {
                path,
                offset,
                length,
            },
            6 => Self::Zeroed {
                path,
                offset,
                length,
            },
            7 => Self::State(path),
            _ => return Err(Malformed("an intended change is of an unknown kind")),
        })
    }

    /// The changes that came of it; `bytes` are those of a write that was done wholly, and none says that it must
    /// be looked at what was done.
    pub(super) fn changes(&self, store: &Store, bytes: Option<&[u8]>) -> io::Result<Vec<Change>> {
        let data = store.data();
        let mut changes = Vec::new();
        match self {
            Self::Made(path) => {
                if let Some(entry) = entry(store, path)? {
                    changes.push(with_parents(store, Act::Made(entry), &[path])?);
                }
            }
            Self::Linked { from, to } => {
                if is_mirrored(stat(data, to)?) {
                    let act = Act::Linked {
                        from: from.as_slice().into(),
                        to: to.as_slice().into(),
                    };
                    changes.push(with_parents(store, act, &[to])?);
                }
            }
            Self::Removed(path) => {
                if stat(data, path)?.is_none() {
                    let act = Act::Removed(path.as_slice().into());
                    changes.push(with_parents(store, act, &[path])?);
                }
            }
            Self::Renamed {
                from,
                to,
                exchange,
                inode,
            } => {
                let there = stat(data, to)?.filter(|stat| stat.st_ino == *inode);
                let act = match there {
                    None => return Ok(changes),
                    Some(_) if is_mirrored(there) => Act::Renamed {
                        from: from.as_slice().into(),
                        to: to.as_slice().into(),
                        exchange: *exchange,
                    },
                    Some(_) if *exchange => {
                        return Err(io::Error::other(
                            "a socket took the place of something else",
                        ));
                    }
                    Some(_) => Act::Removed(to.as_slice().into()),
                };
                changes.push(with_parents(store, act, &[from, to])?);
            }
            Self::Written {
                path,
                offset,
                length,
            }
            | Self::Zeroed {
                path,
                offset,
                length,
            } => match (self, bytes) {
                (Self::Zeroed { .. }, Some(_)) => {
                    let act = Act::Zeroed {
                        path: path.as_slice().into(),
                        offset: *offset,
                        length: *length,
                    };
                    changes.push(plain(act));
                    changes.extend(state(store, path)?);
                }
                (_, Some(bytes)) => {
                    for (part, at) in bytes.chunks(WRITE_CAP).zip(0..) {
                        let mut change = written(path, offset + at * WRITE_CAP as u64, part.into());
                        change
                            .times
                            .push((path.as_slice().into(), time(store, path)?));
                        changes.push(change);
                    }
                }
                (_, None) => {
                    reread(store, path, *offset, *length, &mut changes)?;
                    changes.extend(state(store, path)?);
                }
            },
            Self::State(path) => changes.extend(state(store, path)?),
        }
        Ok(changes)
    }
}

fn plain(act: Act) -> Change {
    Change {
        act,
        times: Vec::new(),
    }
}

fn written(path: &[u8], offset: u64, bytes: Box<[u8]>) -> Change {
    plain(Act::Written {
        path: path.into(),
        offset,
        bytes,
    })
}

/// A change of names, with the times of the directories of `paths` after it.
fn with_parents(store: &Store, act: Act, paths: &[&[u8]]) -> io::Result<Change> {
    let mut change = plain(act);
    for path in paths {
        let parent = split(path).0;
        change.times.push((parent.into(), time(store, parent)?));
    }
    Ok(change)
}

/// What is at `path`, if anything is.
fn stat(data: &Confined, path: &[u8]) -> io::Result<Option<FileStat>> {
    if path.is_empty() {
        return Ok(Some(fstat(data.fd())?));
    }
    let found = data
        .parent(path)
        .and_then(|(parent, name)| fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW));
    match found {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether something is there, and no socket: these are left behind everywhere.
fn is_mirrored(stat: Option<FileStat>) -> bool {
    stat.is_some_and(|stat| kind_of(&stat) != SFlag::S_IFSOCK)
}

fn time(store: &Store, path: &[u8]) -> io::Result<Timestamp> {
    let look = || io::Result::Ok(stat(store.data(), path)?.ok_or(Errno::ENOENT)?);
    let mut stat = look()?;
    if let Some(_quiet) = store.quiet(store.number(stat.st_ino)) {
        stat = look()?;
    }
    Ok(timestamp(stat.st_mtime, stat.st_mtime_nsec))
}

fn entry(store: &Store, path: &[u8]) -> io::Result<Option<Entry>> {
    let data = store.data();
    let Some(stat) = stat(data, path)?.filter(|stat| is_mirrored(Some(*stat))) else {
        return Ok(None);
    };
    let failed = |error: crate::volume::walk::WalkError| io::Error::other(error.to_string());
    if kind_of(&stat) != SFlag::S_IFREG {
        let found = Found {
            path: path.into(),
            stat,
        };
        return special_entry(data, &found, false).map(Some).map_err(failed);
    }
    let (file, stat) = open_file(data, path).map_err(failed)?;
    let _quiet = store.quiet(store.number(stat.st_ino));
    let stat = fstat(&file)?;
    let kind = Kind::File {
        size: stat.st_size.unsigned_abs(),
        blocks: Vec::new(),
    };
    let mut entry = bare_entry(path, &stat, kind, false);
    entry.xattrs = read_xattrs(data, path, &file).map_err(failed)?;
    Ok(Some(entry))
}

fn state(store: &Store, path: &[u8]) -> io::Result<Option<Change>> {
    Ok(entry(store, path)?.map(|entry| plain(Act::State(entry))))
}

/// The pages of a range that are here.
fn reread(
    store: &Store,
    path: &[u8],
    offset: u64,
    length: u64,
    changes: &mut Vec<Change>,
) -> io::Result<()> {
    let opened = open_file(store.data(), path);
    let (file, stat) = opened.map_err(|error| io::Error::other(error.to_string()))?;
    let number = store.number(stat.st_ino);
    let end = offset
        .saturating_add(length)
        .min(stat.st_size.unsigned_abs());
    let mut at = offset;
    while at < end {
        let to = end.min((at / PAGE + 1) * PAGE);
        if !store.waits(number, at, to - at) {
            let mut bytes = vec![0; (to - at) as usize];
            let read = read_full(&file, &mut bytes, at)?;
            bytes.truncate(read);
            changes.push(written(path, at, bytes.into()));
        }
        at = to;
    }
    Ok(())
}

/// The name of `name` in the directory at `parent`.
pub(in crate::serve) fn joined(parent: &[u8], name: &OsStr) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    if parent.is_empty() {
        return name.as_bytes().to_vec();
    }
    [parent, b"/", name.as_bytes()].concat()
}
