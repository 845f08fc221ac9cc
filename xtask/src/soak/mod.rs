//! `cargo xtask soak transfer`: kills the sides of transfers again and again, and shows that they go on from what
//! had arrived.
//!
//! Source, paired device and target are processes of the real data plane on lab hosts. Each kill strikes one of
//! them (SIGKILL), or the link (a cable that is pulled, connections that are reset), after a random number of
//! bytes or a random time, and the side is started again. A transfer has several epochs, the tree changes between
//! them, and sides are killed in each; a source that was killed knows nothing of the epochs before. What was sent again is
//! counted twice: by the target's own counter of bytes that it had already, and by what its network interface received
//! beyond an undisturbed transfer. Every copy is compared by rsync, both ways.
//!
//! `cargo xtask soak switch` kills the real agents (`switch`).

mod changes;
pub mod switch;
mod tree;

use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use crate::lab::{Host, HostSpec, Lab, LabSpec};
use crate::process::{become_root, output, wait_for};
use crate::workspace;

/// Arguments of `cargo xtask soak`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Kills source, paired device, target and link of transfers at random instants
    Transfer(Transfer),
    /// Kills the agents of source and target through plans that switch first, and their aborts
    Switch(switch::Switch),
}

/// What to do to transfers.
#[derive(Debug, Args)]
pub struct Transfer {
    /// Kills and cuts
    #[arg(long, default_value_t = 2000)]
    pub kills: u32,
    /// Repeats the choices of a run that printed this seed
    #[arg(long)]
    pub seed: Option<u64>,
    /// Data of each transfer, in MiB
    #[arg(long, default_value_t = 512)]
    pub mib: u64,
}

/// Runs `cargo xtask soak`.
///
/// # Errors
/// A copy differs, a side gave up, or too much was sent again.
pub fn soak(arguments: &Arguments) -> Result<()> {
    become_root()?;
    crate::test::build()?;
    match &arguments.what {
        What::Transfer(wanted) => transfer(wanted).map(drop),
        What::Switch(wanted) => switch::switch(wanted).map(drop),
    }
}

/// The ways of a block, and whether they lead over a paired device.
const WAYS: [(&str, bool); 4] = [
    ("direct", false),
    ("spool", true),
    ("seal-forward", true),
    ("seal-return", true),
];
const TARGET_PORT: u16 = 7000;
const RELAY_PORT: u16 = 7001;
const SOURCE_DATA: &str = "/srv/data";
/// What [`SOURCE_DATA`] is at the beginning of each transfer.
const BEGINNING: &str = "/srv/beginning";
/// Epochs of a transfer; the tree changes before each but the first.
pub const EPOCHS: usize = 4;
/// No step takes longer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most of what had arrived that may be sent again.
const AGAIN_MAX: f64 = 0.01;

/// The same by the interface counts records that were cut off in the middle, those that a killed target had not
/// applied, and what a new beginning costs too, whatever the size of the data: about one MiB a kill where the target
/// keeps up, and up to 6 MiB more that wait in the socket of one that gets little processor. Of small transfers this
/// much may be more than [`AGAIN_MAX`].
const BEYOND_MAX: u64 = 4 << 20;

/// What happened to the transfers.
#[derive(Debug, Default)]
pub struct Tally {
    /// Transfers that were carried to their end.
    pub transfers: u32,
    /// Kills of source, paired device and target, and cuts of the link.
    pub kills: [u32; 4],
    /// The same by the epoch in which they struck.
    pub epochs: [u32; EPOCHS],
    /// Bytes that the target's interface had received at the moments of the kills, summed.
    pub arrived: u64,
    /// Bytes that the target took although it had them, by its own count.
    pub again: u64,
    /// Bytes that the target's interface received beyond undisturbed transfers.
    pub beyond: u64,
}

impl Tally {
    fn struck(&self) -> u32 {
        self.kills.iter().sum()
    }

    #[expect(clippy::cast_precision_loss, reason = "shares of byte counts")]
    fn share(&self, bytes: u64) -> f64 {
        bytes as f64 / self.arrived.max(1) as f64
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [source, paired, target, link] = self.kills;
        write!(
            f,
            "{} transfers, {} kills (source {source}, paired device {paired}, target {target}, link {link}; \
             {:?} in epochs 1 to {EPOCHS}); sent again of what had arrived: {:.3} % by the target's count, {:.3} % by its interface, with all that \
             was under way and the protocol's own",
            self.transfers,
            self.struck(),
            self.epochs,
            100.0 * self.share(self.again),
            100.0 * self.share(self.beyond),
        )
    }
}

/// Kills transfers until there were `wanted.kills` of them, and carries each to its end.
///
/// # Errors
/// A copy differs, a side gave up, or too much was sent again.
pub fn transfer(wanted: &Transfer) -> Result<Tally> {
    let chance = Chance::new("soak", wanted.seed);
    let seed = chance.0;
    let bare = |name: &str| HostSpec {
        containers: false,
        ..name.into()
    };
    let lab = Lab::up(&LabSpec {
        name: format!("soak-{}", std::process::id()),
        hosts: vec![bare("source"), bare("paired"), bare("target")],
    })?;
    tree::furnish(&lab.host("source")?.path(BEGINNING), wanted.mib)?;
    let mut soak = Soak {
        lab: &lab,
        chance,
        mib: wanted.mib,
        tally: Tally::default(),
    };
    let mut undisturbed = Vec::new();
    for way in WAYS {
        undisturbed.push(soak.run(way, 0)?.received);
    }
    for at in (0..WAYS.len()).cycle() {
        let left = wanted.kills.saturating_sub(soak.tally.struck());
        if left == 0 {
            break;
        }
        let run = soak.run(WAYS[at], left)?;
        let beyond = run.received.saturating_sub(undisturbed[at]);
        soak.tally.again += run.again;
        soak.tally.beyond += beyond;
        soak.tally.arrived += run.arrived;
        soak.tally.transfers += 1;
        for (sum, kills) in soak.tally.epochs.iter_mut().zip(run.kills) {
            *sum += kills;
        }
        println!(
            "soak: {:5} kills; {}: {} kills, {:.1} MiB again, {:.1} MiB beyond, {:.1} s",
            soak.tally.struck(),
            WAYS[at].0,
            run.struck(),
            mib(run.again),
            mib(beyond),
            run.took.as_secs_f64(),
        );
    }
    let tally = soak.tally;
    lab.down()?;
    println!("soak: {tally}");
    ensure!(
        tally.share(tally.again) < AGAIN_MAX,
        "more than 1 % of what had arrived was sent again; seed {seed}"
    );
    ensure!(
        tally.share(tally.beyond) < AGAIN_MAX
            || tally.beyond < BEYOND_MAX * u64::from(tally.struck()),
        "the interface of the target received more than 1 % beyond what had arrived; seed {seed}"
    );
    Ok(tally)
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Choices that a seed repeats (SplitMix64).
#[derive(Debug)]
pub struct Chance(u64);

impl Chance {
    /// Begins with `seed`, or with one of its own; says it.
    #[must_use]
    pub fn new(what: &str, seed: Option<u64>) -> Self {
        let seed = seed.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.map_or(0, |now| now.subsec_nanos().into())
        });
        println!("{what}: seed {seed}");
        Self(seed)
    }

    /// The next choice, from 0 to below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    fn millis_below(&mut self, limit: u64) -> Duration {
        Duration::from_millis(self.below(limit))
    }
}

/// One transfer.
#[derive(Default)]
struct Run {
    kills: [u32; EPOCHS],
    arrived: u64,
    again: u64,
    received: u64,
    took: Duration,
}

impl Run {
    fn struck(&self) -> u32 {
        self.kills.iter().sum()
    }
}

struct Soak<'l> {
    lab: &'l Lab,
    chance: Chance,
    /// Data of each transfer in its first epoch.
    mib: u64,
    tally: Tally,
}

/// A process on a lab host, with what it prints.
struct Side {
    child: Child,
    printed: PathBuf,
}

impl Drop for Side {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Side {
    fn start(host: &Host, words: &[&str]) -> Result<Self> {
        let program = workspace::binary("examples/move_directory");
        ensure!(
            program.exists(),
            "{} is missing: `cargo build --examples`",
            program.display()
        );
        let printed = host.log("printed");
        let errors = host.log("errors");
        let errors = File::options().create(true).append(true).open(errors)?;
        let mut argv = vec![program.as_os_str()];
        argv.extend(words.iter().map(std::ffi::OsStr::new));
        let child = host
            .command(argv)
            .env("MOVE_KEY", "soak")
            .stdin(Stdio::piped())
            .stdout(File::create(&printed)?)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start a side on {}", host.name()))?;
        Ok(Self { child, printed })
    }

    /// Started, and its first line was read.
    fn serving(host: &Host, words: &[&str]) -> Result<Self> {
        let side = Self::start(host, words)?;
        wait_for("a side that serves", PATIENCE, || {
            Ok(fs::read_to_string(&side.printed)?
                .contains('\n')
                .then_some(()))
        })
        .with_context(|| fs::read_to_string(host.log("errors")).unwrap_or_default())?;
        Ok(side)
    }

    fn printed(&self) -> String {
        fs::read_to_string(&self.printed).unwrap_or_default()
    }

    /// The lines that it printed to their ends.
    fn lines(&self) -> Vec<String> {
        let text = self.printed();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(str::to_owned).collect()
    }

    /// Bytes that this life of a target took although it had them.
    fn again(&self) -> u64 {
        let lines = self.lines();
        let last = lines.last().map_or("", String::as_str);
        let progress: serde_json::Value = serde_json::from_str(last).unwrap_or_default();
        progress["bytes_again"].as_u64().unwrap_or_default()
    }
}

/// A source, which sends its first epoch by itself and another when it is told to.
struct Source {
    side: Side,
    /// Epochs that this life of it was told to send.
    told: usize,
}

impl Source {
    fn start(host: &Host, words: &[&str]) -> Result<Self> {
        let side = Side::start(host, words)?;
        Ok(Self { side, told: 1 })
    }

    fn tell(&mut self) -> Result<()> {
        let input = self.side.child.stdin.as_mut();
        let input = input.context("the source takes no more")?;
        input.write_all(b"\n").context("the source is gone")?;
        self.told += 1;
        Ok(())
    }

    /// Whether it has sent what it was told to.
    fn has_sent(&mut self) -> Result<bool> {
        let ended = self.side.child.try_wait()?;
        if self.side.lines().len() >= self.told {
            return Ok(true);
        }
        ensure!(ended.is_none(), "the source gave up");
        Ok(false)
    }

    /// Waits for its end.
    fn end(mut self) -> Result<()> {
        drop(self.side.child.stdin.take());
        let status = wait_for("the end of the source", PATIENCE, || {
            Ok(self.side.child.try_wait()?)
        })?;
        ensure!(status.success(), "the source ended with {status}");
        Ok(())
    }
}

impl Soak<'_> {
    /// One transfer along `way`, with at most `kills` kills.
    fn run(&mut self, way: (&str, bool), kills: u32) -> Result<Run> {
        let mut run = Run::default();
        let outcome = self.carry(way, kills, &mut run);
        outcome.with_context(|| {
            format!(
                "{}, after {:?} kills in its epochs:\n{}",
                way.0,
                run.kills,
                self.told()
            )
        })?;
        Ok(run)
    }

    fn carry(&mut self, (way, relayed): (&str, bool), kills: u32, run: &mut Run) -> Result<()> {
        let lab = self.lab;
        let (from, over, to) = (
            lab.host("source")?,
            lab.host("paired")?,
            lab.host("target")?,
        );
        let start = Instant::now();
        let target = format!("{}:{TARGET_PORT}", to.address());
        let relay = format!("{}:{RELAY_PORT}", over.address());
        let receiving = ["receive", &target, "/srv/copy", "/srv/map"];
        let relaying = ["relay", way, &relay, "/srv/spool", &target];
        let mut sending = vec!["send", way, &target, SOURCE_DATA];
        sending.extend(relayed.then_some(relay.as_str()));
        from.run(["rm", "-rf", SOURCE_DATA])?;
        from.run(["cp", "-a", BEGINNING, SOURCE_DATA])?;

        let before = to.received()?;
        let mut receiver = Side::serving(to, &receiving)?;
        let mut carrier = relayed
            .then(|| Side::serving(over, &relaying))
            .transpose()?;
        let mut source = Source::start(from, &sending)?;
        for epoch in 1..=EPOCHS {
            if epoch > 1 {
                tree::change(&from.path(SOURCE_DATA), epoch, self.mib)?;
                source.tell()?;
            }
            // Most bytes between two kills: some of them in what an epoch moves.
            let step = (self.mib << 20) / if epoch == 1 { 12 } else { 24 };
            loop {
                if run.struck() == kills {
                    wait_for("an undisturbed epoch", 3 * PATIENCE, || {
                        Ok(source.has_sent()?.then_some(()))
                    })?;
                    break;
                }
                if self.wait(&mut source, to, step)? {
                    break;
                }
                run.kills[epoch - 1] += 1;
                run.arrived += to.received()? - before;
                let victim = self.chance.below(if relayed { 4 } else { 3 });
                match victim {
                    0 => {
                        drop(source);
                        source = Source::start(from, &sending)?;
                        self.tally.kills[0] += 1;
                    }
                    1 => {
                        run.again += receiver.again();
                        drop(receiver);
                        receiver = Side::serving(to, &receiving)?;
                        self.tally.kills[2] += 1;
                    }
                    2 => {
                        self.cut(to, TARGET_PORT)?;
                        self.tally.kills[3] += 1;
                    }
                    _ => {
                        drop(carrier.take());
                        carrier = Some(Side::serving(over, &relaying)?);
                        self.tally.kills[1] += 1;
                    }
                }
            }
        }
        source.end()?;
        run.received = to.received()? - before;
        // Its last line is at most 20 ms behind.
        sleep(Duration::from_millis(50));
        run.again += receiver.again();
        run.took = start.elapsed();
        drop((receiver, carrier));
        self.compare()?;
        to.run(["rm", "-rf", "/srv/copy", "/srv/map"])?;
        over.run(["rm", "-rf", "/srv/spool"])?;
        Ok(())
    }

    /// Waits for the instant of the next kill, or until the epoch is sent, if that is first: says so.
    fn wait(&mut self, source: &mut Source, to: &Host, step: u64) -> Result<bool> {
        let begun = to.received()?;
        let start = Instant::now();
        // Mostly after so many bytes; every fifth after some time, which may be while nothing flows.
        let (bytes, time) = if self.chance.below(5) == 0 {
            (u64::MAX, self.chance.millis_below(400))
        } else {
            (self.chance.below(step), PATIENCE)
        };
        while to.received()? - begun < bytes && start.elapsed() < time {
            if source.has_sent()? {
                return Ok(true);
            }
            sleep(Duration::from_millis(1));
        }
        Ok(false)
    }

    /// Pulls the target's cable for a moment, or resets its connections.
    fn cut(&mut self, host: &Host, port: u16) -> Result<()> {
        let time = self.chance.millis_below(200);
        if self.chance.below(2) == 0 {
            self.lab.link(host, false)?;
            sleep(time);
            return self.lab.link(host, true);
        }
        let rules = format!(
            "table inet soak {{\nchain cut {{\ntype filter hook input priority 0\n\
             tcp dport {port} reject with tcp reset\n}}\n}}"
        );
        host.run(["nft", &rules])?;
        sleep(time);
        host.run(["nft", "delete table inet soak"]).map(drop)
    }

    fn told(&self) -> String {
        let tell = |host: &Host| {
            let errors = fs::read_to_string(host.log("errors")).unwrap_or_default();
            let tail: Vec<&str> = errors.lines().rev().take(5).collect();
            format!("{}: {}\n", host.name(), tail.join("\n"))
        };
        self.lab.hosts().iter().map(tell).collect()
    }

    /// Compares source and copy from outside.
    fn compare(&self) -> Result<()> {
        // Where the lab keeps /srv: rsync does not go through /proc/PID/root.
        let source = self.lab.dir().join("source/srv/data/");
        let copy = self.lab.dir().join("target/srv/copy/");
        same(&source, &copy)
    }
}

/// Compares two trees in all that they have, both ways.
fn same(one: &Path, other: &Path) -> Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        let differences = output(Command::new("rsync").args(WHOLLY).args([from, to]))?;
        ensure!(
            differences.is_empty(),
            "{} differs from {}:\n{differences}",
            to.display(),
            from.display()
        );
    }
    Ok(())
}

/// For rsync: says what differs, and does nothing.
const WHOLLY: [&str; 6] = [
    "-aHAXS",
    "--checksum",
    // Times to the nanosecond.
    "--modify-window=-1",
    "--dry-run",
    "--itemize-changes",
    "--delete",
];
