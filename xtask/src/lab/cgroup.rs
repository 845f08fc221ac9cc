//! The cgroup2 subtree of a lab: every process of the lab is in it, so killing it ends the lab.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::wait_for;

/// What a lab's cgroup is called on the machine, before the lab's name.
const PREFIX: &str = "lifeboat-lab-";

/// One directory of the machine's cgroup2 hierarchy.
#[derive(Debug, Clone)]
pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    /// The subtree of the lab `name`; it need not exist.
    pub(super) fn of_lab(name: &str) -> Result<Self> {
        Ok(Self(hierarchy()?.join(format!("{PREFIX}{name}"))))
    }

    /// A subtree whose path is known.
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(super) fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn exists(&self) -> bool {
        self.0.is_dir()
    }

    /// Makes the directory (its parent must exist) and, where the machine's controllers are on cgroup2,
    /// hands them down to it. On a hybrid machine there is nothing to hand down.
    pub(super) fn create(&self) -> Result<()> {
        if let Some(parent) = self.0.parent() {
            let available =
                fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
            for controller in ["cpu", "io", "memory", "pids"] {
                if available.split_whitespace().any(|word| word == controller) {
                    // Refused where the parent itself holds processes: the lab then has no limits.
                    let _ = fs::write(
                        parent.join("cgroup.subtree_control"),
                        format!("+{controller}"),
                    );
                }
            }
        }
        match fs::create_dir(&self.0) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                Err(error).with_context(|| format!("cannot make the cgroup {}", self.0.display()))
            }
            _ => Ok(()),
        }
    }

    /// True while a process is in the subtree.
    pub(super) fn populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events"))
            .is_ok_and(|events| events.contains("populated 1"))
    }

    /// Kills every process of the subtree and removes it. Nothing to do when it does not exist.
    pub(super) fn kill_and_remove(&self) -> Result<()> {
        if !self.exists() {
            return Ok(());
        }
        wait_for(
            &format!("end of the processes in {}", self.0.display()),
            Duration::from_secs(20),
            || {
                if !self.exists() {
                    return Ok(Some(()));
                }
                // Again each time: a process that was just being placed here joins after the first kill.
                fs::write(self.0.join("cgroup.kill"), "1").with_context(|| {
                    format!("cannot kill the processes of {}", self.0.display())
                })?;
                Ok((!self.populated()).then_some(()))
            },
        )?;
        remove_tree(&self.0).with_context(|| format!("cannot remove {}", self.0.display()))
    }
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Where the machine has cgroup2: /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid machine.
fn hierarchy() -> Result<PathBuf> {
    let mounts =
        fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .context("no cgroup2 file system is mounted: lab hosts need one (mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified)")
}
