//! Files of procfs and devices that say by poll(2) that what they tell has changed.
//!
//! Invariants: asking never waits; a file that cannot be opened announces nothing, and is tried again.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

/// One such file, kept open between two looks.
pub struct Announced {
    name: &'static str,
    /// How it says so.
    by: PollFlags,
    file: Option<File>,
}

impl Announced {
    /// Mounted, unmounted, or mounted anew with other options (Linux, fs/proc_namespace.c, `mounts_poll`). Not that a
    /// file system gave up writing: the kernel's log tells that.
    pub const fn mounts() -> Self {
        Self::of("proc/self/mountinfo", PollFlags::POLLPRI)
    }

    /// An md array lost a member, got one, or began or ended to copy (Linux, drivers/md/md.c, `mdstat_poll`).
    pub const fn arrays() -> Self {
        Self::of("proc/mdstat", PollFlags::POLLPRI)
    }

    /// An event of a mapped device, as a failed member of a RAID volume or a failed path (Linux,
    /// drivers/md/dm-ioctl.c, `dm_poll`).
    pub const fn mapped() -> Self {
        Self::of("dev/mapper/control", PollFlags::POLLIN)
    }

    const fn of(name: &'static str, by: PollFlags) -> Self {
        let file = None;
        Self { name, by, file }
    }

    /// Whether something may have changed since this was last asked. Ask before reading: what changes meanwhile is then
    /// announced the next time.
    pub fn changed(&mut self, root: &Path) -> bool {
        if let Some(file) = &self.file {
            let mut asked = [PollFd::new(file.as_fd(), self.by)];
            let told = poll(&mut asked, PollTimeout::ZERO).unwrap_or(0) > 0;
            let told = told
                && asked[0]
                    .revents()
                    .is_some_and(|said| said.intersects(self.by));
            if !told {
                return false;
            }
        }
        // Opened anew, it announces what comes after: of those that go on announcing until they are read too.
        self.file = File::open(root.join(self.name)).ok();
        self.file.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn what_is_not_there_announces_nothing_and_what_comes_is_a_change() {
        let root = tempfile::tempdir().expect("a directory");
        let mut arrays = Announced::arrays();
        assert!(!arrays.changed(root.path()));
        std::fs::create_dir(root.path().join("proc")).expect("made");
        std::fs::write(root.path().join("proc/mdstat"), "Personalities :\n").expect("written");
        assert!(arrays.changed(root.path()));
        assert!(!arrays.changed(root.path()));
    }

    #[test]
    fn a_mount_and_another_way_of_mounting_are_each_announced_once() {
        // Namespaces are of a thread, whose mounts are in `thread-self`.
        let seen = std::thread::spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS) {
                println!("not run: no mount namespace can be made here: {error}");
                return None;
            }
            let none = None::<&str>;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(none, "/", none, private, none).expect("private");
            let directory = tempfile::tempdir().expect("a directory");
            let at = directory.path();
            let mut mounts = Announced::of("proc/thread-self/mountinfo", PollFlags::POLLPRI);
            let mut changed = || mounts.changed(Path::new("/"));
            let mut seen = vec![changed(), changed()];
            mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), none).expect("mounted");
            seen.extend([changed(), changed()]);
            let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(none, at, none, read_only, none).expect("mounted anew");
            seen.extend([changed(), changed()]);
            umount2(at, MntFlags::empty()).expect("unmounted");
            seen.push(changed());
            Some(seen)
        });
        if let Some(seen) = seen.join().expect("no panic") {
            assert_eq!(seen, [true, false, true, false, true, false, true]);
        }
    }
}
