//! A served volume as a mounted directory tree, by FUSE.
//!
//! Every call goes to the same name in the store's tree; reads and writes of files that lack pages go through
//! the store, those of whole files past this process where the kernel can (passthrough, Linux 6.9). Permissions
//! and ACLs are checked by the kernel. Invariants: no path leaves the tree; a call that waits for the source
//! holds up no other; unmounting ends what still waits. Non-goals: file locks between hosts.

mod calls;
mod convert;
mod handles;
mod nodes;
mod tree;

use super::FrontEnd;
use super::store::Store;
use fuser::{BackgroundSession, Config, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::stat;
use nix::sys::statvfs::statvfs;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Threads that take the kernel's calls.
const THREADS: usize = 4;

/// A served tree cannot be mounted.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot mount at {directory}: {error}; name an empty directory, and see that the kernel has FUSE (`modprobe fuse`)"
)]
pub struct MountError {
    directory: PathBuf,
    error: io::Error,
}

/// A mounted tree; dropped, it is unmounted, also from under those who use it.
pub struct Mount {
    directory: PathBuf,
    /// The mounted file system, so that no other one is unmounted.
    device: u64,
    session: Option<BackgroundSession>,
}

impl Mount {
    /// Whether something can be mounted at `directory`; a dead mount that a killed agent left there is removed.
    ///
    /// # Errors
    /// It is no empty directory.
    pub fn check(directory: &Path) -> Result<(), MountError> {
        let failed = |error: io::Error| MountError {
            directory: directory.to_owned(),
            error,
        };
        clear_dead(directory).map_err(failed)?;
        let mut names = std::fs::read_dir(directory).map_err(failed)?;
        match names.next() {
            None => Ok(()),
            Some(_) => Err(failed(Errno::ENOTEMPTY.into())),
        }
    }

    /// Mounts the tree of `store` at `directory`, which is [`Mount::check`]ed first.
    ///
    /// # Errors
    /// The directory cannot be used, or the kernel has no FUSE.
    pub fn at(directory: &Path, store: Arc<Store>, read_only: bool) -> Result<Self, MountError> {
        let failed = |error: io::Error| MountError {
            directory: directory.to_owned(),
            error,
        };
        Self::check(directory)?;
        let connection = attach(directory, read_only).map_err(failed)?;
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(THREADS);
        let tree = tree::Tree::new(store, read_only);
        let calls = calls::Calls::new(tree);
        let session = Session::from_fd(calls, connection, SessionACL::All, config);
        let started = session.and_then(Session::spawn).and_then(|session| {
            let device = stat(directory)?.st_dev;
            Ok((session, device))
        });
        match started {
            Ok((session, device)) => Ok(Self {
                directory: directory.to_owned(),
                device,
                session: Some(session),
            }),
            Err(error) => {
                // The first error says more.
                let _ = umount2(directory, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
                Err(failed(error))
            }
        }
    }

    /// Takes the mount away from its directory; whoever uses it, as a container with a mount of its own, is served on
    /// until the last of them ends.
    ///
    /// # Errors
    /// The system's.
    pub fn let_go(mut self) -> io::Result<()> {
        umount2(&self.directory, MntFlags::MNT_DETACH)?;
        // Its threads end when the last user does.
        drop(self.session.take());
        Ok(())
    }

    /// Whether the mount is gone.
    fn unmount(&self) -> bool {
        match stat(&self.directory) {
            Ok(found) if found.st_dev == self.device => {}
            // Unmounted by hand.
            _ => return true,
        }
        let unmounted = umount2(&self.directory, MntFlags::empty()).or_else(|error| {
            if error == Errno::EBUSY {
                tracing::warn!(directory = %self.directory.display(), "in use; it is unmounted from under its users");
                // What was written through a mapping is still in the page cache.
                if let Err(error) = File::open(&self.directory)
                    .and_then(|root| Ok(nix::unistd::syncfs(&root)?))
                {
                    tracing::error!(directory = %self.directory.display(), "cannot write back: {error}");
                }
            }
            umount2(&self.directory, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH)
        });
        if let Err(error) = unmounted {
            tracing::error!(directory = %self.directory.display(), "cannot unmount: {error}; unmount it by hand");
        }
        unmounted.is_ok()
    }
}

/// Unmounts what a killed agent left mounted: it answers nobody.
fn clear_dead(directory: &Path) -> io::Result<()> {
    // Not `stat`: what the kernel remembers of the directory would answer that.
    if statvfs(directory).is_err_and(|error| error == Errno::ENOTCONN) {
        tracing::info!(directory = %directory.display(), "removes the dead mount of an earlier agent");
        umount2(directory, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// Mounts a connection to this process at `directory`.
fn attach(directory: &Path, read_only: bool) -> io::Result<OwnedFd> {
    let connection = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let mode = stat(directory)?.st_mode;
    let text = format!(
        "fd={},rootmode={mode:o},user_id=0,group_id=0,default_permissions,allow_other",
        connection.as_raw_fd()
    );
    // Anybody may have put a set-user-id program there, and nobody need run one.
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_RDONLY, read_only);
    mount(
        Some("lifeboat"),
        directory,
        Some("fuse.lifeboat"),
        flags,
        Some(text.as_str()),
    )?;
    Ok(connection.into())
}

impl FrontEnd for Mount {
    fn at(&self) -> String {
        self.directory.display().to_string()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.session.is_none() {
            return;
        }
        // Its threads end with the mount.
        if self.unmount()
            && let Some(session) = self.session.take()
            && let Err(error) = session.join()
        {
            tracing::warn!(directory = %self.directory.display(), "the mount ended badly: {error}");
        }
    }
}
