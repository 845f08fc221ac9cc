//! Lifeboat's data plane between two lab hosts against its peers: a large file, many small ones, a real tree,
//! a change, a second copy, and half of the work delegated.
//!
//! Every run starts with a cold cache and, but for the change, an empty destination and an empty block map;
//! Lifeboat and its peers take turns. Lifeboat's acknowledgement comes after the receiver's `syncfs`; its peers
//! leave their data in the page cache, so a `sync -f` of the destination is measured beside them. Destinations
//! of small files are kept until the end: ext4 avoids inodes deleted in the last minutes, at a price that
//! would fall on whoever comes next.

mod changes;
mod data;
mod demand;
mod sides;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::machine::{self, Limits};
use super::{goal, median};
use crate::lab::far::FarLink;
use crate::lab::{Lab, LabSpec};
use crate::setup;
use sides::{Ours, Pair, Theirs, cold};

/// Bytes of the large file, and files of 4 KiB in the tree.
const LARGE: u64 = 4 << 30;
const FILES: usize = 50_000;
/// Files of the large tree.
const MILLION: usize = 1_000_000;
/// The far link, and its rate in bytes a second: 500 Mbit/s.
const ROUND_TRIP: Duration = Duration::from_millis(30);
const FAR: f64 = 62.5e6;
/// Resident memory allowed on either side, in MiB.
const PEAK: f64 = 256.0;

const GIB: f64 = (1_u64 << 30) as f64;

struct Bench<'l> {
    pair: Pair<'l>,
    runs: usize,
    limits: Limits,
    /// Highest resident memory so far: source and target.
    peaks: (f64, f64),
}

/// What can be measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// The large file, and what else it tells.
    File,
    /// Many small files.
    Small,
    /// The Rust sources.
    Tree,
    /// A change since the last epoch; takes 26 GiB of the disk.
    Changes,
    /// A link with a long round trip.
    Far,
    /// Reads on demand over such a link.
    Demand,
    /// A million small files; takes some minutes and 9 GB of the disk, and is only measured when it is named.
    Million,
}

/// Measures `only` these parts, all when none is named.
pub(super) fn measure(short: bool, runs: usize, only: &[Part]) -> Result<String> {
    let wants = |part: Part| only.is_empty() || only.contains(&part);
    setup::provide("qemu-nbd", "qemu-utils", "peer of the figures")?;
    setup::provide("nbdcopy", "libnbd-bin", "peer of the figures")?;
    let (scale, runs) = if short { (10, 1) } else { (1, runs) };
    let lab = Lab::up(&LabSpec {
        name: format!("transfer-{}", std::process::id()),
        hosts: ["from", "to", "over"].map(machine::bare).into(),
    })?;
    let pair = Pair {
        from: lab.host("from")?,
        to: lab.host("to")?,
        over: lab.host("over")?,
        target: lab.host("to")?.address(),
    };
    pair.start_ssh()?;
    let mut bench = Bench {
        limits: machine::measured(pair.from, pair.to)?,
        pair,
        runs,
        peaks: (0.0, 0.0),
    };
    let mut text = format!(
        "## Transfer\n\nSealed, between two lab hosts that share two cores and a disk, cold cache and empty \
         destination in every run; median of {runs}. Lifeboat counts until the receiver has acknowledged that \
         everything is on disk; a peer's ratio is with a `sync -f` after it, the one in brackets without.\n\n"
    );
    text.push_str(&bench.table(LARGE / scale, FILES / scale as usize, wants)?);
    if wants(Part::Changes) {
        text.push_str(&changes::measure(&mut bench, scale)?);
    }
    if wants(Part::Far) {
        text.push_str(&bench.far(LARGE / 8 / scale)?);
    }
    if wants(Part::Demand) {
        // With a tenth of the data the filling would be over before the reads are.
        text.push_str(&demand::measure(LARGE / scale.min(2), runs)?);
    }
    if only.contains(&Part::Million) {
        text.push_str(&bench.million(MILLION / scale as usize)?);
    }
    let (source, target) = bench.peaks;
    // Of reads on demand alone none is measured.
    if source > 0.0 {
        text.push_str(&format!(
            "Highest resident memory in all of these: source {source:.0} MiB, target {target:.0} MiB ({}).\n",
            goal("at most 256 MiB", source.max(target) <= PEAK)
        ));
    }
    lab.down()?;
    Ok(text)
}

/// One peer's name and how it copies from a directory to another.
type Peer<'p> = (
    &'static str,
    f64,
    Box<dyn Fn(&str, &str) -> Result<Theirs> + 'p>,
);

/// What of a subject is needed once all are measured.
struct Measured {
    ours: Vec<Ours>,
    theirs: BTreeMap<&'static str, Vec<Theirs>>,
}

fn middle<T>(runs: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    median(&runs.iter().map(figure).collect::<Vec<_>>())
}

impl Bench<'_> {
    /// Runs of Lifeboat and `peers`, taking turns.
    fn compare(&mut self, source: &str, keep: bool, peers: &[Peer<'_>]) -> Result<Measured> {
        let mut measured = Measured {
            ours: Vec::new(),
            theirs: BTreeMap::new(),
        };
        let pair = &self.pair;
        for run in 0..self.runs {
            for turn in 0..=peers.len() {
                let who = (turn + run) % (peers.len() + 1);
                let out = format!("{source}-{who}-{run}");
                if who == 0 {
                    let ours = pair.lifeboat(source, &out)?;
                    eprintln!("bench: {source}: {ours:.2?}");
                    measured.ours.push(ours);
                    if run == 0 {
                        pair.same(source, &out)?;
                    }
                } else {
                    let (name, _, copy) = &peers[who - 1];
                    let theirs = copy(source, &out)?;
                    eprintln!("bench: {source}: {name} {theirs:.2?}");
                    measured.theirs.entry(name).or_default().push(theirs);
                }
                if !keep {
                    pair.to.run(["rm", "-rf", &out])?;
                }
            }
        }
        self.peak(&measured.ours);
        Ok(measured)
    }

    fn peak(&mut self, runs: &[Ours]) {
        for run in runs {
            self.peaks.0 = self.peaks.0.max(run.source_peak);
            self.peaks.1 = self.peaks.1.max(run.target_peak);
        }
    }

    /// The large file, the small files and the real tree.
    fn table(&mut self, large: u64, files: usize, wants: impl Fn(Part) -> bool) -> Result<String> {
        let pair = self.pair;
        let from = pair.from;
        if wants(Part::File) {
            fs::create_dir(from.path("/srv/file"))?;
            data::write_large(&from.path("/srv/file/random"), large)?;
        }
        if wants(Part::Small) {
            data::write_tree(&from.path("/srv/small"), files)?;
        }
        let real = if wants(Part::Tree) {
            data::copy_rust_sources(&from.path("/srv/real"))?
        } else {
            String::new()
        };
        let rsync = || -> Peer<'_> {
            let copy = |source: &str, out: &str| pair.rsync(source, out, &["-W"]);
            ("rsync over ssh", 5.0, Box::new(copy))
        };
        let tar: Peer<'_> = (
            "tar over ssh",
            3.0,
            Box::new(|source, out| pair.tar(source, out)),
        );
        // No peer, so without a goal: what the file system alone takes for the same files.
        let plain = || -> Peer<'_> {
            let copy = |source: &str, out: &str| pair.plain_copy(source, out);
            (
                "`cp -a`, no link, no keys, no signatures",
                0.0,
                Box::new(copy),
            )
        };
        let nbd: Peer<'_> = (
            "nbdcopy, not sealed",
            2.0,
            Box::new(|source, out| pair.nbdcopy(&format!("{source}/random"), out)),
        );
        let subjects: [(Part, String, &str, bool, Vec<Peer<'_>>); 3] = [
            (
                Part::File,
                format!("one file of {} MiB", large >> 20),
                "/srv/file",
                false,
                vec![rsync(), nbd],
            ),
            (
                Part::Small,
                format!("{files} files of 4 KiB"),
                "/srv/small",
                true,
                vec![rsync(), tar, plain()],
            ),
            (Part::Tree, real, "/srv/real", true, vec![rsync(), plain()]),
        ];
        let mut text = String::from(
            "| data | Lifeboat | peer | peer's time | peer ÷ Lifeboat | goal |\n|---|---|---|---|---|---|\n",
        );
        let mut rest = String::new();
        for (part, what, source, keep, peers) in subjects.iter().filter(|one| wants(one.0)) {
            let measured = self.compare(source, *keep, peers)?;
            let ours = middle(&measured.ours, |run| run.seconds);
            for (name, least, _) in peers {
                let theirs = &measured.theirs[name];
                let durable = middle(theirs, |run| run.durable);
                let copied = middle(theirs, |run| run.copied);
                let asked = if *least > 0.0 {
                    let met = goal(&format!("at least {least:.0}"), durable / ours >= *least);
                    let within = format!(" (within {:.2} s)", durable / least);
                    match part {
                        Part::File => met + &within + &self.beyond(large as f64 * least / durable),
                        _ => met + &within,
                    }
                } else {
                    String::new()
                };
                text.push_str(&format!(
                    "| {what} | {ours:.2} s | {name} | {durable:.2} s | {:.1} ({:.1}) | {asked} |\n",
                    durable / ours,
                    copied / ours,
                ));
            }
            if *source == "/srv/file" {
                rest.push_str(&self.large(&measured, large)?);
            }
        }
        Ok(format!("{text}\n{rest}"))
    }

    /// What is to be said of a goal that asks for more bytes a second than the machine has.
    fn beyond(&self, speed: f64) -> String {
        let (limit, slowest) = self.limits.slowest();
        if speed <= slowest {
            return String::new();
        }
        format!(
            "; that is {:.2} GB/s, and {limit} gives {:.2}",
            speed / 1e9,
            slowest / 1e9
        )
    }

    /// What else the large file tells: how near the machine's limits, the source's processor time, half of the
    /// work delegated, and a second volume with the same content.
    fn large(&mut self, measured: &Measured, bytes: u64) -> Result<String> {
        let gib = bytes as f64 / GIB;
        let speed = bytes as f64 / middle(&measured.ours, |run| run.seconds);
        let limits = self.limits.with(processor(self.pair.from)?);
        let (limit, slowest) = limits.slowest();
        let cpu = middle(&measured.ours, |run| run.cpu) / gib;
        let rsync = middle(&measured.theirs["rsync over ssh"], |run| run.cpu) / gib;
        let mut delegated = Vec::new();
        for run in 0..self.runs {
            let out = format!("/srv/delegated-{run}");
            let ours = self.pair.delegated("/srv/file", &out)?;
            eprintln!("bench: delegated: {ours:.2?}");
            delegated.push(ours);
            self.pair.to.run(["rm", "-rf", &out])?;
        }
        let less = middle(&delegated, |run| run.cpu) / gib;
        let mut again = Vec::new();
        for run in 0..self.runs {
            let (first, second) = (format!("/srv/first-{run}"), format!("/srv/second-{run}"));
            self.pair.lifeboat("/srv/file", &first)?;
            cold()?;
            let map = format!("{first}.map");
            let (sender, second_time) = self.pair.begin("/srv/file", &second, &map)?;
            sender.end()?;
            if run == 0 {
                self.pair.same("/srv/file", &second)?;
            }
            eprintln!("bench: again: {second_time:.2?}");
            again.push(second_time);
            self.pair.to.run(["rm", "-rf", &first, &second])?;
        }
        self.peak(&delegated);
        self.peak(&again);
        let share = middle(&again, |run| run.wire / run.read);
        Ok(format!(
            "| the large file | | goal |\n|---|---|---|\n\
             | speed | {:.2} GB/s, {:.0} % of the slowest limit ({limit}, {:.2} GB/s) | {} |\n\
             | the source's processor time for each GiB | {cpu:.2} s; rsync and ssh {rsync:.2} s | {} |\n\
             | the same with `encrypt` and `transfer` delegated | {less:.2} s | {} |\n\
             | the same file as a second volume | {:.2} % of its bytes on the wire, {:.2} s | {} |\n\n\
             Limits beside it: {}.\n\n",
            speed / 1e9,
            100.0 * speed / slowest,
            slowest / 1e9,
            goal("at least 60 %", speed >= 0.6 * slowest),
            goal("at most a third", cpu <= rsync / 3.0),
            goal("at most half", less <= cpu / 2.0),
            100.0 * share,
            middle(&again, |run| run.seconds),
            goal("under 1 %", share < 0.01),
            limits.listed(),
        ))
    }

    /// A file over a link with a long round trip.
    fn far(&mut self, bytes: u64) -> Result<String> {
        let link = FarLink::between(self.pair.from, self.pair.to, ROUND_TRIP, FAR)?;
        let pair = Pair {
            target: link.there,
            ..self.pair
        };
        fs::create_dir(pair.from.path("/srv/far"))?;
        data::write_large(&pair.from.path("/srv/far/random"), bytes)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for run in 0..self.runs {
            let (out, peer) = (format!("/srv/far-{run}"), format!("/srv/far-rsync-{run}"));
            ours.push(pair.lifeboat("/srv/far", &out)?);
            theirs.push(pair.rsync("/srv/far", &peer, &["-W"])?);
            pair.to.run(["rm", "-rf", &out, &peer])?;
        }
        eprintln!("bench: far: lifeboat {ours:.2?}, rsync {theirs:.2?}");
        self.peak(&ours);
        let share = |seconds: f64| 100.0 * bytes as f64 / seconds / link.rate;
        let ours = middle(&ours, |run| run.seconds);
        let theirs = middle(&theirs, |run| run.copied);
        Ok(format!(
            "{} MiB over a link of {} Mbit/s with a round trip of {} ms: {ours:.2} s, {:.0} % of the link ({}); rsync over ssh {theirs:.2} s, {:.0} %.\n\n",
            bytes >> 20,
            link.rate * 8.0 / 1e6,
            ROUND_TRIP.as_millis(),
            share(ours),
            goal("at least 80 %", share(ours) >= 80.0),
            share(theirs),
        ))
    }

    /// A tree that is too large to be held in memory as it is.
    fn million(&mut self, files: usize) -> Result<String> {
        let (source, out) = ("/srv/million", "/srv/million-out");
        data::write_tree(&self.pair.from.path(source), files)?;
        let ours = self.pair.lifeboat(source, out)?;
        self.pair.same(source, out)?;
        self.peak(&[ours]);
        Ok(format!(
            "{files} files of 4 KiB, one run: {:.1} s, {:.1} s of the source's processor; resident memory at most {:.0} MiB on the source and {:.0} MiB on the target ({}).\n\n",
            ours.seconds,
            ours.cpu,
            ours.source_peak,
            ours.target_peak,
            goal(
                "at most 256 MiB",
                ours.source_peak.max(ours.target_peak) <= PEAK
            ),
        ))
    }
}

/// What one core hashes and seals in a second, by the program that moves.
fn processor(host: &crate::lab::Host) -> Result<[(&'static str, f64); 2]> {
    let text = host.run([sides::program()?, "measure".into()])?;
    let speeds: Value = serde_json::from_str(&text).context("no speeds of the processor")?;
    let speed = |name: &str| {
        speeds[name]
            .as_f64()
            .with_context(|| format!("no speed of {name}"))
    };
    Ok([
        ("BLAKE3, one core", speed("blake3")?),
        ("AES-256-GCM, one core", speed("seal")?),
    ])
}
