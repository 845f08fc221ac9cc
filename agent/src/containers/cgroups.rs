//! cgroup2: which cgroup a container is, which cgroups nobody claims, and freezing one.
//!
//! Invariants: nothing outside the scope is reported; a path is always relative to the scope, with a
//! leading slash; the id is the directory's inode number, which is what the kernel's `cgroup_id()` and
//! `bpf_get_current_cgroup_id()` give for cgroup2.
//! Non-goals: cgroup v1 hierarchies (on hybrid hosts only their cgroup2 half is looked at).

use crate::model::mounts;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most cgroups looked at in one walk: a guard against a runaway hierarchy, far above real hosts.
const MAX_CGROUPS: usize = 20_000;
/// Runtimes allow themselves 10 s to freeze (runc); a task in uninterruptible sleep can take as long.
const FREEZE_TIME: Duration = Duration::from_secs(10);

/// The cgroup subtree an agent owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Directory of the subtree's root in a mounted cgroup2 file system.
    pub cgroup_root: PathBuf,
}

impl Default for Scope {
    /// The whole host: `/sys/fs/cgroup`, or its `unified` half on hybrid hosts.
    fn default() -> Self {
        let hybrid = Path::new("/sys/fs/cgroup/unified");
        Self {
            cgroup_root: if hybrid.join("cgroup.procs").exists() {
                hybrid.to_owned()
            } else {
                PathBuf::from("/sys/fs/cgroup")
            },
        }
    }
}

/// A cgroup within the scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cgroup {
    /// Path below the scope, with a leading slash.
    pub path: String,
    /// cgroup2 id.
    pub id: u64,
}

/// Where a cgroup2 file system is mounted and which cgroup is its root there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mounted {
    root: String,
    point: PathBuf,
}

impl Scope {
    /// The cgroup of a container whose first process is `pid`; `None` when it lies outside the scope.
    pub(super) fn cgroup_of(&self, pid: i32, container_id: &str) -> io::Result<Option<Cgroup>> {
        let memberships = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let Some(path) = unified_path(&memberships) else {
            return Ok(None);
        };
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
        let Some(mounted) = mount_of(&mountinfo, &self.cgroup_root) else {
            return Ok(None);
        };
        let Some(directory) = mounted.directory_of(container_part(path, container_id)) else {
            return Ok(None);
        };
        self.at(&directory)
    }

    fn at(&self, directory: &Path) -> io::Result<Option<Cgroup>> {
        let Ok(below) = directory.strip_prefix(&self.cgroup_root) else {
            return Ok(None);
        };
        Ok(Some(Cgroup {
            path: format!("/{}", below.display()),
            id: fs::metadata(directory)?.ino(),
        }))
    }

    /// Cgroups that hold processes and that nobody in `claimed` (paths below the scope) owns.
    pub(super) fn unclaimed(&self, claimed: &BTreeSet<String>) -> io::Result<Vec<(Cgroup, i32)>> {
        fs::metadata(self.cgroup_root.join("cgroup.procs"))?; // a scope that is not there is an error
        let mut found = Vec::new();
        let mut waiting = vec![self.cgroup_root.clone()];
        let mut seen = 0;
        while let Some(directory) = waiting.pop() {
            seen += 1;
            if seen > MAX_CGROUPS {
                break;
            }
            // A cgroup that vanished while it was looked at is no error: it has just ended.
            let Ok(Some(cgroup)) = self.at(&directory) else {
                continue;
            };
            if claimed.contains(&cgroup.path) || is_monitor(&cgroup.path) {
                continue;
            }
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            waiting.extend(
                entries
                    .filter_map(Result::ok)
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|entry| entry.path()),
            );
            if directory == self.cgroup_root {
                continue; // what runs in the root is the host itself
            }
            let first = fs::read_to_string(directory.join("cgroup.procs"))
                .ok()
                .and_then(|pids| pids.lines().next().and_then(|pid| pid.parse().ok()));
            if let Some(pid) = first {
                found.push((cgroup, pid));
            }
        }
        found.sort_by(|a, b| a.0.path.cmp(&b.0.path));
        Ok(found)
    }
}

impl Mounted {
    /// The directory of a cgroup path as /proc/PID/cgroup shows it to us.
    fn directory_of(&self, path: &str) -> Option<PathBuf> {
        let below = if self.root == "/" {
            path
        } else {
            let rest = path.strip_prefix(&self.root)?;
            if !rest.is_empty() && !rest.starts_with('/') {
                return None;
            }
            rest
        };
        Some(self.point.join(below.trim_start_matches('/')))
    }
}

/// The cgroup2 line (`0::`) of /proc/PID/cgroup; paths that lead out of our cgroup namespace (`/../`)
/// are outside every scope we can see.
fn unified_path(memberships: &str) -> Option<&str> {
    let path = memberships
        .lines()
        .find_map(|line| line.strip_prefix("0::"))?;
    (!path.starts_with("/..")).then_some(path)
}

/// Cuts a path behind the component that carries the container's id: an init system or a runtime may
/// have put the first process into a cgroup below it (`…/libpod-ID/container`, `…/init.scope`).
fn container_part<'a>(path: &'a str, container_id: &str) -> &'a str {
    if container_id.is_empty() {
        return path;
    }
    // Ids of `ctr` are a person's words: one may be a part of another component.
    let named = format!("/{container_id}/");
    let at = format!("{path}/").find(&named).map(|at| at + 1);
    match at.or_else(|| path.find(container_id)) {
        Some(at) => match path[at..].find('/') {
            Some(end) => &path[..at + end],
            None => path,
        },
        None => path,
    }
}

/// The cgroup2 mount that shows `directory`: the longest mount point above it (proc(5), mountinfo).
fn mount_of(mountinfo: &str, directory: &Path) -> Option<Mounted> {
    mountinfo
        .lines()
        .filter_map(mounts::parse)
        .filter(|mount| mount.file_system == "cgroup2" && directory.starts_with(&mount.point))
        .map(|mount| Mounted {
            root: mount.root,
            point: mount.point,
        })
        // The last of equal mount points is the one on top.
        .max_by_key(|mounted| mounted.point.components().count())
}

/// Podman's monitor processes have cgroups of their own beside the container's.
fn is_monitor(path: &str) -> bool {
    path.rsplit('/')
        .next()
        .is_some_and(|name| name.starts_with("libpod-conmon-") || name == "conmon")
}

/// A cgroup could not be frozen, thawed or killed.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The kernel's control file cannot be used.
    #[error("cannot {what} {}: {source}; see whether the cgroup still exists and is not the root", path.display())]
    Control {
        /// `freeze`, `thaw` or `kill`.
        what: &'static str,
        /// The control file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A task did not stop.
    #[error("{} is not {what} after {after:?}: a task is stuck in the kernel, probably on a disk", path.display())]
    Stuck {
        /// `frozen` or `thawed`.
        what: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// The bound that passed.
        after: Duration,
    },
}

/// Stops every task of a cgroup that has no runtime to ask; returns when all have stopped.
///
/// # Errors
/// When the control file refuses or tasks do not stop within 10 s (the cgroup is thawed again then).
pub async fn freeze(cgroup: &Path) -> Result<(), FreezeError> {
    let result = switch(cgroup, true).await;
    if result.is_err() {
        let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
    }
    result
}

/// Lets a frozen cgroup run again.
///
/// # Errors
/// When the control file refuses.
pub async fn thaw(cgroup: &Path) -> Result<(), FreezeError> {
    switch(cgroup, false).await
}

/// Sends SIGKILL to every process at and below a frozen cgroup except `first`: none of them runs another
/// instruction, also when the freezer lets go of it.
///
/// # Errors
/// When the cgroup cannot be read or a process cannot be signalled.
pub(super) fn kill_all_but(cgroup: &Path, first: i32) -> Result<(), FreezeError> {
    let failed = |path: &Path, source| FreezeError::Control {
        what: "kill",
        path: path.to_owned(),
        source,
    };
    let mut waiting = vec![cgroup.to_owned()];
    while let Some(directory) = waiting.pop() {
        let below = fs::read_dir(&directory).map_err(|source| failed(&directory, source))?;
        waiting.extend(
            below
                .filter_map(Result::ok)
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
        let path = directory.join("cgroup.procs");
        let pids = fs::read_to_string(&path).map_err(|source| failed(&path, source))?;
        for pid in pids.lines().filter_map(|pid| pid.parse::<i32>().ok()) {
            // 0 stands for a process outside our PID namespace.
            if pid <= 0 || pid == first {
                continue;
            }
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(failed(&path, error.into())),
            }
        }
    }
    Ok(())
}

async fn switch(cgroup: &Path, on: bool) -> Result<(), FreezeError> {
    let (what, done, flag) = if on {
        ("freeze", "frozen", "1")
    } else {
        ("thaw", "thawed", "0")
    };
    let control = |file: &str, source| FreezeError::Control {
        what,
        path: cgroup.join(file),
        source,
    };
    fs::write(cgroup.join("cgroup.freeze"), flag)
        .map_err(|source| control("cgroup.freeze", source))?;
    let wanted = format!("frozen {flag}");
    let wait = async {
        loop {
            let events = fs::read_to_string(cgroup.join("cgroup.events"))
                .map_err(|source| control("cgroup.events", source))?;
            if events.lines().any(|line| line == wanted) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    match tokio::time::timeout(FREEZE_TIME, wait).await {
        Ok(result) => result,
        Err(_) => Err(FreezeError::Stuck {
            what: done,
            path: cgroup.to_owned(),
            after: FREEZE_TIME,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str =
        "9:name=systemd:/x\n1:cpu:/libpod_parent/libpod-ab\n0::/libpod_parent/libpod-ab\n";

    #[test]
    fn the_unified_line_is_found_among_v1_lines() {
        assert_eq!(unified_path(HYBRID), Some("/libpod_parent/libpod-ab"));
        assert_eq!(unified_path("0::/../other/libpod-ab\n"), None);
        assert_eq!(unified_path("1:cpu:/x\n"), None);
    }

    #[test]
    fn cgroups_below_the_containers_own_are_cut_off() {
        assert_eq!(
            container_part("/m/libpod-ab12.scope/container", "ab12"),
            "/m/libpod-ab12.scope"
        );
        assert_eq!(container_part("/docker/ab12", "ab12"), "/docker/ab12");
        assert_eq!(container_part("/elsewhere", "ab12"), "/elsewhere");
        assert_eq!(container_part("/default/a/init", "a"), "/default/a");
    }

    #[test]
    fn the_innermost_cgroup2_mount_decides_what_a_path_means() {
        let mountinfo = "\
30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
32 30 0:28 /host-a /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let mounted = mount_of(mountinfo, Path::new("/sys/fs/cgroup/unified/scope")).unwrap();
        assert_eq!(mounted.root, "/host-a");
        assert_eq!(
            mounted.directory_of("/host-a/scope/docker/ab"),
            Some(PathBuf::from("/sys/fs/cgroup/unified/scope/docker/ab"))
        );
        assert_eq!(mounted.directory_of("/host-ab/docker"), None);
        assert_eq!(mount_of(mountinfo, Path::new("/sys/fs/cgroup/cpu")), None);
    }

    #[test]
    fn monitors_of_podman_are_not_containers() {
        assert!(is_monitor("/machine.slice/libpod-conmon-ab.scope"));
        assert!(is_monitor("/libpod_parent/conmon"));
        assert!(!is_monitor("/machine.slice/libpod-ab.scope"));
    }
}
