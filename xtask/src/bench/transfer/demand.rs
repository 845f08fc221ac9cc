//! Random reads at a twin whose data is still on a far source: a real evacuation that switches first.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::super::{goal, median};
use super::{FAR, ROUND_TRIP, data};
use crate::crew::{Crew, Device};
use crate::images;
use crate::lab::far::FarLink;
use crate::lab::{HostSpec, Lab, LabSpec};
use crate::process::wait_for;

/// Reads under way at once, and how many each of these makes in a run; alone, as many as there are under way else.
const WINDOW: usize = 64;
const READS: usize = 16;
const NAME: &str = "reader";
const PLACE: &str = "/srv/notes";

/// Reads of 4 KiB all over the last quarter of `bytes`, to which what fills in behind does not come meanwhile: each run
/// has its own share of it, so that none finds what another has fetched.
pub(super) fn measure(bytes: u64, runs: usize) -> Result<String> {
    let lab = Lab::up(&LabSpec {
        name: format!("demand-{}", std::process::id()),
        hosts: ["source", "target", "duplicator"]
            .map(HostSpec::from)
            .into(),
    })?;
    let (source, target) = (lab.host("source")?, lab.host("target")?);
    let link = FarLink::between(target, source, ROUND_TRIP, FAR)?;
    images::load_some(source, &["redis"])?;
    source.run(["mkdir", PLACE])?;
    data::write_large(&source.path(PLACE).join("random"), bytes)?;
    let (volume, image) = (format!("{PLACE}:/notes"), "localhost/redis:demo");
    source.podman([
        "run", "--detach", "--name", NAME, "--volume", &volume, image,
    ])?;
    let far = Device {
        fleet: vec![format!("advertise_data: {}:7402", link.there)],
        ..Device::new("source")
    };
    let crew = Crew::start(&lab, "duplicator", &[far, Device::new("target")])?;
    wait_for("the source's view", Duration::from_secs(20), || {
        let (code, _) = crew.ask("source", &["plan", NAME])?;
        Ok((code == 0).then_some(()))
    })?;
    let evacuate = ["evacuate", NAME, "--yes", "--switch-first"];
    crew.begin("source", "evacuate", &evacuate)?;
    wait_for("the twin", Duration::from_secs(60), || {
        let running = target.podman(["ps", "--format", "{{.Names}}"])?;
        Ok(running.contains(NAME).then_some(()))
    })
    .with_context(|| crew.log("source"))?;

    let quarter = bytes / 4;
    let share = quarter / runs as u64;
    let reads = |window: usize, reads: usize, run: usize| -> Result<f64> {
        let first = bytes - quarter + share * run as u64;
        let script = format!(
            "fio --name=reads --filename={PLACE}/random --readonly --rw=randread --offset={first} --size={share} --bs=4k --direct=1 --ioengine=psync --thread \
             --numjobs={window} --number_ios={reads} --randseed={} --group_reporting --output-format=json",
            2 * run + window
        );
        let report: Value = serde_json::from_str(&target.run(["sh", "-c", &script])?)?;
        let rate = report["jobs"][0]["read"]["iops"].as_f64();
        rate.context("fio reports no rate")
    };
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for run in 0..runs {
        alone.push(reads(1, WINDOW, run)?);
        together.push(reads(WINDOW, READS, run)?);
    }
    let (_, status) = crew.ask("target", &["status"])?;
    let absent = status["arriving"][0]["arrival"]["absent"].as_u64();
    ensure!(
        absent > Some(quarter),
        "the filling was faster: {}",
        status["arriving"]
    );
    eprintln!(
        "bench: on demand: {alone:.0?} reads/s alone, {together:.0?} with {WINDOW} at once; {}",
        status["arriving"]
    );
    lab.down()?;
    let (alone, together) = (median(&alone), median(&together));
    let trips = 1.0 / ROUND_TRIP.as_secs_f64();
    Ok(format!(
        "Over a link of the same rate and round trip (median of {runs}), random reads of 4 KiB on the mount of a twin that was switched first, of the quarter of {} MiB that comes last, while all is being filled in: \
         {alone:.0} a second one after another, {together:.0} with {WINDOW} at once; one each round trip would be {trips:.0} ({}). \
         Each fetches the 64 KiB around it: the link has room for {:.0} a second.\n\n",
        bytes >> 20,
        goal("at window depth", together >= 8.0 * trips),
        FAR / 65_536.0,
    ))
}
