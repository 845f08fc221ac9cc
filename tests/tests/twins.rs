//! Twins, their networks and volumes, and fenced sources, for real: Podman in lab hosts.

use anyhow::{Result, ensure};
use lifeboat::containers::{Fence, Means, ResourceError, Twin, TwinError, TwinSpec};
use lifeboat::model::container::State;
use lifeboat_tests::boxes::{SECOND, comes_back, crash, lab, runtime, start};
use serde_json::json;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use xtask::lab::Host;

/// A container that uses as many settings as one can.
fn start_elaborate(host: &Host) -> Result<()> {
    host.podman([
        "network",
        "create",
        "--subnet=10.123.0.0/24",
        "--label=x=y",
        "back",
    ])?;
    host.podman(["volume", "create", "--label=app=db", "data"])?;
    host.run(["mkdir", "-p", "/srv/files"])?;
    let args = [
        "--restart=on-failure:3",
        "--network=back:alias=db,alias=pg",
        "--hostname=db-1",
        "--add-host=foo:1.2.3.4",
        "--env=A=b",
        "--env=C=d e=f",
        "--label=z=1",
        "--label=lifeboat.registration-id=shop",
        "--volume=data:/data",
        "--volume=/srv/files:/files:ro",
        "--volume=/anonymous",
        "--tmpfs=/scratch:size=1m",
        "--publish=127.0.0.1:8080:80",
        "--publish=5353:53/udp",
        "--cap-add=NET_ADMIN",
        "--cap-drop=CHOWN",
        "--sysctl=net.ipv4.ip_default_ttl=61",
        "--ulimit=nofile=1000:2000",
        "--ulimit=nproc=9000:9000",
        "--user=5:6",
        "--workdir=/tmp",
        "--health-cmd=test -f /tmp/ok",
        "--health-interval=5s",
        "--health-retries=2",
        "--shm-size=1m",
        "--read-only",
        "--security-opt=no-new-privileges",
        "--device=/dev/null:/dev/other",
        "--group-add=7",
        "--stop-signal=INT",
        "--stop-timeout=3",
        "--oom-score-adj=100",
        "--entrypoint=[\"/bin/sh\",\"-c\"]",
    ];
    start(host, "db", &args, &["echo started; sleep 1000"])?;
    Ok(())
}

/// Exports the image on one host and loads it on the other.
async fn carry_image(from: &Host, to: &Host, id: &str, reference: &str) -> Result<bool> {
    let (archive, copy) = (from.path("/srv/image.tar"), to.path("/srv/image.tar"));
    let written = AtomicU64::new(0);
    let length = runtime(from)
        .export_image(reference, &archive, &[], |bytes| {
            written.fetch_add(bytes, Ordering::Relaxed);
            Duration::ZERO
        })
        .await?;
    ensure!(written.into_inner() == length, "progress is not the length");
    ensure!(length == fs::metadata(&archive)?.len() && length > 0);
    fs::copy(&archive, &copy)?;
    let loaded = runtime(to).load_image(&copy, id, reference).await?;
    ensure!(loaded.id == id);
    Ok(loaded.was_present)
}

#[tokio::test]
async fn a_twin_is_its_source_field_by_field_and_runs() -> Result<()> {
    let Some(lab) = lab("twin", &["a", "b"])? else {
        return Ok(());
    };
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    start_elaborate(a)?;
    let spec = runtime(a).describe("db").await?;
    ensure!(serde_json::from_slice::<TwinSpec>(&serde_json::to_vec(&spec)?)? == spec);

    b.podman(["rmi", "--force", "localhost/box:1"])?;
    let missing = runtime(b).create_twin(&spec).await.unwrap_err();
    ensure!(matches!(missing, TwinError::NoImage { .. }), "{missing}");
    ensure!(!carry_image(a, b, spec.image_id(), spec.image_reference()).await?);
    ensure!(carry_image(a, b, spec.image_id(), spec.image_reference()).await?);

    b.run(["mkdir", "-p", "/srv/files"])?;
    let twin = runtime(b).create_twin(&spec).await?;
    println!("not carried over: {:#?}", twin.not_carried);
    ensure!(twin.not_carried.is_empty(), "{:#?}", twin.not_carried);
    ensure!(runtime(b).state(&twin.id).await? == State::Created);
    // Our own comparison could be blind: these are compared by hand.
    let (source, made) = (
        runtime(a).inspect("db").await?,
        runtime(b).inspect("db").await?,
    );
    for path in [
        "/Config/Entrypoint",
        "/Config/Cmd",
        "/Config/User",
        "/Config/WorkingDir",
        "/Config/Labels",
        "/Config/Healthcheck",
        "/Config/Hostname",
        "/Config/StopSignal",
        "/Config/StopTimeout",
        "/Config/Image",
        "/Image",
        "/Name",
        "/HostConfig/RestartPolicy",
        "/HostConfig/PortBindings",
        "/HostConfig/CapAdd",
        "/HostConfig/CapDrop",
        "/HostConfig/Ulimits",
        "/HostConfig/ShmSize",
        "/HostConfig/ExtraHosts",
        "/HostConfig/ReadonlyRootfs",
        "/HostConfig/Tmpfs",
        "/HostConfig/SecurityOpt",
        "/HostConfig/GroupAdd",
        "/HostConfig/OomScoreAdj",
        "/HostConfig/Binds",
    ] {
        let (source, made) = (source.pointer(path), made.pointer(path));
        ensure!(
            source.is_some() && source == made,
            "{path}: {source:?} and {made:?}"
        );
    }

    // Made before and never started: taken as it is.
    let again: Twin = runtime(b).create_twin(&spec).await?;
    ensure!(again == twin);
    runtime(b).start("db").await?;
    runtime(b).start("db").await?;
    let ttl = b.podman(["exec", "db", "cat", "/proc/sys/net/ipv4/ip_default_ttl"])?;
    ensure!(ttl.trim() == "61", "sysctl: {ttl}");
    let logs = runtime(b).logs("db", 5).await?;
    ensure!(logs.trim() == "started", "{logs}");
    let taken = runtime(b).create_twin(&spec).await.unwrap_err();
    ensure!(matches!(taken, TwinError::NameTaken { .. }), "{taken}");
    Ok(())
}

#[tokio::test]
async fn networks_and_volumes_are_made_once_and_others_of_their_name_are_refused() -> Result<()> {
    let Some(lab) = lab("resources", &["a", "b"])? else {
        return Ok(());
    };
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    a.podman(["network", "create", "--subnet=10.124.0.0/24", "back"])?;
    a.podman([
        "network",
        "create",
        "--subnet=10.125.0.0/24",
        "--internal",
        "inner",
    ])?;
    a.podman(["volume", "create", "--label=k=v", "data"])?;
    let (source, target) = (runtime(a), runtime(b));
    let back = source.network("back").await?;
    ensure!(target.ensure_network(&back).await?.is_empty());
    ensure!(target.ensure_network(&back).await?.is_empty());
    ensure!(target.network("back").await?["IPAM"]["Config"] == back["IPAM"]["Config"]);
    ensure!(
        target
            .ensure_network(&source.network("podman").await?)
            .await?
            .is_empty()
    );

    // Its subnet is taken: it gets another, and that is said.
    b.podman(["network", "create", "--subnet=10.125.0.0/24", "other"])?;
    let inner = source.network("inner").await?;
    let notes = target.ensure_network(&inner).await?;
    ensure!(
        notes.len() == 1 && notes[0].contains("10.125.0.0/24"),
        "{notes:?}"
    );
    ensure!(target.network("inner").await?["Internal"] == json!(true));

    b.podman(["network", "rm", "inner"])?;
    b.podman(["network", "create", "inner"])?;
    let refused = target.ensure_network(&inner).await.unwrap_err();
    ensure!(
        matches!(refused, ResourceError::Different { .. }),
        "{refused}"
    );

    let data = source.volume("data").await?;
    let place = target.ensure_volume(&data).await?;
    ensure!(b.path(&place.display().to_string()).is_dir());
    ensure!(target.ensure_volume(&data).await? == place);
    ensure!(target.volume("data").await?["Labels"]["k"] == json!("v"));
    let mut ram = data.clone();
    ram["Options"] = json!({ "type": "tmpfs", "device": "tmpfs" });
    let refused = target.ensure_volume(&ram).await.unwrap_err();
    ensure!(
        matches!(refused, ResourceError::Different { .. }),
        "{refused}"
    );
    Ok(())
}

#[tokio::test]
async fn a_fenced_container_does_not_come_back_and_an_unfenced_one_does() -> Result<()> {
    let Some(lab) = lab("fence", &["a"])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    let api = runtime(host);
    let id = start(host, "db", &["--restart=always"], &["sleep", "1000"])?;
    let before = crash(host, &api, "db").await?;
    comes_back(&api, "db", before).await?;

    let fence = api.forbid_start("db", "released by plan p1").await?;
    ensure!(fence.container == id);
    if let Means::Hook { file } = &fence.how {
        ensure!(host.path(&file.display().to_string()).exists());
    }
    ensure!(api.forbid_start("db", "released by plan p1").await? == fence);
    ensure!(
        api.state("db").await? == State::Running,
        "the fence must not end it"
    );
    crash(host, &api, "db").await?;
    tokio::time::sleep(3 * SECOND).await;
    ensure!(
        api.state("db").await? == State::Exited,
        "the fence did not hold"
    );
    if matches!(fence.how, Means::Hook { .. }) {
        let refused = api.start("db").await.unwrap_err();
        ensure!(
            refused.to_string().contains("released by plan p1"),
            "{refused}"
        );
        ensure!(host.podman(["start", "db"]).is_err());
    }
    let _ = host.podman(["start", "--all", "--filter", "restart-policy=always"]);
    ensure!(
        api.state("db").await? != State::Running,
        "start --all went past the fence"
    );
    start(host, "other", &[], &["sleep", "1000"])?;
    ensure!(
        api.state("other").await? == State::Running,
        "the fence holds others too"
    );

    let fence: Fence = serde_json::from_slice(&serde_json::to_vec(&fence)?)?;
    api.lift_fence(&fence).await?;
    api.lift_fence(&fence).await?;
    api.start("db").await?;
    let before = crash(host, &api, "db").await?;
    comes_back(&api, "db", before).await
}
