//! Switching first with a whole application under load: nginx, a service, PostgreSQL and Redis.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{PATIENCE, SOURCE, TARGET, device};
use xtask::crew::Crew;
use xtask::demo_app;
use xtask::lab::{Lab, LabSpec};
use xtask::load::Load;
use xtask::process::{is_root, wait_for};

const OFFICE: &str = "office";

#[test]
fn no_acknowledged_write_of_an_application_is_lost_when_its_twins_start_before_their_data()
-> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    let lab = Lab::up(&LabSpec::of("switched-app", &[SOURCE, TARGET, OFFICE]))?;
    let crew = Crew::start(&lab, OFFICE, &[device(SOURCE, None), device(TARGET, None)])?;
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    demo_app::deploy(source)?;
    let url = format!("http://{}:{}", source.address(), demo_app::PORT);
    let load = Load::start(lab.host(OFFICE)?, &url, 4)?;
    let grows = |by: usize| {
        let wanted = load.ledger()?.entries().len() + by;
        wait_for("acknowledged writes", PATIENCE, || {
            Ok((load.ledger()?.entries().len() >= wanted).then_some(()))
        })
        .with_context(|| {
            format!(
                "source:\n{}\ntarget:\n{}",
                demo_app::state(source),
                demo_app::state(target)
            )
        })
    };
    grows(50)?;
    let all = demo_app::CONTAINERS;
    wait_for("the source's view of its containers", PATIENCE, || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        let text = status["view"].to_string();
        let seen = |name: &&str| text.contains(&format!("\"{name}\""));
        Ok(all.iter().all(seen).then_some(()))
    })?;
    let told = crew
        .tell(
            SOURCE,
            &[&["evacuate"], &all[..], &["--yes", "--switch-first"]].concat(),
        )
        .with_context(|| format!("{}\n{}", crew.log(SOURCE), crew.log(TARGET)))?;
    ensure!(
        told.contains("switched first") && told.contains("completed"),
        "{told}"
    );
    grows(50)?;
    let proof = load.stop()?.check(target)?;
    ensure!(proof.holds(), "{proof:?}");
    lab.down()
}
