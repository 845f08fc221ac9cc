//! Moving a directory between two lab hosts: our data plane against `rsync -aHAXS -W` over ssh with
//! aes128-gcm, on one large random file and on a tree of small files.
//!
//! Both read a source that is in the page cache and write to the same disk; ours is done when the
//! target has verified every block and made everything durable, rsync when it has written. The targets
//! of a run are kept until its end: ext4 avoids inodes deleted in the last minutes, at a price that
//! would fall on whoever comes next.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::lab::{Host, HostSpec, Lab, LabSpec};
use crate::process::{output, run as run_command, wait_for};
use crate::workspace;

/// Port of ssh on the target host.
const SSH_PORT: u16 = 2222;
/// Port of our receiver on the target host.
const DATA_PORT: u16 = 7000;

/// Measures transfers.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Measurements of each kind; the fastest of each is compared
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Size of the large file in MiB
    #[arg(long, default_value_t = 2048)]
    large_mib: u64,
    /// Number of 4 KiB files
    #[arg(long, default_value_t = 50_000)]
    small_files: u32,
    /// Take the development build, which is there already but slower
    #[arg(long)]
    debug: bool,
}

/// Fastest time of each contender on one workload.
#[derive(Clone, Copy)]
struct Fastest {
    rsync: Duration,
    /// rsync and the write-back that makes its result durable.
    rsync_durable: Duration,
    io_uring: Duration,
    threads: Duration,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let mover = build(arguments.debug)?;
    let hosts = ["from", "to"].map(|name| HostSpec {
        containers: false,
        ..HostSpec::from(name)
    });
    let lab = Lab::up(&LabSpec {
        name: format!("bench-{}", std::process::id()),
        hosts: hosts.into(),
    })?;
    let (from, to) = (lab.host("from")?, lab.host("to")?);
    fill(from, arguments)?;
    let ssh = start_ssh(from, to)?;
    let mut lines = Vec::new();
    for (name, what) in [
        ("large", format!("one file of {} MiB", arguments.large_mib)),
        ("small", format!("{} files of 4 KiB", arguments.small_files)),
    ] {
        let mut best: Option<Fastest> = None;
        for round in 0..arguments.rounds.max(1) {
            let times = measure(from, to, &ssh, &mover, name, round)?;
            best = Some(best.map_or(times, |best| best.and(times)));
        }
        if let Some(best) = best {
            println!("{what}: {best}");
            lines.push((what, best));
        }
    }
    lab.down()?;
    println!(
        "\n| workload | rsync over ssh | and made durable | ours, io_uring | ours, threads | ratio |"
    );
    println!("|---|---|---|---|---|---|");
    for (what, best) in &lines {
        println!("{}", best.row(what));
    }
    for (what, best) in &lines {
        ensure!(
            best.io_uring < best.rsync,
            "{what}: slower than rsync over ssh; the goal is to be faster"
        );
    }
    Ok(())
}

impl Fastest {
    fn and(self, other: Self) -> Self {
        Self {
            rsync: self.rsync.min(other.rsync),
            rsync_durable: self.rsync_durable.min(other.rsync_durable),
            io_uring: self.io_uring.min(other.io_uring),
            threads: self.threads.min(other.threads),
        }
    }

    fn ratio(&self) -> f64 {
        self.rsync.as_secs_f64() / self.io_uring.as_secs_f64()
    }

    fn row(&self, what: &str) -> String {
        format!(
            "| {what} | {:.2} s | {:.2} s | {:.2} s | {:.2} s | {:.1}x |",
            self.rsync.as_secs_f64(),
            self.rsync_durable.as_secs_f64(),
            self.io_uring.as_secs_f64(),
            self.threads.as_secs_f64(),
            self.ratio(),
        )
    }
}

impl std::fmt::Display for Fastest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} times as fast as rsync over ssh", self.ratio())
    }
}

/// Builds the program that moves a directory and returns its path.
fn build(debug: bool) -> Result<String> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace::root());
    cargo.args([
        "build",
        "--package",
        "lifeboat",
        "--example",
        "move_directory",
    ]);
    if !debug {
        cargo.arg("--release");
    }
    run_command(&mut cargo)?;
    let profile = if debug { "debug" } else { "release" };
    let path = workspace::target()
        .join(profile)
        .join("examples/move_directory");
    Ok(path.display().to_string())
}

/// Makes the workloads in `/srv` of the source host, which is on the machine's disk.
fn fill(host: &Host, arguments: &Arguments) -> Result<()> {
    let srv = host.path("/srv");
    let mut random = File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    let large = srv.join("large");
    make_dir(&large)?;
    let mut file = File::create(large.join("file")).context("cannot make the large file")?;
    io::copy(
        &mut Read::by_ref(&mut random).take(arguments.large_mib << 20),
        &mut file,
    )
    .context("cannot fill the large file; is the disk full?")?;
    let small = srv.join("small");
    let mut content = [0; 4096];
    for number in 0..arguments.small_files {
        let dir = small.join(format!("d{}", number / 100));
        if number % 100 == 0 {
            make_dir(&dir)?;
        }
        random
            .read_exact(&mut content)
            .and_then(|()| File::create(dir.join(format!("f{number}"))))
            .and_then(|mut file| file.write_all(&content))
            .context("cannot make the small files; is the disk full?")?;
    }
    Ok(())
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))
}

/// Starts sshd on the target host and returns the ssh command that reaches it.
fn start_ssh(from: &Host, to: &Host) -> Result<String> {
    for (host, name) in [(to, "host"), (from, "user")] {
        host.run(["mkdir", "-p", "/srv/ssh", "/run/sshd"])?;
        let path = format!("/srv/ssh/{name}");
        host.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &path])?;
    }
    let public = fs::read(from.path("/srv/ssh/user.pub")).context("cannot read the ssh key")?;
    to.write("/srv/ssh/authorized", public)?;
    to.write(
        "/srv/ssh/config",
        format!(
            "Port {SSH_PORT}\nHostKey /srv/ssh/host\nAuthorizedKeysFile /srv/ssh/authorized\n\
             StrictModes no\nPermitRootLogin yes\nUsePAM no\nPidFile none\n"
        ),
    )?;
    to.spawn_logged(
        "sshd",
        ["/usr/sbin/sshd", "-D", "-e", "-f", "/srv/ssh/config"],
    )?;
    let ssh = format!(
        "ssh -p {SSH_PORT} -i /srv/ssh/user -c aes128-gcm@openssh.com -o StrictHostKeyChecking=no \
         -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    );
    let address = format!("root@{}", to.address());
    let mut words: Vec<&str> = ssh.split(' ').collect();
    words.extend([address.as_str(), "true"]);
    wait_for("ssh to the target host", Duration::from_secs(10), || {
        Ok(from.run(&words).ok())
    })?;
    Ok(ssh)
}

fn measure(
    from: &Host,
    to: &Host,
    ssh: &str,
    mover: &str,
    name: &str,
    round: u32,
) -> Result<Fastest> {
    let source = format!("/srv/{name}");
    let place = |who: &str| format!("/srv/{name}-{who}-{round}");
    let into = place("rsync");
    settle(from)?;
    let started = Instant::now();
    let there = format!("root@{}:{into}/", to.address());
    let here = format!("{source}/");
    from.run(["rsync", "-aHAXS", "-W", "-e", ssh, &here, &there])?;
    let rsync = started.elapsed();
    to.run(["sync", "-f", &into])?;
    let rsync_durable = started.elapsed();
    let ours = |engine: &str| move_directory(from, to, mover, &source, &place(engine), engine);
    Ok(Fastest {
        rsync,
        rsync_durable,
        io_uring: ours("io-uring")?,
        threads: ours("threads")?,
    })
}

/// Times one transfer by our data plane.
fn move_directory(
    from: &Host,
    to: &Host,
    mover: &str,
    source: &str,
    into: &str,
    engine: &str,
) -> Result<Duration> {
    let addr = SocketAddr::from((to.address(), DATA_PORT)).to_string();
    let key = "MOVE_KEY=bench";
    let engine_there = format!("MOVE_ENGINE={engine}");
    let mut receiver = to.spawn_logged(
        "receiver",
        ["env", key, &engine_there, mover, "receive", &addr, into],
    )?;
    let result = (|| {
        let port = format!("/dev/tcp/{}/{DATA_PORT}", to.address());
        let probe = format!("exec 3<>{port}");
        wait_for(
            "the receiver on the target host",
            Duration::from_secs(10),
            || Ok(from.run(["bash", "-c", &probe]).ok()),
        )?;
        settle(from)?;
        let started = Instant::now();
        let mut sender = from.command(["env", key, mover, "send", &addr, source, engine]);
        output(&mut sender)?;
        Ok(started.elapsed())
    })();
    // It serves until it is ended; that it has ended already would show as the sender's failure.
    let _ = receiver.kill();
    let _ = receiver.wait();
    result
}

/// Everything written so far is on the disk: no one measures another's write-back.
fn settle(host: &Host) -> Result<()> {
    host.run(["sync"]).map(drop)
}
