//! A store that is made ahead, while the list of its volume may still change, and is brought to the last list once it
//! cannot any more: a tree takes far longer to make than to look through.
//!
//! Invariants: the index is gone, durably, before the tree is changed, so that a draft which is found is whole; what is
//! the same in both lists is not touched. Non-goal: bytes, of which none comes before the volume is owned here.

use super::origins::{StoreError, Tree, failed, make, read_index, read_list};
use super::reuse::{Copies, end_copies};
use crate::model::units::Bytes;
use crate::transfer::Options;
use crate::transfer::fetch::{BLOCK, FetchPlan, Fetcher};
use crate::volume::apply::Access;
use crate::volume::confined::split;
use crate::volume::tree::shown;
use crate::volume::{Entry, Kind};
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::Path;

/// The store of a volume before it is opened.
#[derive(Clone, Copy)]
pub struct Draft<'a> {
    /// The store's directory.
    pub directory: &'a Path,
    /// The volume's name, for messages.
    pub volume: &'a str,
    /// Whether device nodes are made.
    pub devices: bool,
}

impl Draft<'_> {
    /// Whether there is a whole one.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.directory.join("index").exists()
    }

    /// Makes it of the source's list of now.
    ///
    /// # Errors
    /// The source cannot be asked, or the tree cannot be made.
    pub fn make(&self, plan: &FetchPlan, options: &Options) -> Result<(), StoreError> {
        let entries = listed(plan, options, &[])?;
        make(self.directory, self.volume, &entries, self.devices)?;
        end_copies(self.directory).map_err(failed("remove an earlier copy", self.directory))
    }

    /// Brings it to the source's list of now. It may have been opened, but nothing written to it.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn revise(&self, plan: &FetchPlan, options: &Options) -> Result<(), StoreError> {
        let before = read_list(self.directory).map_err(failed("read the list", self.directory))?;
        let now = listed(plan, options, &before)?;
        self.bring_to(&before, &now)
    }

    fn bring_to(&self, before: &[Entry], entries: &[Entry]) -> Result<(), StoreError> {
        let directory = self.directory;
        let origins = read_index(directory).and_then(|origins| {
            origins.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is not whole"))
        });
        let origins = origins.map_err(failed("read the index", directory))?;
        let changed = Difference::between(before, entries);
        tracing::info!(
            volume = self.volume,
            entries = entries.len(),
            removed = changed.gone.len(),
            made = changed.new.len(),
            changed = changed.other.len(),
            "brings what was listed ahead to the last list"
        );
        forget(directory).map_err(failed("remove the index", directory))?;
        let was = changed.gone.iter().chain(&changed.other);
        let was: HashSet<&[u8]> = was.map(|entry| &*entry.path).collect();
        let numbers = origins.iter().zip(0..);
        let numbers = numbers.filter_map(|(origin, number)| {
            let path = was.get(&*origin.path)?;
            Some((*path, number))
        });
        let numbers: HashMap<&[u8], usize> = numbers.collect();
        let mut tree = Tree::open(directory, self.volume, self.devices, origins)?;
        for entry in changed.gone.iter().rev() {
            tree.data.remove(&mut tree.parent, &entry.path)?;
            if entry.kind == Kind::Directory {
                tree.parent.forget();
            }
            if let Some(number) = numbers.get(&*entry.path) {
                tree.forget_origin(*number)?;
            }
        }
        let mut copies = Copies::default();
        for entry in changed.new {
            tree.add(entry, &mut copies)?;
        }
        for entry in changed.other {
            match (&entry.kind, numbers.get(&*entry.path)) {
                (Kind::File { size, .. }, known) => {
                    tree.finish_file(entry, Access::InPlace)?;
                    match known {
                        Some(number) if *size > 0 => tree.origins[*number].size = *size,
                        Some(number) => tree.forget_origin(*number)?,
                        None if *size > 0 => tree.name_origin(entry)?,
                        None => {}
                    }
                }
                // With those whose names changed.
                (Kind::Directory, _) => {}
                _ => tree.data.finish_special(&mut tree.parent, entry)?,
            }
        }
        for entry in entries.iter().rev() {
            if entry.kind == Kind::Directory && changed.directories.contains(&*entry.path) {
                tree.data.finish_directory(entry)?;
            }
        }
        tree.write(entries)?;
        Ok(())
    }
}

/// Removes the index, and what an opened store knows of its blocks, which may have other numbers from now on.
fn forget(directory: &Path) -> io::Result<()> {
    for name in ["index", "durable", "live", "signatures", "inodes"] {
        match std::fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    File::open(directory)?.sync_all()
}

/// The source's list of a volume, of which this one is here.
pub(super) fn listed(
    plan: &FetchPlan,
    options: &Options,
    known: &[Entry],
) -> Result<Vec<Entry>, StoreError> {
    let listed = consistent(Fetcher::list(plan, options, known)?);
    fits(&listed)?;
    Ok(listed)
}

/// Whether a list is of no more blocks than can be kept account of.
fn fits(listed: &[Entry]) -> Result<(), StoreError> {
    let blocks = |entry: &Entry| entry.size().div_ceil(BLOCK);
    let all = listed.iter().map(blocks).fold(0, u64::saturating_add);
    match listed.iter().max_by_key(|entry| entry.size()) {
        Some(largest) if all > BLOCKS_CAP => Err(StoreError::TooLong {
            cap: Bytes(BLOCKS_CAP * BLOCK),
            path: shown(&largest.path).into_owned(),
            size: Bytes(largest.size()),
        }),
        _ => Ok(()),
    }
}

/// Blocks of a store: 16 TiB, of which what is here takes 1 GiB of memory.
const BLOCKS_CAP: u64 = 1 << 28;

/// A list without what contradicts the rest of it, because the tree changed meanwhile: what comes twice, what lies in no
/// directory of the list, and further names of nothing.
fn consistent(listed: Vec<Entry>) -> Vec<Entry> {
    let mut directories: HashSet<Box<[u8]>> = HashSet::new();
    let links = listed.iter().filter_map(|entry| match &entry.kind {
        Kind::HardLink(primary) => Some((primary.clone(), false)),
        _ => None,
    });
    let mut primaries: HashMap<Box<[u8]>, bool> = links.collect();
    let mut kept: Vec<Entry> = Vec::with_capacity(listed.len());
    for entry in listed {
        let (parent, _) = split(&entry.path);
        let is_next = kept.last().is_none_or(|last| last.path < entry.path);
        if !is_next || !(entry.path.is_empty() || directories.contains(parent)) {
            continue;
        }
        match &entry.kind {
            Kind::HardLink(primary) if primaries.get(primary) != Some(&true) => continue,
            Kind::Directory => {
                directories.insert(entry.path.clone());
            }
            Kind::HardLink(_) => {}
            _ => {
                if let Some(there) = primaries.get_mut(&entry.path) {
                    *there = true;
                }
            }
        }
        kept.push(entry);
    }
    kept
}

/// What is to be done to a tree that is as one list says, so that it is as the other says. Each in path order.
#[derive(Debug, Default)]
struct Difference<'a> {
    /// Entries of the first list to be removed.
    gone: Vec<&'a Entry>,
    /// Entries of the second to be made.
    new: Vec<&'a Entry>,
    /// Entries of the second that are there and have another size or other metadata.
    other: Vec<&'a Entry>,
    /// Directories whose times are lost by that, or are others.
    directories: HashSet<&'a [u8]>,
}

impl<'a> Difference<'a> {
    fn between(before: &'a [Entry], now: &'a [Entry]) -> Self {
        let mut difference = Self::default();
        let (mut was, mut is) = (before.iter().peekable(), now.iter().peekable());
        loop {
            let order = match (was.peek(), is.peek()) {
                (Some(was), Some(is)) => was.path.cmp(&is.path),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return difference,
            };
            let old = was.next_if(|_| order.is_le());
            let new = is.next_if(|_| order.is_ge());
            if let (Some(old), Some(new)) = (old, new)
                && stays(old, new, before, now)
            {
                if !old.same(new) {
                    difference.other.push(new);
                    difference.touch(new);
                }
                continue;
            }
            for entry in [old, new].into_iter().flatten() {
                difference.touch(entry);
                difference.directories.insert(split(&entry.path).0);
            }
            difference.gone.extend(old);
            difference.new.extend(new);
        }
    }

    fn touch(&mut self, entry: &'a Entry) {
        if entry.kind == Kind::Directory {
            self.directories.insert(&entry.path);
        }
    }
}

/// Whether what the one list has at a path is what the other has there, but for its size and metadata.
fn stays(old: &Entry, new: &Entry, before: &[Entry], now: &[Entry]) -> bool {
    match (&old.kind, &new.kind) {
        (Kind::File { .. }, Kind::File { .. }) => true,
        // A further name of what is made anew is none of that.
        (Kind::HardLink(one), Kind::HardLink(other)) => {
            one == other
                && matches!((find(before, one), find(now, one)), (Some(old), Some(new))
                    if !matches!(old.kind, Kind::HardLink(_)) && stays(old, new, before, now))
        }
        (one, other) => one == other,
    }
}

fn find<'a>(list: &'a [Entry], path: &[u8]) -> Option<&'a Entry> {
    let found = list.binary_search_by(|entry| (*entry.path).cmp(path));
    found.ok().map(|at| &list[at])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::tree::Timestamp;
    use crate::volume::{BlockSize, FleetKey};
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{DirEntryExt, MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    #[test]
    fn a_list_of_more_blocks_than_can_be_counted_is_refused_by_the_name_of_the_longest_file() {
        let file = |path: &[u8], size| Entry {
            path: path.into(),
            mode: 0o600,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            kind: Kind::File {
                size,
                blocks: Vec::new(),
            },
            seen: crate::volume::tree::Seen::default(),
        };
        let long = i64::MAX as u64;
        assert!(fits(&[file(b"a", BLOCKS_CAP * BLOCK), file(b"b", 0)]).is_ok());
        for list in [
            vec![file(b"a", BLOCKS_CAP * BLOCK), file(b"b", 1)],
            vec![file(b"a", long), file(b"b", long - 1), file(b"c", long - 2)],
        ] {
            let said = fits(&list).unwrap_err().to_string();
            assert!(said.contains("`a`") && said.contains("16.0 TiB"), "{said}");
        }
    }

    /// What may happen to a tree.
    #[derive(Clone, Debug)]
    enum Deed {
        Directory(PathBuf),
        Write(PathBuf, u16),
        Link(PathBuf, PathBuf),
        Symlink(PathBuf, PathBuf),
        Fifo(PathBuf),
        Rename(PathBuf, PathBuf),
        Remove(PathBuf),
        Mode(PathBuf, u32),
        Attribute(PathBuf, u8),
        Time(PathBuf, u32),
    }

    impl Deed {
        /// Does it where it can be done.
        fn attempt(&self, root: &Path) -> io::Result<()> {
            let at = |path: &PathBuf| root.join(path);
            match self {
                Self::Directory(path) => std::fs::create_dir(at(path)),
                Self::Write(path, size) => {
                    if at(path).symlink_metadata().is_ok_and(|is| !is.is_file()) {
                        return Ok(());
                    }
                    std::fs::write(at(path), vec![1; usize::from(*size)])
                }
                Self::Link(from, to) => std::fs::hard_link(at(from), at(to)),
                Self::Symlink(to, path) => symlink(to, at(path)),
                Self::Fifo(path) => {
                    nix::unistd::mkfifo(&at(path), nix::sys::stat::Mode::S_IRUSR)?;
                    Ok(())
                }
                Self::Rename(from, to) => std::fs::rename(at(from), at(to)),
                Self::Remove(path) if at(path).symlink_metadata()?.is_dir() => {
                    std::fs::remove_dir_all(at(path))
                }
                Self::Remove(path) => std::fs::remove_file(at(path)),
                Self::Mode(path, mode) if !at(path).is_symlink() => {
                    std::fs::set_permissions(at(path), PermissionsExt::from_mode(0o700 | mode))
                }
                Self::Attribute(path, value) if !at(path).is_symlink() => {
                    xattr::set(at(path), "user.lifeboat", &[*value])
                }
                Self::Time(path, seconds) if at(path).is_dir() => {
                    let time = std::time::Duration::from_secs(u64::from(*seconds));
                    File::open(at(path))?.set_modified(std::time::UNIX_EPOCH + time)
                }
                Self::Mode(..) | Self::Attribute(..) | Self::Time(..) => Ok(()),
            }
        }
    }

    fn any_path() -> impl Strategy<Value = PathBuf> {
        let name = proptest::sample::select(vec![&b"a"[..], b"b", b"a-", b"\xff"]);
        let names = proptest::collection::vec(name, 1..4);
        names.prop_map(|names| names.iter().map(|name| OsStr::from_bytes(name)).collect())
    }

    fn any_deed() -> impl Strategy<Value = Deed> {
        let two = || (any_path(), any_path());
        prop_oneof![
            4 => any_path().prop_map(Deed::Directory),
            4 => (any_path(), prop_oneof![Just(0), 1..9000_u16]).prop_map(|(path, size)| Deed::Write(path, size)),
            3 => two().prop_map(|(from, to)| Deed::Link(from, to)),
            1 => two().prop_map(|(from, to)| Deed::Symlink(from, to)),
            1 => any_path().prop_map(Deed::Fifo),
            3 => two().prop_map(|(from, to)| Deed::Rename(from, to)),
            2 => any_path().prop_map(Deed::Remove),
            1 => (any_path(), 0..0o1000_u32).prop_map(|(path, mode)| Deed::Mode(path, mode)),
            1 => (any_path(), any::<u8>()).prop_map(|(path, value)| Deed::Attribute(path, value)),
            1 => (any_path(), any::<u32>()).prop_map(|(path, seconds)| Deed::Time(path, seconds)),
        ]
    }

    /// The list of a tree, as the source gives it.
    fn list(path: &Path) -> Vec<Entry> {
        let (state, _) =
            crate::volume::scan(path, &FleetKey([3; 32]), BlockSize::for_volume(0)).unwrap();
        let mut entries: Vec<Entry> = state.iter().collect();
        for entry in &mut entries {
            if let Kind::File { blocks, .. } = &mut entry.kind {
                blocks.clear();
            }
        }
        entries
    }

    /// Inode of each origin that there is, with its path and size.
    fn origins(directory: &Path) -> BTreeMap<u64, (Vec<u8>, u64)> {
        let index = read_index(directory).unwrap().unwrap();
        let mut next = 0;
        for origin in &index {
            assert_eq!(origin.first, next);
            next += origin.blocks();
        }
        let names = std::fs::read_dir(directory.join("origins")).unwrap();
        let named = names.map(|name| {
            let name = name.unwrap();
            let number: usize = name.file_name().to_str().unwrap().parse().unwrap();
            let origin = &index[number];
            (name.ino(), (origin.path.to_vec(), origin.size))
        });
        let named: BTreeMap<_, _> = named.collect();
        let there = index.iter().filter(|origin| origin.size > 0);
        assert_eq!(named.len(), there.count());
        named
    }

    /// The same, of the files of a list that have bytes.
    fn expected(directory: &Path, list: &[Entry]) -> BTreeMap<u64, (Vec<u8>, u64)> {
        let files = list.iter().filter(|entry| entry.size() > 0);
        let known = files.map(|entry| {
            let path = directory.join("data").join(OsStr::from_bytes(&entry.path));
            let inode = path.symlink_metadata().unwrap().ino();
            (inode, (entry.path.to_vec(), entry.size()))
        });
        known.collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn a_draft_that_is_brought_to_another_list_is_the_store_of_that_list(
            first in proptest::collection::vec(any_deed(), 0..60),
            second in proptest::collection::vec(any_deed(), 0..60),
        ) {
            let base = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")).unwrap();
            let (source, directory) = (base.path().join("source"), base.path().join("store"));
            std::fs::create_dir(&source).unwrap();
            // Most of them cannot be done.
            first.iter().for_each(|deed| drop(deed.attempt(&source)));
            let draft = Draft { directory: &directory, volume: "data", devices: false };
            prop_assert!(!draft.is_there());
            make(&directory, "data", &list(&source), false).unwrap();
            prop_assert!(draft.is_there());
            second.iter().for_each(|deed| drop(deed.attempt(&source)));
            let last = list(&source);
            draft.bring_to(&read_list(&directory).unwrap(), &last).unwrap();
            prop_assert!(draft.is_there());
            let made = list(&directory.join("data"));
            let differs = made.iter().zip(&last).find(|(made, last)| !made.same(last));
            prop_assert!(differs.is_none() && made.len() == last.len(), "{:?}", differs);
            prop_assert_eq!(origins(&directory), expected(&directory, &last));
            let kept = read_list(&directory).unwrap();
            prop_assert!(kept.len() == last.len() && kept.iter().zip(&last).all(|(kept, last)| kept.same(last)));
        }
    }

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry {
            path: path.as_bytes().into(),
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            kind,
            seen: crate::volume::tree::Seen::default(),
        }
    }

    #[test]
    fn what_is_the_same_in_both_lists_is_not_touched() {
        let base = tempfile::tempdir().unwrap();
        let (source, directory) = (base.path().join("source"), base.path().join("store"));
        std::fs::create_dir_all(source.join("kept")).unwrap();
        for name in ["kept/one", "changed", "gone"] {
            std::fs::write(source.join(name), name).unwrap();
        }
        std::fs::hard_link(source.join("kept/one"), source.join("kept/two")).unwrap();
        make(&directory, "data", &list(&source), false).unwrap();
        let changed = |name: &str| {
            let is = std::fs::metadata(directory.join("data").join(name)).unwrap();
            (is.ino(), is.ctime(), is.ctime_nsec())
        };
        let before = ["kept", "kept/one"].map(changed);
        std::fs::write(source.join("changed"), "longer than before").unwrap();
        std::fs::remove_file(source.join("gone")).unwrap();
        let last = list(&source);
        let draft = Draft {
            directory: &directory,
            volume: "data",
            devices: false,
        };
        draft
            .bring_to(&read_list(&directory).unwrap(), &last)
            .unwrap();
        assert_eq!(["kept", "kept/one"].map(changed), before);
        let made = list(&directory.join("data"));
        assert!(made.iter().zip(&last).all(|(made, last)| made.same(last)));
    }

    #[test]
    fn a_list_of_a_tree_that_changed_meanwhile_keeps_only_what_can_be_made() {
        let (directory, file) = (Kind::Directory, || Kind::File {
            size: 1,
            blocks: Vec::new(),
        });
        let link = |to: &str| Kind::HardLink(to.as_bytes().into());
        let listed = vec![
            entry("", directory.clone()),
            entry("a", directory.clone()),
            entry("a/one", file()),
            // Listed twice, as it was removed and made again.
            entry("a/one", file()),
            entry("a/two", link("a/one")),
            entry("a/zero", link("a/renamed")),
            // Its directory was gone when it was looked at, and came back.
            entry("b/one", file()),
            entry("c", link("b/one")),
            entry("d", file()),
            entry("d/one", file()),
            entry("e", Kind::Fifo),
            entry("f", link("e")),
        ];
        let kept: Vec<String> = consistent(listed)
            .iter()
            .map(|entry| String::from_utf8_lossy(&entry.path).into_owned())
            .collect();
        assert_eq!(kept, ["", "a", "a/one", "a/two", "d", "e", "f"]);
    }
}
