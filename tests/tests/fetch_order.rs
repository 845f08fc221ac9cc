//! A recorded access trace in a plan that switches first: what it found hottest comes before the rest.

use anyhow::{Context as _, Result, ensure};
use lifeboat::model::trace::{Cause, Of, Touch, Trace, TracedFile};
use lifeboat::model::units::{Bytes, UnixMillis};
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device};
use std::time::Duration;
use xtask::crew::wait_for_end;
use xtask::images;
use xtask::lab::{Fault, Host};
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// Bytes of a file that would come first by its name, and of one that the trace found hot.
const COLD: u64 = 16 << 20;
const HOT: u64 = 48 << 20;
/// A link over which they take a while.
const SLOW: Fault = Fault::Net {
    mbit: 40,
    loss_percent: 0,
};
/// What may be asked for beyond what came: the window of the background.
const AHEAD: u64 = 4 << 20;

/// A trace in which every extent of the hot file was read.
fn trace() -> Trace {
    let touch = |extent| Touch {
        file: 0,
        extent,
        cause: 0,
        write: false,
        at_ms: extent,
        heat: 2,
    };
    Trace {
        of: Of::Directory(CACHE.notes()),
        started: UnixMillis(0),
        lasted: Duration::from_secs(60),
        extent: Bytes(64 << 10),
        lost: 0,
        elsewhere: 0,
        causes: vec![Cause {
            container: None,
            cgroup: String::new(),
        }],
        files: vec![TracedFile {
            path: b"z-hot".to_vec(),
            length: Bytes(HOT),
        }],
        touches: (0..HOT >> 16).map(touch).collect(),
    }
}

/// Bytes of the cold and of the hot file that are on the target, beside their volume's place.
fn there(target: &Host) -> Result<(u64, u64)> {
    let look = "cd /srv/.lifeboat-*/data && stat --format=%b a-cold z-hot";
    let told = target.run(["sh", "-c", look])?;
    let mut blocks = told.lines().map(|line| line.trim().parse::<u64>());
    let mut next = || anyhow::Ok(blocks.next().context(told.clone())?? * 512);
    Ok((next()?, next()?))
}

#[test]
fn what_a_trace_found_hottest_comes_first_behind_the_twins_also_when_the_target_died() -> Result<()>
{
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(mut stage) = Stage::up("traced", &devices, &[CACHE])? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let fill = format!(
        "cd {} && head -c {COLD} /dev/urandom >a-cold && head -c {HOT} /dev/urandom >z-hot",
        CACHE.notes()
    );
    source.run(["sh", "-c", &fill])?;
    let file = "/srv/trace";
    let wanted = ["plan", CACHE.name, "--switch-first", "--trace", file];
    let refused = stage.crew.tell(SOURCE, &wanted).map_or_else(
        |error| Ok(format!("{error:#}")),
        |plan| anyhow::bail!("a trace that is not there is used: {plan}"),
    )?;
    says(&refused, &["cannot use the access trace", file])?;
    source.write(file, trace().encode())?;
    let told = stage.crew.tell(SOURCE, &wanted)?;
    says(&told, &["48.0 MiB of", "come before the rest", file])?;

    // So that the image need not go at this pace too.
    images::load_some(&target, &["redis"])?;
    stage.lab.fault(&source, SLOW, PATIENCE * 5)?;
    let evacuate = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    let evacuate = [&evacuate[..], &["--trace", file]].concat();
    stage.crew.begin(SOURCE, "evacuate", &evacuate)?;
    let plan = stage.plan()?;
    // It is in the plan.
    source.run(["rm", file])?;
    let some = wait_for("some of it behind the twins", PATIENCE, || {
        Ok(there(&target).ok().filter(|(cold, hot)| cold + hot > AHEAD))
    });
    let (cold, hot) = some.with_context(|| stage.crew.log(TARGET))?;
    ensure!(cold < hot && hot < HOT, "{cold} and {hot} bytes came");
    stage.crew.kill_agent(TARGET)?;
    let (_, before) = there(&target)?;
    ensure!(before < HOT, "all was there before the target died");
    stage.crew.start_agent(TARGET)?;
    wait_for("all that is hot", PATIENCE, || {
        let (cold, hot) = there(&target)?;
        ensure!(
            hot >= HOT || cold <= AHEAD,
            "{cold} bytes of what is cold came before the last of {hot} hot ones"
        );
        Ok((hot >= HOT).then_some(()))
    })
    .with_context(|| stage.crew.log(TARGET))?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "completed", "{report:#}");
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}
