//! Both ends of a transfer between two lab hosts: Lifeboat's data plane and its peers, each timed with the
//! processor time that the source paid.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::Host;
use crate::process::{output, wait_for};
use crate::workspace;

const SSH_PORT: &str = "2222";
const DATA_PORT: &str = "7000";
const RELAY_PORT: &str = "7001";
const NBD_PORT: &str = "10809";

/// The two hosts, and one that can be lent.
#[derive(Clone, Copy)]
pub(super) struct Pair<'l> {
    pub(super) from: &'l Host,
    pub(super) to: &'l Host,
    pub(super) over: &'l Host,
    /// Where the source reaches `to`.
    pub(super) target: Ipv4Addr,
}

/// What one run of Lifeboat took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ours {
    /// Until the source had the target's word that everything is on disk.
    pub(super) seconds: f64,
    /// Of the source's process.
    pub(super) cpu: f64,
    pub(super) read: f64,
    pub(super) wire: f64,
    /// Highest resident memory in MiB.
    pub(super) source_peak: f64,
    pub(super) target_peak: f64,
}

/// What one run of a peer took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Theirs {
    pub(super) copied: f64,
    pub(super) durable: f64,
    /// Of all processes on the source.
    pub(super) cpu: f64,
}

/// The target's process, ended when it is dropped.
pub(super) struct Receiver {
    child: Child,
}

impl Receiver {
    /// Its highest resident memory in MiB.
    fn peak(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        Ok(kib.context("the kernel tells no VmHWM")? / 1024.0)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A source that sends an epoch at its start and another for each line it is given.
pub(super) struct Sender {
    child: Child,
    input: Option<ChildStdin>,
    reports: BufReader<ChildStdout>,
    receiver: Receiver,
}

impl Sender {
    /// Waits for the epoch's report.
    pub(super) fn report(&mut self, since: Instant) -> Result<Ours> {
        let mut line = String::new();
        self.reports.read_line(&mut line)?;
        let seconds = since.elapsed().as_secs_f64();
        let report: Value = serde_json::from_str(&line).context("the source sent no report")?;
        let figure = |name: &str| {
            let value = &report[name];
            let seconds =
                |value: &Value| Some(value["secs"].as_f64()? + value["nanos"].as_f64()? / 1e9);
            let found = value.as_f64().or_else(|| seconds(value));
            found.with_context(|| format!("the report has no {name}"))
        };
        Ok(Ours {
            seconds,
            cpu: figure("source_cpu")?,
            read: figure("bytes_read")?,
            wire: figure("bytes_on_wire")?,
            source_peak: figure("peak_memory_kib")? / 1024.0,
            target_peak: self.receiver.peak()?,
        })
    }

    /// Sends what changed since.
    pub(super) fn next(&mut self) -> Result<Ours> {
        let start = Instant::now();
        let input = self.input.as_mut().context("the source is at its end")?;
        input.write_all(b"\n").context("the source is gone")?;
        self.report(start)
    }

    /// Lets it end.
    pub(super) fn end(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "the source failed: {status}");
        Ok(())
    }
}

/// Everything clean on disk and nothing of it in memory.
pub(super) fn cold() -> Result<()> {
    output(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")
}

/// Processor seconds of all processes that this one has waited for, and of theirs.
fn children_cpu() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // cutime and cstime of proc_pid_stat(5), in ticks of 10 ms.
    let ticks = after_name.split_whitespace().skip(13).take(2);
    Ok(ticks
        .filter_map(|ticks| ticks.parse::<f64>().ok())
        .sum::<f64>()
        / 100.0)
}

pub(super) fn program() -> Result<OsString> {
    let program = workspace::binary("examples/move_directory");
    ensure!(
        program.exists(),
        "{} is missing: `cargo build --release --examples`",
        program.display()
    );
    Ok(program.into())
}

fn move_directory(words: &[&str], size: u64) -> Result<Vec<OsString>> {
    let size = format!("MOVE_SIZE={size}");
    let mut argv: Vec<OsString> = vec![
        "env".into(),
        "MOVE_KEY=bench".into(),
        size.into(),
        program()?,
    ];
    argv.extend(words.iter().map(OsString::from));
    Ok(argv)
}

/// A block device over a file of a host, which reads and writes past the page cache as a disk does; detached when
/// dropped.
pub(super) struct Loop<'h> {
    host: &'h Host,
    pub(super) device: String,
}

impl<'h> Loop<'h> {
    pub(super) fn over(host: &'h Host, file: &str) -> Result<Self> {
        let device = host.run(["losetup", "--find", "--show", "--direct-io=on", file])?;
        Ok(Self { host, device })
    }
}

impl Drop for Loop<'_> {
    fn drop(&mut self) {
        // Fails only when it is detached already.
        let _ = self.host.run(["losetup", "--detach", &self.device]);
    }
}

impl Pair<'_> {
    /// An ssh server of its own in the receiving host, with keys that end with the lab.
    pub(super) fn start_ssh(&self) -> Result<()> {
        let key = |host: &Host, path: &str| {
            host.run(["mkdir", "-p", "/run/bench", "/run/sshd"])?;
            host.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path])
        };
        key(self.from, "/run/bench/id")?;
        key(self.to, "/run/bench/host")?;
        let public = fs::read(self.from.path("/run/bench/id.pub"))?;
        self.to.write("/run/bench/authorized", public)?;
        let config = format!(
            "Port {SSH_PORT}\nHostKey /run/bench/host\nAuthorizedKeysFile /run/bench/authorized\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n\
             Ciphers aes128-gcm@openssh.com\nPidFile none\n"
        );
        self.to.write("/run/bench/sshd_config", config)?;
        let argv = ["/usr/sbin/sshd", "-D", "-e", "-f", "/run/bench/sshd_config"];
        self.to.spawn_logged("sshd", argv)?;
        await_port(self.to, SSH_PORT, "sshd")
    }

    fn ssh() -> String {
        format!(
            "ssh -p {SSH_PORT} -i /run/bench/id -c aes128-gcm@openssh.com -o BatchMode=yes \
             -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        )
    }

    fn receive(&self, out: &str, map: &str, one: Option<&str>) -> Result<Receiver> {
        let address = format!("{}:{DATA_PORT}", self.target);
        let words = ["receive", &address, out, map].into_iter().chain(one);
        let argv = move_directory(&words.collect::<Vec<_>>(), 0)?;
        let child = self.to.spawn_logged("receiver", argv)?;
        let receiver = Receiver { child };
        await_port(self.to, DATA_PORT, "receiver")?;
        Ok(receiver)
    }

    fn send(&self, words: &[&str], size: u64, receiver: Receiver) -> Result<Sender> {
        let mut command = self.from.command(move_directory(words, size)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the source")?;
        let input = child.stdin.take();
        let reports = child.stdout.take().context("the source has no output")?;
        Ok(Sender {
            child,
            input,
            reports: BufReader::new(reports),
            receiver,
        })
    }

    /// Starts both sides of a transfer from `source` to `out`, whose block map is `map`, and waits for the
    /// first epoch.
    pub(super) fn begin(&self, source: &str, out: &str, map: &str) -> Result<(Sender, Ours)> {
        self.begin_sized(source, out, map, 0, None)
    }

    /// The same of what is known to have `size` bytes; with `one`, from a block device to the file `out`.
    pub(super) fn begin_sized(
        &self,
        source: &str,
        out: &str,
        map: &str,
        size: u64,
        one: Option<&str>,
    ) -> Result<(Sender, Ours)> {
        let receiver = self.receive(out, map, one)?;
        let address = format!("{}:{DATA_PORT}", self.target);
        let start = Instant::now();
        let mut sender = self.send(&["send", &address, source], size, receiver)?;
        let ours = sender.report(start)?;
        Ok((sender, ours))
    }

    /// One transfer from a cold source into the empty directory `out`.
    pub(super) fn lifeboat(&self, source: &str, out: &str) -> Result<Ours> {
        cold()?;
        let (sender, ours) = self.begin(source, out, &format!("{out}.map"))?;
        sender.end()?;
        Ok(ours)
    }

    /// The same with `encrypt` and `transfer` delegated over a trusted link.
    pub(super) fn delegated(&self, source: &str, out: &str) -> Result<Ours> {
        cold()?;
        let receiver = self.receive(out, &format!("{out}.map"), None)?;
        let way = "seal-forward";
        let target = format!("{}:{DATA_PORT}", self.target);
        let relay = format!("{}:{RELAY_PORT}", self.over.address());
        let argv = move_directory(&["relay", way, &relay, "/srv/spool", &target], 0)?;
        let child = self.over.spawn_logged("relay", argv)?;
        let _relay = Receiver { child };
        await_port(self.over, RELAY_PORT, "relay")?;
        let start = Instant::now();
        let mut sender = self.send(&["send", way, &target, source, &relay], 0, receiver)?;
        let ours = sender.report(start)?;
        sender.end()?;
        Ok(ours)
    }

    fn timed(&self, mut command: Command, out: &str) -> Result<Theirs> {
        let mut sync = self.to.command(["sync", "-f", out]);
        let (start, cpu) = (Instant::now(), children_cpu()?);
        output(&mut command)?;
        let copied = start.elapsed().as_secs_f64();
        let cpu = children_cpu()? - cpu;
        output(&mut sync)?;
        let durable = start.elapsed().as_secs_f64();
        Ok(Theirs {
            copied,
            durable,
            cpu,
        })
    }

    /// `rsync -aHAXS` over ssh with `how`.
    pub(super) fn rsync(&self, source: &str, out: &str, how: &[&str]) -> Result<Theirs> {
        self.to.run(["mkdir", "-p", out])?;
        cold()?;
        let (shell, from) = (Self::ssh(), format!("{source}/"));
        let to = format!("root@{}:{out}/", self.target);
        let mut argv = vec!["rsync", "-aHAXS", "-e", &shell];
        argv.extend(how);
        argv.extend([from.as_str(), to.as_str()]);
        self.timed(self.from.command(argv), out)
    }

    /// `tar | ssh tar`.
    pub(super) fn tar(&self, source: &str, out: &str) -> Result<Theirs> {
        self.to.run(["mkdir", "-p", out])?;
        cold()?;
        let (ssh, to) = (Self::ssh(), self.target);
        let line = format!("set -e; tar -c -C {source} . | {ssh} root@{to} tar -x -p -C {out}");
        self.timed(self.from.command(["sh", "-c", &line]), out)
    }

    /// `cp -a` on one machine: what reading the source and making its copy take without anything between them.
    pub(super) fn plain_copy(&self, source: &str, out: &str) -> Result<Theirs> {
        self.to.run(["mkdir", "-p", out])?;
        cold()?;
        let mut command = Command::new("cp");
        command
            .args(["-a", "-T"])
            .arg(self.from.path(source))
            .arg(self.to.path(out));
        self.timed(command, out)
    }

    /// `nbdcopy` of the file `source` from `qemu-nbd`, without encryption; the target fetches it.
    pub(super) fn nbdcopy(&self, source: &str, out: &str) -> Result<Theirs> {
        self.to.run(["mkdir", "-p", out])?;
        let address = self.from.address().to_string();
        let argv = [
            "qemu-nbd",
            "--read-only",
            "--format=raw",
            "--cache=none",
            "--aio=io_uring",
            "--shared=8",
            "--persistent",
            "--bind",
            &address,
            "--port",
            NBD_PORT,
            source,
        ];
        let server = self.from.spawn_logged("qemu-nbd", argv)?;
        let server = Receiver { child: server };
        await_port(self.from, NBD_PORT, "qemu-nbd")?;
        cold()?;
        let (uri, file) = (format!("nbd://{address}:{NBD_PORT}"), format!("{out}/copy"));
        let took = self.timed(self.to.command(["nbdcopy", &uri, &file]), out);
        drop(server);
        took
    }

    /// Both trees hold the same.
    pub(super) fn same(&self, source: &str, out: &str) -> Result<()> {
        let mut diff = Command::new("diff");
        diff.args(["--recursive", "--brief", "--no-dereference"]);
        diff.arg(self.from.path(source)).arg(self.to.path(out));
        output(&mut diff).map(drop).context("the copy differs")
    }
}

fn await_port(host: &Host, port: &str, log: &str) -> Result<()> {
    wait_for("a port", Duration::from_secs(10), || {
        let filter = format!(":{port}");
        let listening = host.run(["ss", "-Hltn", "sport", "=", &filter])?;
        Ok((!listening.is_empty()).then_some(()))
    })
    .with_context(|| fs::read_to_string(host.log(log)).unwrap_or_default())
}
