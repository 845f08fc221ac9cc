//! Docker, for real: dockerd in lab hosts, driven through the same code as Podman.

use anyhow::{Context as _, Result, ensure};
use lifeboat::containers::{How, Means, ReadyRules, Runtime, Runtimes, Scope};
use lifeboat::model::container::State;
use lifeboat_tests::boxes::{SECOND, by_name, comes_back, crash};
use lifeboat_tests::dockers::{self, docker, socket};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

fn rules(ports: &[u16]) -> ReadyRules {
    ReadyRules {
        service_ports: ports.iter().copied().collect(),
        settle: SECOND,
        timeout: 20 * SECOND,
    }
}

#[tokio::test]
async fn a_docker_container_is_discovered_fenced_killed_and_let_back() -> Result<()> {
    let Some(lab) = dockers::lab("docker", &["a", "b"], &[])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    let port = "--publish=8080:80";
    let id = docker(
        host,
        &[
            "run",
            "-d",
            "--name=db",
            "--restart=always",
            port,
            "box:1",
            "sleep",
            "1000",
        ],
    )?;
    let scope = Scope {
        cgroup_root: host.cgroup().to_owned(),
    };
    let all = Runtimes::new(&[socket(host)], scope);
    let seen = all.discover().await;
    ensure!(seen.problems.is_empty(), "{:?}", seen.problems);
    let db = by_name(&seen.containers, "db")?;
    ensure!(db.id == id && db.state == State::Running && db.cgroup_path.contains(&id));
    ensure!(db.cgroup_id == fs::metadata(all.directory(db))?.ino());
    ensure!(
        db.published
            .iter()
            .any(|p| p.host_port == 8080 && p.container_port == 80)
    );
    ensure!(db.addresses.len() == 1);

    let api = Runtime::new(&socket(host));
    let before = crash(host, &api, "db").await?;
    comes_back(&api, "db", before).await?;
    let fence = api.forbid_start("db", "released by plan p1").await?;
    ensure!(matches!(fence.how, Means::RestartPolicy { .. }));
    crash(host, &api, "db").await?;
    tokio::time::sleep(3 * SECOND).await;
    ensure!(
        api.state("db").await? == State::Exited,
        "the fence did not hold"
    );
    api.lift_fence(&fence).await?;
    ensure!(api.inspect("db").await?["HostConfig"]["RestartPolicy"]["Name"] == "always");
    api.start("db").await?;
    let before = crash(host, &api, "db").await?;
    comes_back(&api, "db", before).await?;

    took_pause(&all).await?;
    api.pause("db").await?;
    api.kill("db", 10 * SECOND).await?;
    ensure!(api.state("db").await? == State::Exited);
    Ok(())
}

async fn took_pause(all: &Runtimes) -> Result<()> {
    let seen = all.discover().await.containers;
    let group = [by_name(&seen, "db")?];
    let (paused, unpaused) = (all.pause_all(&group).await?, all.unpause_all(&group).await?);
    println!("paused by Docker in {paused:?}, let run again in {unpaused:?}");
    Ok(())
}

#[tokio::test]
async fn a_docker_twin_is_its_source_field_by_field_and_runs() -> Result<()> {
    let Some(lab) = dockers::lab("dtwin", &["a", "b"], &[])? else {
        return Ok(());
    };
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    docker(a, &["network", "create", "--subnet=10.126.0.0/24", "back"])?;
    docker(a, &["network", "create", "--subnet=10.127.0.0/24", "front"])?;
    docker(a, &["volume", "create", "--label=app=db", "data"])?;
    for host in [a, b] {
        host.run(["mkdir", "-p", "/srv/files"])?;
    }
    let create = [
        "create",
        "--name=db",
        "--restart=on-failure:3",
        "--network=back",
        "--network-alias=pg",
        "--ip=10.126.0.9",
        "--hostname=db-1",
        "--add-host=foo:1.2.3.4",
        "--env=A=b",
        "--label=z=1",
        "--label=lifeboat.registration-id=shop",
        "--volume=data:/data",
        "--volume=/srv/files:/files:ro",
        "--volume=/anonymous",
        "--mount=type=volume,src=more,dst=/more",
        "--tmpfs=/scratch:size=1m",
        "--publish=127.0.0.1:8080:80",
        "--publish=5353:53/udp",
        "--cap-add=NET_ADMIN",
        "--cap-drop=CHOWN",
        "--sysctl=net.ipv4.ip_default_ttl=61",
        "--ulimit=nofile=1000:2000",
        "--user=5:6",
        "--workdir=/tmp",
        "--health-cmd=test -d /tmp",
        "--health-interval=1s",
        "--shm-size=1m",
        "--security-opt=no-new-privileges",
        "--device=/dev/null:/dev/other",
        "--stop-signal=INT",
        "--stop-timeout=3",
        "--oom-score-adj=100",
        "--entrypoint=/bin/sh",
        "box:1",
        "-c",
        "echo started; sleep 1000",
    ];
    docker(a, &create)?;
    docker(a, &["network", "connect", "--alias=f1", "front", "db"])?;
    docker(a, &["start", "db"])?;
    let (source, target) = (Runtime::new(&socket(a)), Runtime::new(&socket(b)));
    let mut spec = source.describe("db").await?;

    let (archive, copy) = (a.path("/srv/image.tar"), b.path("/srv/image.tar"));
    source
        .export_image(spec.image_reference(), &archive, &[], |_| Duration::ZERO)
        .await?;
    fs::copy(&archive, &copy)?;
    let loaded = target
        .load_image(&copy, spec.image_id(), spec.image_reference())
        .await?;
    ensure!(loaded.id == spec.image_id() && !loaded.was_present);

    // An address a person chose is given up only with a word about it.
    let twin = target.create_twin(&spec).await?;
    println!("not carried over: {:#?}", twin.not_carried);
    ensure!(twin.not_carried.len() == 1 && twin.not_carried[0].contains("10.126.0.9"));
    target.remove("db").await?;
    spec.keep_addresses = true;
    let twin = target.create_twin(&spec).await?;
    let others: Vec<&String> = twin
        .not_carried
        .iter()
        .filter(|line| !line.contains("Networks.front.IPAMConfig"))
        .collect();
    ensure!(others.is_empty(), "{others:#?}");

    target.start("db").await?;
    let ready = target.wait_ready("db", &rules(&[])).await?;
    ensure!(ready.how == How::HealthCheck, "{ready:?}");
    let made = target.inspect("db").await?;
    ensure!(made["NetworkSettings"]["Networks"]["back"]["IPAddress"] == "10.126.0.9");
    let names: BTreeSet<&str> = spec
        .volumes
        .iter()
        .filter_map(|v| v["Name"].as_str())
        .collect();
    let mounted: BTreeSet<&str> = made["Mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|mount| mount["Name"].as_str())
        .collect();
    ensure!(
        names == mounted && names.len() == 3,
        "{names:?} {mounted:?}"
    );

    // Upon an image that the target has, only what is new travels.
    let grow = "head -c 2000000 /dev/urandom >/grown";
    docker(a, &["run", "--name", "grower", "box:1", "sh", "-c", grow])?;
    docker(a, &["commit", "grower", "grown:1"])?;
    let id = source.image_id("grown:1").await?.context("committed")?;
    let layers = source.image_layers("grown:1").await?;
    let held = &layers[..layers.len() - 1];
    let known = target.all_layers().await?;
    ensure!(known.iter().any(|here| here.starts_with(held)), "{known:?}");
    let whole = source.image_size("grown:1").await?;
    let length = source
        .export_image("grown:1", &archive, held, |_| Duration::ZERO)
        .await?;
    println!("{length} bytes for an image of {whole}");
    ensure!(
        (2_000_000..2_100_000).contains(&length),
        "{length} of {whole}"
    );
    fs::copy(&archive, &copy)?;
    let loaded = target.load_image(&copy, &id, "grown:1").await?;
    ensure!(loaded.id == id && !loaded.was_present);
    let sum = [
        "run",
        "--rm",
        "grown:1",
        "sh",
        "-c",
        "md5sum /grown /bin/sh",
    ];
    ensure!(docker(a, &sum)? == docker(b, &sum)?);
    Ok(())
}
