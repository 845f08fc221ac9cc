//! A crowded host: the agent's memory with 500 containers and 10,000 live connections, and its CPU while
//! thousands of connections a second are made.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::agent::{cpu_share, first_process, resident_mib};
use super::tools::{self, furnish, inside, server};
use super::{goal, machine};
use crate::crew::{Crew, Device};
use crate::lab::{Lab, LabSpec};
use crate::process::wait_for;

const DEVICE: &str = "crowded";

pub(super) fn measure(short: bool) -> Result<String> {
    let (containers, connections, seconds) = if short {
        (50, 1000, 3)
    } else {
        (500, 10_000, 15)
    };
    let lab = Lab::up(&LabSpec {
        name: format!("crowd-{}", std::process::id()),
        hosts: vec![machine::bare("duplicator"), DEVICE.into()],
    })?;
    let host = lab.host(DEVICE)?;
    furnish(host)?;
    for number in 2..containers {
        let name = format!("idle-{number}");
        let options = ["run", "--detach", "--network", "none", "--name", &name];
        let command = [tools::IMAGE, "/bin/sleep", "100000"];
        host.podman(options.iter().chain(&command))?;
    }
    let crew = Crew::start(&lab, "duplicator", &[Device::new(DEVICE)])?;
    wait_for("all containers in view", Duration::from_secs(120), || {
        let (_, status) = crew.ask(DEVICE, &["status"])?;
        let running = status["view"]["containers"].as_array();
        let running = running.into_iter().flatten();
        let running = running.filter(|container| container["state"] == "running");
        Ok((running.count() >= containers).then_some(()))
    })?;
    let agent = first_process(host, "agent")?;

    let address = server(host)?;
    let hold = format!("redis-benchmark -h {address} -I -c {connections} >/dev/null & echo $!");
    let holder = inside(host, &hold)?;
    wait_for("live connections", Duration::from_secs(30), || {
        let clients = inside(host, &format!("redis-cli -h {address} info clients"))?;
        let count = clients
            .lines()
            .find_map(|line| line.strip_prefix("connected_clients:"));
        let count: usize = count
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0);
        Ok((count >= connections).then_some(()))
    })?;
    // Many sweeps over them.
    thread::sleep(Duration::from_secs(15));
    let resident = resident_mib(agent)?;
    inside(host, &format!("kill {}", holder.trim()))?;
    thread::sleep(Duration::from_secs(3));

    let (client, from) = (host.clone(), Instant::now());
    let time = Duration::from_secs(seconds);
    let load = thread::spawn(move || -> Result<(u32, Duration)> {
        let (mut made, mut last) = (0, from.elapsed());
        while last < time {
            tools::redis(&client, 10_000, "-k 0 -c 4 -t ping_inline")?;
            made += 10_000;
            last = from.elapsed();
        }
        Ok((made, last))
    });
    let cpu = cpu_share(&[agent], time)?[0];
    let joined = load.join().ok().context("the load's thread panicked")?;
    let (made, took) = joined?;
    let rate = f64::from(made) / took.as_secs_f64();
    let (_, relations) = crew.ask(DEVICE, &["relations"])?;
    ensure!(
        relations.to_string().contains("client"),
        "the agent saw none of the connections: {relations}"
    );
    lab.down()?;

    let scaled = cpu * 10_000.0 / rate;
    Ok(format!(
        "## A crowded host\n\n{containers} running containers; {connections} live connections from one to another; then {seconds} s of new \
         connections, each closed after a ping.\n\n\
         | what | | goal |\n|---|---|---|\n\
         | resident memory (VmRSS) | {resident:.1} MiB | {} |\n\
         | new connections a second | {rate:.0} | |\n\
         | CPU of the agent meanwhile | {:.2} % of a core | |\n\
         | the same at 10,000 connections a second | {:.2} % of a core | {} |\n",
        goal("at most 40 MiB", resident <= 40.0),
        cpu * 100.0,
        scaled * 100.0,
        goal("at most 5 %", scaled <= 0.05),
    ))
}
