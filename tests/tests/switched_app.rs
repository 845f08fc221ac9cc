//! Switching first with other workloads: an application of nginx, a service, PostgreSQL and Redis under load, and a
//! container of Docker.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::dockers::{self, docker};
use lifeboat_tests::stage::{PATIENCE, SOURCE, TARGET, device};
use std::fs;
use xtask::crew::{Crew, wait_for_end};
use xtask::demo_app;
use xtask::lab::{Fault, Host, Lab, LabSpec};
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
    seen(&crew, &all)?;
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
    let log = crew.log(TARGET);
    let kept = !log
        .lines()
        .any(|line| line.contains("cannot keep a fetched block"));
    ensure!(kept, "{log}");
    let proof = load.stop()?.check(target)?;
    ensure!(proof.holds(), "{proof:?}");
    lab.down()
}

/// Bytes that come behind the twin, over a link on which they take some seconds.
const LATER: u64 = 48 << 20;
const SLOW: Fault = Fault::Net {
    mbit: 40,
    loss_percent: 0,
};
/// Counts on from where it was, and crashes when it is asked to.
const COUNT: &str = "n=$(cat /data/n || echo 0); while :; do n=$((n+1)); echo $n >/data/next; \
                     mv /data/next /data/n; [ -e /data/crash ] && rm /data/crash && exit 3; sleep 0.1; done";

#[test]
fn a_container_of_docker_switches_first_and_its_restart_policy_is_back_once_its_data_is()
-> Result<()> {
    let Some(lab) = dockers::lab("switched-docker", &[SOURCE, TARGET], &[OFFICE])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let count = "--restart=always --volume=data:/data box:1 sh -c";
    let run = ["run", "--detach", "--name=db"].into_iter();
    let run: Vec<&str> = run.chain(count.split(' ')).chain([COUNT]).collect();
    docker(source, &run)?;
    let inside = |host: &Host, script: &str| docker(host, &["exec", "db", "sh", "-c", script]);
    inside(source, &format!("head -c {LATER} /dev/urandom >/data/big"))?;
    let sum = |host: &Host| inside(host, "md5sum /data/big");
    let counted = |host: &Host| -> Result<u64> { Ok(inside(host, "cat /data/n")?.parse()?) };
    let state = |host: &Host| {
        let format = "--format={{.State.Status}} {{.HostConfig.RestartPolicy.Name}}";
        docker(host, &["inspect", format, "db"])
    };
    let expected = sum(source)?;
    let crew = Crew::start(&lab, OFFICE, &[device(SOURCE, None), device(TARGET, None)])?;
    let logs = || format!("{}\n{}", crew.log(SOURCE), crew.log(TARGET));
    seen(&crew, &["db"])?;
    let before = counted(source)?;
    lab.fault(source, SLOW, PATIENCE * 5)?;
    let evacuate = ["evacuate", "db", "--yes", "--switch-first"];
    crew.begin(SOURCE, "evacuate", &evacuate)?;
    let plan = wait_for("a twin before its data", PATIENCE, || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        let plan = &status["plans"][0];
        let filling = plan["phase"] == "fill" && plan["arrival"]["absent"].as_u64() > Some(0);
        Ok(plan["plan"].as_str().filter(|_| filling).map(str::to_owned))
    })
    .with_context(logs)?;
    ensure!(state(target)? == "running no", "{}", state(target)?);
    ensure!(state(source)? == "exited no", "{}", state(source)?);
    ensure!(counted(target)? >= before, "the count went back");
    let started = "--format={{.State.StartedAt}}";
    let started = || docker(target, &["inspect", started, "db"]);
    let first = started()?;
    inside(target, "touch /data/crash")?;
    wait_for("a twin that the agent started again", PATIENCE, || {
        Ok((started()? != first && state(target)?.starts_with("running")).then_some(()))
    })
    .with_context(logs)?;
    let report = wait_for_end(&crew, SOURCE, &plan, PATIENCE * 2).with_context(logs)?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(sum(target)? == expected, "the data differs");
    ensure!(counted(target)? >= before, "the count went back");
    ensure!(state(target)? == "running always", "{}", state(target)?);
    ensure!(state(source)? == "exited no", "{}", state(source)?);
    crew.tell(SOURCE, &["verify", &plan])?;
    let left = target.run(["ls", "-A", "/srv/docker/volumes/data"])?;
    ensure!(left.trim() == "_data", "{left}");
    let plain = fs::metadata(target.path("/srv/docker/volumes/data/_data/big"))?;
    ensure!(plain.len() == LATER, "{plain:?}");
    lab.down()
}

/// Waits until the source's agent sees the containers.
fn seen(crew: &Crew, names: &[&str]) -> Result<()> {
    wait_for("the source's view of its containers", PATIENCE, || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        let text = status["view"].to_string();
        let seen = |name: &&str| text.contains(&format!("\"{name}\""));
        Ok(names.iter().all(seen).then_some(()))
    })
}
