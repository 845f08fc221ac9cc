//! A target or a disk that takes nothing for a while: source, paired device and target hold what may be in flight and
//! no more, then go on.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use xtask::process::{is_root, output};
use xtask::workspace;

/// More than may be in flight and what socket buffers hold.
const BYTES: u64 = 320 << 20;
/// What may be in flight by default.
const CAP_KIB: u64 = 128 << 10;
/// The program itself, its stacks and what it keeps of the tree.
const PROGRAM_KIB: u64 = 24 << 10;
const LOOPBACK: &str = "127.0.0.1:0";
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

    /// Where it listens, which it says first.
    fn address(&mut self) -> Result<String> {
        let said = self.0.stdout.take().context("an end says nothing")?;
        let mut lines = BufReader::new(said).lines();
        let address = lines.next().context("an end has no address")??;
        // Its progress must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(address)
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

/// What one end has, and what it has to say.
struct Ends {
    dir: PathBuf,
    from: PathBuf,
    target: Ended,
    address: String,
}

impl Ends {
    /// A large file to be sent, and a target that takes it into a directory.
    fn new(name: &str, into: &Path) -> Result<Self> {
        let dir = empty_directory(name)?;
        let (from, map) = (dir.join("from"), dir.join("map"));
        fs::create_dir_all(&from)?;
        let mut content = fs::File::create(from.join("large"))?;
        std::io::copy(
            &mut fs::File::open("/dev/urandom")?.take(BYTES),
            &mut content,
        )?;
        let mut target = Ended::start(&["receive", LOOPBACK, &text(into), &text(&map)])?;
        let address = target.address()?;
        Ok(Self {
            dir,
            from,
            target,
            address,
        })
    }

    fn arrived(&self, into: &Path) -> Result<()> {
        let same = Command::new("cmp")
            .args([self.from.join("large"), into.join("large")])
            .status()?;
        ensure!(same.success(), "the copy differs");
        Ok(())
    }
}

/// Most memory that `held` has while nothing goes on.
fn most(held: &Ended) -> Result<u64> {
    let (stopped, mut most) = (Instant::now(), 0);
    while stopped.elapsed() < STOPPED {
        most = most.max(held.memory()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(most)
}

/// Waits until something of the file is there.
fn begun(source: &mut Ended, into: &Path) -> Result<()> {
    while !into.join("large").exists() {
        std::thread::sleep(Duration::from_millis(1));
        ensure!(source.0.try_wait()?.is_none(), "the source ended early");
    }
    Ok(())
}

#[test]
fn a_target_that_takes_nothing_makes_the_source_hold_no_more_than_the_cap() -> Result<()> {
    let into = empty_directory("source")?.join("into");
    let ends = Ends::new("source-end", &into)?;
    let mut source = Ended::start(&["send", &ends.address, &text(&ends.from)])?;
    begun(&mut source, &into)?;
    ends.target.signal(Signal::SIGSTOP)?;
    let most = most(&source)?;
    ends.target.signal(Signal::SIGCONT)?;
    ensure!(source.0.wait()?.success(), "the source failed");
    ensure!(
        most <= CAP_KIB + PROGRAM_KIB,
        "{most} KiB while nothing was taken"
    );
    ensure!(
        most > CAP_KIB / 2,
        "only {most} KiB: the window was never full"
    );
    ends.arrived(&into)?;
    fs::remove_dir_all(&ends.dir)?;
    Ok(())
}

#[test]
fn a_target_that_takes_nothing_makes_a_paired_device_hold_no_more_than_the_cap() -> Result<()> {
    for way in ["seal-forward", "spool"] {
        let into = empty_directory(way)?.join("into");
        let ends = Ends::new(&format!("{way}-end"), &into)?;
        let spool = ends.dir.join("spool");
        fs::create_dir(&spool)?;
        let mut relay = Ended::start(&["relay", way, LOOPBACK, &text(&spool), &ends.address])?;
        let paired = relay.address()?;
        let mut source = Ended::start(&["send", way, &ends.address, &text(&ends.from), &paired])?;
        begun(&mut source, &into)?;
        ends.target.signal(Signal::SIGSTOP)?;
        let most = most(&relay)?;
        ends.target.signal(Signal::SIGCONT)?;
        ensure!(source.0.wait()?.success(), "{way}: the source failed");
        println!("{way}: {most} KiB at most on the paired device");
        ensure!(
            most <= CAP_KIB + PROGRAM_KIB,
            "{way}: {most} KiB while nothing was taken"
        );
        ends.arrived(&into)?;
        fs::remove_dir_all(&ends.dir)?;
    }
    Ok(())
}

/// A file system that writes nothing for a while.
struct Frozen(PathBuf);

impl Frozen {
    fn new(dir: &Path) -> Result<Self> {
        let (image, at) = (dir.join("image"), dir.join("disk"));
        fs::File::create(&image)?.set_len(BYTES * 2)?;
        fs::create_dir_all(&at)?;
        output(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        output(
            Command::new("mount")
                .args(["-o", "loop"])
                .args([&image, &at]),
        )?;
        Ok(Self(at))
    }

    fn freeze(&self, how: &str) -> Result<()> {
        output(Command::new("fsfreeze").arg(how).arg(&self.0)).map(drop)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // It fails when it is not frozen, as it should not be.
        let _ = self.freeze("--unfreeze");
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_takes_nothing_makes_the_target_hold_no_more_than_the_cap() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: a file system to freeze needs root");
        return Ok(());
    }
    let dir = empty_directory("target")?;
    let disk = Frozen::new(&dir)?;
    let into = disk.0.join("into");
    let ends = Ends::new("target-end", &into)?;
    let mut source = Ended::start(&["send", &ends.address, &text(&ends.from)])?;
    begun(&mut source, &into)?;
    disk.freeze("--freeze")?;
    let most = most(&ends.target);
    disk.freeze("--unfreeze")?;
    let most = most?;
    ensure!(source.0.wait()?.success(), "the source failed");
    println!("{most} KiB at most on the target");
    ensure!(
        most <= CAP_KIB + PROGRAM_KIB,
        "{most} KiB while nothing was written"
    );
    ends.arrived(&into)?;
    fs::remove_dir_all(&ends.dir)?;
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A directory on the disk under test, empty.
fn empty_directory(name: &str) -> Result<PathBuf> {
    let dir = workspace::root().join("target/tmp/in-flight").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}
