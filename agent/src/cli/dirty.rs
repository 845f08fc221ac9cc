//! `lifeboat record --dirty`: what changes on a block device.

use super::output::say;
use super::record::as_root;
use super::{Context, Outcome};
use crate::model::units::Bytes;
use crate::telemetry::dirty::{Changes, Watch};
use std::path::Path;
use std::time::{Duration, Instant};

/// Prints what changed, epoch by epoch, until the time is over.
pub fn run(
    device: &Path,
    every: Duration,
    lasting: Option<Duration>,
    context: &Context,
) -> Outcome {
    let end = lasting.map(|lasting| Instant::now() + lasting);
    let mut watch = Watch::start(Path::new("/"), device).map_err(as_root("--dirty"))?;
    loop {
        let left = end.map_or(every, |end| end.saturating_duration_since(Instant::now()));
        std::thread::sleep(every.min(left));
        let changes = watch.swap();
        if context.json {
            say(&serde_json::to_string(&changes)?);
        } else {
            say(&render(&changes));
        }
        if end.is_some_and(|end| Instant::now() >= end) {
            return Ok(());
        }
    }
}

fn render(changes: &Changes) -> String {
    let mut text = format!(
        "epoch {}: {} dirty in granules of {}{}\n",
        changes.epoch,
        changes.bytes(),
        changes.granule,
        if changes.everything {
            "; something changed that could not be located, so everything counts as dirty"
        } else {
            ""
        }
    );
    for range in &changes.ranges {
        let length = Bytes(range.end - range.start);
        text.push_str(&format!("  {:>16} {length}\n", range.start));
    }
    text
}
