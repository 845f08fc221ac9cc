//! The tree of a served volume as it is made from the source's list: everything but the bytes of its files, and
//! the index of which file is which of the source.
//!
//! Invariant: the index is written last, so where it is the tree is whole.

use super::presence::{PAGE, WHOLE};
use super::reuse::{Copies, clear, private};
use crate::model::units::Bytes;
use crate::transfer::fetch::{BLOCK, FetchError};
use crate::volume::apply::{Access, ApplyError, Destination, Parent};
use crate::volume::codec::{Reader, put_short};
use crate::volume::confined::proc_path;
use crate::volume::{Entry, Kind};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A volume cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The source cannot be asked.
    #[error("{0}")]
    Fetch(#[from] FetchError),
    /// The tree cannot be made.
    #[error("{0}")]
    Apply(#[from] ApplyError),
    /// More than can be kept account of.
    #[error(
        "its files are longer than {cap} in all, holes included (`{path}` has {size}); shorten or remove what is not \
         needed, or copy first"
    )]
    TooLong {
        /// Bytes that would do.
        cap: Bytes,
        /// The longest file.
        path: String,
        /// Its bytes.
        size: Bytes,
    },
    /// A file of the store.
    #[error("cannot {doing} in {directory}: {error}; free space or repair the file system there")]
    File {
        /// What.
        doing: &'static str,
        /// The store's directory.
        directory: PathBuf,
        /// Cause.
        error: io::Error,
    },
}

/// A file as the source has it.
pub(super) struct Origin {
    /// Its path there; empty, with no bytes, when it was gone before anything of it had come.
    pub(super) path: Arc<[u8]>,
    /// Its size there, bytes.
    pub(super) size: u64,
    /// Number of its first block among all.
    pub(super) first: u64,
}

impl Origin {
    pub(super) fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// Pages that a block has.
    pub(super) fn real(&self, block: u64) -> u16 {
        let length = self.size.saturating_sub(block * BLOCK).min(BLOCK);
        mask(0, length.div_ceil(PAGE))
    }
}

/// Bits `from..to` of a block's pages.
pub(super) fn mask(from: u64, to: u64) -> u16 {
    let below = |count: u64| match count {
        0..=15 => (1_u16 << count) - 1,
        _ => WHOLE,
    };
    below(to) & !below(from)
}

/// The tree of a store while it is made or brought to another list.
pub(super) struct Tree {
    directory: PathBuf,
    names: PathBuf,
    pub(super) data: Destination,
    pub(super) parent: Parent,
    pub(super) origins: Vec<Origin>,
}

impl Tree {
    /// Opens the tree in `directory`, of which these files have an origin.
    pub(super) fn open(
        directory: &Path,
        volume: &str,
        devices: bool,
        origins: Vec<Origin>,
    ) -> Result<Self, StoreError> {
        let names = directory.join("origins");
        let made = private(directory).and_then(|()| std::fs::create_dir_all(&names));
        made.map_err(failed("make directories", directory))?;
        let data =
            Destination::open(volume, &directory.join("data"), false)?.taking_devices(devices);
        Ok(Self {
            directory: directory.to_owned(),
            names,
            data,
            parent: Parent::default(),
            origins,
        })
    }

    /// Makes what is not there; a directory gets its metadata when it is full.
    pub(super) fn add(&mut self, entry: &Entry, copies: &mut Copies) -> Result<(), StoreError> {
        let (data, parent) = (&self.data, &mut self.parent);
        match &entry.kind {
            Kind::Directory => data.directory(parent, &entry.path)?,
            Kind::HardLink(primary) => data.link(parent, &entry.path, primary)?,
            Kind::File { size, .. } => {
                let taken = *size > 0
                    && copies
                        .take(&entry.path, data.root())
                        .map_err(failed("take a file of an earlier copy", &self.directory))?;
                let access = if taken {
                    Access::InPlace
                } else {
                    Access::private()
                };
                self.finish_file(entry, access)?;
                if *size > 0 {
                    self.name_origin(entry)?;
                }
            }
            Kind::Symlink(_) | Kind::Fifo | Kind::CharDevice(_) | Kind::BlockDevice(_) => {
                data.special(parent, entry)?;
            }
        }
        Ok(())
    }

    /// Gives a file its size and metadata.
    pub(super) fn finish_file(&mut self, entry: &Entry, access: Access) -> Result<(), StoreError> {
        let file = self.data.file(&mut self.parent, &entry.path, access)?;
        Ok(self.data.finish_file(&file, entry, false)?)
    }

    /// Lets a file be found wherever it is renamed to.
    pub(super) fn name_origin(&mut self, entry: &Entry) -> Result<(), StoreError> {
        let name = self.names.join(self.origins.len().to_string());
        let here = proc_path(self.data.root().fd(), OsStr::new(""));
        let path = here.join(bytes_path(&entry.path));
        std::fs::hard_link(path, name).map_err(failed("name an origin", &self.directory))?;
        self.origins.push(Origin {
            path: (*entry.path).into(),
            size: entry.size(),
            // When all are known.
            first: 0,
        });
        Ok(())
    }

    /// Leaves an origin of no file, so that no other has its number.
    pub(super) fn forget_origin(&mut self, number: usize) -> Result<(), StoreError> {
        let name = self.names.join(number.to_string());
        std::fs::remove_file(name).map_err(failed("forget an origin", &self.directory))?;
        if let Some(origin) = self.origins.get_mut(number) {
            origin.path = Arc::default();
            origin.size = 0;
        }
        Ok(())
    }

    /// Makes the tree durable, as it is by this list.
    pub(super) fn write(mut self, entries: &[Entry]) -> Result<Vec<Origin>, StoreError> {
        number_blocks(&mut self.origins);
        let directory = &self.directory;
        write_list(directory, entries).map_err(failed("write the list", directory))?;
        write_index(directory, &self.origins).map_err(failed("write the index", directory))?;
        Ok(self.origins)
    }
}

/// What was being done in a store's directory when it failed.
pub(super) fn failed(doing: &'static str, directory: &Path) -> impl Fn(io::Error) -> StoreError {
    let directory = directory.to_owned();
    move |error| StoreError::File {
        doing,
        directory: directory.clone(),
        error,
    }
}

/// Makes the tree, its files sparse or taken from copies that lie by; what an attempt before left is removed.
pub(super) fn make(
    directory: &Path,
    volume: &str,
    entries: &[Entry],
    devices: bool,
) -> Result<Vec<Origin>, StoreError> {
    clear(directory).map_err(failed("remove what an earlier attempt left", directory))?;
    let mut tree = Tree::open(directory, volume, devices, Vec::new())?;
    let mut copies = Copies::open(directory).map_err(failed("open earlier copies", directory))?;
    for entry in entries {
        tree.add(entry, &mut copies)?;
    }
    for entry in entries.iter().rev() {
        if entry.kind == Kind::Directory {
            tree.data.finish_directory(entry)?;
        }
    }
    tree.write(entries)
}

/// Numbers the blocks of all origins, one after the other.
fn number_blocks(origins: &mut [Origin]) {
    let mut first = 0;
    for origin in origins {
        origin.first = first;
        first += origin.blocks();
    }
}

/// Keeps the list as it came; made durable with the index.
fn write_list(directory: &Path, entries: &[Entry]) -> io::Result<()> {
    let mut out = io::BufWriter::new(File::create(directory.join("list"))?);
    let mut layout = Vec::new();
    for entry in entries {
        layout.clear();
        entry.encode(&mut layout);
        out.write_all(&layout)?;
    }
    out.flush()
}

/// The source's list of the volume, as it was when the store was made.
pub(super) fn read_list(directory: &Path) -> io::Result<Vec<Entry>> {
    let bytes = std::fs::read(directory.join("list"))?;
    let mut reader = Reader::new(&bytes);
    let mut entries = Vec::new();
    while !reader.is_empty() {
        let entry = Entry::decode(&mut reader);
        entries.push(entry.map_err(|error| io::Error::other(error.to_string()))?);
    }
    Ok(entries)
}

fn bytes_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

/// The index is written last: where it is, the tree is whole.
fn write_index(directory: &Path, origins: &[Origin]) -> io::Result<()> {
    let mut bytes = Vec::new();
    for origin in origins {
        bytes.extend_from_slice(&origin.size.to_le_bytes());
        put_short(&mut bytes, &origin.path);
    }
    bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
    let new = directory.join("index.new");
    std::fs::write(&new, bytes)?;
    let whole = File::open(directory)?;
    nix::unistd::syncfs(&whole)?;
    std::fs::rename(new, directory.join("index"))?;
    whole.sync_all()
}

/// The files of the source that the tree was made from; none when it was not made whole.
pub(super) fn read_index(directory: &Path) -> io::Result<Option<Vec<Origin>>> {
    let bytes = match std::fs::read(directory.join("index")) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some((bytes, check)) = bytes.split_last_chunk::<32>() else {
        return Ok(None);
    };
    if blake3::hash(bytes) != blake3::Hash::from(*check) {
        return Ok(None);
    }
    let mut reader = Reader::new(bytes);
    let mut origins: Vec<Origin> = Vec::new();
    while !reader.is_empty() {
        let (Ok(size), Ok(path)) = (reader.u64(), reader.short()) else {
            return Ok(None);
        };
        origins.push(Origin {
            path: path.into(),
            size,
            first: 0,
        });
    }
    number_blocks(&mut origins);
    Ok(Some(origins))
}

/// Which origin each inode is.
pub(super) fn numbers(directory: &Path) -> io::Result<HashMap<u64, u32>> {
    let mut numbers = HashMap::new();
    for name in std::fs::read_dir(directory.join("origins"))? {
        let name = name?;
        if let Some(number) = name.file_name().to_str().and_then(|name| name.parse().ok()) {
            numbers.insert(name.ino(), number);
        }
    }
    Ok(numbers)
}
