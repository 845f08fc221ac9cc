//! `lifeboat abort`, `approve`, `report` and `verify`: a plan that exists.

use super::daemon::ask;
use super::{Context, Failure, Outcome};
use crate::api::local::{ApproveRequest, LimitRequest};
use crate::migration::events;
use crate::migration::report::Report;
use crate::migration::verify::Verification;
use crate::model::ids::PlanId;
use crate::model::ids::visible::visible;
use crate::model::units::human_duration;

/// A plan.
#[derive(clap::Args)]
pub struct Arguments {
    /// Plan, as `lifeboat status` names it.
    plan: String,
}

impl Arguments {
    fn path(&self, what: &str) -> Result<String, Failure> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if self.plan.bytes().all(plain) {
            return Ok(format!("/v1/plans/{}/{what}", PlanId(self.plan.clone())));
        }
        Err(Failure::Failed(anyhow::anyhow!(
            "`{}` is no plan id; `lifeboat status` lists them",
            self.plan
        )))
    }
}

/// Stops a plan that is not released, or was switched first and is not whole, and brings everything back.
pub fn abort(arguments: &Arguments, context: &Context) -> Outcome {
    let path = arguments.path("abort")?;
    let () = ask(&context.socket, async |agent| {
        agent.post(&path, &()).await.map_err(Failure::of)
    })?;
    if context.json {
        println!("{}", serde_json::json!({ "aborting": arguments.plan }));
    } else {
        println!(
            "plan {} is being rolled back; `lifeboat report {}` tells when it is, `lifeboat status` what is in the way",
            arguments.plan, arguments.plan
        );
    }
    Ok(())
}

/// A plan and its limit.
#[derive(clap::Args)]
pub struct Limit {
    #[command(flatten)]
    plan: Arguments,
    /// Most bytes a second, such as 20MiB, or `none`.
    #[arg(value_name = "RATE", value_parser = limit_or_none)]
    rate: LimitRequest,
}

fn limit_or_none(text: &str) -> Result<LimitRequest, String> {
    let limit = match text {
        "none" => None,
        text => Some(crate::health::rate(text)?),
    };
    Ok(LimitRequest { limit })
}

/// Changes the limit of a plan.
pub fn limit(arguments: &Limit, context: &Context) -> Outcome {
    let path = arguments.plan.path("limit")?;
    let () = ask(&context.socket, async |agent| {
        agent
            .post(&path, &arguments.rate)
            .await
            .map_err(Failure::of)
    })?;
    if context.json {
        println!("{}", serde_json::to_string(&arguments.rate)?);
        return Ok(());
    }
    let plan = &arguments.plan.plan;
    match arguments.rate.limit {
        Some(limit) => println!("plan {plan} reads at most {limit} a second"),
        None => println!("plan {plan} reads without limit"),
    }
    Ok(())
}

/// A plan and a role.
#[derive(clap::Args)]
pub struct Approval {
    #[command(flatten)]
    plan: Arguments,
    /// Role, as `guards.approvals` of the policy names it.
    #[arg(long = "as", value_name = "ROLE")]
    role: String,
}

/// Approves a plan.
pub fn approve(arguments: &Approval, context: &Context) -> Outcome {
    let path = arguments.plan.path("approve")?;
    let request = ApproveRequest {
        role: arguments.role.clone(),
    };
    let approval: events::Approval = ask(&context.socket, async |agent| {
        agent.post(&path, &request).await.map_err(Failure::of)
    })?;
    if context.json {
        println!("{}", serde_json::to_string(&approval)?);
    } else {
        let events::Approval { role, by } = approval;
        println!("plan {} is approved as {role} by {by}", arguments.plan.plan);
    }
    Ok(())
}

/// Tells what a plan did.
pub fn report(arguments: &Arguments, context: &Context) -> Outcome {
    let path = arguments.path("report")?;
    let report: Report = ask(&context.socket, async |agent| {
        agent.get(&path).await.map_err(Failure::of)
    })?;
    print_report(&report, context)
}

/// Prints a report as text or JSON.
pub fn print_report(report: &Report, context: &Context) -> Outcome {
    if context.json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    for moment in &report.timeline {
        println!(
            "{:>9.3} s  {}",
            moment.after.as_secs_f64(),
            visible(&moment.text)
        );
    }
    println!(
        "{}: {} in changesets, {} on the wire, {}/s",
        report.plan, report.changesets, report.wire, report.rate
    );
    if let Some(each) = report.source_cpu_per_gib {
        println!(
            "CPU of this device while sending: {}, {} for each GiB read",
            human_duration(report.source_cpu),
            human_duration(each)
        );
    }
    if let (Some(interruption), Some(start_up)) = (report.interruption, report.start_up) {
        println!(
            "interruption {} = pause {} + twins' start-up {}",
            human_duration(interruption),
            human_duration(interruption.saturating_sub(start_up)),
            human_duration(start_up)
        );
    }
    for (volume, lost) in &report.unreadable {
        for lost in lost {
            println!(
                "not read: volume {}: {}",
                visible(&volume.to_string()),
                visible(&lost.to_string())
            );
        }
    }
    for exception in &report.exceptions {
        println!("not carried over: {}", visible(exception));
    }
    Ok(())
}

/// Proves a plan anew; exit code 5 when something is not as it must be.
pub fn verify(arguments: &Arguments, context: &Context) -> Outcome {
    let path = arguments.path("verify")?;
    let proof: Verification = ask(&context.socket, async |agent| {
        agent.post(&path, &()).await.map_err(Failure::of)
    })?;
    if context.json {
        println!("{}", serde_json::to_string_pretty(&proof)?);
    } else {
        for volume in &proof.volumes {
            let shown = |root: Option<crate::model::ids::Signature>| {
                root.map_or_else(|| "-".to_owned(), |root| root.to_string()[..16].to_owned())
            };
            println!(
                "{}  {}: {} {} (epoch {}), received {} (owned from epoch {}), kept on the source {}",
                match (volume.agrees, volume.incomparable) {
                    (true, false) => "agrees ",
                    (true, true) => "unread ",
                    (false, _) => "DIFFERS",
                },
                volume.name,
                if volume.listed {
                    "switched first with list"
                } else {
                    "released"
                },
                shown(Some(volume.released)),
                volume.released_epoch,
                shown(volume.received),
                volume
                    .owned_epoch
                    .map_or_else(|| "-".into(), |epoch| epoch.to_string()),
                shown(volume.kept),
            );
            for lost in &volume.unreadable {
                println!("not read again: {}", visible(&lost.to_string()));
            }
        }
        println!(
            "twins ready: {} of {}",
            proof.twins_ready.0, proof.twins_ready.1
        );
        for (twin, left) in &proof.twins_left {
            println!(
                "{} has left to {} with plan {}",
                visible(twin.as_str()),
                visible(left.device.as_str()),
                visible(left.plan.as_str())
            );
        }
        println!("running on the source: {}", proof.running_on_source.len());
        println!("can be started on the source: {}", proof.unfenced.len());
    }
    if proof.faults.is_empty() {
        return Ok(());
    }
    if context.json {
        return Err(Failure::Told(5));
    }
    Err(Failure::Unproven(anyhow::anyhow!(
        "plan {} is not proven: {}",
        proof.plan,
        proof.faults.join("; ")
    )))
}
