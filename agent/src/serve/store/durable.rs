//! Making what is here durable, and letting go of the origins for which the source is not needed any more.
//!
//! Invariant: once a write-back failed, nothing more counts as durable in this life of the host: the kernel tells that
//! once, and what it could not write then looks as if it were on the disk. In the host's next life what was not durable is
//! absent, and fetched again.

use super::{Store, locked};
use crate::serve::presence::boot_id;
use nix::sys::stat::fstat;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::PoisonError;

/// Name of the file that keeps why something could not be written back, behind the id of the boot.
const UNSAFE: &str = "unsafe";

/// Why nothing more counts as durable in this life of the host, as an earlier life of the process noted it.
pub(super) fn noted(directory: &Path) -> io::Result<Option<String>> {
    let bytes = match std::fs::read(directory.join(UNSAFE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let why = bytes.strip_prefix(&boot_id()?);
    Ok(why.map(|why| String::from_utf8_lossy(why).into_owned()))
}

impl Store {
    /// Why what is here may not reach the disk, for people; none while it does.
    #[must_use]
    pub fn unsafe_here(&self) -> Option<String> {
        locked(&self.unsafe_here).clone()
    }

    /// Makes a file durable with the presence of its pages.
    ///
    /// # Errors
    /// The disk's error.
    pub fn sync(&self, file: &File, number: Option<u32>) -> io::Result<()> {
        let origin = number.and_then(|number| self.origins.get(number as usize));
        let soft = origin.map(|origin| {
            let blocks = origin.first..origin.first + origin.blocks();
            self.presence.soft(blocks)
        });
        if let Err(error) = file.sync_all() {
            self.fails(&error);
            return Err(error);
        }
        let Some(soft) = soft.filter(|soft| !soft.is_empty() && self.unsafe_here().is_none())
        else {
            return Ok(());
        };
        if let Some(proof) = &self.proof {
            proof.sync()?;
        }
        self.presence.harden(&soft)
    }

    /// Takes note of a write-back that failed.
    fn fails(&self, error: &io::Error) {
        let mut known = locked(&self.unsafe_here);
        if known.is_some() {
            return;
        }
        let why = format!(
            "volume {}: something could not be written back to {} ({error}), and may be lost; the source is needed until \
             the file system there was repaired and this host was started anew, or `lifeboat abort` on the source brings \
             everything back there",
            self.name,
            self.directory.display()
        );
        tracing::error!("{why}");
        let noted = boot_id().and_then(|boot| {
            let note = [&boot, why.as_bytes()].concat();
            std::fs::write(self.directory.join(UNSAFE), note)
        });
        if let Err(error) = noted {
            tracing::error!(directory = %self.directory.display(), "cannot note that: {error}");
        }
        *known = Some(why);
    }

    /// Lets go of an origin that is whole and durable, or that has no name any more: it is a plain file then. False when
    /// somebody opened one of these meanwhile.
    ///
    /// # Errors
    /// It cannot be made durable, or its name among the origins cannot be removed.
    pub(in crate::serve) fn settle(&self, number: u32) -> io::Result<bool> {
        let path = self.origin_path(number);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(error),
        };
        self.sync(&file, Some(number))?;
        if let Some(why) = self.unsafe_here() {
            return Err(io::Error::other(why));
        }
        let inode = fstat(&file)?.st_ino;
        let mut numbers = self.numbers.write().unwrap_or_else(PoisonError::into_inner);
        if locked(&self.held).contains_key(&number) && !self.is_whole(number) {
            return Ok(false);
        }
        if let Some(proof) = &self.proof {
            proof.note_inode(number, inode)?;
        }
        std::fs::remove_file(&path)?;
        locked(&self.open).remove(&number);
        numbers.remove(&inode);
        Ok(true)
    }

    /// Whether every origin was let go of.
    pub(super) fn is_settled(&self) -> bool {
        let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
        numbers.is_empty()
    }

    /// Whether a background may help that is started once the last one is over: something could not be had or kept, or
    /// could not be let go of.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.figures().refused > 0 || !self.is_settled() && self.unsafe_here().is_none()
    }
}
