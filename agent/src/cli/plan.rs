//! `lifeboat plan`: what an evacuation would do, without doing it.

use super::daemon::{Selection, ask};
use super::{Context, Failure, Outcome};
use crate::model::ids::visible::{visible, visible_lines};
use crate::model::plan::Plan;
use crate::model::units::{Bytes, human_duration};
use crate::model::volume::Unused;
use std::fmt::Write as _;

/// Shows order, groups, sizes, actions, estimate and what blocks the plan; changes nothing.
#[derive(clap::Args)]
#[command(
    override_usage = "lifeboat plan [OPTIONS] <CONTAINERS>...\n       lifeboat plan [OPTIONS] --all"
)]
pub struct Arguments {
    #[command(flatten)]
    selection: Selection,
}

/// Prints the plan; a blocked one ends with exit code 4.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    let plan: Plan = ask(&context.socket, async |agent| {
        agent
            .post("/v1/plan", &arguments.selection.request())
            .await
            .map_err(Failure::of)
    })?;
    if context.json {
        println!("{}", serde_json::to_string_pretty(&plan)?);
    } else {
        print!("{}", render(&plan));
    }
    if plan.blockers.is_empty() {
        return Ok(());
    }
    if context.json {
        return Err(Failure::Told(4));
    }
    Err(Failure::Blocked(anyhow::anyhow!(
        "the plan is blocked by {} thing(s) above",
        plan.blockers.len()
    )))
}

/// The plan as text.
#[must_use]
pub fn render(plan: &Plan) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "evacuation of {} container(s) from {}",
        plan.containers.len(),
        plan.source
    );
    let _ = writeln!(out, "\nstart order of the twins");
    for (number, step) in plan.order.iter().enumerate() {
        let joint = if step.sequential { " → " } else { " + " };
        let names: Vec<String> = step.containers.iter().map(ToString::to_string).collect();
        let cycle = if step.sequential {
            "  (a cycle: one after another)"
        } else {
            ""
        };
        let _ = writeln!(out, "  {}. {}{cycle}", number + 1, names.join(joint));
    }
    let _ = writeln!(out, "\ngroups that stay together");
    for group in &plan.groups {
        let names: Vec<String> = group.iter().map(ToString::to_string).collect();
        let _ = writeln!(out, "  {}", names.join(", "));
    }
    let _ = writeln!(out, "\nvolumes");
    for volume in &plan.volumes {
        let users: Vec<String> = volume.containers.iter().map(ToString::to_string).collect();
        let _ = writeln!(
            out,
            "  {:>10}  {:>8} entries  {}  ({})",
            volume.size,
            volume.entries,
            visible(&volume.name),
            users.join(", ")
        );
        if volume.holes > Bytes(0) {
            let _ = writeln!(out, "              {} of it are holes", volume.holes);
        }
        if volume.kind.is_one() {
            let _ = writeln!(out, "              changes are found {}", volume.changes);
        }
        let _ = match &volume.unused {
            Unused::Unknown => Ok(()),
            Unused::LeftOut { file_system, bytes } => writeln!(
                out,
                "              {bytes} that its {file_system} does not use are left out"
            ),
            Unused::Sent { file_system, why } => writeln!(
                out,
                "              what its {file_system} does not use is sent too: {why}"
            ),
        };
    }
    let _ = writeln!(out, "\ndelegated to the paired device: {}", plan.delegated);
    let _ = writeln!(
        out,
        "estimate: {} in about {} at {}/s ({})",
        plan.estimate.bytes,
        human_duration(plan.estimate.duration),
        plan.estimate.rate,
        plan.estimate.basis
    );
    if let Some(choice) = &plan.choice {
        let _ = writeln!(out, "{}", choice.why);
    }
    for note in &plan.notes {
        let _ = writeln!(out, "note: {}", visible(note));
    }
    for blocker in &plan.blockers {
        let _ = writeln!(
            out,
            "blocked: {}: {}",
            visible(&blocker.what),
            visible_lines(&blocker.why)
        );
    }
    out
}
