//! What is moved: random bytes, small files, the Rust sources, and a sparse file that changes.

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
/// Bytes of a place in the sparse file that is written at once: a block.
const PLACE: u64 = 64 << 10;

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

/// A sparse file of `size` bytes with random bytes in places that come to about `there`.
pub(super) fn write_sparse(path: &Path, size: u64, there: u64) -> Result<()> {
    fs::File::create(path)?.set_len(size)?;
    scatter(path, size, there, 0, 16 * PLACE)
}

/// Changes about `bytes` of it, in places that depend on `round`.
pub(super) fn change(path: &Path, size: u64, bytes: u64, round: usize) -> Result<()> {
    scatter(path, size, bytes, 1 + round as u64, PLACE)
}

fn scatter(path: &Path, size: u64, bytes: u64, seed: u64, place: u64) -> Result<()> {
    let file = fs::File::options().write(true).open(path)?;
    let (mut random, mut places) = (random()?, Places(seed));
    let mut content = vec![0; place as usize];
    for _ in 0..bytes / place {
        random.read_exact(&mut content)?;
        file.write_all_at(&content, places.below(size / place) * place)?;
    }
    Ok(())
}
