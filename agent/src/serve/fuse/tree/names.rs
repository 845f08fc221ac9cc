//! Names of a served tree: removed, renamed, linked.
//!
//! Invariant: the nodes know of a name what the disk has, for nobody looks one up while it changes.

use super::{Tree, is_last};
use crate::serve::mirror::Intent;
use fuser::{FileAttr, RenameFlags};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, renameat2};
use nix::sys::stat::fstatat;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use std::ffi::OsStr;

impl Tree {
    pub(in crate::serve::fuse) fn remove(
        &self,
        parent: u64,
        name: &OsStr,
        flag: UnlinkatFlags,
    ) -> Result<(), Errno> {
        let intent = || Ok(Some(Intent::Removed(self.path_in(parent, name)?)));
        self.mirrored(intent, None, || self.unlink(parent, name, flag))
    }

    fn unlink(&self, parent: u64, name: &OsStr, flag: UnlinkatFlags) -> Result<(), Errno> {
        let mut nodes = self.change_nodes();
        let directory = self.directory_in(&nodes, parent)?;
        let found = self.look(&directory, name)?;
        let last = self.last_of(&directory, name, &found);
        unlinkat(&directory, name, flag)?;
        let inode = found.0.st_ino;
        nodes.removed(parent, name, inode, is_last(&found));
        if let Some(last) = last {
            nodes.keep(inode, last);
        }
        Ok(())
    }

    pub(in crate::serve::fuse) fn rename(
        &self,
        from: (u64, &OsStr),
        to: (u64, &OsStr),
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        let intent = || {
            if flags.contains(RenameFlags::RENAME_WHITEOUT) {
                return Err(Errno::EINVAL);
            }
            let inode = |(parent, name): (u64, &OsStr)| {
                let directory = self.directory(parent)?;
                let stat = fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW);
                stat.map(|stat| stat.st_ino)
            };
            let moved = inode(from)?;
            // Two names of one file stay as they are.
            if inode(to) == Ok(moved) {
                return Ok(None);
            }
            Ok(Some(Intent::Renamed {
                from: self.path_in(from.0, from.1)?,
                to: self.path_in(to.0, to.1)?,
                exchange: flags.contains(RenameFlags::RENAME_EXCHANGE),
                inode: moved,
            }))
        };
        self.mirrored(intent, None, || self.move_name(from, to, flags))
    }

    fn move_name(
        &self,
        from: (u64, &OsStr),
        to: (u64, &OsStr),
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        let mut nodes = self.change_nodes();
        let old = self.directory_in(&nodes, from.0)?;
        let new = self.directory_in(&nodes, to.0)?;
        let moved = self.look(&old, from.1)?.0.st_ino;
        let replaced = self.look(&new, to.1).ok();
        let exchanges = flags.contains(RenameFlags::RENAME_EXCHANGE);
        let last = replaced
            .as_ref()
            .filter(|(stat, _)| !exchanges && stat.st_ino != moved);
        let last = last.and_then(|found| self.last_of(&new, to.1, found));
        let how = nix::fcntl::RenameFlags::from_bits_truncate(flags.bits());
        renameat2(&old, from.1, &new, to.1, how)?;
        match replaced {
            // Two names of one file: `rename` does nothing.
            Some((stat, _)) if stat.st_ino == moved => return Ok(()),
            Some((stat, _)) if exchanges => {
                nodes.moved(stat.st_ino, to, from);
            }
            Some(replaced) => {
                let inode = replaced.0.st_ino;
                nodes.removed(to.0, to.1, inode, is_last(&replaced));
                if let Some(last) = last {
                    nodes.keep(inode, last);
                }
            }
            None => {}
        }
        nodes.moved(moved, from, to);
        Ok(())
    }

    pub(in crate::serve::fuse) fn link(
        &self,
        inode: u64,
        parent: u64,
        name: &OsStr,
    ) -> Result<(FileAttr, u64), Errno> {
        let directory = self.directory(parent)?;
        let intent = || {
            Ok(Some(Intent::Linked {
                from: self.nodes().path(inode)?,
                to: self.path_in(parent, name)?,
            }))
        };
        self.mirrored(intent, None, || {
            self.named(inode, |from, old| {
                linkat(from, old, &directory, name, AtFlags::empty())
            })
        })?;
        self.entry_in(&directory, parent, name)
    }
}
