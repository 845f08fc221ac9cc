//! The proof that a volume which was filled is the source's: the signature of each block as the source named it when
//! the block came, one root over them and the source's list.
//!
//! Invariant: a signature is durable before its block counts as durable. After another boot of the host only those of
//! such blocks are believed: asking for one anew would compare the source with itself. Blocks that were written over
//! before they came are asked for without their bytes. Non-goal: what was written here.

use super::origins::{Origin, read_list};
use super::presence::{Presence, boot_id};
use crate::model::ids::Signature;
use crate::transfer::fetch::Place;
use crate::volume::sign::ZERO;
use crate::volume::tree::RootHasher;
use crate::volume::{BlockSize, FleetKey, Kind};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where the signatures begin in the file, behind the boot's id.
const START: u64 = 64;
/// Stands for the signature of zeros, which in the file means that none is known.
const ZEROS: Signature = Signature([0xff; 32]);
/// Signatures that are asked for and have not come.
pub(super) const ASKED_CAP: usize = 4096;

/// The signatures of all blocks of a volume as they came.
pub(super) struct Proof {
    file: File,
    /// What was known before it was doubted, while it is.
    doubted: PathBuf,
    /// The inode of each file that was let go of.
    inodes: File,
    key: FleetKey,
}

impl Proof {
    /// Opens what is known in `directory` of blocks of which `presence` says what is here.
    pub(super) fn open(
        directory: &Path,
        key: FleetKey,
        origins: &[Origin],
        presence: &Presence,
    ) -> io::Result<Self> {
        let boot = boot_id()?;
        let open = |name| {
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).read(true).write(true);
            options.open(directory.join(name))
        };
        let file = open("signatures")?;
        let mut of = [0; 36];
        let proof = Self {
            file,
            doubted: directory.join("doubted"),
            inodes: open("inodes")?,
            key,
        };
        if proof.file.read_at(&mut of, 0)? < of.len() || of != boot {
            proof.after_boot(&boot, origins, presence)?;
        }
        Ok(proof)
    }

    /// Forgets what the host's death may have spoilt.
    fn after_boot(&self, boot: &[u8], origins: &[Origin], presence: &Presence) -> io::Result<()> {
        if self.doubted.exists() || self.file.metadata()?.len() == 0 {
            return self.begin(boot);
        }
        for origin in origins {
            for block in origin.first..origin.first + origin.blocks() {
                if origin.real(block - origin.first) & !presence.of(block) != 0 {
                    self.file.write_all_at(&ZERO.0, START + block * 32)?;
                }
            }
        }
        self.file.write_all_at(boot, 0)
    }

    /// Makes durable what is known.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn begin(&self, boot: &[u8]) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all_at(boot, 0)
    }

    /// Forgets every signature, so that it is asked for again, and keeps it to compare.
    pub(super) fn doubt(&self) -> io::Result<()> {
        if self.doubted.exists() {
            return Ok(());
        }
        let name = self.doubted.with_extension("new");
        let mut new = File::create(&name)?;
        let mut from = &self.file;
        from.seek(SeekFrom::Start(0))?;
        io::copy(&mut from, &mut new)?;
        new.sync_all()?;
        std::fs::rename(name, &self.doubted)?;
        if let Some(directory) = self.doubted.parent() {
            File::open(directory)?.sync_all()?;
        }
        self.begin(&boot_id()?)
    }

    /// Ends the doubt.
    pub(super) fn believe(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.doubted) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Blocks of which the source says another signature now, `cap` at most, each with the one of before.
    pub(super) fn differing(
        &self,
        origins: &[Origin],
        cap: usize,
    ) -> io::Result<Vec<(Place, Signature)>> {
        let before = match File::open(&self.doubted) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            opened => opened?,
        };
        let mut differing = Vec::new();
        for (origin, file) in origins.iter().zip(0..) {
            let both = of(&before, origin)?.into_iter().zip(self.of(origin)?);
            let differs = both
                .zip(0..)
                .filter(|((before, now), _)| before != now)
                .filter_map(|((before, _), block)| Some((Place { file, block }, before?)));
            differing.extend(differs.take(cap - differing.len()));
            if differing.len() == cap {
                break;
            }
        }
        Ok(differing)
    }

    /// Takes note of a block's signature, which is in doubt no more.
    pub(super) fn settle(&self, block: u64, signature: Signature) -> io::Result<()> {
        self.note(block, signature)?;
        let before = File::options().write(true).open(&self.doubted)?;
        before.write_all_at(&kept(signature).0, START + block * 32)
    }

    /// Takes note of a block's signature.
    pub(super) fn note(&self, block: u64, signature: Signature) -> io::Result<()> {
        self.file
            .write_all_at(&kept(signature).0, START + block * 32)
    }

    /// Takes note of which inode a file is that nothing else will name.
    pub(super) fn note_inode(&self, number: u32, inode: u64) -> io::Result<()> {
        let at = u64::from(number) * 8;
        self.inodes.write_all_at(&inode.to_le_bytes(), at)
    }

    /// Whether a file that was let go of is this inode; not known after the host's death, no.
    pub(super) fn is_inode(&self, number: u32, inode: u64) -> io::Result<bool> {
        let mut known = [0; 8];
        crate::volume::scan::read_full(&self.inodes, &mut known, u64::from(number) * 8)?;
        Ok(u64::from_le_bytes(known) == inode)
    }

    fn of(&self, origin: &Origin) -> io::Result<Vec<Option<Signature>>> {
        of(&self.file, origin)
    }

    /// Blocks whose signature is not known, [`ASKED_CAP`] at most.
    pub(super) fn lacking(&self, origins: &[Origin]) -> io::Result<Vec<Place>> {
        let mut lacking = Vec::new();
        for (origin, file) in origins.iter().zip(0..) {
            let known = self.of(origin)?;
            let unknown = known.iter().zip(0..).filter(|(known, _)| known.is_none());
            lacking.extend(unknown.map(|(_, block)| Place { file, block }));
            if lacking.len() > ASKED_CAP {
                break;
            }
        }
        Ok(lacking)
    }

    /// The root over the list in `directory` with the signatures of its files; none while one is not known.
    pub(super) fn root(
        &self,
        directory: &Path,
        origins: &[Origin],
    ) -> io::Result<Option<Signature>> {
        let by_path: HashMap<&[u8], &Origin> = origins
            .iter()
            .map(|origin| (&*origin.path, origin))
            .collect();
        let mut root = RootHasher::new(&self.key, BlockSize::for_volume(0));
        for mut entry in read_list(directory)? {
            if let Kind::File { blocks, .. } = &mut entry.kind
                && let Some(origin) = by_path.get(&*entry.path)
            {
                let known: Option<Vec<Signature>> = self.of(origin)?.into_iter().collect();
                let Some(known) = known else {
                    return Ok(None);
                };
                *blocks = known;
            }
            root.add(&entry);
        }
        Ok(Some(root.finish()))
    }
}

/// A signature as the file has it.
fn kept(signature: Signature) -> Signature {
    if signature == ZERO { ZEROS } else { signature }
}

/// Signatures of an origin's blocks; none for those that are not known.
fn of(file: &File, origin: &Origin) -> io::Result<Vec<Option<Signature>>> {
    let mut bytes = vec![0; usize::try_from(origin.blocks() * 32).unwrap_or(usize::MAX)];
    crate::volume::scan::read_full(file, &mut bytes, START + origin.first * 32)?;
    let (signatures, _) = bytes.as_chunks::<32>();
    Ok(signatures
        .iter()
        .map(|bytes| match Signature(*bytes) {
            ZERO => None,
            ZEROS => Some(ZERO),
            signature => Some(signature),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::presence::WHOLE;

    #[test]
    fn after_another_boot_only_signatures_of_blocks_that_are_durable_are_believed() {
        let directory = tempfile::tempdir().unwrap();
        let origins = [Origin {
            path: b"file".as_slice().into(),
            size: 4 * 65536,
            first: 0,
        }];
        let open = || {
            let real = (0..4).map(|_| WHOLE);
            let presence = Presence::open(directory.path(), 4, real).unwrap();
            let key = FleetKey([1; 32]);
            let proof = Proof::open(directory.path(), key, &origins, &presence).unwrap();
            (presence, proof)
        };
        let known = |proof: &Proof| proof.of(&origins[0]).unwrap();
        let some = |number: u8| Some(Signature([number; 32]));
        let (presence, proof) = open();
        for block in 0..3 {
            proof.note(block, Signature([block as u8 + 1; 32])).unwrap();
            presence.mark(block, WHOLE).unwrap();
        }
        presence.harden(&presence.soft(0..2)).unwrap();
        drop((presence, proof));
        assert_eq!(known(&open().1), [some(1), some(2), some(3), None]);

        let boot_anew = || {
            for (name, at) in [("signatures", 0), ("live", 8)] {
                let file = OpenOptions::new()
                    .write(true)
                    .open(directory.path().join(name));
                file.unwrap().write_all_at(&[b'x'; 36], at).unwrap();
            }
        };
        boot_anew();
        let (_, proof) = open();
        assert_eq!(known(&proof), [some(1), some(2), None, None]);
        proof.note(2, Signature([3; 32])).unwrap();

        // While it is doubted all are asked for anew, and compared with those of before.
        proof.doubt().unwrap();
        proof.note(0, Signature([9; 32])).unwrap();
        boot_anew();
        let (_, proof) = open();
        assert_eq!(known(&proof), [None; 4]);
        for (block, now) in [(0, 9), (1, 2), (2, 3)] {
            proof.note(block, Signature([now; 32])).unwrap();
        }
        let first = Place { file: 0, block: 0 };
        let differing = proof.differing(&origins, 8).unwrap();
        assert_eq!(differing, [(first, Signature([1; 32]))]);
    }
}
