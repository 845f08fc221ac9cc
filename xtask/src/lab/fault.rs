//! Faults of a lab host: real load and real loss, bounded in time, in size and by the lab's end.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Lab;
use super::host::Host;

/// What goes wrong with a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// This many busy loops compete for the host's CPUs.
    Cpu {
        /// Number of busy loops.
        workers: u16,
    },
    /// This many direct readers and writers storm the host's disk, over one file of 1 GiB each.
    Disk {
        /// Number of jobs, each with 32 requests in flight.
        jobs: u16,
    },
    /// A process holds this much memory.
    Memory {
        /// Size in MiB.
        mib: u32,
    },
    /// The host's link becomes slow and lossy.
    Net {
        /// Cap of each direction in Mbit/s.
        mbit: u32,
        /// Share of lost packets in percent.
        loss_percent: u8,
    },
    /// The host's cable is pulled.
    LinkDown,
}

impl Fault {
    /// Name of the cgroup, below the host's, that holds the fault's processes.
    #[must_use]
    pub fn cgroup_name(self) -> &'static str {
        match self {
            Self::Cpu { .. } => "fault-cpu",
            Self::Disk { .. } => "fault-disk",
            Self::Memory { .. } => "fault-memory",
            Self::Net { .. } => "fault-net",
            Self::LinkDown => "fault-link-down",
        }
    }
}

/// Where the disk fault keeps its files: the host's real disk.
const STORM_DIR: &str = "/srv/.fault-disk";

impl Lab {
    /// Starts a fault that ends by itself after `time`, with [`Lab::clear_fault`] or with the lab.
    ///
    /// # Errors
    /// A tool is missing or refused.
    pub fn fault(&self, host: &Host, fault: Fault, time: Duration) -> Result<()> {
        let seconds = time.as_secs().max(1).to_string();
        let timed = |script: &str, argument: String| {
            host.spawn_logged(
                fault.cgroup_name(),
                ["timeout", &seconds, "sh", "-c", script, &argument],
            )
        };
        // The child is not waited for: its end is seen by its cgroup, and Rust's handle is not needed.
        let child = match fault {
            Fault::Cpu { workers } => timed(
                r#"i=0; while [ $i -lt "$0" ]; do i=$((i + 1)); (while :; do :; done) & done; wait"#,
                workers.to_string(),
            ),
            Fault::Memory { mib } => timed(
                // `tail -c` keeps what it was told to keep until its input ends.
                r#"(head -c "$0" /dev/zero; sleep infinity) | tail -c "$0" >/dev/null"#,
                format!("{mib}M"),
            ),
            Fault::Disk { jobs } => host.spawn_logged(
                fault.cgroup_name(),
                [
                    "sh",
                    "-c",
                    r#"mkdir -p "$0"; fio --directory="$0" "$@"; rm -rf "$0""#,
                    STORM_DIR,
                    "--name=storm",
                    "--rw=randrw",
                    "--bs=256k",
                    "--size=1g",
                    "--direct=1",
                    "--ioengine=io_uring",
                    "--iodepth=32",
                    "--time_based",
                    &format!("--numjobs={jobs}"),
                    &format!("--runtime={seconds}"),
                ],
            ),
            Fault::Net { mbit, loss_percent } => {
                self.shape(host, Some(mbit))?;
                self.loss(host, loss_percent)?;
                self.undo_after(host, fault, &seconds)
            }
            Fault::LinkDown => {
                self.link(host, false)?;
                self.undo_after(host, fault, &seconds)
            }
        };
        child.map(drop)
    }

    /// Ends a fault before its time.
    ///
    /// # Errors
    /// Its processes or its network rules could not be removed.
    pub fn clear_fault(&self, host: &Host, fault: Fault) -> Result<()> {
        let cgroup = super::cgroup::Cgroup::at(host.cgroup().join(fault.cgroup_name()));
        cgroup.kill_and_remove()?;
        match fault {
            Fault::Net { .. } => {
                self.shape(host, None)?;
                self.loss(host, 0)
            }
            Fault::LinkDown => self.link(host, true),
            Fault::Disk { .. } => host.run(["rm", "-rf", STORM_DIR]).map(drop),
            Fault::Cpu { .. } | Fault::Memory { .. } => Ok(()),
        }
    }

    /// A network fault is a state of the fabric: this program, waiting in the lab's cgroup, takes it back.
    fn undo_after(&self, host: &Host, fault: Fault, seconds: &str) -> Result<Child> {
        let task = std::env::current_exe().context("cannot find this program's own file")?;
        let task = if task.file_name().is_some_and(|name| name == "xtask") {
            task
        } else {
            crate::workspace::binary("xtask")
        };
        anyhow::ensure!(
            Path::new(&task).exists(),
            "{} is not built: `cargo build -p xtask`",
            task.display()
        );
        let cgroup = super::cgroup::Cgroup::at(host.cgroup().join("init"));
        Command::new("setsid")
            .args([
                "sh",
                "-c",
                r#"echo $$ >"$0/cgroup.procs"; sleep "$1"; shift; exec "$@""#,
            ])
            .arg(cgroup.path())
            .arg(seconds)
            .arg(task)
            .args(["lab", "--lab", self.name(), "clear-fault", host.name()])
            .arg(fault.cgroup_name().trim_start_matches("fault-"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start `setsid` (package util-linux)")
    }
}
