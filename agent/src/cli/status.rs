//! `lifeboat status`: verdict, plans, and how well the agent itself can see.

use super::daemon::ask;
use super::{Context, Failure, Outcome};
use crate::api::local::Status;
use crate::model::units::human_duration;
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
    ask(&context.socket, async |agent| {
        loop {
            let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
            let text = if context.json {
                serde_json::to_string(&status)?
            } else {
                render(&status)
            };
            if arguments.watch && std::io::stdout().is_terminal() {
                print!("\x1b[H\x1b[2J");
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

fn render(status: &Status) -> String {
    let snapshot = &status.view.snapshot;
    let mut lines = Vec::new();
    match &status.view.verdict {
        None => lines.push(format!(
            "{}: no policy is loaded, so no verdict",
            status.device
        )),
        Some(verdict) => {
            let age = human_duration(snapshot.at.since(verdict.since));
            lines.push(format!("{}: {} for {age}", status.device, verdict.kind));
            lines.extend(verdict.evidence.iter().map(|evidence| {
                format!("  {}; clears when {}", evidence.text, evidence.clears_when)
            }));
            lines.extend(
                verdict
                    .missing
                    .iter()
                    .map(|missing| format!("  missing: {}", missing.text)),
            );
        }
    }
    for plan in &status.plans {
        let end = |device: &Option<_>| {
            device
                .as_ref()
                .map_or_else(|| "-".into(), ToString::to_string)
        };
        lines.push(format!(
            "plan {}: {}, target {}, paired device {}, {} read, {} sent",
            plan.plan,
            plan.phase,
            end(&plan.target),
            end(&plan.paired),
            plan.bytes_read,
            plan.bytes_sent
        ));
        lines.extend(
            plan.trouble
                .iter()
                .map(|text| format!("  retrying: {text}")),
        );
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
    for program in snapshot.programs.iter().filter(|program| program.runs > 0) {
        lines.push(format!(
            "kernel program {}: {} runs, {} ns each",
            program.name,
            program.runs,
            program.run_time_ns / program.runs
        ));
    }
    lines.join("\n")
}
