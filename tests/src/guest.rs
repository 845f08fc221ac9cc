//! Disks that can be made to fail. They need md, the device mapper and scsi_debug, so the tests that use them
//! run in the guests of `cargo xtask lab kernels`.

use crate::disk::output;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether this is such a guest; prints that the test is not run when it is not.
#[must_use]
pub fn is_guest() -> bool {
    let is = std::env::var_os("LIFEBOAT_GUEST").is_some();
    if !is {
        println!("not run: only in the guests of `cargo xtask lab kernels`");
    }
    is
}

/// A loop device, given back when dropped.
pub struct Loop(String);

impl Loop {
    /// Over a new file of zeros in memory.
    #[must_use]
    pub fn of(name: &str, mib: u64) -> Self {
        let file = Path::new("/tmp").join(name);
        let backing = File::create(&file).expect("a file");
        backing.set_len(mib << 20).expect("sparse");
        let device = Self::over(&file);
        // It lives as long as the device has it open.
        fs::remove_file(file).expect("removed");
        device
    }

    /// Over a file or a block device.
    #[must_use]
    pub fn over(file: &Path) -> Self {
        let file = file.to_str().expect("plain");
        Self(output("losetup", &["--find", "--show", file]))
    }

    /// Its path, `/dev/loop0`.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A mapped device, removed when dropped.
pub struct Mapped(String);

impl Mapped {
    /// Of a table (dmsetup(8)).
    #[must_use]
    pub fn new(name: &str, table: &str) -> Self {
        let how = ["--noudevsync", "--noudevrules"];
        let create = ["create", name, "--table", table];
        output("dmsetup", &[&create[..], &how[..]].concat());
        output("dmsetup", &["mknodes"]);
        Self(name.to_owned())
    }

    /// Its path.
    #[must_use]
    pub fn device(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.0)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = Command::new("dmsetup")
            .args(["remove", "--force", "--retry", "--noudevsync", &self.0])
            .output();
    }
}
