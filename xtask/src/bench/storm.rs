//! Many short connections: that none is lost, and what each costs in the kernel's own counters.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::bpftrace::Idle;
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
    let (lasting, measured) = if short {
        (Duration::from_secs(2), 10_000)
    } else {
        (Duration::from_secs(60), 100_000)
    };
    let lab = Lab::up(&LabSpec {
        name: format!("storm-{}", std::process::id()),
        hosts: vec![machine::bare("duplicator"), machine::bare(DEVICE)],
    })?;
    let host = lab.host(DEVICE)?;
    let crew = Crew::start(&lab, "duplicator", &[Device::new(DEVICE)])?;
    let mut server = talk(host, "serve", &format!("sink=127.0.0.1:{PORT}"))?;

    let start = Instant::now();
    let mut made = 0;
    while start.elapsed() < lasting {
        made += storm(host, "storm", 100_000)?;
    }
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

    let idle = Idle::at("sock:inet_sock_set_state")?;
    let measuring = Measuring::on()?;
    let mut lives = Vec::new();
    for (verb, how) in [("storm", "reset at once"), ("visit", "closed in order")] {
        let before = costs(&crew, DEVICE, now_ms()?)?;
        let (idle_runs, idle_time) = idle.cost()?;
        let made = storm(host, verb, measured)?;
        let after = costs(&crew, DEVICE, now_ms()?)?;
        let (runs, time) = idle.cost()?;
        let measuring_ns = (time - idle_time) / (runs - idle_runs).max(1);
        lives.push(life(how, made, &before, &after, measuring_ns)?);
    }
    drop((measuring, idle));
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
         A connection's life in the kernel's own counters: all programs that run for both its ends. In the counters are their own \
         clock readings, two a run, which nobody pays while nothing is measured; what they come to is told by a program that does nothing, \
         at the same tracepoint at the same time.\n\n\
         | {measured} connections | programs run | ns of a run that does nothing | ns per connection as counted | of it the programs' own | goal |\n\
         |---|---|---|---|---|---|\n{}",
        made as f64 / took.as_secs_f64(),
        took.as_secs_f64(),
        made.saturating_sub(seen),
        goal("none", seen >= made).trim_start_matches("none: "),
        lives.concat(),
    ))
}

fn life(how: &str, made: u64, before: &Costs, after: &Costs, measuring_ns: u64) -> Result<String> {
    let spent = |program: &str| -> (u64, u64) {
        let of = |costs: &Costs| costs.get(program).copied().unwrap_or_default();
        let ((runs, time), (runs_before, time_before)) = (of(after), of(before));
        (runs - runs_before, time - time_before)
    };
    let all = PROGRAMS.map(spent);
    let runs: u64 = all.iter().map(|(runs, _)| runs).sum();
    let time: u64 = all.iter().map(|(_, time)| time).sum();
    ensure!(made > 0 && runs > 0, "the kernel counted no connection");
    let (each, own) = (time / made, time.saturating_sub(runs * measuring_ns) / made);
    Ok(format!(
        "| {how} | {:.1} | {measuring_ns} | {each} | {own} | at most 1000: {} |\n",
        runs as f64 / made as f64,
        goal("", own <= 1_000).trim_start_matches(": "),
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
