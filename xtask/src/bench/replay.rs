//! A day of recording, judged again.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{goal, median};
use crate::process::output;
use crate::workspace;

pub(super) fn measure(short: bool) -> Result<String> {
    let runs = if short { 1 } else { 3 };
    let file = workspace::target().join(format!("tmp-diary-{}", std::process::id()));
    let written = output(Command::new(workspace::binary("diary")).arg(&file));
    let measured =
        written.and_then(|written| replay(&serde_json::from_str(&written)?, &file, runs));
    let removed = fs::remove_file(&file);
    let text = measured?;
    removed.with_context(|| format!("cannot remove {}", file.display()))?;
    Ok(text)
}

fn replay(written: &Value, file: &std::path::Path, runs: u32) -> Result<String> {
    let policy = workspace::root().join("policies/default.yaml");
    let (mut seconds, mut changes) = (Vec::new(), Value::Null);
    for _ in 0..runs {
        let mut replay = Command::new(workspace::binary("lifeboat"));
        replay.args(["--json", "policy", "replay"]).arg(file);
        let start = Instant::now();
        let told = output(replay.arg("--policy").arg(&policy))?;
        seconds.push(start.elapsed().as_secs_f64());
        let told: Value = serde_json::from_str(&told)?;
        let summary = &told["summary"];
        ensure!(
            summary["sweeps"] == written["sweeps"],
            "{} of {} sweeps were judged",
            summary["sweeps"],
            written["sweeps"]
        );
        changes = summary["changes"].clone();
    }
    let took = median(&seconds);
    Ok(format!(
        "## Replay of a recording\n\nA day of {} sweeps with {} samples each, half of which move, under `default.yaml`; median of {runs}.\n\n\
         | what | | goal |\n|---|---|---|\n\
         | recording | {:.0} MiB | |\n\
         | changes of the verdict | {changes} | |\n\
         | replay | {took:.1} s | {} |\n",
        written["sweeps"],
        written["samples"],
        written["bytes"].as_f64().unwrap_or_default() / f64::from(1 << 20),
        goal("under 10 s", took < 10.0),
    ))
}
