//! What is moved while sides are killed: a tree with something of everything, and what changes in it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::output;

/// A large file, small ones, and one of everything that has no bytes.
pub(super) fn furnish(root: &Path, mib: u64) -> Result<()> {
    fs::create_dir_all(root.join("small"))?;
    let mut random = File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    let small = 300;
    let large = (mib << 20) - small * (32 << 10);
    let mut file = File::create(root.join("large"))?;
    std::io::copy(&mut (&mut random).take(large), &mut file).context("cannot write the data")?;
    let mut bytes = vec![0; 32 << 10];
    for number in 0..small {
        random.read_exact(&mut bytes)?;
        fs::write(root.join(format!("small/{number}")), &bytes)?;
    }
    std::os::unix::fs::symlink("large", root.join("symbolic"))?;
    fs::hard_link(root.join("large"), root.join("small/hard"))?;
    let sparse = File::create(root.join("sparse"))?;
    sparse.set_len(64 << 20)?;
    sparse.write_all_at(b"island", 20 << 20)?;
    output(
        Command::new("setfattr")
            .args(["-n", "user.note", "-v", "kept"])
            .arg(root.join("large")),
    )?;
    output(Command::new("mkfifo").arg(root.join("pipe")))?;
    Ok(())
}

/// What happens to the tree before an epoch, the same in every transfer: files written, grown, truncated, renamed and
/// deleted, hard links made and their first names removed, directories renamed, files and directories that take each
/// other's names. An eighth of the data is new.
pub(super) fn change(root: &Path, epoch: usize, mib: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    let mut noise = |bytes: u64| -> std::io::Result<Vec<u8>> {
        let mut noise = Vec::new();
        (&mut random).take(bytes).read_to_end(&mut noise)?;
        Ok(noise)
    };
    let at = |name: &str| root.join(name);
    let small = |number: usize| root.join(format!("small/{number}"));
    let write = |path: &Path| File::options().write(true).open(path);

    fs::write(at(&format!("new-{epoch}")), noise(mib << 17)?)?;
    if epoch > 2 {
        let moved = at(&format!("small/moved-{}", epoch - 1));
        fs::rename(at(&format!("new-{}", epoch - 1)), moved)?;
    }
    if epoch > 3 {
        let cut = write(&at(&format!("small/moved-{}", epoch - 2)))?;
        cut.set_len((mib << 16) + 5)?;
    }
    let large = write(&at("large"))?;
    for page in 0..mib / 2 {
        let offset = ((2 * page) << 20) + ((epoch as u64) << 16);
        // Not in what other epochs cut off.
        if offset + (3 << 20) < large.metadata()?.len() {
            large.write_all_at(&noise(4096)?, offset)?;
        }
    }
    let length = large.metadata()?.len();
    // Cut off, and then longer by a hole.
    large.set_len(if epoch % 2 == 1 {
        length - (1 << 20) - 5
    } else {
        length + (3 << 20)
    })?;

    let first = 20 * epoch;
    for number in first..first + 4 {
        fs::remove_file(small(number))?;
        fs::rename(small(number + 4), at(&format!("renamed-{number}")))?;
        fs::write(small(number + 8), noise(40 << 10)?)?;
        write(&small(number + 12))?.set_len(5000)?;
        let link = at(&format!("link-{number}"));
        fs::hard_link(small(number + 16), link)?;
        if epoch > 2 {
            // The first name of what was linked before the last epoch.
            fs::remove_file(small(number - 4))?;
        }
    }
    let directory = at(&format!("directory-{epoch}"));
    fs::create_dir(&directory)?;
    for number in 0..4 {
        fs::write(directory.join(number.to_string()), noise(9000)?)?;
    }
    if epoch > 2 {
        let before = at(&format!("directory-{}", epoch - 1));
        fs::rename(before, at(&format!("was-directory-{}", epoch - 1)))?;
        let swapped = at(&format!("was-directory-{}/0", epoch - 1));
        fs::remove_file(&swapped)?;
        fs::create_dir(&swapped)?;
        fs::write(swapped.join("below"), noise(100)?)?;
    }
    if epoch > 3 {
        let before = at(&format!("was-directory-{}", epoch - 2));
        fs::remove_dir_all(&before)?;
        fs::write(&before, noise(100)?)?;
    }
    let symbolic = at("symbolic");
    fs::remove_file(&symbolic)?;
    std::os::unix::fs::symlink(format!("new-{epoch}"), &symbolic)?;
    Ok(())
}
