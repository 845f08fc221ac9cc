//! `cargo xtask soak switch`: kills the real agents of source and target through plans that switch first, to their
//! ends and to their aborts, while the volume is changed where the twin has it.
//!
//! Each kill is a SIGKILL of one agent or of both at a random instant, or a cable that is pulled; agents are started anew.
//! After an abort the source must have the tree as it was where the twin had it, compared with a model by rsync, both
//! ways; after an end the target must, and the source what it had at the switch.

use std::collections::BTreeSet;
use std::fmt;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use super::changes::{Progress, Work};
use super::{Chance, PATIENCE, same, tree};
use crate::crew::{Crew, Device};
use crate::images;
use crate::lab::{Host, HostSpec, Lab, LabSpec};
use crate::process::{output, wait_for};

/// What to do to plans that switch first.
#[derive(Debug, Args)]
pub struct Switch {
    /// Kills of agents, and cuts
    #[arg(long, default_value_t = 400)]
    pub kills: u32,
    /// Repeats the choices of a run that printed this seed
    #[arg(long)]
    pub seed: Option<u64>,
    /// Data of each plan, in MiB
    #[arg(long, default_value_t = 24)]
    pub mib: u64,
}

const SOURCE: &str = "source";
const TARGET: &str = "target";
const OFFICE: &str = "office";
/// What each volume is at the beginning.
const BEGINNING: &str = "/srv/beginning";
/// Most kills and cuts of a plan.
const KILLS_MAX: u32 = 8;
/// The link, so that data comes behind for longer than agents take to start.
const MBIT: u32 = 24;
/// Changes where the twin has its volume, before an abort is asked for.
const CHANGES: u32 = 40;
/// Of a plan from its beginning to its end.
const PLAN_PATIENCE: Duration = Duration::from_secs(240);

/// What happened to the plans.
#[derive(Debug, Default)]
pub struct Tally {
    /// Plans that were carried to their end.
    pub completed: u32,
    /// Plans that were aborted after their switch.
    pub returned: u32,
    /// Plans that ended by themselves before it.
    pub rolled_back: u32,
    /// Kills of source, target and both, and cuts.
    pub kills: [u32; 4],
    /// Changes of volumes that were answered, and that were interrupted.
    pub changes: [u32; 2],
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [source, target, both, link] = self.kills;
        write!(
            f,
            "{} plans completed, {} given back, {} rolled back; {} kills (source {source}, target {target}, \
             both {both}, link {link}); {} changes, {} interrupted",
            self.completed,
            self.returned,
            self.rolled_back,
            self.kills.iter().sum::<u32>(),
            self.changes[0],
            self.changes[1],
        )
    }
}

/// Kills agents through plans that switch first, until there were `wanted.kills` kills: every second plan is aborted.
///
/// # Errors
/// A tree is not what it must be, a container runs where it must not, or a plan does not end.
pub fn switch(wanted: &Switch) -> Result<Tally> {
    let chance = Chance::new("soak", wanted.seed);
    let seed = chance.0;
    let office = HostSpec {
        containers: false,
        ..OFFICE.into()
    };
    let lab = Lab::up(&LabSpec {
        name: format!("soak-switch-{}", std::process::id()),
        hosts: vec![SOURCE.into(), TARGET.into(), office],
    })?;
    for host in [SOURCE, TARGET] {
        images::load_some(lab.host(host)?, &["redis"])?;
    }
    tree::furnish(&lab.host(SOURCE)?.path(BEGINNING), wanted.mib)?;
    let crew = Crew::start(&lab, OFFICE, &[Device::new(SOURCE), Device::new(TARGET)])?;
    let mut soak = Soak {
        lab: &lab,
        crew,
        chance,
        known: BTreeSet::new(),
        tally: Tally::default(),
    };
    for number in 0.. {
        let left = wanted.kills.saturating_sub(soak.struck());
        let both = soak.tally.completed > 0 && soak.tally.returned > 0;
        if left == 0 && both {
            break;
        }
        let begun = Instant::now();
        let kills = 2 + soak.chance.below(u64::from(KILLS_MAX) - 1) as u32;
        let carried = soak.carry(number, left.min(kills), number % 2 == 0);
        carried.with_context(|| {
            let logs = [SOURCE, TARGET].map(|host| format!("{host}:\n{}", soak.crew.log(host)));
            format!("seed {seed}, plan {number}\n{}", logs.join("\n"))
        })?;
        println!(
            "soak: {} ({:.0} s)",
            soak.tally,
            begun.elapsed().as_secs_f64()
        );
    }
    let tally = soak.tally;
    lab.down()?;
    Ok(tally)
}

struct Soak<'l> {
    lab: &'l Lab,
    crew: Crew,
    chance: Chance,
    /// Plans so far.
    known: BTreeSet<String>,
    tally: Tally,
}

impl Soak<'_> {
    fn struck(&self) -> u32 {
        self.tally.kills.iter().sum()
    }

    /// One plan, with so many kills.
    fn carry(&mut self, number: u32, kills: u32, abort: bool) -> Result<()> {
        let (source, target) = (
            self.lab.host(SOURCE)?.clone(),
            self.lab.host(TARGET)?.clone(),
        );
        let (cell, volume) = (format!("cell-{number}"), format!("/srv/volume-{number}"));
        source.run(["cp", "-a", BEGINNING, &volume])?;
        let model = format!("/srv/model-{number}");
        let seen = |host: &Host, path: &str| {
            // Where the lab keeps /srv: rsync does not go through /proc/PID/root.
            let inside = path.trim_start_matches('/');
            self.lab.dir().join(host.name()).join(inside).join("")
        };
        let (at_source, at_target) = (seen(&source, &volume), seen(&target, &volume));
        let modelled = seen(&target, &model);
        let beginning = seen(&source, BEGINNING);
        output(Command::new("cp").arg("-a").args([&beginning, &modelled]))?;
        let (data, mount) = (format!("{cell}-data"), format!("{volume}:/volume"));
        let run = ["run", "--detach", "--name", &cell, "--restart", "always"];
        let kept = format!("{data}:/data");
        let volumes = ["--volume", &kept, "--volume", &mount];
        source.podman([&run[..], &volumes, &["localhost/redis:demo"]].concat())?;
        wait_for("the source's view of its container", PATIENCE, || {
            let (_, status) = self.crew.ask(SOURCE, &["status"])?;
            Ok(status["view"].to_string().contains(&cell).then_some(()))
        })?;
        self.lab.shape(&source, Some(MBIT))?;
        let evacuate = ["evacuate", &cell, "--yes", "--switch-first"];
        let mut evacuating = self.crew.begin(SOURCE, "evacuate", &evacuate)?;
        let plan = self.new_plan()?;

        let chance = Chance(self.chance.below(u64::MAX));
        let mut work = Work::new(&target, &volume, (model.clone(), modelled.clone()), chance);
        let progress = Progress::default();
        let report = thread::scope(|scope| {
            let working = scope.spawn(|| work.run(&progress));
            let report = self.kill_through(&plan, kills, abort, &progress);
            progress.over.store(true, Ordering::Relaxed);
            let worked = working.join();
            worked.map_err(|_| anyhow::anyhow!("the work panicked"))??;
            report
        })?;
        // It ended with its agent or with the plan, or does now.
        evacuating.kill()?;
        evacuating.wait()?;
        self.lab.shape(&source, None)?;
        let changes =
            [&progress.made, &progress.interrupted].map(|count| count.load(Ordering::Relaxed));
        for (sum, count) in self.tally.changes.iter_mut().zip(changes) {
            *sum += count;
        }
        let completed = report["state"] == "completed";
        let (owner, other) = if completed {
            (&target, &source)
        } else {
            (&source, &target)
        };
        let owned = if completed { &at_target } else { &at_source };
        work.settle(owned)?;
        same(&modelled, owned)?;
        if completed {
            same(&beginning, &at_source)?;
            self.crew.tell(SOURCE, &["verify", &plan])?;
            self.tally.completed += 1;
        } else {
            let gone = target.run([
                "sh",
                "-c",
                "ls -A /srv; grep fuse.lifeboat /proc/mounts || true",
            ])?;
            ensure!(!gone.contains("lifeboat"), "left on the target: {gone}");
            let ended = if changes[0] > 0 {
                &mut self.tally.returned
            } else {
                &mut self.tally.rolled_back
            };
            *ended += 1;
        }
        let mirror = source.path(&format!("/var/lib/lifeboat/plans/{plan}.source/mirror"));
        wait_for("the end of the mirror's log", PATIENCE, || {
            Ok((!mirror.exists()).then_some(()))
        })?;
        ensure!(
            runs(owner, &cell)?,
            "{cell} does not run on {}",
            owner.name()
        );
        ensure!(!runs(other, &cell)?, "{cell} runs on {} too", other.name());
        for host in [&source, &target] {
            host.podman(["rm", "--force", "--ignore", "--time", "1", &cell])?;
            host.podman(["volume", "rm", "--force", &data])?;
            host.run(["rm", "-rf", &volume, &model])?;
        }
        Ok(())
    }

    fn new_plan(&mut self) -> Result<String> {
        let plan = wait_for("a plan", PATIENCE, || {
            let (_, status) = self.crew.ask(SOURCE, &["status"])?;
            let plans = status["plans"].as_array().cloned().unwrap_or_default();
            let ids = plans.iter().filter_map(|plan| plan["plan"].as_str());
            Ok(ids.map(str::to_owned).find(|id| !self.known.contains(id)))
        })?;
        self.known.insert(plan.clone());
        Ok(plan)
    }

    /// Kills until the plan is over, and asks for its abort in the midst of it where that is wanted; its report.
    fn kill_through(
        &mut self,
        plan: &str,
        kills: u32,
        abort: bool,
        progress: &Progress,
    ) -> Result<Value> {
        let begun = Instant::now();
        let made = || progress.made.load(Ordering::Relaxed);
        // Of every third plan some before the twin runs.
        if self.chance.below(3) > 0 {
            self.twin_works(plan, progress)?;
        }
        let last = self.chance.below(u64::from(kills.max(1)));
        let mut left = u64::from(kills);
        while left > 0 && self.ended(plan).is_none() {
            // Every third one strikes what the last one left.
            let most = if self.chance.below(3) == 0 { 300 } else { 2500 };
            sleep(self.chance.millis_below(most));
            self.strike()?;
            left -= 1;
            if abort && left <= last && made() >= CHANGES {
                // It may be taken already, or the agent be away.
                let _ = self.crew.tell(SOURCE, &["abort", plan]);
            }
        }
        loop {
            if let Some(report) = self.ended(plan) {
                return Ok(report);
            }
            if abort && made() >= CHANGES {
                let _ = self.crew.tell(SOURCE, &["abort", plan]);
            } else if !abort {
                self.lab.shape(self.lab.host(SOURCE)?, None)?;
            }
            ensure!(begun.elapsed() < PLAN_PATIENCE, "plan {plan} does not end");
            sleep(Duration::from_millis(500));
        }
    }

    /// Waits until the volume was changed where the twin has it, or the plan is over.
    fn twin_works(&self, plan: &str, progress: &Progress) -> Result<()> {
        wait_for("changes where the twin has its volume", PATIENCE, || {
            let works = progress.made.load(Ordering::Relaxed) > 0;
            Ok((works || self.ended(plan).is_some()).then_some(()))
        })
    }

    /// The plan's report once it is over, if the agent answers.
    fn ended(&self, plan: &str) -> Option<Value> {
        let (_, report) = self.crew.ask(SOURCE, &["report", plan]).ok()?;
        matches!(report["state"].as_str(), Some("completed" | "aborted")).then_some(report)
    }

    /// Kills an agent or both, and starts them anew after a while, or pulls the source's cable for one.
    fn strike(&mut self) -> Result<()> {
        let victim = self.chance.below(7) as usize / 2;
        self.tally.kills[victim] += 1;
        let away = self.chance.millis_below(800);
        let agents: &[&str] = match victim {
            0 => &[SOURCE],
            1 => &[TARGET],
            2 => &[SOURCE, TARGET],
            _ => {
                let host = self.lab.host(SOURCE)?;
                self.lab.link(host, false)?;
                sleep(away);
                return self.lab.link(host, true);
            }
        };
        for agent in agents {
            self.crew.kill_agent(agent)?;
        }
        sleep(away);
        for agent in agents {
            self.crew.launch_agent(agent, &[])?;
        }
        Ok(())
    }
}

/// Whether a container runs on a host.
fn runs(host: &Host, name: &str) -> Result<bool> {
    let filter = format!("name=^{name}$");
    Ok(!host
        .podman(["ps", "--quiet", "--filter", &filter])?
        .is_empty())
}
