//! Writes the recording of a day of a host that never was, the same for every run: each metric of the catalogue
//! for each of its subjects, most of them moving. Prints what it wrote as JSON.

use std::env;
use std::fs::File;
use std::io::{BufWriter, Write as _};

use anyhow::{Context as _, Result};
use lifeboat::health::{Encoder, MAGIC, RecordingHeader};
use lifeboat::model::metric::{METRICS, Per, Sample, Subject};
use lifeboat::model::units::UnixMillis;
use serde_json::json;

const DAY_MS: u64 = 86_400_000;
/// As often as the agent sweeps.
const SWEEP_MS: u64 = 900;
const BEGIN: UnixMillis = UnixMillis(1_700_000_000_000);

/// Names of what a storage host with ten containers has.
fn subjects(per: Per) -> Vec<String> {
    let count = match per {
        Per::Device | Per::Fleet => return vec![String::new()],
        Per::Container => 10,
        Per::Cpu | Per::Disk | Per::Sensor => 4,
        _ => 2,
    };
    (0..count)
        .map(|number| format!("{}{number}", per.word()))
        .collect()
}

fn main() -> Result<()> {
    let path = env::args().nth(1).context("diary FILE")?;
    let header = RecordingHeader {
        device: "diary".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        at: BEGIN,
    };
    let (mut encoder, first) = Encoder::start(&header)?;
    let mut file = BufWriter::new(File::create(&path).with_context(|| path.clone())?);
    file.write_all(MAGIC)?;
    file.write_all(&first)?;
    let mut samples: Vec<Sample> = Vec::new();
    for metric in METRICS {
        for &per in metric.per {
            samples.extend(subjects(per).into_iter().map(|name| Sample {
                metric: metric.name.to_owned(),
                subject: Subject::new(per, name),
                value: 1.0,
                at: BEGIN,
            }));
        }
    }
    let (mut sweeps, mut bytes) = (0, 0);
    for at in (BEGIN.0..BEGIN.0 + DAY_MS).step_by(SWEEP_MS as usize) {
        for (place, sample) in samples.iter_mut().enumerate() {
            sample.at = UnixMillis(at);
            // Every other one moves: whole numbers and others, each in its own time.
            let turn = sweeps as f64 / (100.0 + place as f64);
            match place % 4 {
                0 => sample.value = (50.0 + 45.0 * turn.sin()).floor(),
                1 => sample.value = 50.0 + 45.0 * turn.sin(),
                _ => {}
            }
        }
        let frame = encoder.sweep(UnixMillis(at), &samples);
        file.write_all(&frame)?;
        bytes += frame.len();
        sweeps += 1_u64;
    }
    file.flush()?;
    println!(
        "{}",
        json!({ "sweeps": sweeps, "samples": samples.len(), "bytes": bytes })
    );
    Ok(())
}
