//! Who uses a block device or an image: file systems mounted from it, in any mount namespace, and loop devices.

use crate::model::mounts;
use nix::sys::stat::{SFlag, fstat, major, minor};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// What is done with a device or image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// Nothing that is known here.
    Nobody,
    /// A file system is mounted from the device.
    Mounted(Mounted),
    /// The image lies below this loop device.
    Attached(PathBuf),
}

/// A mount of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The mount point as this process reaches it, also in another mount namespace.
    pub reached: PathBuf,
    /// The mount point as those see it who use it.
    pub at: PathBuf,
    /// Its type, as the kernel names it.
    pub file_system: String,
}

/// Who uses the open file or device at `path`.
///
/// # Errors
/// `/proc` or `losetup` cannot be asked.
pub fn of(path: &Path, file: &File) -> io::Result<User> {
    let stat = fstat(file)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFBLK {
        let mounted = mounted(major(stat.st_rdev), minor(stat.st_rdev))?;
        return Ok(mounted.map_or(User::Nobody, User::Mounted));
    }
    let device = loops_over(path)?.pop();
    Ok(device.map_or(User::Nobody, User::Attached))
}

/// The first mount of the device with that number.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn mounted(major: u64, minor: u64) -> io::Result<Option<Mounted>> {
    let number = format!("{major}:{minor}");
    let mut seen = HashSet::new();
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        // What is no process has no namespace, and one that ended has no mounts.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else {
            continue;
        };
        if !seen.insert(namespace) {
            continue;
        }
        let table = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        if let Some((at, file_system)) = table.lines().find_map(|line| mount_of(line, &number)) {
            return Ok(Some(Mounted {
                reached: process
                    .join("root")
                    .join(at.strip_prefix("/").unwrap_or(&at)),
                at,
                file_system,
            }));
        }
    }
    Ok(None)
}

/// Mount point and type of a line of mountinfo (proc(5)) that is of the device with this number.
fn mount_of(line: &str, number: &str) -> Option<(PathBuf, String)> {
    let mount = mounts::parse(line).filter(|mount| mount.device == number)?;
    Some((mount.point, mount.file_system.to_owned()))
}

/// Loop devices over a file; none over one that is missing.
///
/// # Errors
/// `losetup` cannot be run.
pub fn loops_over(file: &Path) -> io::Result<Vec<PathBuf>> {
    if !file.exists() {
        return Ok(Vec::new());
    }
    let output = ["--noheadings", "--output", "NAME", "--associated"].map(Path::new);
    let names = losetup(&[&output[..], &[file]].concat())?;
    let names = names.lines().map(|name| PathBuf::from(name.trim()));
    Ok(names.collect())
}

/// A file that a loop device makes a disk of, to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedFile {
    /// The file.
    pub file: PathBuf,
    /// The loop device.
    pub device: PathBuf,
    /// Where a file system of it is mounted, if one is.
    pub mounted: Option<PathBuf>,
}

/// Files below a directory that loop devices may write.
///
/// # Errors
/// `/sys` or `/proc` cannot be read.
pub fn attached_below(directory: &Path) -> io::Result<Vec<AttachedFile>> {
    let directory = fs::canonicalize(directory)?;
    let mut found = Vec::new();
    for block in fs::read_dir("/sys/block")? {
        let block = block?;
        let read = |name: &str| fs::read(block.path().join(name));
        // Devices that are no loops, or over nothing, have no such file.
        let Ok(mut file) = read("loop/backing_file") else {
            continue;
        };
        file.truncate(file.trim_ascii_end().len());
        let file = PathBuf::from(OsString::from_vec(file));
        if read("ro")?.starts_with(b"1") || !file.starts_with(&directory) || !file.exists() {
            continue;
        }
        let number = String::from_utf8_lossy(&read("dev")?).into_owned();
        let number = number.trim().split_once(':');
        let number =
            number.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let mount = number
            .map(|(major, minor)| mounted(major, minor))
            .transpose()?;
        found.push(AttachedFile {
            file,
            device: Path::new("/dev").join(block.file_name()),
            mounted: mount.flatten().map(|mount| mount.at),
        });
    }
    found.sort_by(|one, other| one.file.cmp(&other.file));
    Ok(found)
}

/// Runs `losetup` of util-linux; what it prints.
///
/// # Errors
/// It is missing, or fails with what it says.
pub fn losetup(arguments: &[&Path]) -> io::Result<String> {
    let output = std::process::Command::new("losetup")
        .args(arguments)
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("losetup (util-linux): {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_names_mount_point_and_type_of_its_device_alone() {
        let line =
            r"36 35 98:0 /sub /mnt/two\040words rw,noatime shared:1 master:2 - ext4 /dev/x rw";
        let found = mount_of(line, "98:0");
        assert_eq!(found, Some(("/mnt/two words".into(), "ext4".into())));
        assert_eq!(mount_of(line, "98:1"), None);
        assert_eq!(mount_of("36 35 98:0", "98:0"), None);
    }

    #[test]
    fn images_that_a_loop_device_writes_are_found_in_their_directory_with_their_mount() {
        if !nix::unistd::geteuid().is_root() {
            println!("not run: loop devices need root");
            return;
        }
        let within = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
        let directory = tempfile::tempdir_in(within).unwrap();
        let (tree, at) = (directory.path().join("tree"), directory.path().join("at"));
        fs::create_dir_all(tree.join("deep")).unwrap();
        fs::create_dir(&at).unwrap();
        let image = tree.join("deep/disk.img");
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let run = |program: &str, arguments: &[&Path]| {
            let done = std::process::Command::new(program).args(arguments).output();
            let done = done.unwrap();
            assert!(done.status.success(), "{program}: {done:?}");
            PathBuf::from(String::from_utf8(done.stdout).unwrap().trim())
        };
        run("mkfs.ext4", &[Path::new("-q"), &image]);
        let attach = |options: &[&str]| {
            let options = options.iter().map(Path::new);
            let all: Vec<&Path> = options.chain([image.as_path()]).collect();
            run("losetup", &all)
        };
        let device = attach(&["--find", "--show"]);
        run("mount", &[&device, &at]);
        let found = attached_below(&tree);
        let beside = attached_below(&at);
        run("umount", &[&at]);
        run("losetup", &[Path::new("--detach"), &device]);
        let device_of =
            |found: &AttachedFile| found.device == device && found.file.ends_with("deep/disk.img");
        let found = found.unwrap();
        assert!(matches!(&found[..], [one] if device_of(one)), "{found:?}");
        assert_eq!(found[0].mounted, Some(at.canonicalize().unwrap()));
        assert_eq!(beside.unwrap(), []);
        let device = attach(&["--find", "--show", "--read-only"]);
        let found = attached_below(&tree);
        run("losetup", &[Path::new("--detach"), &device]);
        assert_eq!(found.unwrap(), [], "nobody writes through it");
    }
}
