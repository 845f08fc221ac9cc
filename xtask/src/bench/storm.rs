//! Many short connections: that none is lost, and what each costs in the kernel's own counters.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::programs::{Costs, Measuring, costs, now_ms};
use super::{goal, machine};
use crate::crew::{Crew, Device};
use crate::lab::{Host, Lab, LabSpec};
use crate::process::wait_for;
use crate::workspace;

const DEVICE: &str = "stormed";
const PORT: u16 = 4501;

/// What runs in the life of a TCP connection.
const PROGRAMS: [&str; 3] = ["inet_sock_set_state", "udp_connect4", "udp_release"];

pub(super) fn measure(short: bool) -> Result<String> {
    let (connections, measured) = if short {
        (100_000, 10_000)
    } else {
        (3_000_000, 100_000)
    };
    let lab = Lab::up(&LabSpec {
        name: format!("storm-{}", std::process::id()),
        hosts: vec![machine::bare("duplicator"), machine::bare(DEVICE)],
    })?;
    let host = lab.host(DEVICE)?;
    let crew = Crew::start(&lab, "duplicator", &[Device::new(DEVICE)])?;
    let mut server = talk(host, "serve", &format!("sink=127.0.0.1:{PORT}"))?;

    let start = Instant::now();
    let made = storm(host, "storm", connections)?;
    let took = start.elapsed();
    let mut seen = 0;
    let until = Instant::now() + Duration::from_secs(10);
    let snapshot = loop {
        let (_, status) = crew.ask(DEVICE, &["status"])?;
        let snapshot = status["view"]["snapshot"].clone();
        let edges = snapshot["edges"].as_array().into_iter().flatten();
        let ours = edges.filter(|edge| edge["port"] == PORT);
        seen = seen.max(ours.filter_map(|edge| edge["connections"].as_u64()).sum());
        if seen >= made || Instant::now() > until {
            break snapshot;
        }
        thread::sleep(Duration::from_millis(200));
    };
    let sum = |list: &str, field: &str| -> u64 {
        let all = snapshot[list].as_array().into_iter().flatten();
        all.filter_map(|one| one[field].as_u64()).sum()
    };
    let (lost, missed) = (sum("losses", "lost"), sum("programs", "missed"));

    let measuring = Measuring::on()?;
    let mut lives = Vec::new();
    for (verb, how) in [("storm", "reset at once"), ("visit", "closed in order")] {
        let before = costs(&crew, DEVICE, now_ms()?)?;
        let made = storm(host, verb, measured)?;
        lives.push(life(how, made, &before, &costs(&crew, DEVICE, now_ms()?)?)?);
    }
    drop(measuring);
    server.kill().context("cannot end the server")?;
    server.wait().context("the server was lost")?;
    lab.down()?;
    Ok(format!(
        "## Short connections\n\n{made} connections with both ends on the host, each reset at once, and what the agent saw of them.\n\n\
         | what | | goal |\n|---|---|---|\n\
         | connections a second | {:.0} over {:.0} s | 50000 over 60 s |\n\
         | not seen | {} | none: {} |\n\
         | failed inserts, all maps | {lost} | |\n\
         | events for which a program did not run | {missed} | |\n\n\
         A connection's life in the kernel's own counters: all programs that run for it, with the two clock readings of each. Of a \
         program that does nothing, these are most.\n\n\
         | {measured} connections | programs run | ns per connection, both ends | ns per end | ns of a run that does nothing | goal |\n\
         |---|---|---|---|---|---|\n{}",
        made as f64 / took.as_secs_f64(),
        took.as_secs_f64(),
        made.saturating_sub(seen),
        goal("none", seen >= made).trim_start_matches("none: "),
        lives.concat(),
    ))
}

fn life(how: &str, made: u64, before: &Costs, after: &Costs) -> Result<String> {
    let spent = |program: &str| -> (u64, u64) {
        let of = |costs: &Costs| costs.get(program).copied().unwrap_or_default();
        let ((runs, time), (runs_before, time_before)) = (of(after), of(before));
        (runs - runs_before, time - time_before)
    };
    let all = PROGRAMS.map(spent);
    let runs: u64 = all.iter().map(|(runs, _)| runs).sum();
    let time: u64 = all.iter().map(|(_, time)| time).sum();
    let (idle_runs, idle_time) = spent("udp_connect4");
    ensure!(
        made > 0 && idle_runs > 0,
        "the kernel counted no connection"
    );
    let each = time / made;
    Ok(format!(
        "| {how} | {:.1} | {each} | {} | {} | at most 1000: {} |\n",
        runs as f64 / made as f64,
        each / 2,
        idle_time / idle_runs,
        goal("", each <= 1_000).trim_start_matches(": "),
    ))
}

fn talk(host: &Host, verb: &str, what: &str) -> Result<std::process::Child> {
    let talker = workspace::binary("talker");
    let talker = talker.to_str().context("a path of text")?;
    let child = host.spawn_logged("talker", [talker, verb, what])?;
    wait_for("the talker", Duration::from_secs(5), || {
        let said = fs::read_to_string(host.log("talker"))?;
        Ok(said.contains("ready").then_some(()))
    })?;
    Ok(child)
}

/// Runs as many connections, and returns how many were made.
fn storm(host: &Host, verb: &str, connections: u64) -> Result<u64> {
    let talker = workspace::binary("talker");
    let talker = talker.to_str().context("a path of text")?;
    let said = host.run([talker, verb, &format!("{connections}=127.0.0.1:{PORT}")])?;
    said.trim().parse().with_context(|| said)
}
