//! A wire that flips bits between source and target: nothing wrong arrives, and the move gets through.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use lifeboat_tests::shop::{self, DATA, FEW, Goods, SOURCE, TARGET, says};
use xtask::crew::Crew;
use xtask::lab::{Host, Lab};
use xtask::process::output;

const WIRE: &str = "wire";
const PORT: u16 = 7499;

/// A fleet whose target is reached through a wire with these flips.
fn fleet(lab: &Lab, flips: &[&str]) -> Result<Crew> {
    let (wire, target) = (lab.host(WIRE)?, lab.host(TARGET)?);
    let listen = format!("0.0.0.0:{PORT}");
    let to = format!("{}:7402", target.address());
    let mut argv = vec![env!("CARGO_BIN_EXE_adversary"), "wire", &listen, &to];
    argv.extend(flips);
    wire.spawn_logged("wire", argv)?;
    let address = format!("advertise_data: {}:{PORT}", wire.address());
    shop::fleet(lab, |target| target.fleet.push(address))
}

/// What the wire did, a line each.
fn flipped(lab: &Lab) -> Result<Vec<String>> {
    let log = fs::read_to_string(lab.host(WIRE)?.log("wire"))?;
    Ok(log.lines().map(str::to_owned).collect())
}

/// Everything a tree can hold that a wrong byte could spoil.
fn furnish(source: &Host) -> Result<()> {
    let make = format!(
        "cd {DATA}/kept && ln -s large symbolic && ln large hard && mkfifo pipe
        truncate -s 5M sparse && echo end >>sparse && setfattr -n user.note -v kept small/1
        chown 12:34 small/2 && chmod 4750 small/2 && touch -d '2001-02-03 04:05:06.789' small/3"
    );
    source.run(["sh", "-c", &make]).map(drop)
}

/// Compares source and target from outside, byte by byte and attribute by attribute; of the twin's log only
/// what the source had written.
fn same_on_both(lab: &Lab, source: &Host, target: &Host) -> Result<()> {
    // Where the lab keeps /srv: rsync does not go through /proc/PID/root.
    let at = |host: &Host| lab.dir().join(host.name()).join(&DATA[1..]).join("");
    let (source_at, target_at) = (at(source), at(target));
    for (from, to) in [(&source_at, &target_at), (&target_at, &source_at)] {
        let mut rsync = Command::new("rsync");
        rsync
            .args(["-aHAXS", "--checksum", "--dry-run", "--itemize-changes"])
            .args(["--modify-window=-1", "--delete", "--exclude=/log"])
            .args([from, to]);
        let differences = output(&mut rsync)?;
        ensure!(differences.is_empty(), "they differ:\n{differences}");
    }
    let log = |host: &Host| fs::read(host.path(&format!("{DATA}/log")));
    let (kept, running) = (log(source)?, log(target)?);
    ensure!(
        !kept.is_empty() && running.starts_with(&kept),
        "the log of the twin does not begin with the source's"
    );
    Ok(())
}

#[test]
fn a_move_gets_through_a_wire_that_flips_bits_and_nothing_wrong_arrives() -> Result<()> {
    let Some(lab) = shop::lab("flips", &[WIRE])? else {
        return Ok(());
    };
    // Messages and records, their headers (kind, barrier, length, number, first block) and their bodies; with
    // records that get through between them, so that the source does not give up. The source's frames first: a
    // flip on the way down lets everything that is under way up arrive, and then no frames are left to spoil.
    let flips = [
        "up:0:2",
        "up:1:20",
        "up:2:36",
        "up:0:45",
        "up:3:5000",
        "up:2:21",
        "up:1:0",
        "up:4:900000",
        "up:1:4",
        "up:3:30",
        "up:2:3",
        "down:0:50",
        "down:2:40",
    ];
    let crew = fleet(&lab, &flips)?;
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let goods = Goods {
        large_mib: 24,
        files: 50,
        file_kib: 3,
    };
    shop::open(&crew, goods)?;
    furnish(source)?;
    let before = shop::digest(source)?;
    shop::moved(&lab, &crew, &before)?;
    same_on_both(&lab, source, target)?;

    let done = flipped(&lab)?;
    ensure!(done.len() == flips.len(), "the wire only flipped {done:#?}");
    let log = crew.log(TARGET);
    let named = log
        .lines()
        .filter(|line| says(line, &[&format!("volume {DATA}, epoch "), ", record "]).is_ok())
        .count();
    // A flip in a record names volume and record; one in a connection's own messages names the plan. One in a
    // copy of a record that had arrived before its acknowledgement did is dropped with the copy, unopened.
    let records = flips
        .iter()
        .filter(|flip| flip.starts_with("up:") && !flip.starts_with("up:0:"))
        .count();
    ensure!(
        (records - 2..=records).contains(&named),
        "the target named {named} of {records} records:\n{log}"
    );
    let log = crew.log(SOURCE);
    let again = log.lines().filter(|line| line.contains("reconnecting"));
    // Of the others, two were in messages up and two in messages down.
    ensure!(
        again.count() >= named + 4,
        "the source did not send again after each flip that was noticed:\n{log}"
    );
    Ok(())
}

#[test]
fn a_greeting_with_a_flipped_bit_rolls_the_plan_back_and_the_next_one_succeeds() -> Result<()> {
    let Some(lab) = shop::lab("greeting", &[WIRE])? else {
        return Ok(());
    };
    let crew = fleet(&lab, &["up:greeting:40"])?;
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    shop::open(&crew, FEW)?;
    let before = shop::digest(source)?;
    let error = shop::refused(&crew)?;
    let address = format!("data link to {}:{PORT}", lab.host(WIRE)?.address());
    says(
        &error,
        &["rolled back", DATA, &address, "start the plan again"],
    )?;
    shop::runs_on(source)?;
    shop::nothing_left_on(target)?;
    ensure!(flipped(&lab)?.len() == 1, "nothing was flipped");
    shop::moved(&lab, &crew, &before)?;
    same_on_both(&lab, source, target)
}
