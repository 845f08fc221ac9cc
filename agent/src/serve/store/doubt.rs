//! A volume whose root is not the source's though all of it is here: which blocks differ, and what is done about them.
//!
//! Every signature is asked for again; a block of which the source says another one than when it came is fetched
//! once more and written over what came, where that is still here. Invariant: what was written here since is never
//! written over: such a block is named instead, and the volume stays unproven. Non-goal: who asks for it (`later`).

use super::{Mirror, Store, locked};
use crate::model::ids::Signature;
use crate::serve::origins::{Origin, StoreError, read_list};
use crate::serve::proof::Proof;
use crate::transfer::fetch::{BLOCK, Block, Content, Fetcher, Place, Refusal};
use crate::volume::Entry;
use crate::volume::scan::read_full;
use crate::volume::sign::signature;
use crate::volume::tree::shown;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::linkat;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, PoisonError};

/// Blocks that are fetched again at a time: 4 MiB.
const WINDOW: usize = 64;
/// A source that says something else each time is not asked for ever.
const ROUNDS_MAX: u32 = 3;
/// Blocks that are named; more are only counted.
const NAMED_CAP: usize = 8;

/// What became of the blocks that differed.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// Fetched again, each with the signature of what came first.
    open: HashMap<Place, Signature>,
    mended: Named,
    lost: Named,
    /// What the disk here does not give up or take, each with its error.
    refused: Named,
    rounds: u32,
    /// Paths of files that were written over since somebody asked.
    fresh: Vec<Arc<[u8]>>,
    /// Paths that are not on the source as it released them.
    changed: Named,
}

/// Blocks for people, the first of them by name.
#[derive(Debug, Default)]
struct Named(Vec<String>, usize);

impl Named {
    fn add(&mut self, name: String) {
        if self.0.len() < NAMED_CAP {
            self.0.push(name);
        } else {
            self.1 += 1;
        }
    }
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join(", "))?;
        match self.1 {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl Store {
    /// Compares every block with the source again, as the roots differ: [`Self::root`] gives another one when that is
    /// over. False where it is known to stay as it is.
    ///
    /// # Errors
    /// The source cannot be asked, or the disk's error.
    pub fn doubt(&self) -> Result<bool, StoreError> {
        let Some(proof) = &self.proof else {
            return Ok(false);
        };
        {
            let mut doubt = locked(&self.doubt);
            if !doubt.lost.0.is_empty() || doubt.rounds == ROUNDS_MAX {
                return Ok(false);
            }
            doubt.refused = Named::default();
        }
        let failed = |error| StoreError::File {
            doing: "compare with the source",
            directory: self.directory.clone(),
            error,
        };
        // What somebody changed there since it was released is not what should be here.
        let listed = read_list(&self.directory).map_err(failed)?;
        let now = Fetcher::list(&self.plan, &self.options, &listed)?;
        locked(&self.doubt).rounds += 1;
        let now: HashMap<&[u8], &Entry> = now.iter().map(|entry| (&*entry.path, entry)).collect();
        let mut changed = Named::default();
        for entry in listed {
            if !now.get(&*entry.path).is_some_and(|now| now.same(&entry)) {
                changed.add(format!("`{}`", shown(&entry.path)));
            }
        }
        let is_same = changed.0.is_empty();
        locked(&self.doubt).changed = changed;
        if is_same {
            proof.doubt().map_err(failed)?;
        }
        Ok(is_same)
    }

    /// What was not as on the source though it was here, for people; none when all was.
    #[must_use]
    pub fn doubted(&self) -> Option<String> {
        let doubt = locked(&self.doubt);
        let Doubt {
            mended,
            lost,
            refused,
            changed,
            ..
        } = &*doubt;
        let name = &self.name;
        if !changed.0.is_empty() {
            return Some(format!(
                "volume {name}: changed on the source since it was released, so that what arrived cannot be proven: \
                 {changed}; see who writes there"
            ));
        }
        if !lost.0.is_empty() {
            return Some(format!(
                "volume {name}: the source has other bytes than it sent, and what is here was changed since: {lost}; \
                 look at these files, or `lifeboat abort` on the source brings everything back there"
            ));
        }
        if !refused.0.is_empty() {
            return Some(format!(
                "volume {name}: the source has other bytes than it sent, and the disk here refuses them: {refused}; repair \
                 the file system there, or `lifeboat abort` on the source brings everything back there"
            ));
        }
        let mended = Some(mended).filter(|mended| !mended.0.is_empty())?;
        Some(format!(
            "volume {name}: the source had other bytes than it sent, which were fetched again: {mended}"
        ))
    }

    /// Paths of files that were written over since this was asked last: who has read them holds what they were.
    #[must_use]
    pub fn take_mended(&self) -> Vec<Arc<[u8]>> {
        std::mem::take(&mut locked(&self.doubt).fresh)
    }

    /// Whether no block is left that differs and may be fetched again; asks for some otherwise.
    pub(super) fn is_mended(&self, proof: &Proof) -> io::Result<bool> {
        // What waits to be asked for again stands in nobody's way.
        let waiting = locked(&self.withheld).places.len();
        let differing = proof.differing(&self.origins, WINDOW + waiting)?;
        if differing.is_empty() {
            proof.believe()?;
            return Ok(true);
        }
        let fetcher = locked(&self.fetcher).clone();
        let Some(fetcher) = fetcher else {
            return Ok(false);
        };
        for (place, came) in differing {
            if !self.is_put_off(place) && locked(&self.doubt).open.insert(place, came).is_none() {
                let path = &self.origins[place.file as usize].path;
                fetcher.ask_anew(place, path);
            }
        }
        Ok(false)
    }

    /// Takes a block that was fetched again; false when it was not.
    pub(super) fn mends(&self, place: Place, block: &Result<Block<'_>, Refusal>) -> bool {
        let known = locked(&self.doubt).open.get(&place).copied();
        let origin = self.origins.get(place.file as usize);
        let (Some(came), Some(proof), Some(origin)) = (known, &self.proof, origin) else {
            return false;
        };
        let (bytes, said) = match block {
            Ok(Block {
                content: Content::Bytes(bytes),
                signature,
            }) => (bytes, *signature),
            Ok(_) => return false,
            Err(_) => {
                // It is asked for again.
                locked(&self.doubt).open.remove(&place);
                return true;
            }
        };
        let (path, offset) = (shown(&origin.path), place.block * BLOCK);
        let written = self.write_over(proof, place, came, bytes);
        // What is not mended keeps the root another one.
        let signature = if written.is_ok() { said } else { came };
        let noted = proof.settle(origin.first + place.block, signature);
        if let Err(error) = noted {
            tracing::error!(directory = %self.directory.display(), "cannot keep a signature: {error}");
        }
        let mut doubt = locked(&self.doubt);
        match written {
            Ok(()) => {
                tracing::warn!(volume = %self.name, %path, offset, "the source has other bytes than it sent: fetched again");
                doubt.mended.add(format!("`{path}` at offset {offset}"));
                if doubt.fresh.last() != Some(&origin.path) {
                    doubt.fresh.push(Arc::clone(&origin.path));
                }
            }
            Err(error) => {
                tracing::error!(volume = %self.name, %path, offset, "the source has other bytes than it sent; they are not fetched again: {error}");
                let block = format!("`{path}` at offset {offset}");
                if is_refused(&error) {
                    doubt.refused.add(format!("{block} ({error})"));
                } else {
                    doubt.lost.add(block);
                }
            }
        }
        doubt.open.remove(&place);
        true
    }

    /// The file of an origin: by its name among these, or at its path if it still is the one that was let go of.
    fn same_file(&self, proof: &Proof, number: u32, origin: &Origin) -> io::Result<File> {
        match File::options()
            .read(true)
            .write(true)
            .open(self.origin_path(number))
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK;
        let opened = self.data.open_beneath(&origin.path, flags, Mode::empty());
        let file = File::from(opened?);
        let stat = fstat(&file)?;
        let is_regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        if is_regular && proof.is_inode(number, stat.st_ino)? {
            Ok(file)
        } else {
            Err(io::Error::other("it is another file, or nobody can tell"))
        }
    }

    /// Writes the bytes over those that came before, if these are still here.
    fn write_over(
        &self,
        proof: &Proof,
        place: Place,
        came: Signature,
        bytes: &[u8],
    ) -> io::Result<()> {
        let Some(origin) = self.origins.get(place.file as usize) else {
            return Ok(());
        };
        // Nobody writes meanwhile: every write goes to the mirror in turn.
        let mirror = self.logs_to();
        if mirror.is_none() && self.mirror.get().is_some() {
            return Err(io::Error::other("writes here are not mirrored any more"));
        }
        let _turn = mirror.map(Mirror::turn);
        let cut = self.cut(place.file);
        let _cut = cut.write().unwrap_or_else(PoisonError::into_inner);
        let file = self.same_file(proof, place.file, origin)?;
        let start = place.block * BLOCK;
        let mut here = vec![0; (origin.size - start).min(BLOCK) as usize];
        let length = read_full(&file, &mut here, start)?;
        let mut wanted = vec![0; length];
        let there = bytes.len().min(length);
        wanted[..there].copy_from_slice(&bytes[..there]);
        // It may have been written before and not have come to the disk, or not look as before.
        let is_written = here[..length] == wanted;
        if !is_written && signature(&self.plan.fleet_key, &here[..length]) != came {
            return Err(io::Error::other("it was written here since"));
        }
        // The name by which the next life finds it, to make it look as before and durable.
        let name = self.origin_path(place.file);
        let link = AtFlags::AT_SYMLINK_FOLLOW;
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        match linkat(AT_FDCWD, &*open, AT_FDCWD, &name, link) {
            Err(Errno::EEXIST) => {}
            linked => linked?,
        }
        let write = || {
            self.unseen(place.file, &file, || {
                if is_written {
                    return Ok(());
                }
                file.write_all_at(&wanted, start)
            })?;
            file.sync_all().inspect_err(|error| self.fails(error))
        };
        let written = write();
        let inode = fstat(&file)?.st_ino;
        self.turn_over(|numbers| {
            let done = written.and_then(|()| match std::fs::remove_file(&name) {
                // A background did it meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            });
            if done.is_err() && std::fs::exists(&name).unwrap_or(true) {
                // It is let go of as the others were, once it can be.
                numbers.insert(inode, place.file);
            } else {
                numbers.remove(&inode);
            }
            done
        })
    }
}

/// Whether it is the disk that does not give up or take bytes, and not that the file has another name or none.
fn is_refused(error: &io::Error) -> bool {
    let elsewhere = [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP, Errno::ENXIO];
    let code = error.raw_os_error().map(Errno::from_raw);
    code.is_some_and(|code| !elsewhere.contains(&code))
}
