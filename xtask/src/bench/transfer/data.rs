//! What is moved: random bytes, small files, the Rust sources, and a file that changes page by page.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::output;

const FILE: usize = 4096;
/// Small files in one directory.
const TOGETHER: usize = 100;
/// Bytes that a change writes at once: a page of a database.
const PAGE: u64 = 4096;
/// Bytes of a file that changes which lie together.
const ISLAND: u64 = 1 << 20;

fn random() -> Result<fs::File> {
    fs::File::open("/dev/urandom").context("cannot open /dev/urandom")
}

/// A file of random bytes.
pub(super) fn write_large(path: &Path, bytes: u64) -> Result<()> {
    let mut file = fs::File::create(path)?;
    std::io::copy(&mut random()?.take(bytes), &mut file)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// Files of 4 KiB of random bytes.
pub(super) fn write_tree(root: &Path, files: usize) -> Result<()> {
    let mut random = random()?;
    let mut bytes = vec![0; FILE * TOGETHER];
    for first in (0..files).step_by(TOGETHER) {
        let dir = root.join(format!("{:03}", first / TOGETHER));
        fs::create_dir_all(&dir)?;
        random.read_exact(&mut bytes)?;
        for (number, content) in bytes.chunks(FILE).enumerate().take(files - first) {
            fs::File::create(dir.join(format!("{number:02}")))?.write_all(content)?;
        }
    }
    Ok(())
}

/// Copies the Rust sources that the toolchain of the kernel programs brings, and says what they are.
pub(super) fn copy_rust_sources(to: &Path) -> Result<String> {
    let rustup = output(Command::new("rustc").args(["+nightly", "--print", "sysroot"]))
        .map(|root| format!("{}/lib/rustlib/src/rust", root.trim()));
    let places = ["/usr/lib/rustlib/src/rust".to_owned()]
        .into_iter()
        .chain(rustup);
    let from = places
        .into_iter()
        .find_map(|place| fs::canonicalize(place).ok())
        .context("the Rust sources are not here: `cargo xtask setup`")?;
    let mut copy = Command::new("cp");
    output(copy.arg("-a").arg(from).arg(to))?;
    let figure = |argument: &str| -> Result<u64> {
        let text = output(Command::new("du").args(["-s", argument]).arg(to))?;
        let first = text
            .split_whitespace()
            .next()
            .context("du printed nothing")?;
        Ok(first.parse()?)
    };
    let (entries, kib) = (figure("--inodes")?, figure("--apparent-size")?);
    Ok(format!(
        "the Rust sources: {entries} entries, {} MiB",
        kib >> 10
    ))
}

/// A generator that gives the same places in every run.
struct Places(u64);

impl Places {
    fn below(&mut self, limit: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % limit
    }
}

/// A file that changes: `held` of its `size` bytes are data, in islands all over it, and the rest is holes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disk {
    /// A multiple of `held`, which is one of [`ISLAND`].
    pub(super) size: u64,
    pub(super) held: u64,
}

impl Disk {
    /// Writes it anew, random bytes.
    pub(super) fn write(self, path: &Path) -> Result<()> {
        let file = fs::File::create(path)?;
        file.set_len(self.size)?;
        let (mut random, mut content) = (random()?, vec![0; ISLAND as usize]);
        for island in 0..self.held / ISLAND {
            random.read_exact(&mut content)?;
            file.write_all_at(&content, self.place(island * ISLAND))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        file.sync_all().context("the data does not reach the disk")
    }

    /// Where the data at `offset` of all data lies.
    fn place(self, offset: u64) -> u64 {
        let stride = self.size / self.held;
        offset / ISLAND * stride * ISLAND + offset % ISLAND
    }

    /// Changes `bytes` of the data in pages that no two rounds have in common but by chance, and waits until they are
    /// on the disk. `at` is the file, or a device over it.
    pub(super) fn change(self, at: &Path, bytes: u64, round: u64) -> Result<()> {
        let file = fs::File::options().write(true).open(at)?;
        let (mut random, mut places) = (random()?, Places(round));
        let mut pages = BTreeSet::new();
        while (pages.len() as u64) < bytes / PAGE {
            pages.insert(places.below(self.held / PAGE));
        }
        let mut content = vec![0; PAGE as usize];
        for page in pages {
            random.read_exact(&mut content)?;
            file.write_all_at(&content, self.place(page * PAGE))?;
        }
        file.sync_all()
            .context("the change does not reach the disk")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_of_a_disk_lies_all_over_it_and_within_it() {
        let disk = Disk {
            size: 64 * ISLAND,
            held: 16 * ISLAND,
        };
        assert_eq!(disk.place(0), 0);
        assert_eq!(disk.place(ISLAND + PAGE), 4 * ISLAND + PAGE);
        assert_eq!(disk.place(disk.held - PAGE), 61 * ISLAND - PAGE);
        let full = Disk {
            size: disk.held,
            ..disk
        };
        assert_eq!(full.place(5 * ISLAND + 7), 5 * ISLAND + 7);
    }
}
