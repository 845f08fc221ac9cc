//! The judgement on very many containers: start order and groups.

use anyhow::{Context, Result};
use serde_json::Value;

use super::{goal, median};
use crate::process::output;
use crate::workspace;

pub(super) fn measure(short: bool) -> Result<String> {
    let runs = if short { 1 } else { 5 };
    let mut all: Vec<Value> = Vec::new();
    for _ in 0..runs {
        let mut grapher = std::process::Command::new(workspace::binary("grapher"));
        all.push(serde_json::from_str(&output(&mut grapher)?)?);
    }
    let first = all.first().context("no run")?;
    let ms = |what: &[&str]| -> f64 {
        let of = |run: &Value| what.iter().filter_map(|key| run[key].as_f64()).sum();
        median(&all.iter().map(of).collect::<Vec<f64>>())
    };
    let (build, order) = (ms(&["build_ms"]), ms(&["build_ms", "order_ms"]));
    let groups = ms(&["build_ms", "groups_ms"]);
    Ok(format!(
        "## Order and groups\n\n{} containers with {} edges from a seed: applications with deep chains, databases that many need, and \
         {} cycles; {} steps. Median of {runs}, the building of the graph in each.\n\n\
         | what | ms | goal |\n|---|---|---|\n\
         | the graph of the evidence | {build:.0} | |\n\
         | start order | {order:.0} | {} |\n\
         | groups for {} targets | {groups:.0} | {} |\n",
        first["containers"],
        first["edges"],
        first["cycles"],
        first["steps"],
        goal("under 1 s", order < 1_000.0),
        first["targets"],
        goal("under 2 s", groups < 2_000.0),
    ))
}
