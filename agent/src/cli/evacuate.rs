//! `lifeboat evacuate`: plan, ask, run, show progress.

use super::daemon::{Selection, ask};
use super::meter::Meter;
use super::{Context, Failure, Outcome};
use crate::api::client::Client;
use crate::api::local::{EvacuateRequest, Status};
use crate::migration::report::{Report, State};
use crate::model::ids::PlanId;
use crate::model::plan::Plan;
use crate::model::units::Bytes;
use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

/// Moves containers and their data to a target that the duplicator chooses.
#[derive(clap::Args)]
#[command(
    override_usage = "lifeboat evacuate [OPTIONS] <CONTAINERS>...\n       lifeboat evacuate [OPTIONS] --all"
)]
pub struct Arguments {
    #[command(flatten)]
    selection: Selection,
    /// Go on also when `fleet_max_evacuating` of the policy forbids one more evacuation now.
    #[arg(long)]
    ignore_storm_guard: bool,
    /// Most bytes a second that the copy may read, such as 20MiB; instead of the policy's.
    #[arg(long, value_name = "RATE", value_parser = crate::health::rate)]
    limit: Option<Bytes>,
    /// Move this volume although its disk does not give up everything: what is lost is as it came before, zeros or missing on the target.
    #[arg(long, value_name = "VOLUME")]
    accept_loss: Vec<String>,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

/// Runs the evacuation to its end.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    let mut request = arguments.selection.request();
    request.guards.limit = arguments.limit;
    request
        .guards
        .accepted_losses
        .clone_from(&arguments.accept_loss);
    ask(&context.socket, async |agent| {
        if !arguments.yes {
            let plan: Plan = agent
                .post("/v1/plan", &request)
                .await
                .map_err(Failure::of)?;
            if !plan.blockers.is_empty() {
                eprint!("{}", super::plan::render(&plan));
                return Err(Failure::Blocked(anyhow::anyhow!(
                    "the plan is blocked by {} thing(s) above; nothing was done",
                    plan.blockers.len()
                )));
            }
            if !confirmed(&plan)? {
                return Err(Failure::Blocked(anyhow::anyhow!(
                    "not confirmed; nothing was done"
                )));
            }
        }
        let ask = EvacuateRequest {
            request,
            ignore_storm_guard: arguments.ignore_storm_guard,
        };
        let id: PlanId = agent
            .post("/v1/evacuate", &ask)
            .await
            .map_err(Failure::of)?;
        follow(agent, &id, context).await
    })
}

fn confirmed(plan: &Plan) -> Result<bool, Failure> {
    eprint!("{}", super::plan::render(plan));
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Blocked(anyhow::anyhow!(
            "not confirmed: no terminal to ask on; say --yes to go on without"
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
    let (mut meter, mut told) = (Meter::default(), String::new());
    loop {
        let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
        if let Some(plan) = status.plans.iter().find(|plan| &plan.plan == id) {
            if !context.json {
                let why = plan.choice.as_ref().map(|choice| &choice.why);
                if let Some(why) = why.filter(|why| *why != &told) {
                    meter.end();
                    eprintln!("{why}");
                    told.clone_from(why);
                }
                meter.draw(plan);
            }
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
        _ if context.json => Err(Failure::Told(4)),
        _ => Err(Failure::Blocked(anyhow::anyhow!(
            "plan {id} was rolled back, the containers run on here: {}",
            report.reason.unwrap_or_default()
        ))),
    }
}
