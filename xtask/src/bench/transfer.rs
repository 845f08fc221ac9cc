//! One large file of random bytes and many small files, sealed, between two lab hosts: Lifeboat's data
//! plane against `rsync -aHAXS -W` over ssh with aes128-gcm.
//!
//! Both start with a cold cache and an empty destination, and take turns. Lifeboat's acknowledgement comes
//! after the receiver's `syncfs`; rsync leaves its data in the page cache, so a `sync -f` of its destination
//! is measured beside it. Destinations are kept until the end: ext4 avoids inodes deleted in the last
//! minutes, at a price that would fall on whoever comes next.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{goal, machine, median};
use crate::lab::{Host, Lab, LabSpec};
use crate::process::{output, wait_for};
use crate::workspace;

/// Bytes of the large file, and files of 4 KiB in the tree.
const LARGE: u64 = 2 << 30;
const FILES: usize = 50_000;
const FILE: usize = 4096;
/// In one directory.
const TOGETHER: usize = 100;
const RUNS: usize = 3;

const SSH_PORT: &str = "2222";
const DATA_PORT: &str = "7000";

/// Seconds of one run.
#[derive(Debug, Clone, Copy)]
struct Rsync {
    copied: f64,
    durable: f64,
}

pub(super) fn measure(short: bool) -> Result<String> {
    let (large, files, runs) = if short {
        (LARGE / 10, FILES / 10, 1)
    } else {
        (LARGE, FILES, RUNS)
    };
    let lab = Lab::up(&LabSpec {
        name: format!("transfer-{}", std::process::id()),
        hosts: vec![machine::bare("from"), machine::bare("to")],
    })?;
    let pair = Pair {
        from: lab.host("from")?,
        to: lab.host("to")?,
    };
    pair.start_ssh()?;
    let mut text = format!(
        "## Transfer\n\nSealed, between two lab hosts, cold cache and empty destination in every run; median of {runs}. \
         Lifeboat counts until the receiver has acknowledged that everything is on disk.\n\n\
         | data | Lifeboat, on disk | rsync, on disk | rsync, in the page cache | rsync ÷ Lifeboat, on disk | rsync in the page cache ÷ Lifeboat on disk | goal |\n\
         |---|---|---|---|---|---|---|\n"
    );
    let file = pair.from.path("/srv/file");
    fs::create_dir(&file)?;
    write_large(&file.join("random"), large)?;
    let tree = pair.from.path("/srv/tree");
    write_tree(&tree, files)?;
    let subjects = [
        (format!("one file of {} MiB", large >> 20), "/srv/file"),
        (format!("{files} files of 4 KiB"), "/srv/tree"),
    ];
    for (what, source) in subjects {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for run in 0..runs {
            // They take turns in being first.
            for turn in 0..2 {
                if (run + turn) % 2 == 0 {
                    ours.push(pair.lifeboat(source, run)?);
                } else {
                    theirs.push(pair.rsync(source, run)?);
                }
            }
        }
        eprintln!("bench: {what}: lifeboat {ours:.2?}, rsync {theirs:.2?}");
        let ours = median(&ours);
        let copied = median(&theirs.iter().map(|run| run.copied).collect::<Vec<_>>());
        let durable = median(&theirs.iter().map(|run| run.durable).collect::<Vec<_>>());
        text.push_str(&format!(
            "| {what} | {ours:.2} s | {durable:.2} s | {copied:.2} s | {:.2} | {:.2} | {} |\n",
            durable / ours,
            copied / ours,
            goal("faster than rsync", durable > ours)
        ));
    }
    lab.down()?;
    Ok(text)
}

fn random() -> Result<fs::File> {
    fs::File::open("/dev/urandom").context("cannot open /dev/urandom")
}

fn write_large(path: &Path, bytes: u64) -> Result<()> {
    let mut file = fs::File::create(path)?;
    std::io::copy(&mut random()?.take(bytes), &mut file)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

fn write_tree(root: &Path, files: usize) -> Result<()> {
    let mut random = random()?;
    let mut bytes = vec![0; FILE * TOGETHER];
    for first in (0..files).step_by(TOGETHER) {
        let dir = root.join(format!("{:03}", first / TOGETHER));
        fs::create_dir_all(&dir)?;
        random.read_exact(&mut bytes)?;
        for (number, content) in bytes.chunks(FILE).enumerate().take(files - first) {
            fs::File::create(dir.join(format!("{number:02}")))?.write_all(content)?;
        }
    }
    Ok(())
}

/// Everything clean on disk and nothing of it in memory.
fn cold() -> Result<()> {
    output(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")
}

struct Pair<'l> {
    from: &'l Host,
    to: &'l Host,
}

impl Pair<'_> {
    /// An ssh server of its own in the receiving host, with keys that end with the lab.
    fn start_ssh(&self) -> Result<()> {
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
        self.await_port(SSH_PORT, "sshd")
    }

    fn await_port(&self, port: &str, log: &str) -> Result<()> {
        wait_for("the receiver's port", Duration::from_secs(10), || {
            let filter = format!(":{port}");
            let listening = self.to.run(["ss", "-Hltn", "sport", "=", &filter])?;
            Ok((!listening.is_empty()).then_some(()))
        })
        .with_context(|| fs::read_to_string(self.to.log(log)).unwrap_or_default())
    }

    fn empty_destination(&self, source: &str, who: &str, run: usize) -> Result<String> {
        let out = format!("{source}-{who}-{run}");
        self.to.run(["mkdir", &out])?;
        cold()?;
        Ok(out)
    }

    fn same(&self, source: &str, out: &str) -> Result<()> {
        let mut diff = Command::new("diff");
        diff.arg("--recursive").arg("--brief");
        diff.arg(self.from.path(source)).arg(self.to.path(out));
        output(&mut diff).map(drop).context("the copy differs")
    }

    fn lifeboat(&self, source: &str, run: usize) -> Result<f64> {
        let program = workspace::binary("examples/move_directory");
        ensure!(
            program.exists(),
            "{} is missing: `cargo build --release --examples`",
            program.display()
        );
        let out = self.empty_destination(source, "lifeboat", run)?;
        let address = format!("{}:{DATA_PORT}", self.to.address());
        let words = |role: &str, directory: &str| {
            let mut argv: Vec<std::ffi::OsString> = vec!["env".into(), "MOVE_KEY=bench".into()];
            argv.extend([program.clone().into(), role.into(), address.clone().into()]);
            argv.push(directory.into());
            argv
        };
        let mut receiver = self.to.spawn_logged("receiver", words("receive", &out))?;
        self.await_port(DATA_PORT, "receiver")?;
        let mut sender = self.from.command(words("send", source));
        let start = Instant::now();
        let sent = output(&mut sender);
        let took = start.elapsed().as_secs_f64();
        receiver.kill().context("cannot end the receiver")?;
        receiver.wait().context("the receiver was lost")?;
        sent.with_context(|| fs::read_to_string(self.to.log("receiver")).unwrap_or_default())?;
        if run == 0 {
            self.same(source, &out)?;
        }
        Ok(took)
    }

    fn rsync(&self, source: &str, run: usize) -> Result<Rsync> {
        let out = self.empty_destination(source, "rsync", run)?;
        let shell = format!(
            "ssh -p {SSH_PORT} -i /run/bench/id -c aes128-gcm@openssh.com -o BatchMode=yes \
             -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        );
        let to = format!("root@{}:{}/", self.to.address(), out);
        let source_contents = format!("{source}/");
        let argv = ["rsync", "-aHAXS", "-W", "-e", &shell, &source_contents, &to];
        let mut rsync = self.from.command(argv);
        let mut sync = self.to.command(["sync", "-f", &out]);
        let start = Instant::now();
        output(&mut rsync)?;
        let copied = start.elapsed().as_secs_f64();
        output(&mut sync)?;
        let durable = start.elapsed().as_secs_f64();
        if run == 0 {
            self.same(source, &out)?;
        }
        Ok(Rsync { copied, durable })
    }
}
