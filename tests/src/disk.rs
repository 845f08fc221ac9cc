//! Block devices for tests, over files.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A loop device over a file, and perhaps a file system on it; taken apart when dropped.
pub struct Disk {
    /// Where its file is.
    pub directory: PathBuf,
    /// The device.
    pub device: PathBuf,
}

impl Disk {
    /// Makes it in a directory below `within`; none, with the reason printed, where that is not possible.
    pub fn new(within: &Path, name: &str, mib: u64) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("not run: loop devices need root");
            return None;
        }
        let directory = within.join(format!("disk-{name}-{}", std::process::id()));
        fs::create_dir(&directory).expect("a directory");
        let backing = File::create(directory.join("disk")).expect("a file");
        backing.set_len(mib << 20).expect("sparse");
        let path = directory.join("disk");
        // Through the page cache, so that whoever reads the file reads what the device holds.
        let path = path.to_str().expect("plain");
        let device = output("losetup", &["--direct-io=off", "--find", "--show", path]);
        let device = PathBuf::from(device.trim());
        Some(Self { directory, device })
    }

    /// The device's path as text.
    pub fn device(&self) -> &str {
        self.device.to_str().expect("plain")
    }

    /// Mounts it, and returns where.
    pub fn mount(&self) -> String {
        let at = self.directory.join("mount");
        fs::create_dir_all(&at).expect("a directory");
        let at = at.to_str().expect("plain").to_owned();
        output("mount", &["-o", "discard", self.device(), &at]);
        at
    }

    /// Unmounts it.
    pub fn unmount(&self) {
        let at = self.directory.join("mount");
        output("umount", &[at.to_str().expect("plain")]);
    }

    /// What the device holds, as the file below it has it.
    pub fn below(&self) -> File {
        File::open(self.directory.join("disk")).expect("the file")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let quiet = |program: &str, argument: &Path| {
            let _ = Command::new(program)
                .arg(argument)
                .stderr(Stdio::null())
                .status();
        };
        quiet("umount", &self.directory.join("mount"));
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// What a program prints, without the space around it; a failing one ends the test.
pub fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
