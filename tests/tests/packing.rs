//! A volume of text over a slow link: records are packed, the report says so, and the copy is the same.

use anyhow::{Result, ensure};
use lifeboat_tests::stage::{SOURCE, Service, Stage, TARGET, device};

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// More than may be in flight, which is not packed any more when the link is found to be slow.
const TEXT: &str = "seq 1 40000000 | head -c 280M";
/// Far below what a loaded host seals and writes.
const MBIT: u32 = 80;

#[test]
fn records_are_packed_while_the_link_is_the_limit() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(stage) = Stage::up("packing", &devices, &[CACHE])? else {
        return Ok(());
    };
    let text = format!("{}/text", CACHE.notes());
    let (source, target) = (stage.source()?, stage.target()?);
    source.run(["sh", "-c", &format!("{TEXT} >{text}")])?;
    stage.lab.shape(source, Some(MBIT))?;
    stage
        .crew
        .tell(SOURCE, &["evacuate", CACHE.name, "--yes"])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    let plan = stage.plan()?;
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    let report = stage.crew.tell(SOURCE, &["report", &plan])?;
    ensure!(report.contains(" packed to "), "{report}");
    let (_, figures) = stage.crew.ask(SOURCE, &["report", &plan])?;
    let (moved, wire) = (&figures["changesets"], &figures["wire"]);
    let (moved, wire) = (moved.as_u64().unwrap_or(0), wire.as_u64().unwrap_or(0));
    ensure!(moved > 280 << 20, "{figures}");
    ensure!(wire * 10 < moved * 9, "{wire} of {moved} bytes on the wire");
    ensure!(source.run(["sha256sum", &text])? == target.run(["sha256sum", &text])?);
    stage.lab.down()
}
