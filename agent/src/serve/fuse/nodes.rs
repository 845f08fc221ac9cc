//! Which names an inode has in the tree, as far as the kernel remembers it.
//!
//! Invariant: an inode that the kernel looked up is known until the kernel forgets it, by any name it still has.
//! A number that the disk gives to a new inode while the kernel still remembers the old one gets the next
//! generation.

use crate::serve::store::Held;
use nix::errno::Errno;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

/// Number of the tree's own directory, to the kernel.
pub(super) const ROOT: u64 = 1;

/// A file with its origin, so that what is absent still comes when its name is removed.
pub(super) type Opened = (File, Option<Held>);

#[derive(Default)]
struct Node {
    /// Directories and names.
    names: Vec<(u64, OsString)>,
    lookups: u64,
    generation: u64,
    /// Its last name was removed: the number may be another inode's when it comes again.
    gone: bool,
}

/// All known inodes.
#[derive(Default)]
pub(super) struct Nodes {
    known: HashMap<u64, Node>,
    /// The files of those without a name, for who found them before that and opens them now.
    kept: HashMap<u64, Opened>,
}

impl Nodes {
    /// The kernel looked up `name` in `parent` and found `inode`; gives the inode's generation.
    pub(super) fn found(&mut self, parent: u64, name: &OsStr, inode: u64) -> u64 {
        let node = self.known.entry(inode).or_default();
        node.lookups += 1;
        if std::mem::take(&mut node.gone) {
            node.names.clear();
            node.generation += 1;
        }
        let same = |(at, known): &(u64, OsString)| *at == parent && known == name;
        if !node.names.iter().any(same) {
            node.names.push((parent, name.to_owned()));
        }
        node.generation
    }

    /// Gives the file that nobody else has.
    pub(super) fn forget(&mut self, inode: u64, lookups: u64) -> Option<Opened> {
        let node = self.known.get_mut(&inode)?;
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups > 0 {
            return None;
        }
        self.known.remove(&inode);
        self.kept.remove(&inode)
    }

    /// `inode` has no name any more, and this is its file.
    pub(super) fn keep(&mut self, inode: u64, file: Opened) {
        if self.known.contains_key(&inode) {
            self.kept.insert(inode, file);
        }
    }

    /// The file of an inode that has no name any more.
    pub(super) fn kept(&self, inode: u64) -> Option<&File> {
        self.kept.get(&inode).map(|(file, _)| file)
    }

    /// All of these, which nobody finds here any more.
    pub(super) fn take_kept(&mut self) -> HashMap<u64, Opened> {
        std::mem::take(&mut self.kept)
    }

    /// `inode` is not called `name` in `parent` any more; `gone`: nor anything else.
    pub(super) fn removed(&mut self, parent: u64, name: &OsStr, inode: u64, gone: bool) {
        if let Some(node) = self.known.get_mut(&inode) {
            node.names
                .retain(|(at, known)| *at != parent || known != name);
            node.gone |= gone;
        }
    }

    /// `inode` has another name now.
    pub(super) fn moved(&mut self, inode: u64, from: (u64, &OsStr), to: (u64, &OsStr)) {
        self.removed(from.0, from.1, inode, false);
        if let Some(node) = self.known.get_mut(&inode) {
            node.names.push((to.0, to.1.to_owned()));
        }
    }

    /// A directory and name of an inode.
    pub(super) fn name(&self, inode: u64) -> Result<(u64, &OsStr), Errno> {
        let name = self.known.get(&inode).and_then(|node| node.names.last());
        let (parent, name) = name.ok_or(Errno::ESTALE)?;
        Ok((*parent, name))
    }

    /// Path below the tree; empty for the tree itself.
    pub(super) fn path(&self, inode: u64) -> Result<Vec<u8>, Errno> {
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut at = inode;
        while at != ROOT {
            let (parent, name) = self.name(at)?;
            parts.push(name.as_bytes());
            at = parent;
            // A tree is no deeper than its paths are long.
            if parts.len() > crate::volume::tree::PATH_CAP {
                return Err(Errno::ELOOP);
            }
        }
        parts.reverse();
        Ok(parts.join(&b'/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_follows_its_directories_and_an_inode_its_other_names() {
        let mut nodes = Nodes::default();
        let name = OsStr::new;
        nodes.found(ROOT, name("a"), 10);
        nodes.found(10, name("f"), 11);
        assert_eq!(nodes.path(11).unwrap(), b"a/f");
        nodes.moved(10, (ROOT, name("a")), (ROOT, name("b")));
        assert_eq!(nodes.path(11).unwrap(), b"b/f");
        nodes.found(ROOT, name("g"), 11);
        nodes.removed(ROOT, name("g"), 11, false);
        assert_eq!(nodes.path(11).unwrap(), b"b/f");
        nodes.removed(10, name("f"), 11, false);
        assert_eq!(nodes.path(11), Err(Errno::ESTALE));
        nodes.forget(11, 1);
        nodes.forget(11, 1);
        assert_eq!(nodes.path(ROOT).unwrap(), b"");
        assert_eq!(nodes.path(99), Err(Errno::ESTALE));
    }

    #[test]
    fn a_number_that_comes_again_is_of_the_next_generation() {
        let mut nodes = Nodes::default();
        let name = OsStr::new;
        assert_eq!(nodes.found(ROOT, name("a"), 10), 0);
        assert_eq!(nodes.found(ROOT, name("b"), 10), 0, "another name of it");
        nodes.removed(ROOT, name("a"), 10, false);
        assert_eq!(nodes.found(ROOT, name("b"), 10), 0);
        nodes.removed(ROOT, name("b"), 10, true);
        assert_eq!(nodes.found(ROOT, name("c"), 10), 1);
        assert_eq!(nodes.path(10).unwrap(), b"c");
        nodes.forget(10, 4);
        assert_eq!(nodes.found(ROOT, name("d"), 10), 0, "it was forgotten");
    }
}
