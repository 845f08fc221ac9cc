//! `lifeboat explain`: the verdict as a person would say it, and what comes next.

use super::daemon::ask;
use super::output::say;
use super::{Context, Failure, Outcome};
use crate::api::local::{Judgement, Status};
use crate::health::{Stage, Verdict, VerdictKind};
use crate::model::metric::Metric;
use crate::model::units::{UnixMillis, human_duration, utc};

/// Explains the verdict: which thresholds, which samples, since when, what would clear them, what happens next.
#[derive(clap::Args)]
pub struct Arguments {}

/// Prints the explanation.
pub fn run(_: &Arguments, context: &Context) -> Outcome {
    ask(&context.socket, async |agent| {
        let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
        if context.json {
            let told = serde_json::json!({
                "device": status.device,
                "verdict": status.view.verdict,
                "judgement": status.judgement,
                "next": next(&status),
            });
            say(&told.to_string());
        } else {
            say(&explain(&status));
        }
        Ok(())
    })
}

fn explain(status: &Status) -> String {
    let now = status.now;
    let Some(judgement) = &status.judgement else {
        return format!(
            "{}: no policy is loaded, so there is no verdict.\nSet `policy` in the agent's configuration and restart it.",
            status.device
        );
    };
    let Some(verdict) = &status.view.verdict else {
        return format!(
            "{}: there is no verdict yet: the agent has just started, and judges from its second sweep on, in a second.",
            status.device
        );
    };
    let mut lines = vec![summary(&status.device, verdict, judgement, now)];
    for evidence in &verdict.evidence {
        let metric = Metric::named(&evidence.metric).map_or("", |metric| metric.about);
        lines.push(format!("\n{}", evidence.text));
        if !metric.is_empty() {
            lines.push(format!("  {} is the {metric}.", evidence.metric));
        }
        lines.push(format!(
            "  The limit was passed first at {}, {} ago; the last sample is {} old.",
            utc(evidence.since),
            human_duration(now.since(evidence.since)),
            human_duration(now.since(evidence.last_sample)),
        ));
        lines.push(format!("  It is over at {}.", evidence.clears_when));
    }
    if !verdict.missing.is_empty() {
        lines.push("\nNot known:".to_owned());
        lines.extend(
            verdict
                .missing
                .iter()
                .map(|missing| format!("  {}", missing.text)),
        );
    }
    lines.push("\nWhat happens next:".to_owned());
    lines.extend(next(status).iter().map(|line| format!("  {line}")));
    lines.join("\n")
}

fn summary(device: &str, verdict: &Verdict, judgement: &Judgement, now: UnixMillis) -> String {
    let stage = verdict
        .stage
        .map_or(String::new(), |stage| format!(", stage {stage}"));
    let because = if verdict.because.is_empty() {
        match verdict.kind {
            VerdictKind::Healthy => format!(
                "none of {} thresholds fails, and all that are not optional are measured",
                judgement.thresholds
            ),
            VerdictKind::Suspect => "something fails, and no entry of `degraded` holds".to_owned(),
            VerdictKind::Unknown => "data that the policy needs are missing".to_owned(),
            VerdictKind::Degraded => "nothing of it holds any more".to_owned(),
        }
    } else {
        format!("by {}", verdict.because.join(" and by "))
    };
    format!(
        "{device} is {}{stage} since {} ({}): {because}. Policy: {}.",
        verdict.kind,
        utc(verdict.since),
        human_duration(now.since(verdict.since)),
        judgement.policy
    )
}

/// What will happen, sentence by sentence.
fn next(status: &Status) -> Vec<String> {
    let now = status.now;
    let (Some(verdict), Some(judgement)) = (&status.view.verdict, &status.judgement) else {
        return Vec::new();
    };
    let mut lines = Vec::new();
    if let Some(until) = verdict.held_until {
        lines.push(format!(
            "guards.hold keeps the verdict for another {}.",
            human_duration(until.since(now))
        ));
    }
    if let Some(pause) = &judgement.paused {
        lines.push(format!(
            "An operator paused the policy ({}): nothing moves by itself until {}, or `lifeboat policy resume`.",
            pause.why,
            utc(pause.until)
        ));
    }
    for plan in status.plans.iter().filter(|plan| !plan.over) {
        lines.push(format!(
            "Plan {} is under way ({}); `lifeboat status --watch` shows it.",
            plan.plan, plan.phase
        ));
        if plan.held {
            lines.push(format!(
                "  Its data is kept up to date on {}; the containers run on here.",
                plan.target
                    .as_ref()
                    .map_or("a target".to_owned(), ToString::to_string)
            ));
        }
        for role in &plan.awaits {
            lines.push(format!(
                "  It waits for `lifeboat approve {} --as {role}`.",
                plan.plan
            ));
        }
        lines.extend(plan.trouble.iter().map(|text| format!("  {text}.")));
    }
    if !judgement.automatic {
        lines.push(
            "Nothing moves by itself, as `migration.automatic` is false or the device is in no fleet; `lifeboat evacuate --all` moves the containers.".to_owned(),
        );
    }
    match (verdict.kind, verdict.stage) {
        (VerdictKind::Degraded, Some(Stage::Watch)) => {
            lines.push("Stage `watch`: it is shown, and nothing moves.".to_owned());
            if judgement.automatic {
                lines.extend(ladder(judgement, Stage::Prepare, "It would act when"));
            }
        }
        (VerdictKind::Degraded, _) if !judgement.automatic => {}
        (VerdictKind::Degraded, Some(Stage::Prepare)) => {
            lines.push("Stage `prepare`: the data of running containers is copied to a target in advance, again and again; they run on here.".to_owned());
            lines.extend(ladder(judgement, Stage::Evacuate, "It would evacuate when"));
        }
        (VerdictKind::Degraded, _)
            if judgement.paused.is_none() && status.plans.iter().all(|plan| plan.over) =>
        {
            let delegated = if verdict.delegate.is_empty() {
                "doing all of the work itself".to_owned()
            } else {
                format!("a paired device is asked to do: {}", verdict.delegate)
            };
            lines.push(format!(
                "Running containers are evacuated by themselves; {delegated}."
            ));
        }
        (VerdictKind::Degraded, _) => {}
        (VerdictKind::Unknown, _) => {
            lines.push("Nothing moves while the verdict is unknown.".to_owned());
        }
        (VerdictKind::Suspect | VerdictKind::Healthy, _) => {
            lines.push("Nothing moves.".to_owned());
            lines.extend(ladder(judgement, Stage::Watch, "It would be degraded when"));
        }
    }
    lines
}

/// Entries of `degraded` of at least this stage.
fn ladder(judgement: &Judgement, stage: Stage, start: &str) -> Vec<String> {
    judgement
        .degraded
        .iter()
        .filter(|(_, of)| *of >= stage)
        .map(|(entry, of)| format!("{start} {entry} holds (stage {of})."))
        .collect()
}
