//! A target that takes nothing for a while: the source holds what may be in flight and no more, then goes on.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use xtask::workspace;

/// More than may be in flight and what socket buffers hold.
const BYTES: u64 = 320 << 20;
/// What may be in flight by default.
const CAP_KIB: u64 = 128 << 10;
/// The program itself, its stacks and what it keeps of the tree.
const PROGRAM_KIB: u64 = 24 << 10;
/// Below the patience of a source with a silent target (8 s).
const STOPPED: Duration = Duration::from_secs(4);

/// A process that ends with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ended {
    fn start(arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(workspace::binary("examples/move_directory"));
        command.args(arguments).env("MOVE_KEY", "in flight");
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Self(command.spawn().context("cannot start an end")?))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.0.id().try_into()?), signal)?)
    }

    /// Memory of its own, in KiB.
    fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(kib.context("the kernel tells no RssAnon")?.parse()?)
    }
}

#[test]
fn a_target_that_takes_nothing_makes_the_source_hold_no_more_than_the_cap() -> Result<()> {
    let dir = empty_directory()?;
    let (from, into, map) = (dir.join("from"), dir.join("into"), dir.join("map"));
    fs::create_dir_all(&from)?;
    let mut content = fs::File::create(from.join("large"))?;
    std::io::copy(
        &mut fs::File::open("/dev/urandom")?.take(BYTES),
        &mut content,
    )?;

    let text = |path: &Path| path.display().to_string();
    let mut target = Ended::start(&["receive", "127.0.0.1:0", &text(&into), &text(&map)])?;
    let output = target.0.stdout.take().context("the target says nothing")?;
    let mut lines = BufReader::new(output).lines();
    let address = lines.next().context("the target has no address")??;
    let mut source = Ended::start(&["send", &address, &text(&from)])?;
    // It has begun once something of it is there.
    while !into.join("large").exists() {
        std::thread::sleep(Duration::from_millis(1));
        ensure!(source.0.try_wait()?.is_none(), "the source ended early");
    }
    target.signal(Signal::SIGSTOP)?;
    let (stopped, mut most) = (Instant::now(), 0);
    while stopped.elapsed() < STOPPED {
        most = most.max(source.memory()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    target.signal(Signal::SIGCONT)?;
    // The target's progress must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    ensure!(source.0.wait()?.success(), "the source failed");
    ensure!(
        most <= CAP_KIB + PROGRAM_KIB,
        "{most} KiB while nothing was taken"
    );
    ensure!(
        most > CAP_KIB / 2,
        "only {most} KiB: the window was never full"
    );
    let same = Command::new("cmp")
        .args([from.join("large"), into.join("large")])
        .status()?;
    ensure!(same.success(), "the copy differs");
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// A directory on the disk under test, empty.
fn empty_directory() -> Result<std::path::PathBuf> {
    let dir = workspace::root().join("target/tmp/in-flight");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}
