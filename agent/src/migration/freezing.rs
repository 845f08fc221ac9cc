//! File systems that are mounted from a plan's block devices: frozen while the final changeset is sent, so that
//! what arrives is whole, their journal empty.
//!
//! Invariants: a freeze is in the journal before it begins; it ends with the pause, at the latest when the agent
//! starts again, and without any agent after [`FROZEN_MAX`], by a process of its own. Non-goal: what others than
//! the plan's containers write there after the switch.

use super::events::SourceEvent;
use super::moving::{Move, MoveError};
use super::planner::Origin;
use crate::model::ids::PlanId;
use crate::model::volume::VolumeKind;
use crate::volume::users::{self, Mounted, User};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpgid};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Time in which a file system must have written back what it holds.
const FREEZE_MAX: Duration = Duration::from_secs(20);

/// After this a file system is let go whatever became of the agent, and nothing is released: longer than any pause.
pub(super) const FROZEN_MAX: Duration = Duration::from_secs(60);

/// File systems whose freezing leaves everything in its place.
const FREEZABLE: [&str; 4] = ["ext2", "ext3", "ext4", "xfs"];

/// The file system that is mounted from a block device.
///
/// # Errors
/// It cannot be found out.
pub(super) fn mounted_from(device: &Path) -> io::Result<Option<Mounted>> {
    Ok(match users::of(device, &File::open(device)?)? {
        User::Mounted(mounted) => Some(mounted),
        User::Nobody | User::Attached(_) => None,
    })
}

/// Why a mounted file system cannot be frozen; none when it can. `state` is the agent's own directory.
pub(super) fn unfreezable(device: &Path, mounted: &Mounted, state: &Path) -> Option<String> {
    let Mounted {
        at, file_system, ..
    } = mounted;
    let at = at.display();
    if !FREEZABLE.contains(&file_system.as_str()) {
        return Some(format!(
            "its {file_system} is mounted at {at} and cannot be frozen; move that directory, or unmount it"
        ));
    }
    let number = std::fs::metadata(device).map(|device| device.rdev()).ok();
    let is_own = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok() == number;
    [state, Path::new("/"), Path::new("/usr"), Path::new("/var"), Path::new("/tmp")]
        .into_iter()
        .find(|path| is_own(path))
        .map(|path| {
            format!(
                "its file system is mounted at {at} and holds {}, which this host needs during the move; move the directories instead",
                path.display()
            )
        })
}

/// What an operator should know of a device with a mounted file system, and of disk images in a tree.
pub(super) fn note(origin: &Origin) -> Option<String> {
    match origin.kind {
        VolumeKind::Device => device_note(&origin.path),
        VolumeKind::Named(_) | VolumeKind::Bind | VolumeKind::File => images_note(&origin.path),
        VolumeKind::Image(_) => None,
    }
}

fn device_note(device: &Path) -> Option<String> {
    // Who cannot tell now is asked again, and must, before it is frozen.
    let mounted = mounted_from(device).ok().flatten()?;
    Some(format!(
        "{} is mounted at {} and frozen while its last changes are sent; what is written there after the switch stays here",
        device.display(),
        mounted.at.display(),
    ))
}

/// A disk image is a file as any other in its tree; what its loop device has not written back yet is not in it.
fn images_note(tree: &Path) -> Option<String> {
    let attached = match users::attached_below(tree) {
        Ok(attached) => attached,
        Err(error) => {
            tracing::warn!(tree = %tree.display(), "cannot tell which disk images in it are attached: {error}");
            return None;
        }
    };
    let images: Vec<String> = attached
        .iter()
        .map(|image| {
            let mounted = image.mounted.as_ref();
            let at = mounted.map(|at| format!(", mounted at {}", at.display()));
            format!(
                "{} ({}{})",
                image.file.display(),
                image.device.display(),
                at.unwrap_or_default()
            )
        })
        .collect();
    (!images.is_empty()).then(|| {
        format!(
            "written through a loop device and not frozen: {}; unmount and detach it, or its file system arrives as \
             after a power failure",
            images.join(", ")
        )
    })
}

/// Ends a freeze by itself when it is not stopped before, by this life of the agent or a later one.
#[derive(Debug)]
pub(super) struct Watchdog {
    process: Child,
}

impl Watchdog {
    fn start(plan: &PlanId, mount: &File) -> io::Result<Self> {
        let seconds = FROZEN_MAX.as_secs();
        let sleeps =
            format!("sleep {seconds} </dev/null; exec fsfreeze --unfreeze /proc/self/fd/0");
        let process = Command::new("sh")
            .args(["-c", &sleeps, &Self::name(plan)])
            .stdin(mount.try_clone()?)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self { process })
    }

    /// What a watchdog of a plan is told by among the processes of the host.
    fn name(plan: &PlanId) -> String {
        format!("lifeboat-thaws-{plan}")
    }

    /// Stops those of a plan: one of an earlier life would end a later freeze.
    fn stop_all(plan: &PlanId) -> io::Result<()> {
        let name = Self::name(plan);
        for process in std::fs::read_dir("/proc")? {
            let process = process?;
            let number = process
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let Some(number) = number.map(Pid::from_raw) else {
                continue;
            };
            // One that ended has no arguments.
            let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let is_one = arguments
                .split(|byte| *byte == 0)
                .any(|one| one == name.as_bytes());
            if is_one && getpgid(Some(number)) == Ok(number) {
                // It leads a group of its own, and may have ended by now.
                let _ = killpg(number, Signal::SIGKILL);
            }
        }
        Ok(())
    }
}

fn fsfreeze(how: &str, mount: &File) -> io::Result<()> {
    let output = Command::new("fsfreeze")
        .args([how, "/proc/self/fd/0"])
        .stdin(mount.try_clone()?)
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("fsfreeze (util-linux): {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.trim().to_owned()));
    }
    Ok(())
}

impl Move {
    /// Freezes what is mounted from the plan's devices.
    pub(super) async fn freeze_file_systems(&mut self) -> Result<(), MoveError> {
        let devices = self
            .plan
            .volumes
            .iter()
            .filter(|volume| volume.kind == VolumeKind::Device);
        let mut mounts = Vec::new();
        let state = self.delegator.parts().state.clone();
        for device in devices.map(|volume| &volume.source_path) {
            let failed = |error| failed(device, error);
            if let Some(mounted) = mounted_from(device).map_err(failed)? {
                if let Some(why) = unfreezable(device, &mounted, &state) {
                    return Err(failed(io::Error::other(why)));
                }
                let mount = File::open(&mounted.reached).map_err(failed)?;
                mounts.push((device.clone(), mount));
            }
        }
        if mounts.is_empty() {
            return Ok(());
        }
        let devices = mounts.iter().map(|(device, _)| device.clone()).collect();
        self.append(SourceEvent::Freezing { devices })?;
        let plan = self.plan.id.clone();
        let stopped = tokio::task::spawn_blocking(move || Watchdog::stop_all(&plan)).await;
        stopped
            .map_err(io::Error::other)
            .flatten()
            .map_err(|error| MoveError::File {
                doing: "stop what would end the freeze too early".into(),
                error,
            })?;
        for (device, mount) in mounts {
            let watchdog =
                Watchdog::start(&self.plan.id, &mount).map_err(|error| failed(&device, error))?;
            self.done.watchdogs.push(watchdog);
            let freezing = tokio::task::spawn_blocking(move || fsfreeze("--freeze", &mount));
            let frozen = match tokio::time::timeout(FREEZE_MAX, freezing).await {
                Ok(frozen) => frozen.map_err(io::Error::other).flatten(),
                Err(_) => Err(io::Error::other(format!("not done after {FREEZE_MAX:?}"))),
            };
            frozen.map_err(|error| failed(&device, error))?;
        }
        Ok(())
    }

    /// Lets go what the journal says may be frozen. Nothing happens to what is not.
    pub(super) async fn thaw_file_systems(&mut self) {
        let devices = std::mem::take(&mut self.done.freezing);
        if devices.is_empty() {
            return;
        }
        let plan = self.plan.id.clone();
        let thawing = tokio::task::spawn_blocking(move || {
            let thawed = thaw(&devices)?;
            // A freeze that was begun and is not there yet is left to them.
            if thawed {
                Watchdog::stop_all(&plan)?;
            }
            Ok(thawed)
        });
        match thawing.await.map_err(io::Error::other).flatten() {
            Ok(false) => {}
            Ok(true) => {
                for mut watchdog in self.done.watchdogs.drain(..) {
                    // So that nothing is left of it.
                    let _ = watchdog.process.wait();
                }
            }
            // The watchdogs go on.
            Err(error) => self.active.trouble(&format!(
                "thawing file systems: {error}; they are let go within {FROZEN_MAX:?}"
            )),
        }
    }
}

/// Thaws what is mounted from devices; whether all of it was frozen.
fn thaw(devices: &[PathBuf]) -> io::Result<bool> {
    let mut all = true;
    for device in devices {
        let Some(mounted) = mounted_from(device)? else {
            all = false;
            continue;
        };
        match fsfreeze("--unfreeze", &File::open(&mounted.reached)?) {
            // FITHAW of what is not frozen: EINVAL.
            Err(error) if error.to_string().contains("Invalid argument") => all = false,
            other => other?,
        }
    }
    Ok(all)
}

fn failed(device: &Path, error: io::Error) -> MoveError {
    MoveError::File {
        doing: format!("freeze what is mounted from {}", device.display()),
        error,
    }
}
