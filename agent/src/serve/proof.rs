//! The proof that a volume which was filled is the source's: the signature of each block as the source named it when
//! the block came, one root over them and the source's list.
//!
//! Invariant: what is in the file was written in this boot of the host; after another boot every signature is asked
//! for anew. Blocks that were written over before they came are asked for without their bytes. Non-goal: what was
//! written here.

use super::origins::{Origin, read_list};
use super::presence::boot_id;
use crate::model::ids::Signature;
use crate::transfer::fetch::Place;
use crate::volume::sign::ZERO;
use crate::volume::tree::RootHasher;
use crate::volume::{BlockSize, FleetKey, Kind};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where the signatures begin in the file, behind the boot's id.
const START: u64 = 64;
/// Stands for the signature of zeros, which in the file means that none is known.
const ZEROS: Signature = Signature([0xff; 32]);
/// Signatures that are asked for and have not come.
pub(super) const ASKED_CAP: usize = 4096;

/// The signatures of all blocks of a volume as they came.
pub(super) struct Proof {
    file: File,
    key: FleetKey,
}

impl Proof {
    /// Opens what is known in `directory`.
    pub(super) fn open(directory: &Path, key: FleetKey) -> io::Result<Self> {
        let boot = boot_id()?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(directory.join("signatures"))?;
        let mut of = [0; 36];
        if file.read_at(&mut of, 0)? < of.len() || of != boot {
            file.set_len(0)?;
            file.write_all_at(&boot, 0)?;
        }
        Ok(Self { file, key })
    }

    /// Takes note of a block's signature.
    pub(super) fn note(&self, block: u64, signature: Signature) -> io::Result<()> {
        let kept = if signature == ZERO { ZEROS } else { signature };
        self.file.write_all_at(&kept.0, START + block * 32)
    }

    /// Signatures of an origin's blocks; none for those that are not known.
    fn of(&self, origin: &Origin) -> io::Result<Vec<Option<Signature>>> {
        let mut bytes = vec![0; usize::try_from(origin.blocks() * 32).unwrap_or(usize::MAX)];
        crate::volume::scan::read_full(&self.file, &mut bytes, START + origin.first * 32)?;
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
