//! A volume of which 1 % changes, page by page, at random: as a file in a tree and as a block device, of both of which
//! the kernel notes what is written.
//!
//! One that is full stands beside rsync. Others show what the time grows with: three sizes with the same data and the same
//! change, and one with four times the data, of which once a quarter changes.

use std::fs;

use anyhow::{Result, ensure};
use nix::sys::statvfs::statvfs;

use super::super::goal;
use super::data::Disk;
use super::sides::{Loop, Ours, Pair, Theirs, cold};
use super::{Bench, GIB, middle};

/// Bytes of the volumes; the first is full, too.
const SIZES: [u64; 3] = [8 << 30, 16 << 30, 32 << 30];
/// What changes: 1 % of the first.
const CHANGED: u64 = SIZES[0] / 100;
/// Data of the volumes that differ in their size alone.
const HELD: u64 = 2 << 30;
/// So many times as long as the smallest volume may the largest take for the same change of the same data.
const GROWTH: f64 = 1.5;

const SOURCE: &str = "/srv/changing";
const FILE: &str = "/srv/changing/disk";

/// What the file is to Lifeboat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tree,
    Device,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Tree, Self::Device];

    fn name(self) -> &'static str {
        match self {
            Self::Tree => "a file in a tree",
            Self::Device => "a block device",
        }
    }
}

const MIB: f64 = (1 << 20) as f64;

fn row(disk: Disk, kind: Kind, changed: u64, ours: &[Ours], peer: Option<f64>) -> String {
    let figure = |of: fn(&Ours) -> f64| middle(ours, of);
    let seconds = figure(|run| run.seconds);
    let peer = peer.map_or_else(
        || " | | ".to_owned(),
        |peer| {
            let met = goal("at least 20", peer / seconds >= 20.0);
            format!("{peer:.2} s | {:.1} | {met}", peer / seconds)
        },
    );
    format!(
        "| {:.1} MiB | {:.1} GiB, of which {:.1} GiB are data | {} | {seconds:.2} s | {:.2} s | {:.0} MiB | {:.0} MiB | {peer} |\n",
        changed as f64 / MIB,
        disk.size as f64 / GIB,
        disk.held as f64 / GIB,
        kind.name(),
        figure(|run| run.cpu),
        figure(|run| run.read) / MIB,
        figure(|run| run.wire) / MIB,
    )
}

/// Bytes for a `scale`, with room for islands of a MiB in every fourth.
fn scaled(bytes: u64, scale: u64) -> u64 {
    (bytes / scale) >> 24 << 24
}

pub(super) fn measure(bench: &mut Bench<'_>, scale: u64) -> Result<String> {
    let mut text = String::from(
        "Pages of 4 KiB all over the data are written anew. A block device is a loop device over the same file, and its peer is rsync with that file.\n\n\
         | since the last epoch | volume | as | Lifeboat | of it the source's processor time | read | on the wire | rsync --inplace --no-whole-file | rsync ÷ Lifeboat | goal |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    let from = bench.pair.from;
    fs::create_dir(from.path(SOURCE))?;
    let changed = CHANGED / scale;

    let size = scaled(SIZES[0], scale);
    // The file, Lifeboat's copy, rsync's, and what rounds leave before they are in place.
    let needed = size * 13 / 4;
    let disk = statvfs(&from.path(SOURCE))?;
    let free = disk.blocks_available() * disk.fragment_size();
    ensure!(
        free >= needed,
        "the changes need {} GiB of the disk, of which {} GiB are free; free the rest",
        needed >> 30,
        free >> 30
    );
    let full = Disk { size, held: size };
    full.write(&from.path(FILE))?;
    let peer = "/srv/changing-rsync";
    bench.pair.rsync(SOURCE, peer, &["-W"])?;
    let mut theirs: Vec<Theirs> = Vec::new();
    for kind in Kind::ALL {
        let ours = epochs(bench, full, kind, &[changed], |pair| {
            if kind == Kind::Tree {
                let how = ["--inplace", "--no-whole-file"];
                theirs.push(pair.rsync(SOURCE, peer, &how)?);
            }
            Ok(())
        })?;
        if kind == Kind::Tree {
            bench.pair.same(SOURCE, peer)?;
            bench.pair.to.run(["rm", "-rf", peer])?;
        }
        let durable = middle(&theirs, |run| run.durable);
        text.push_str(&row(full, kind, changed, &ours[0], Some(durable)));
    }
    eprintln!("bench: changed: rsync {theirs:.2?}");

    // Of each kind: seconds for each size with the same data, then with more data for all and for a quarter of the change.
    let mut seconds = [Vec::new(), Vec::new()];
    let (all, part) = ([changed], [changed, changed / 4]);
    let more = (SIZES[2], SIZES[2] / 4, &part[..]);
    let sizes = SIZES.map(|size| (size, HELD, &all[..]));
    for (size, held, changes) in sizes.into_iter().chain([more]) {
        let disk = Disk {
            size: scaled(size, scale),
            held: scaled(size, scale) / (size / held),
        };
        disk.write(&from.path(FILE))?;
        for (kind, seconds) in Kind::ALL.into_iter().zip(&mut seconds) {
            let ours = epochs(bench, disk, kind, changes, |_| Ok(()))?;
            for (&changed, ours) in changes.iter().zip(&ours) {
                text.push_str(&row(disk, kind, changed, ours, None));
                seconds.push(middle(ours, |run| run.seconds));
            }
        }
    }
    fs::remove_dir_all(from.path(SOURCE))?;
    text.push_str("\nTime is to grow with the change, not with the volume. ");
    for (kind, seconds) in Kind::ALL.into_iter().zip(&seconds) {
        let volume = seconds[2] / seconds[0];
        text.push_str(&format!(
            "As {}, the volume of four times the size took {volume:.1} times as long ({}); with four times the data in it, of which more blocks hold a changed page, {:.1} times, and for a quarter of the change {:.2} of that. ",
            kind.name(),
            goal(&format!("at most {GROWTH}"), volume <= GROWTH),
            seconds[3] / seconds[0],
            seconds[4] / seconds[3],
        ));
    }
    Ok(format!("{}\n\n", text.trim_end()))
}

/// Sends `disk` and then its changes, which are bytes: as many rounds of each as there are runs, and after each round `then`.
fn epochs(
    bench: &mut Bench<'_>,
    disk: Disk,
    kind: Kind,
    changes: &[u64],
    mut then: impl FnMut(&Pair<'_>) -> Result<()>,
) -> Result<Vec<Vec<Ours>>> {
    let pair = bench.pair;
    let (out, map) = ("/srv/changing-out", "/srv/changing-map");
    let device = match kind {
        Kind::Tree => None,
        Kind::Device => Some(Loop::over(pair.from, FILE)?),
    };
    cold()?;
    let (mut sender, _) = match &device {
        None => pair.begin_sized(SOURCE, out, map, disk.size, None)?,
        Some(device) => {
            let file = format!("{out}/disk");
            pair.begin_sized(&device.device, &file, map, disk.size, Some("one"))?
        }
    };
    let at = match &device {
        None => pair.from.path(FILE),
        Some(device) => device.device.clone().into(),
    };
    let mut all = Vec::new();
    for (number, &bytes) in changes.iter().enumerate() {
        let mut ours = Vec::new();
        for run in 0..bench.runs {
            disk.change(&at, bytes, (1 + number * bench.runs + run) as u64)?;
            cold()?;
            ours.push(sender.next()?);
            then(&pair)?;
        }
        eprintln!("bench: {bytes} bytes of {disk:?}, {kind:?}: {ours:.2?}");
        bench.peak(&ours);
        all.push(ours);
    }
    sender.end()?;
    drop(device);
    pair.same(SOURCE, out)?;
    pair.to.run(["rm", "-rf", out, map])?;
    Ok(all)
}
