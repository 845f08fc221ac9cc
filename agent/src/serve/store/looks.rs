//! What a write changes of a file beside its bytes: arriving is no modification, and must not look like one.
//!
//! Invariants: what arrives has a file to itself until the file looks as before, so that neither a change of these made
//! here is taken back nor anybody sees them in between; what will be restored is noted first, so that the next life of a
//! killed process does it. What cannot be restored, as on a full disk, is owed: until it is, nothing more arrives under the
//! lock of its file, and who changed the file since has the last word. Non-goal: a host that dies within an arrival.

use super::{SHARDS, Store, locked};
use crate::serve::presence::boot_id;
use crate::volume::codec::{Malformed, Reader, put_short};
use crate::volume::scan::read_full;
use nix::errno::Errno;
use nix::sys::stat::{fstat, futimens};
use nix::sys::time::TimeSpec;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLockReadGuard};
use std::time::Duration;
use xattr::FileExt as _;

/// The attribute that the kernel removes at every write (capabilities(7)).
const CAPABILITY: &str = "security.capability";
/// Bytes of a note: 39 beside the capability, of which the longest has 24.
const NOTE: usize = 64;
/// Bytes before the notes: the boot in which they were made.
const HEAD: usize = 64;
/// Longer than a tick of the kernel's coarse clock, by which it notes changes.
const TICK: Duration = Duration::from_millis(20);

/// How a file looks.
struct Looks {
    modified: TimeSpec,
    capability: Option<Vec<u8>>,
}

impl Looks {
    fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        let capability = match file.get_xattr(CAPABILITY) {
            // A file system without attributes.
            Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => None,
            capability => capability?,
        };
        Ok(Self {
            modified: TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec),
            capability,
        })
    }

    fn restore(&self, file: &File) -> io::Result<()> {
        // First, as it may find no space: the file is as it was found then.
        if let Some(capability) = &self.capability {
            file.set_xattr(CAPABILITY, capability)?;
        }
        Ok(futimens(file, &TimeSpec::UTIME_OMIT, &self.modified)?)
    }
}

/// How a file is to look again.
struct Note {
    /// Its number.
    number: u32,
    looks: Looks,
    /// What it was when that could not be done; none while something is being written to it.
    owed: Option<Was>,
}

/// Stands for what of a file changes with its capability, and what is restored: not its names and rights, which may change
/// without.
type Was = [u8; 16];

fn was(file: &File) -> io::Result<Was> {
    let stat = fstat(file)?;
    let looks = Looks::of(file)?;
    let mut hasher = blake3::Hasher::new();
    for number in [stat.st_mtime, stat.st_mtime_nsec, stat.st_size] {
        hasher.update(&number.to_le_bytes());
    }
    for owner in [stat.st_uid, stat.st_gid] {
        hasher.update(&owner.to_le_bytes());
    }
    hasher.update(looks.capability.as_deref().unwrap_or_default());
    let mut was = Was::default();
    hasher.finalize_xof().fill(&mut was);
    Ok(was)
}

impl Note {
    fn restore(&self, file: &File) -> io::Result<()> {
        match self.owed {
            // What somebody did to it here stays.
            Some(owed) if was(file)? != owed => Ok(()),
            _ => self.looks.restore(file),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let time = |note: &mut Vec<u8>, time: &TimeSpec| {
            note.extend_from_slice(&time.tv_sec().to_le_bytes());
            note.extend_from_slice(&time.tv_nsec().to_le_bytes());
        };
        let mut note = vec![1 + u8::from(self.owed.is_some())];
        note.extend_from_slice(&self.number.to_le_bytes());
        time(&mut note, &self.looks.modified);
        put_short(
            &mut note,
            self.looks.capability.as_deref().unwrap_or_default(),
        );
        note.extend_from_slice(self.owed.as_ref().map_or(&[][..], |was| was));
        note.resize(NOTE, 0);
        note
    }

    fn decode(note: &[u8]) -> Result<Option<Self>, Malformed> {
        let time = |reader: &mut Reader<'_>| {
            let seconds = i64::from_le_bytes(reader.array()?);
            let nanoseconds = i64::from_le_bytes(reader.array()?);
            Ok::<_, Malformed>(TimeSpec::new(seconds, nanoseconds))
        };
        let mut reader = Reader::new(note);
        let kind = reader.u8()?;
        if kind == 0 {
            return Ok(None);
        }
        let number = reader.u32()?;
        let modified = time(&mut reader)?;
        let capability = Some(reader.short()?.to_vec()).filter(|bytes| !bytes.is_empty());
        let owed = (kind == 2).then(|| reader.array()).transpose()?;
        Ok(Some(Self {
            number,
            looks: Looks {
                modified,
                capability,
            },
            owed,
        }))
    }
}

/// How files looked into which something is being written: one for each lock that keeps others away.
pub(super) struct Notes {
    file: File,
    /// The names of the files.
    origins: PathBuf,
    /// What is owed, by its place in the file.
    owed: Mutex<HashMap<usize, Note>>,
}

impl Notes {
    /// Opens those of the store in `directory`, and restores the files in which the process before died.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let boot = boot_id()?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(directory.join("arriving"))?;
        let mut bytes = vec![0; HEAD + SHARDS * NOTE];
        read_full(&file, &mut bytes, 0)?;
        file.set_len(bytes.len() as u64)?;
        file.write_all_at(&boot, 0)?;
        let notes = Self {
            file,
            origins: directory.join("origins"),
            owed: Mutex::default(),
        };
        for (place, note) in bytes[HEAD..].chunks_exact(NOTE).enumerate() {
            let Ok(Some(note)) = Note::decode(note) else {
                continue;
            };
            // Of another life of the host, in which the order of writes is unknown, only what is owed.
            let counts = bytes.starts_with(&boot) || note.owed.is_some();
            if counts
                && let Some(file) = notes.file(&note)?
                && let Err(error) = note.restore(&file)
            {
                tracing::warn!(directory = %directory.display(), "a file looks as changed by its arrival until that can be mended: {error}");
                notes.owe(note, &file)?;
                continue;
            }
            notes.write(place, &[0])?;
        }
        Ok(notes)
    }

    fn write(&self, place: usize, note: &[u8]) -> io::Result<()> {
        self.file.write_all_at(note, (HEAD + place * NOTE) as u64)
    }

    /// The file of a note; none when it is not needed any more.
    fn file(&self, note: &Note) -> io::Result<Option<File>> {
        let path = self.origins.join(note.number.to_string());
        match OpenOptions::new().write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }

    /// Keeps what could not be restored of a file, until it can. Nobody else uses it meanwhile.
    fn owe(&self, mut note: Note, file: &File) -> io::Result<()> {
        // Who changes it from now on does so at another time.
        std::thread::sleep(TICK);
        note.owed = Some(was(file)?);
        let (at, encoded) = (place(note.number), note.encode());
        locked(&self.owed).insert(at, note);
        self.write(at, &encoded)
    }

    /// Somebody writes to a file, which takes its capability away: no more is owed to it. Nothing arrives in it meanwhile.
    pub(super) fn forgive(&self, number: u32) -> io::Result<()> {
        let at = place(number);
        let mut owed = locked(&self.owed);
        if owed.get(&at).is_some_and(|note| note.number == number) {
            self.write(at, &[0])?;
            owed.remove(&at);
        }
        Ok(())
    }

    /// Restores what is owed under the lock of a file.
    pub(super) fn settle(&self, number: u32) -> io::Result<()> {
        let at = place(number);
        let mut owed = locked(&self.owed);
        let Some(note) = owed.get(&at) else {
            return Ok(());
        };
        if let Some(file) = self.file(note)? {
            note.restore(&file)?;
        }
        self.write(at, &[0])?;
        owed.remove(&at);
        Ok(())
    }
}

/// Where the note of a file is: as that of every other which has its lock.
fn place(number: u32) -> usize {
    number as usize % SHARDS
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
        self.notes.settle(number)?;
        let note = Note {
            number,
            looks: Looks::of(file)?,
            owed: None,
        };
        self.notes.write(place(number), &note.encode())?;
        let acted = act();
        if let Err(error) = note.looks.restore(file) {
            self.notes.owe(note, file)?;
            return acted.and(Err(error));
        }
        self.notes.write(place(number), &[0])?;
        acted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::SystemTime;

    #[test]
    fn what_is_owed_is_given_after_a_chmod_and_a_new_name_and_not_after_a_write_or_a_cut() {
        let directory = tempfile::tempdir().unwrap();
        let origins = directory.path().join("origins");
        fs::create_dir(&origins).unwrap();
        let (path, away) = (origins.join("3"), directory.path().join("away"));
        let file = File::create(&path).unwrap();
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30);
        let notes = Notes::open(directory.path()).unwrap();
        // Whether it has its time again after `act`.
        let given = |act: &dyn Fn()| {
            file.set_modified(modified).unwrap();
            let note = Note {
                number: 3,
                looks: Looks::of(&file).unwrap(),
                owed: None,
            };
            file.set_modified(SystemTime::now()).unwrap();
            // Found by its name it may not be, as with no descriptor left.
            fs::rename(&path, &away).unwrap();
            notes.owe(note, &file).unwrap();
            fs::rename(&away, &path).unwrap();
            act();
            notes.settle(3).unwrap();
            file.metadata().unwrap().modified().unwrap() == modified
        };
        assert!(given(&|| {}));
        assert!(given(&|| {
            let rights = Permissions::from_mode(0o700);
            fs::set_permissions(&path, rights).unwrap();
            fs::hard_link(&path, directory.path().join("other")).unwrap();
        }));
        assert!(!given(&|| file.write_all_at(b"x", 0).unwrap()));
        assert!(!given(&|| file.set_len(77).unwrap()));
        let time = || file.metadata().unwrap().modified().unwrap();
        assert!(
            !given(&|| {
                let known = time();
                notes.forgive(3).unwrap();
                file.write_all_at(b"y", 0).unwrap();
                file.set_modified(known).unwrap();
            }),
            "who writes may set the time back"
        );
        assert!(
            given(&|| notes.forgive(3 + SHARDS as u32).unwrap()),
            "it is another file's"
        );
    }
}
