//! `lifeboat status`: verdict, plans, and how well the agent itself can see.

use super::daemon::ask;
use super::meter::Meter;
use super::output::clear;
use super::policy::lasts;
use super::{Context, Failure, Outcome};
use crate::api::local::Status;
use crate::health::Stage;
use crate::migration::Arriving;
use crate::model::ids::PlanId;
use crate::model::ids::visible::visible;
use crate::model::units::{human_duration, utc};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Shows the verdict with its evidence, plans under way, disabled sensors, losses and their cost.
#[derive(clap::Args)]
pub struct Arguments {
    /// Show it again every second, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

/// Prints the status once, or for ever.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    let mut meters = BTreeMap::new();
    ask(&context.socket, async |agent| {
        loop {
            let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
            let text = if context.json {
                serde_json::to_string(&status)?
            } else {
                render(&status, &mut meters)
            };
            if arguments.watch && std::io::stdout().is_terminal() {
                clear();
            }
            println!("{}", text.trim_end());
            std::io::stdout().flush()?;
            if !arguments.watch {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
}

fn render(status: &Status, meters: &mut BTreeMap<PlanId, Meter>) -> String {
    let snapshot = &status.view.snapshot;
    let mut lines = Vec::new();
    match &status.view.verdict {
        None => lines.push(format!(
            "{}: {}",
            status.device,
            if status.judgement.is_some() {
                "no verdict yet"
            } else {
                "no policy is loaded, so no verdict"
            }
        )),
        Some(verdict) => {
            let age = human_duration(status.now.since(verdict.since));
            let watched = match verdict.stage {
                Some(Stage::Watch) => ", to be watched",
                Some(Stage::Prepare) => ", to be prepared",
                Some(Stage::Evacuate) | None => "",
            };
            let held = verdict.held_until.map_or_else(String::new, |until| {
                format!(
                    ", held by the policy's `hold` until {} ({} more)",
                    utc(until),
                    human_duration(until.since(status.now))
                )
            });
            lines.push(format!(
                "{}: {}{watched} for {age}{held}",
                status.device, verdict.kind
            ));
            lines.extend(
                verdict
                    .evidence
                    .iter()
                    .map(|evidence| format!("  {}", evidence.text)),
            );
            lines.extend(
                verdict
                    .missing
                    .iter()
                    .map(|missing| format!("  missing: {}", missing.text)),
            );
        }
    }
    if let Some(pause) = status.judgement.iter().find_map(|one| one.paused.as_ref()) {
        lines.push(format!(
            "  paused {}: nothing moves by itself ({})",
            lasts(pause),
            pause.why
        ));
    }
    for plan in &status.plans {
        let meter = meters.entry(plan.plan.clone()).or_default();
        lines.push(meter.line(plan));
        lines.extend(plan.choice.iter().map(|choice| format!("  {}", choice.why)));
        for role in &plan.awaits {
            lines.push(format!(
                "  waits for `lifeboat approve {} --as {role}`",
                plan.plan
            ));
        }
        let devices = [("target", &plan.target), ("paired device", &plan.paired)];
        for (role, device) in devices {
            lines.extend(device.iter().map(|device| format!("  {role} {device}")));
        }
        lines.extend(plan.stand_in.iter().map(|device| {
            format!(
                "  {device} answers the target in this device's stead; given out here: {} read for it, {} for the target itself",
                plan.given.paired.read, plan.given.target.read
            )
        }));
    }
    for Arriving {
        plan,
        source,
        arrival,
    } in &status.arriving
    {
        let trouble = arrival.trouble.as_ref();
        let trouble = trouble.map_or_else(String::new, |text| format!(" [{text}]"));
        lines.push(format!(
            "plan {plan} from {source}: its twins run here, {} here{trouble}",
            arrival.share()
        ));
    }
    lines.extend(
        status
            .view
            .problems
            .iter()
            .map(|problem| format!("problem: {problem}")),
    );
    lines.extend(
        snapshot
            .disabled
            .iter()
            .map(|disabled| format!("disabled: {}: {}", disabled.what, disabled.why)),
    );
    lines.extend(
        snapshot
            .losses
            .iter()
            .filter(|loss| loss.lost > 0)
            .map(|loss| format!("lost: {} insert(s) into {}", loss.lost, loss.map)),
    );
    if let Some(percent) = snapshot.watched_percent {
        lines.push(format!(
            "sampled {percent:.0} %: the host switches tasks so often that run-queue latency is watched in windows"
        ));
    }
    let missed = snapshot.programs.iter();
    lines.extend(
        missed
            .filter(|program| program.missed > 0)
            .map(|program| format!("lost: {} run(s) of {}", program.missed, program.name)),
    );
    if let Some(memory) = snapshot.map_memory {
        lines.push(format!("kernel memory of all maps: {memory}"));
    }
    for program in snapshot.programs.iter().filter(|program| program.runs > 0) {
        lines.push(format!(
            "kernel program {}: {} runs, {} ns each",
            program.name,
            program.runs,
            program.run_time_ns / program.runs
        ));
    }
    let lines: Vec<_> = lines.iter().map(|line| visible(line)).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::{Verdict, VerdictKind};
    use crate::model::telemetry::Snapshot;
    use crate::model::units::UnixMillis;

    #[test]
    fn a_verdict_that_the_hold_keeps_says_what_keeps_it_and_until_when() {
        let minutes = |minutes: u64| UnixMillis(1_750_000_000_000 + minutes * 60_000);
        let mut status = Status {
            device: "h1".into(),
            now: minutes(7),
            view: Default::default(),
            plans: Vec::new(),
            arriving: Vec::new(),
            judgement: None,
        };
        status.view.snapshot = Snapshot {
            at: minutes(7),
            ..Snapshot::default()
        };
        status.view.problems = vec!["/srv/a\x1b[2J\nh2: healthy".into()];
        status.view.verdict = Some(Verdict {
            kind: VerdictKind::Degraded,
            since: minutes(0),
            held_until: Some(minutes(10)),
            ..Verdict::default()
        });
        let text = render(&status, &mut BTreeMap::new());
        let expected = format!(
            "h1: degraded for 7 min 0 s, held by the policy's `hold` until {} (3 min 0 s more)\n\
             problem: /srv/a\\x1b[2J\\nh2: healthy",
            utc(minutes(10))
        );
        assert_eq!(text, expected);
    }
}
