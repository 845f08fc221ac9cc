//! What the agent takes from its host's own work: the same loads without it, with it, and with bpftrace's
//! `runqlat` and `biolatency` in its place.
//!
//! The three take turns with the loads, so that what else moves on the machine falls on all of them; what one of
//! them takes is the median over the rounds of its rate beside that of the same round without anything. Every process
//! of a load keeps to one CPU: where the scheduler happens to put two that talk to each other moves a rate by more than
//! a tenth, which is what a goal of 2 % cannot be seen through.

use std::fs;
use std::process::Child;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::bpftrace::{self, Tracing};
use super::tools::{CLIENT_CPU, furnish, inside, redis, server};
use super::{goal, machine, median};
use crate::crew::{Crew, Device};
use crate::lab::{Host, Lab, LabSpec};
use crate::{setup, workspace};

const DEVICE: &str = "loaded";

/// `runqlat.bt` and `biolatency.bt` of bpftrace's tools, the latter over the tracepoints of requests, because
/// the functions it hooks into are not in every kernel.
const PEER: &str = "
tracepoint:sched:sched_wakeup, tracepoint:sched:sched_wakeup_new { @queued[args->pid] = nsecs; }
tracepoint:sched:sched_switch {
  if (args->prev_state == 0) { @queued[args->prev_pid] = nsecs; }
  $since = @queued[args->next_pid];
  if ($since) { @runqlat = hist((nsecs - $since) / 1000); }
  delete(@queued[args->next_pid]);
}
tracepoint:block:block_rq_issue { @issued[args->dev, args->sector] = nsecs; }
tracepoint:block:block_rq_complete /@issued[args->dev, args->sector]/ {
  @biolatency = hist((nsecs - @issued[args->dev, args->sector]) / 1000);
  delete(@issued[args->dev, args->sector]);
}";

/// Work of the host whose rate is measured.
struct Load {
    what: &'static str,
    unit: &'static str,
    rate: fn(&Host, u32) -> Result<f64>,
}

const ON_ONE_CPU: [&str; 3] = ["taskset", "--cpu-list", CLIENT_CPU];

const LOADS: [Load; 5] = [
    Load {
        what: "`perf bench sched pipe`: two processes on one CPU wake each other",
        unit: "wake-ups/s",
        rate: |host, seconds| {
            let rate = |loops: u32| -> Result<f64> {
                let loops = loops.to_string();
                let bench = [
                    "perf", "bench", "-f", "simple", "sched", "pipe", "-l", &loops,
                ];
                let took: f64 = host.run(ON_ONE_CPU.iter().chain(&bench))?.trim().parse()?;
                Ok(loops.parse::<f64>()? / took)
            };
            let loops = rate(20_000)? * f64::from(seconds);
            Ok(rate(loops as u32)? * 2.0)
        },
    },
    Load {
        what: "connect, ping, close: container to container",
        unit: "connections/s",
        rate: |host, seconds| redis(host, 10_000 * seconds, "-k 0 -c 4 -t ping_inline"),
    },
    Load {
        what: "`redis-benchmark`, SET: container to container",
        unit: "requests/s",
        rate: |host, seconds| redis(host, 60_000 * seconds, "-c 20 -t set"),
    },
    Load {
        what: "`iperf3`, one stream: container to container",
        unit: "Gbit/s",
        rate: |host, seconds| {
            let script = format!("iperf3 -c {} -t {seconds} --json", server(host)?);
            let report: Value = serde_json::from_str(&inside(host, &script)?)?;
            let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
            Ok(bits.context("iperf3 reports no rate")? / 1e9)
        },
    },
    Load {
        what: "`fio`, random reads of 4 KiB, O_DIRECT, 8 in flight",
        unit: "reads/s",
        rate: |host, seconds| {
            let script = format!(
                "fio --name=reads --filename=/srv/reads --size=512M --rw=randread --bs=4k --direct=1 \
                 --ioengine=libaio --iodepth=8 --runtime={seconds} --time_based --output-format=json"
            );
            let report: Value = serde_json::from_str(&inside(host, &script)?)?;
            let rate = report["jobs"][0]["read"]["iops"].as_f64();
            rate.context("fio reports no rate")
        },
    },
];

/// What runs beside the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Agent,
    Peer,
}

const BESIDE: [Beside; 3] = [Beside::Nothing, Beside::Agent, Beside::Peer];

pub(super) fn measure(short: bool) -> Result<String> {
    let (rounds, seconds) = if short { (1, 1) } else { (9, 3) };
    setup::provide("perf", "linux-perf", "`perf bench sched pipe`")?;
    let tracing = Tracing::mounted()?;
    let lab = Lab::up(&LabSpec {
        name: format!("overhead-{}", std::process::id()),
        hosts: vec![machine::bare("duplicator"), DEVICE.into()],
    })?;
    let host = lab.host(DEVICE)?;
    furnish(host)?;
    let policy = fs::read_to_string(workspace::root().join("policies/default.yaml"))?;
    let device = Device {
        policy: Some(policy),
        ..Device::new(DEVICE)
    };
    let mut crew = Crew::start(&lab, "duplicator", &[device])?;
    crew.kill_agent(DEVICE)?;

    let mut rates = vec![[const { Vec::new() }; 3]; LOADS.len()];
    for round in 0..rounds {
        for turn in 0..3 {
            // Each is first as often as it is last.
            let place = (round + turn) % 3;
            let peer = match BESIDE[place] {
                Beside::Nothing => None,
                Beside::Agent => {
                    crew.start_agent(DEVICE)?;
                    // Starting is not watching.
                    thread::sleep(Duration::from_secs(3));
                    None
                }
                Beside::Peer => Some(Peer(bpftrace::start(PEER)?)),
            };
            for (load, rates) in LOADS.iter().zip(&mut rates) {
                rates[place].push((load.rate)(host, seconds)?);
            }
            drop(peer);
            if BESIDE[place] == Beside::Agent {
                crew.kill_agent(DEVICE)?;
            }
        }
        for (load, rates) in LOADS.iter().zip(&rates) {
            let told: Vec<f64> = rates
                .iter()
                .filter_map(|rates| rates.last().copied())
                .collect();
            eprintln!(
                "{}: alone, with the agent, with bpftrace: {told:.1?}",
                load.what
            );
        }
    }
    lab.down()?;
    drop(tracing);

    let mut text = format!(
        "## What the agent takes from its host\n\nThe same load without anything, with the agent (policy `default.yaml`), and with \
         bpftrace's runqlat and biolatency; {seconds} s each, taking turns, medians of {rounds} rounds; what is taken is the median of \
         the ratios within a round. Clients keep to one CPU, servers to another. The spread is that of the rounds without anything, from the slowest to the fastest.\n\n\
         | load | alone | spread | with the agent | with bpftrace | the agent takes | bpftrace takes | goal |\n\
         |---|---|---|---|---|---|---|---|\n"
    );
    for (load, rates) in LOADS.iter().zip(&rates) {
        let least = rates[0].iter().copied().fold(f64::INFINITY, f64::min);
        let most = rates[0].iter().copied().fold(0.0, f64::max);
        let taken = |place: usize| {
            let pairs = rates[0].iter().zip(&rates[place]);
            let shares: Vec<f64> = pairs
                .map(|(alone, with)| (1.0 - with / alone) * 100.0)
                .collect();
            median(&shares)
        };
        let alone = median(&rates[0]);
        text.push_str(&format!(
            "| {} | {} {} | {:.1} % | {} | {} | {:.1} % | {:.1} % | {} |\n",
            load.what,
            figure(alone),
            load.unit,
            (most - least) / alone * 100.0,
            figure(median(&rates[1])),
            figure(median(&rates[2])),
            taken(1),
            taken(2),
            goal("at most 2 %", taken(1) <= 2.0),
        ));
    }
    Ok(text)
}

fn figure(rate: f64) -> String {
    if rate < 100.0 {
        format!("{rate:.2}")
    } else {
        format!("{rate:.0}")
    }
}

/// A running bpftrace; ended with it.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
