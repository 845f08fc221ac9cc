//! The entries of a directory tree, their layout as bytes, and the root over all of them.
//!
//! Invariants: entries are sorted by raw path bytes, the volume's own directory first with an empty
//! path; a parent always comes before its children; inode numbers and change times are how the
//! source detects changes and never enter the root.

use super::codec::{Malformed, Reader, put_short};
use super::sign::{BlockSize, FleetKey};
use crate::model::ids::Signature;
use std::borrow::Cow;

/// Longest path within a volume, in bytes: `PATH_MAX` without its NUL.
pub const PATH_CAP: usize = 4095;
/// Longest name within a directory, in bytes: `NAME_MAX`.
pub const NAME_CAP: usize = 255;
/// Longest value of an extended attribute: `XATTR_SIZE_MAX` of the kernel.
pub const XATTR_CAP: usize = 65_536;
/// Most bytes of all extended attributes of one entry that a record carries.
pub const XATTRS_CAP: usize = 512 << 10;

/// A point in time as a file system stores it: seconds since the Unix epoch and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds, possibly before the epoch.
    pub seconds: i64,
    /// 0–999,999,999.
    pub nanoseconds: u32,
}

/// One extended attribute; POSIX ACLs and file capabilities are such attributes too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Full name with its name space.
    pub name: Box<[u8]>,
    /// Raw value.
    pub value: Box<[u8]>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file: its size in bytes and the signature of each block.
    File {
        /// Apparent size in bytes.
        size: u64,
        /// One signature a block; [`super::sign::ZERO`] for zeros and holes.
        blocks: Vec<Signature>,
    },
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// Another name of what is at this path, a file, symbolic link, FIFO or device that comes earlier in the order.
    HardLink(Box<[u8]>),
    /// A FIFO.
    Fifo,
    /// A character device and its number.
    CharDevice(u64),
    /// A block device and its number.
    BlockDevice(u64),
}

impl Kind {
    /// Its number in a layout.
    pub(super) fn number(&self) -> u8 {
        match self {
            Self::Directory => 0,
            Self::File { .. } => 1,
            Self::Symlink(_) => 2,
            Self::HardLink(_) => 3,
            Self::Fifo => 4,
            Self::CharDevice(_) => 5,
            Self::BlockDevice(_) => 6,
        }
    }
}

/// How the source recognises an entry again; never leaves the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// File system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Last change of content or metadata.
    pub changed: Timestamp,
    /// The change time was too close to the scan to rule out a later, unseen change.
    pub racy: bool,
}

/// One entry of a tree.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Path below the volume's directory; empty for that directory itself.
    pub path: Box<[u8]>,
    /// Permission bits with set-id and sticky; 0 for hard links.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<Xattr>,
    /// What it is.
    pub kind: Kind,
    /// Identity on the source.
    pub seen: Seen,
}

/// Something that was left out on purpose, or arrives as something else, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exception {
    /// Path below the volume's directory, made printable.
    pub path: String,
    /// Why it does not arrive so.
    pub reason: String,
}

impl std::fmt::Display for Exception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}

/// The root of a volume: BLAKE3, keyed with the fleet key, over the block size and then, in path
/// order, each entry's layout ([`Entry::encode`]) followed by the signatures of its blocks.
pub struct RootHasher {
    hasher: blake3::Hasher,
    layout: Vec<u8>,
}

impl RootHasher {
    /// Before the first entry.
    #[must_use]
    pub fn new(key: &FleetKey, block_size: BlockSize) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(b"lifeboat volume root 1");
        hasher.update(&block_size.bytes().to_le_bytes());
        let layout = Vec::with_capacity(64 << 10);
        Self { hasher, layout }
    }

    /// The next entry.
    pub fn add(&mut self, entry: &Entry) {
        entry.encode(&mut self.layout);
        if let Kind::File { blocks, .. } = &entry.kind {
            for block in blocks {
                self.layout.extend_from_slice(&block.0);
            }
        }
        // Hashing in large pieces keeps the wide BLAKE3 code paths busy.
        if self.layout.len() > 48 << 10 {
            self.hasher.update(&self.layout);
            self.layout.clear();
        }
    }

    /// The root.
    #[must_use]
    pub fn finish(mut self) -> Signature {
        self.hasher.update(&self.layout);
        Signature(*self.hasher.finalize().as_bytes())
    }
}

impl Entry {
    /// Apparent size in bytes; 0 unless it is a file.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self.kind {
            Kind::File { size, .. } => size,
            _ => 0,
        }
    }

    /// Whether both describe the same thing on disk, blocks included; identity is ignored.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        self.path == other.path
            && self.mode == other.mode
            && self.uid == other.uid
            && self.gid == other.gid
            && self.mtime == other.mtime
            && self.xattrs == other.xattrs
            && self.kind == other.kind
    }

    /// Appends the layout: path, kind, mode, owner, time, attributes and what the kind adds. All
    /// numbers are little-endian; every variable part is preceded by its length.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_short(out, &self.path);
        out.push(self.kind.number());
        out.extend_from_slice(&self.mode.to_le_bytes());
        out.extend_from_slice(&self.uid.to_le_bytes());
        out.extend_from_slice(&self.gid.to_le_bytes());
        out.extend_from_slice(&self.mtime.seconds.to_le_bytes());
        out.extend_from_slice(&self.mtime.nanoseconds.to_le_bytes());
        let count = u16::try_from(self.xattrs.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&count.to_le_bytes());
        for xattr in self.xattrs.iter().take(usize::from(count)) {
            put_short(out, &xattr.name);
            let len = u32::try_from(xattr.value.len()).unwrap_or(u32::MAX);
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(&xattr.value);
        }
        match &self.kind {
            Kind::Directory | Kind::Fifo => {}
            Kind::File { size: number, .. }
            | Kind::CharDevice(number)
            | Kind::BlockDevice(number) => out.extend_from_slice(&number.to_le_bytes()),
            Kind::Symlink(path) | Kind::HardLink(path) => put_short(out, path),
        }
    }

    /// Reads what [`Entry::encode`] wrote. A file comes without blocks, every entry without identity.
    ///
    /// # Errors
    /// [`Malformed`] for bytes that break the layout, a path that could lead outside or a value
    /// above its cap.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let path = checked_path(reader.short()?)?;
        let kind = reader.u8()?;
        let mode = reader.u32()?;
        if mode & !0o7777 != 0 {
            return Err(Malformed("a mode has more than permission bits"));
        }
        let (uid, gid) = (reader.u32()?, reader.u32()?);
        let mtime = Timestamp {
            seconds: reader.i64()?,
            nanoseconds: reader.u32()?,
        };
        if mtime.nanoseconds >= 1_000_000_000 {
            return Err(Malformed("a time has a billion nanoseconds or more"));
        }
        let mut xattrs = Vec::new();
        for _ in 0..reader.u16()? {
            let name = reader.short()?;
            if name.is_empty() || name.len() > 255 || name.contains(&0) {
                return Err(Malformed("an attribute has an impossible name"));
            }
            let len = reader.u32()? as usize;
            if len > XATTR_CAP {
                return Err(Malformed("an attribute is longer than 64 KiB"));
            }
            xattrs.push(Xattr {
                name: name.into(),
                value: reader.bytes(len)?.into(),
            });
        }
        let kind = match kind {
            0 => Kind::Directory,
            1 => {
                let size = reader.u64()?;
                if size > i64::MAX as u64 {
                    return Err(Malformed("a file is larger than any file can be"));
                }
                Kind::File {
                    size,
                    blocks: Vec::new(),
                }
            }
            2 => {
                let target = reader.short()?;
                if target.is_empty() || target.len() > PATH_CAP || target.contains(&0) {
                    return Err(Malformed("a symbolic link has an impossible target"));
                }
                Kind::Symlink(target.into())
            }
            3 => Kind::HardLink(checked_path(reader.short()?)?),
            4 => Kind::Fifo,
            5 => Kind::CharDevice(reader.u64()?),
            6 => Kind::BlockDevice(reader.u64()?),
            _ => return Err(Malformed("an entry is of an unknown kind")),
        };
        if path.is_empty() && kind != Kind::Directory {
            return Err(Malformed("the volume itself is not a directory"));
        }
        Ok(Self {
            path,
            mode,
            uid,
            gid,
            mtime,
            xattrs,
            kind,
            seen: Seen::default(),
        })
    }
}

/// A path from outside that stays beneath the volume by its form: relative, no empty, `.` or `..`
/// component, no NUL.
///
/// # Errors
/// [`Malformed`] otherwise.
pub fn checked_path(path: &[u8]) -> Result<Box<[u8]>, Malformed> {
    if path.len() > PATH_CAP || path.contains(&0) {
        return Err(Malformed("a path is too long or contains NUL"));
    }
    let plain = path.is_empty()
        || path.split(|&byte| byte == b'/').all(|part| {
            !part.is_empty() && part != b"." && part != b".." && part.len() <= NAME_CAP
        });
    if !plain {
        return Err(Malformed("a path is not plain and relative"));
    }
    Ok(path.into())
}

/// A path for people: bytes that are not UTF-8 are replaced; the volume itself is `.`.
#[must_use]
pub fn shown(path: &[u8]) -> Cow<'_, str> {
    if path.is_empty() {
        return Cow::Borrowed(".");
    }
    String::from_utf8_lossy(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_kind() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Directory),
            (0..i64::MAX as u64).prop_map(|size| Kind::File {
                size,
                blocks: Vec::new()
            }),
            "[^\0]{1,40}".prop_map(|target| Kind::Symlink(target.into_bytes().into())),
            "[a-z]{1,9}(/[a-z]{1,9}){0,3}"
                .prop_map(|path| Kind::HardLink(path.into_bytes().into())),
            Just(Kind::Fifo),
            any::<u64>().prop_map(Kind::CharDevice),
            any::<u64>().prop_map(Kind::BlockDevice),
        ]
    }

    prop_compose! {
        fn any_entry()(
            path in "[a-z]{1,9}(/[a-z\u{e9}]{1,9}){0,3}",
            mode in 0..0o10000_u32,
            uid in any::<u32>(),
            gid in any::<u32>(),
            seconds in any::<i64>(),
            nanoseconds in 0..1_000_000_000_u32,
            names in proptest::collection::vec(("user\\.[a-z]{1,9}", proptest::collection::vec(any::<u8>(), 0..99)), 0..4),
            kind in any_kind(),
        ) -> Entry {
            Entry {
                path: path.into_bytes().into(),
                mode, uid, gid,
                mtime: Timestamp { seconds, nanoseconds },
                xattrs: names.into_iter().map(|(name, value)| Xattr {
                    name: name.into_bytes().into(), value: value.into(),
                }).collect(),
                kind,
                seen: Seen::default(),
            }
        }
    }

    proptest! {
        #[test]
        fn an_entry_survives_its_layout(entry in any_entry()) {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            let mut reader = Reader::new(&bytes);
            let back = Entry::decode(&mut reader).unwrap();
            prop_assert!(reader.is_empty());
            prop_assert!(entry.same(&back));
        }

        #[test]
        fn decoding_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let decoded = Entry::decode(&mut Reader::new(&bytes));
            if let Ok(entry) = decoded {
                prop_assert!(checked_path(&entry.path).is_ok());
            }
        }

        #[test]
        fn changed_blocks_cover_every_changed_byte_once_and_no_block_without_one(
            ranges in proptest::collection::vec((0..5_000_000_u64, 1..400_000_u64), 0..20), size in 1..5_000_000_u64,
        ) {
            let path = b"content";
            let now = |size| crate::volume::state::Now { size, ..Default::default() };
            let file = Entry {
                path: (*path).into(), mode: 0, uid: 0, gid: 0, mtime: Timestamp::default(), xattrs: Vec::new(),
                kind: Kind::File { size, blocks: Vec::new() }, seen: Seen::default(),
            };
            let mut state = crate::volume::TreeState::new(&FleetKey([3; 32]), BlockSize::default(), vec![file]);
            prop_assert_eq!(state.changed_blocks(path, &now(size)), None);
            let (lost, changed) = ranges.split_at(ranges.len() / 2);
            state.changed = Some(changed.iter().map(|(start, len)| *start..start + len).collect());
            state.unreadable = lost.iter().map(|(offset, length)| crate::volume::Unreadable {
                path: "content".into(), offset: *offset, length: *length, entry: None, kept: false,
            }).collect();
            let runs = state.changed_blocks(path, &now(size)).unwrap();
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            for block in 0..BlockSize::default().blocks_of(size) {
                let (from, to) = (block * 65_536, ((block + 1) * 65_536).min(size));
                let differs = ranges.iter().any(|(start, len)| *start < to && from < start + len);
                prop_assert_eq!(runs.iter().any(|run| run.contains(&block)), differs);
            }
            prop_assert_eq!(state.changed_blocks(path, &now(size + 1)), None);
        }

        #[test]
        fn a_root_depends_on_every_field(a in any_entry(), b in any_entry()) {
            let key = FleetKey([3; 32]);
            let root = |entry: &Entry| {
                let mut hasher = RootHasher::new(&key, BlockSize::default());
                hasher.add(entry);
                hasher.finish()
            };
            prop_assert_eq!(root(&a) == root(&b), a.same(&b));
        }
    }

    #[test]
    fn paths_that_could_leave_the_volume_are_refused() {
        for path in ["/etc", "..", "a/../b", "a//b", "a/.", "./a", "a/", "a\0b"] {
            assert!(checked_path(path.as_bytes()).is_err(), "{path:?}");
        }
        for path in ["", "a", "a/b", "...", "a/..b", "a b\n"] {
            assert!(checked_path(path.as_bytes()).is_ok(), "{path:?}");
        }
        assert!(checked_path(b"caf\xe9/\xff").is_ok());
    }
}
