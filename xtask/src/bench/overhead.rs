//! What the agent takes from its host's own work: the same loads without it, with it, and with bpftrace's
//! `runqlat` and `biolatency` in its place.
//!
//! The three take turns at one load, seconds apart, so that what else moves on the machine falls on all of them; what
//! one of them takes is the median over the rounds of its rate beside that of the same round without anything, and
//! goes with the interval that holds the true median in at least 95 of 100 such measurements. Every process of a load
//! keeps to one CPU: where the scheduler happens to put two that talk to each other moves a rate by more than a tenth,
//! which is what a goal of 2 % cannot be seen through.

use std::process::Child;
use std::time::Instant;
use std::{fmt, fs};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};
use serde_json::Value;

use super::agent::{first_process, ticks};
use super::bpftrace::{self, Idle, Tracing};
use super::programs::{Measuring, costs, now_ms};
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

/// Of a load's rate, in percent.
const MOST_TAKEN: f64 = 2.0;

const WARM_UP_SECONDS: u32 = 2;

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
    let (rounds, seconds) = if short { (1, 1) } else { (13, 3) };
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
    for (load, rates) in LOADS.iter().zip(&mut rates) {
        for round in 0..rounds {
            for turn in 0..3 {
                // Each is first as often as it is last.
                let place = (round + turn) % 3;
                let peer = match BESIDE[place] {
                    Beside::Nothing => None,
                    Beside::Agent => {
                        crew.start_agent(DEVICE)?;
                        None
                    }
                    Beside::Peer => Some(Peer(bpftrace::start(PEER)?)),
                };
                // Starting is not watching, and the agent looks less closely at what happens often.
                (load.rate)(host, WARM_UP_SECONDS)?;
                rates[place].push((load.rate)(host, seconds)?);
                drop(peer);
                if BESIDE[place] == Beside::Agent {
                    crew.kill_agent(DEVICE)?;
                }
            }
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
    crew.start_agent(DEVICE)?;
    let mut used = Vec::new();
    for load in &LOADS {
        used.push(Used::by(load, &crew, host, seconds)?);
    }
    lab.down()?;
    drop(tracing);

    let mut text = format!(
        "## What the agent takes from its host\n\nThe same load without anything, with the agent (policy `default.yaml`), and with \
         bpftrace's runqlat and biolatency; {seconds} s each after {WARM_UP_SECONDS} s of the same, taking turns, medians of {rounds} \
         rounds; what is taken is the median of the ratios within a round, in brackets the interval that holds the true one in at \
         least 95 of 100 such measurements. Clients keep to one CPU, servers to another. The spread is that of the rounds without \
         anything, from the slowest to the fastest.\n\n\
         | load | alone | spread | with the agent | with bpftrace | the agent takes | bpftrace takes | goal |\n\
         |---|---|---|---|---|---|---|---|\n"
    );
    for (load, rates) in LOADS.iter().zip(&rates) {
        let least = rates[0].iter().copied().fold(f64::INFINITY, f64::min);
        let most = rates[0].iter().copied().fold(0.0, f64::max);
        let alone = median(&rates[0]);
        let (agent, peer) = (
            Taken::of(&rates[0], &rates[1]),
            Taken::of(&rates[0], &rates[2]),
        );
        text.push_str(&format!(
            "| {} | {} {} | {:.1} % | {} | {} | {agent} | {peer} | {} |\n",
            load.what,
            figure(alone),
            load.unit,
            (most - least) / alone * 100.0,
            figure(median(&rates[1])),
            figure(median(&rates[2])),
            agent.goal(),
        ));
    }
    text.push_str(
        "\nThe processor time that it uses meanwhile, apart from that: what the kernel counts for its programs \
         (`bpf_stats_enabled`, less the counting itself), and the agent's own. No load can lose more of its time to it.\n\n\
         | load | kernel programs | the agent | together |\n|---|---|---|---|\n",
    );
    for (load, Used { programs, agent }) in LOADS.iter().zip(used) {
        let together = programs + agent;
        text.push_str(&format!(
            "| {} | {programs:.2} % of a core | {agent:.2} % | {together:.2} % |\n",
            load.what
        ));
    }
    Ok(text)
}

/// Processor time while a load runs, in percent of one core.
struct Used {
    programs: f64,
    agent: f64,
}

impl Used {
    fn by(load: &Load, crew: &Crew, host: &Host, seconds: u32) -> Result<Self> {
        (load.rate)(host, WARM_UP_SECONDS)?;
        let idle = Idle::at("sched:sched_switch")?;
        let _measuring = Measuring::on()?;
        let (idle_runs, idle_time) = idle.cost()?;
        let before = costs(crew, DEVICE, now_ms()?)?;
        let agent = first_process(host, "agent")?;
        let (ticks_before, start) = (ticks(agent)?, Instant::now());
        (load.rate)(host, seconds)?;
        let (passed, ticks) = (start.elapsed(), ticks(agent)? - ticks_before);
        let after = costs(crew, DEVICE, now_ms()?)?;
        let (runs, time) = idle.cost()?;
        let counting = (time - idle_time) / (runs - idle_runs).max(1);
        let own = after.iter().map(|(name, (runs, time))| {
            let (runs_before, time_before) = before.get(name).copied().unwrap_or_default();
            (time - time_before).saturating_sub((runs - runs_before) * counting)
        });
        let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")? as f64;
        Ok(Self {
            programs: own.sum::<u64>() as f64 / passed.as_nanos() as f64 * 100.0,
            agent: ticks as f64 / per_second / passed.as_secs_f64() * 100.0,
        })
    }
}

/// Share of a load's rate, in percent, that what runs beside it takes.
struct Taken {
    median: f64,
    /// Holds the true median in at least 95 of 100 measurements, whatever the distribution; none of few rounds.
    interval: Option<(f64, f64)>,
}

impl Taken {
    fn of(alone: &[f64], with: &[f64]) -> Self {
        let pairs = alone.iter().zip(with);
        let mut shares: Vec<f64> = pairs
            .map(|(alone, with)| (1.0 - with / alone) * 100.0)
            .collect();
        shares.sort_by(f64::total_cmp);
        let interval =
            outside(shares.len()).map(|out| (shares[out], shares[shares.len() - 1 - out]));
        Self {
            median: median(&shares),
            interval,
        }
    }

    fn goal(&self) -> String {
        let met = self.median <= MOST_TAKEN;
        let goal = goal("at most 2 %", met);
        match self.interval {
            Some((least, most)) if (most <= MOST_TAKEN) == met && (least <= MOST_TAKEN) == met => {
                goal
            }
            _ => format!("{goal}, but the other is within the interval"),
        }
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} %", self.median)?;
        match self.interval {
            Some((least, most)) => write!(f, " ({least:.1} to {most:.1})"),
            None => Ok(()),
        }
    }
}

/// How many of `count` sorted values are left out at each end of the interval that holds the median in at least 95 of
/// 100 cases: as many as less than 2.5 % of `count` tosses of a coin come to (the sign test's interval).
fn outside(count: usize) -> Option<usize> {
    let (mut ways, mut below) = (0.5_f64.powi(count as i32), 0.0);
    let mut out = None;
    for heads in 0..count / 2 {
        below += ways;
        if below > 0.025 {
            break;
        }
        out = Some(heads);
        ways *= (count - heads) as f64 / (heads + 1) as f64;
    }
    out
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_median_is_that_of_the_tables() {
        // Ranks of the sign test's interval of 95 %: 1 and 6 of 6, 2 and 9 of 10, 5 and 13 of 17, 6 and 15 of 20.
        let out = [5, 6, 10, 17, 20].map(outside);
        assert_eq!(out, [None, Some(0), Some(1), Some(4), Some(5)]);
    }
}
