//! What a write changes of a file beside its bytes: arriving is no modification, and must not look like one.
//!
//! Invariants: what arrives has a file to itself until the file looks as before, so that neither a change of these made
//! here is taken back nor anybody sees them in between; what will be restored is noted first, so that the next life of a
//! killed process does it. Non-goal: a host that dies within an arrival.

use super::{SHARDS, Store};
use crate::serve::presence::boot_id;
use crate::volume::codec::{Malformed, Reader, put_short};
use nix::sys::stat::{fstat, futimens};
use nix::sys::time::TimeSpec;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{PoisonError, RwLockReadGuard};
use xattr::FileExt as _;

/// The attribute that the kernel removes at every write (capabilities(7)).
const CAPABILITY: &str = "security.capability";
/// Bytes of a note; the longest capability has 24.
const NOTE: usize = 64;
/// Bytes before the notes: the boot in which they were made.
const HEAD: usize = 64;

/// How a file looks.
pub(super) struct Looks {
    modified: TimeSpec,
    capability: Option<Vec<u8>>,
}

impl Looks {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        Ok(Self {
            modified: TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec),
            capability: file.get_xattr(CAPABILITY).unwrap_or_default(),
        })
    }

    pub(super) fn restore(&self, file: &File) -> io::Result<()> {
        futimens(file, &TimeSpec::UTIME_OMIT, &self.modified)?;
        match &self.capability {
            Some(capability) => file.set_xattr(CAPABILITY, capability),
            None => Ok(()),
        }
    }

    fn encode(&self, number: u32) -> Vec<u8> {
        let mut note = vec![1];
        note.extend_from_slice(&number.to_le_bytes());
        note.extend_from_slice(&self.modified.tv_sec().to_le_bytes());
        note.extend_from_slice(&self.modified.tv_nsec().to_le_bytes());
        put_short(&mut note, self.capability.as_deref().unwrap_or_default());
        note.resize(NOTE, 0);
        note
    }

    fn decode(note: &[u8]) -> Result<Option<(u32, Self)>, Malformed> {
        let mut reader = Reader::new(note);
        if reader.u8()? == 0 {
            return Ok(None);
        }
        let number = reader.u32()?;
        let seconds = i64::from_le_bytes(reader.array()?);
        let modified = TimeSpec::new(seconds, i64::from_le_bytes(reader.array()?));
        let capability = Some(reader.short()?.to_vec()).filter(|bytes| !bytes.is_empty());
        let looks = Self {
            modified,
            capability,
        };
        Ok(Some((number, looks)))
    }
}

/// How files looked into which something is being written: one for each lock that keeps others away.
pub(super) struct Notes(File);

impl Notes {
    /// Opens those of the store in `directory`, and restores the files in which the process before died.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let (path, boot) = (directory.join("arriving"), boot_id()?);
        match std::fs::read(&path) {
            Ok(bytes) if bytes.starts_with(&boot) => {
                for note in bytes.get(HEAD..).unwrap_or_default().chunks_exact(NOTE) {
                    if let Ok(Some((number, looks))) = Looks::decode(note) {
                        let file = directory.join("origins").join(number.to_string());
                        match OpenOptions::new().write(true).open(file) {
                            Ok(file) => looks.restore(&file)?,
                            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            // Of another life of the host, in which the order of writes is unknown.
            _ => {}
        }
        let file = File::create(path)?;
        file.write_all_at(&boot, 0)?;
        file.set_len((HEAD + SHARDS * NOTE) as u64)?;
        Ok(Self(file))
    }

    fn write(&self, number: u32, note: &[u8]) -> io::Result<()> {
        let at = HEAD + number as usize % SHARDS * NOTE;
        self.0.write_all_at(note, at as u64)
    }
}

impl Store {
    /// Nothing arrives in a file while this is held: who looks at its times and attributes, or changes them, holds it. None
    /// for a file in which nothing can. Never taken twice, nor before the mirror's turn.
    #[must_use]
    pub fn quiet(&self, number: Option<u32>) -> Option<RwLockReadGuard<'_, ()>> {
        let lock = self.cut(number?);
        Some(lock.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does `act`, which writes to an origin's file what arrived, without a look of it; nobody else uses the file
    /// meanwhile.
    pub(super) fn unseen(
        &self,
        number: u32,
        file: &File,
        act: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let looks = Looks::of(file)?;
        self.notes.write(number, &looks.encode(number))?;
        let acted = act();
        looks.restore(file)?;
        self.notes.write(number, &[0])?;
        acted
    }
}
