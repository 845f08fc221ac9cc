//! `lifeboat evacuate`: plan, ask, run, show progress.

use super::daemon::{Selection, ask};
use super::{Context, Failure, Outcome};
use crate::api::client::Client;
use crate::api::local::Status;
use crate::migration::PlanStatus;
use crate::migration::report::{Report, State};
use crate::model::ids::PlanId;
use crate::model::plan::Plan;
use crate::model::units::{Bytes, human_duration};
use std::io::{BufRead, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Moves containers and their data to a target that the duplicator chooses.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    selection: Selection,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

/// Runs the evacuation to its end.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    let request = arguments.selection.request();
    ask(&context.socket, async |agent| {
        if !arguments.yes {
            let plan: Plan = agent
                .post("/v1/plan", &request)
                .await
                .map_err(Failure::of)?;
            if !confirmed(&plan)? {
                return Err(Failure::Blocked(anyhow::anyhow!(
                    "not confirmed; nothing was done"
                )));
            }
        }
        let id: PlanId = agent
            .post("/v1/evacuate", &request)
            .await
            .map_err(Failure::of)?;
        follow(agent, &id, context).await
    })
}

fn confirmed(plan: &Plan) -> Result<bool, Failure> {
    eprint!("{}", super::plan::render(plan));
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Failed(anyhow::anyhow!(
            "no terminal to ask on; say --yes to go on without"
        )));
    }
    eprint!("move them? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "yes"))
}

/// Shows progress until the plan is over, then the report.
async fn follow(agent: &Client, id: &PlanId, context: &Context) -> Outcome {
    let mut meter = Meter::default();
    loop {
        let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
        if let Some(plan) = status.plans.iter().find(|plan| &plan.plan == id) {
            meter.show(plan, context.json);
            if plan.over {
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    meter.end();
    let report: Report = agent
        .get(&format!("/v1/plans/{id}/report"))
        .await
        .map_err(Failure::of)?;
    super::plans::print_report(&report, context)?;
    match report.state {
        State::Completed => Ok(()),
        _ => Err(Failure::Blocked(anyhow::anyhow!(
            "plan {id} was rolled back, the containers run on here: {}",
            report.reason.unwrap_or_default()
        ))),
    }
}

/// A line of phase, rate and remaining time.
#[derive(Default)]
pub struct Meter {
    phase: String,
    trouble: Option<String>,
    last: Option<(Instant, Bytes)>,
    rate: f64,
    drawn: bool,
}

impl Meter {
    /// Shows the plan's progress: a line that is drawn over on a terminal, else a line for each phase.
    pub fn show(&mut self, plan: &PlanStatus, json: bool) {
        if json {
            return;
        }
        if let Some((at, read)) = self.last {
            let seconds = at.elapsed().as_secs_f64().max(1e-3);
            let now = plan.bytes_read.0.saturating_sub(read.0) as f64 / seconds;
            self.rate = if self.rate == 0.0 {
                now
            } else {
                0.7 * self.rate + 0.3 * now
            };
        }
        self.last = Some((Instant::now(), plan.bytes_read));
        let terminal = std::io::stderr().is_terminal();
        let changed = plan.phase != self.phase || plan.trouble != self.trouble;
        self.phase.clone_from(&plan.phase);
        self.trouble.clone_from(&plan.trouble);
        if !terminal && !changed {
            return;
        }
        let left = plan.bytes_total.0.saturating_sub(plan.bytes_read.0) as f64;
        let remaining = if self.rate > 1.0 && plan.phase == "replicate" {
            format!(
                ", {} left",
                human_duration(Duration::from_secs_f64(left / self.rate))
            )
        } else {
            String::new()
        };
        let trouble = plan
            .trouble
            .as_ref()
            .map(|text| format!(" [{text}]"))
            .unwrap_or_default();
        let line = format!(
            "{}: {}: {} of about {} read, {} sent, {}/s{remaining}{trouble}",
            plan.plan,
            plan.phase,
            plan.bytes_read,
            plan.bytes_total,
            plan.bytes_sent,
            Bytes(self.rate as u64)
        );
        if terminal {
            eprint!("\r\x1b[K{line}");
            self.drawn = true;
        } else {
            eprintln!("{line}");
        }
    }

    /// Ends the line.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.drawn) {
            eprintln!();
        }
    }
}
