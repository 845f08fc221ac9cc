//! Making what is here durable, and letting go of the origins for which the source is not needed any more.
//!
//! Invariant: once a write-back failed, nothing more counts as durable in this life of the host: the kernel tells that
//! once, and what it could not write then looks as if it were on the disk. In the host's next life what was not durable is
//! absent, and fetched again; so a sync of it is refused.

use super::{Store, locked};
use crate::serve::presence::boot_id;
use crate::serve::proof::Proof;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::fstat;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// Name of the file that keeps why something could not be written back, behind the id of the boot; zeros while nothing
/// is to be noted.
const UNSAFE: &str = "unsafe";
/// Bytes of that file, which has its space beforehand: it is written when the disk may have no more.
const NOTE: usize = 4096;

/// Why nothing more counts as durable in this life of the host, as an earlier life of the process noted it, and the file
/// for such a note.
pub(super) fn noted(directory: &Path) -> io::Result<(Option<String>, File)> {
    let path = directory.join(UNSAFE);
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let end = bytes.iter().rposition(|byte| *byte != 0);
    let known = &bytes[..end.map_or(0, |last| last + 1)];
    let boot = boot_id()?;
    let why = match known.split_first_chunk() {
        // A torn one may be of this life.
        Some((of, _)) if *of != boot && !of.contains(&0) => None,
        Some((_, why)) if !why.is_empty() => Some(String::from_utf8_lossy(why).into_owned()),
        _ => (!known.is_empty()).then(|| {
            format!(
                "something could not be written back to {}, and may be lost: the note of it is not whole; repair the file \
                 system there and start this host anew",
                directory.display()
            )
        }),
    };
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    if bytes.len() < NOTE {
        match fallocate(&file, FallocateFlags::empty(), 0, NOTE as i64) {
            // A full disk keeps no store from being opened.
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSPC | Errno::EDQUOT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // A torn one is made whole, so that the host's next life sees that it is over; what an earlier life noted is. Where
    // that finds no space, it says the same as before.
    let noted = match &why {
        Some(why) => note(&file, why),
        None => file.write_all_at(&vec![0; known.len()], 0),
    };
    match noted {
        Err(error) if !is_full(&error) => return Err(error),
        _ => {}
    }
    Ok((why, file))
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

fn note(file: &File, why: &str) -> io::Result<()> {
    let mut bytes = [&boot_id()?, why.as_bytes()].concat();
    bytes.truncate(NOTE);
    file.write_all_at(&bytes, 0)
}

impl Drop for Store {
    fn drop(&mut self) {
        // Before others hear of it: the kernel tells a file that is opened after that nothing.
        if self.proof.is_some() {
            // It is noted.
            let _ = self.write_back();
        }
    }
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
    /// The disk's error; `EIO` where something of the file would be fetched again in the host's next life.
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
        let Some(soft) = soft.filter(|soft| !soft.is_empty()) else {
            return Ok(());
        };
        if self.unsafe_here().is_some() {
            return if self.presence.is_hard(&soft) {
                Ok(())
            } else {
                Err(Errno::EIO.into())
            };
        }
        let kept = self.proof.as_ref().map_or(Ok(()), Proof::sync);
        let kept = kept.map_err(io::Error::other);
        let kept = kept.and_then(|()| self.presence.harden(&soft));
        // The next one would be told that all is well; not where nothing was written for want of space.
        kept.inspect_err(|error| {
            if !is_full(error) {
                self.fails(error);
            }
        })
    }

    /// Sees to it that what arrived is on the disk, also in files that nobody has open any more: the kernel may have
    /// forgotten these, and what became of their pages, but not that something of the file system failed (Linux 5.8).
    pub(super) fn write_back(&self) -> io::Result<()> {
        if self.is_written_back.load(Ordering::Acquire) {
            return Ok(());
        }
        if let Err(error) = nix::unistd::syncfs(&self.disk) {
            let error = error.into();
            self.fails(&error);
            return Err(error);
        }
        // Each later write has a sync of its own.
        self.is_written_back.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes note of a write-back that failed.
    pub(super) fn fails(&self, error: &io::Error) {
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
        if let Err(error) = note(&self.unsafe_note, &why) {
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
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.drop_nameless(number, &path);
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        self.sync(&file, Some(number))?;
        if let Some(why) = self.unsafe_here() {
            return Err(io::Error::other(why));
        }
        {
            let _cut = self
                .cut(number)
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            // What is owed is found by its name.
            self.notes.settle(number)?;
        }
        let inode = fstat(&file)?.st_ino;
        self.turn_over(|numbers| {
            if locked(&self.held).contains_key(&number) && !self.is_whole(number) {
                return Ok(false);
            }
            if let Some(proof) = &self.proof {
                proof.note_inode(number, inode)?;
            }
            match std::fs::remove_file(&path) {
                // A mend did it meanwhile.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            locked(&self.open).remove(&number);
            numbers.remove(&inode);
            Ok(true)
        })
    }

    /// A whole origin without a name is none any more, whoever removed that; reads of another one go on to fail, as its
    /// absent pages would be zeros.
    fn drop_nameless(&self, number: u32, path: &Path) {
        let is_known = {
            let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
            numbers.values().any(|known| *known == number)
        };
        if is_known && self.is_whole(number) {
            self.turn_over(|numbers| {
                // A mend may have made it again meanwhile.
                if matches!(std::fs::exists(path), Ok(false)) {
                    numbers.retain(|_, known| *known != number);
                }
            });
        }
    }

    /// Whether every origin was let go of.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
        numbers.is_empty()
    }

    /// Whether a background may help that is started now, once the last one is over: something could not be had or kept,
    /// or could not be let go of.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        if self.waits_for_source() {
            return false;
        }
        let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
        if self.unsafe_here().is_none() {
            return !numbers.is_empty();
        }
        // Nothing is let go of in this life of the host, but who reads what is absent need not wait for the source.
        numbers
            .values()
            .any(|number| !self.is_whole(*number) && !self.is_removed(*number))
    }

    /// Says once that origins cannot be let go of, as each of a volume may fail, again and again.
    pub(in crate::serve) fn stay_apart(&self, error: &io::Error) {
        if !self.is_apart.swap(true, Ordering::AcqRel) {
            tracing::error!(volume = %self.name, "served files stay apart though they are whole: {error}");
        }
    }

    /// Every origin could be let go of, as far as it is whole.
    pub(in crate::serve) fn stay_apart_no_more(&self) {
        self.is_apart.store(false, Ordering::Release);
    }
}
