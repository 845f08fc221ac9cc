//! Container runtimes, for real: Podman in lab hosts, driven through its API from outside.

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use lifeboat::containers::{
    How, Means, NotReady, ReadyRules, ResourceError, Runtime, RuntimeError, Runtimes, Scope, Twin,
    TwinError,
};
use lifeboat::model::container::{Container, State};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};
use xtask::lab::{Host, Lab, LabSpec, PODMAN_SOCKET};
use xtask::process::{is_root, wait_for};

const SECOND: Duration = Duration::from_secs(1);

/// A lab with these hosts, or `None` where there can be none.
fn lab(name: &str, hosts: &[&str]) -> Result<Option<Lab>> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(None);
    }
    let lab = Lab::up(&LabSpec::of(name, hosts))?;
    for host in lab.hosts() {
        host.run(["sh", "-c", IMAGE])?;
    }
    Ok(Some(lab))
}

/// An image of nothing but busybox.
const IMAGE: &str = "mkdir -p /tmp/image/bin /tmp/image/etc /tmp/image/tmp
cp \"$(command -v busybox)\" /tmp/image/bin/busybox
for applet in sh sleep nc httpd echo cat touch test; do ln -sf busybox /tmp/image/bin/$applet; done
echo root:x:0:0::/:/bin/sh >/tmp/image/etc/passwd
tar -c -C /tmp/image . | podman import - localhost/box:1 >/dev/null 2>&1";

fn socket(host: &Host) -> String {
    host.path(PODMAN_SOCKET).display().to_string()
}

fn runtimes(host: &Host) -> Runtimes {
    let scope = Scope {
        cgroup_root: host.cgroup().to_owned(),
    };
    Runtimes::new(&[socket(host)], scope)
}

fn runtime(host: &Host) -> Runtime {
    Runtime::new(&socket(host))
}

/// `podman run -d --name NAME ARGS… localhost/box:1 COMMAND…`; returns the id.
fn start(host: &Host, name: &str, args: &[&str], command: &[&str]) -> Result<String> {
    let mut all = vec!["run", "--detach", "--name", name];
    all.extend(args);
    all.push("localhost/box:1");
    all.extend(command);
    Ok(host.podman(all)?.trim().to_owned())
}

/// Processes in the cgroup `/plain` that no runtime knows.
fn start_bare(host: &Host) -> Result<()> {
    host.spawn_logged("plain", ["sleep", "1000"])?;
    let procs = host.cgroup().join("plain/cgroup.procs");
    wait_for("the bare cgroup", 10 * SECOND, || {
        Ok((!fs::read_to_string(&procs)?.is_empty()).then_some(()))
    })
}

fn by_name<'a>(containers: &'a [Container], name: &str) -> Result<&'a Container> {
    containers
        .iter()
        .find(|container| container.name.as_str() == name)
        .with_context(|| format!("{name} was not discovered among {containers:#?}"))
}

#[tokio::test]
async fn discovery_shows_every_container_with_its_cgroup_and_bare_cgroups_by_path() -> Result<()> {
    let Some(lab) = lab("discover", &["a"])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    host.podman(["volume", "create", "data"])?;
    host.run(["mkdir", "-p", "/srv/files"])?;
    let db = [
        "--volume=data:/data",
        "--volume=/srv/files:/files:ro",
        "--publish=127.0.0.1:8080:80",
        "--publish=5353:53/udp",
        "--label=lifeboat.registration-id=shop",
    ];
    let id = start(host, "db", &db, &["sleep", "1000"])?;
    start(host, "held", &[], &["sleep", "1000"])?;
    start(host, "done", &[], &["echo", "bye"])?;
    host.podman(["create", "--name", "made", "localhost/box:1", "echo"])?;
    host.podman(["pause", "held"])?;
    start_bare(host)?;

    let mut sockets = vec![socket(host)];
    sockets.push("/nonexistent/docker.sock".to_owned());
    let scope = Scope {
        cgroup_root: host.cgroup().to_owned(),
    };
    let all = Runtimes::new(&sockets, scope);
    let seen = all.discover().await;
    ensure!(seen.problems.len() == 1, "{:?}", seen.problems);
    ensure!(seen.problems[0].contains("/nonexistent/docker.sock"));

    let db = by_name(&seen.containers, "db")?;
    ensure!(db.id == id && db.state == State::Running && db.pid > 0);
    ensure!(db.cgroup_path.contains(&id) && db.cgroup_path.starts_with('/'));
    ensure!(db.cgroup_id == fs::metadata(all.directory(db))?.ino());
    ensure!(
        fs::read_to_string(all.directory(db).join("cgroup.procs"))?.contains(&db.pid.to_string())
    );
    ensure!(db.image == "localhost/box:1" && db.image_id.starts_with("sha256:"));
    ensure!(db.addresses.len() == 1 && db.registration_id.as_deref() == Some("shop"));
    let ports: BTreeSet<(String, u16, u16, bool)> = db
        .published
        .iter()
        .map(|p| (p.host_ip.to_string(), p.host_port, p.container_port, p.udp))
        .collect();
    let wanted = [
        ("127.0.0.1".to_owned(), 8080, 80, false),
        ("0.0.0.0".to_owned(), 5353, 53, true),
    ];
    ensure!(ports == BTreeSet::from(wanted), "{ports:?}");
    let data = db
        .mounts
        .iter()
        .find(|m| m.volume.as_deref() == Some("data"));
    ensure!(data.is_some_and(|m| m.writable && m.destination == Path::new("/data")));
    let files = db.mounts.iter().find(|m| m.volume.is_none());
    ensure!(files.is_some_and(|m| !m.writable && m.source == Path::new("/srv/files")));

    ensure!(by_name(&seen.containers, "held")?.state == State::Paused);
    let done = by_name(&seen.containers, "done")?;
    ensure!(done.state == State::Exited && done.pid == 0 && done.cgroup_path.is_empty());
    ensure!(by_name(&seen.containers, "made")?.state == State::Created);
    let plain = by_name(&seen.containers, "/plain")?;
    ensure!(plain.runtime.is_none() && plain.state == State::Running && plain.pid > 0);
    let odd: Vec<&str> = seen
        .containers
        .iter()
        .map(|container| container.name.as_str())
        .filter(|name| name.contains("conmon") || name.contains("libpod"))
        .collect();
    ensure!(odd.is_empty(), "monitors are shown as containers: {odd:?}");

    // What changed is seen the next time, from memory or not.
    host.podman(["unpause", "held"])?;
    host.podman(["restart", "--time", "0", "db"])?;
    host.podman(["rm", "done"])?;
    let later = all.discover().await.containers;
    ensure!(by_name(&later, "held")?.state == State::Running);
    ensure!(by_name(&later, "db")?.pid != db.pid);
    ensure!(by_name(&later, "done").is_err());
    Ok(())
}

#[tokio::test]
async fn a_group_is_paused_side_by_side_and_a_paused_container_can_be_killed() -> Result<()> {
    let Some(lab) = lab("pause", &["a"])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    for name in ["one", "two", "three"] {
        start(host, name, &["--restart=always"], &["sleep", "1000"])?;
    }
    start_bare(host)?;
    let all = runtimes(host);
    let seen = all.discover().await.containers;
    let group: Vec<&Container> = ["one", "two", "three", "/plain"]
        .iter()
        .map(|name| by_name(&seen, name))
        .collect::<Result<_>>()?;
    let took = all.pause_all(&group).await?;
    println!("paused {} containers in {took:?}", group.len());
    for container in &group {
        let events = fs::read_to_string(all.directory(container).join("cgroup.events"))?;
        ensure!(events.contains("frozen 1"), "{} runs on", container.name);
    }
    let took = all.unpause_all(&group).await?;
    println!("let them run again in {took:?}");
    for container in &group {
        let events = fs::read_to_string(all.directory(container).join("cgroup.events"))?;
        ensure!(
            events.contains("frozen 0"),
            "{} is still held",
            container.name
        );
    }

    // One that cannot be paused: the others must not stay paused.
    let mut gone = group[0].clone();
    gone.id = "0123456789ab".to_owned();
    let broken = [&gone, group[1]];
    ensure!(all.pause_all(&broken).await.is_err());
    let api = runtime(host);
    ensure!(api.state("two").await? == State::Running);

    api.pause("three").await?;
    api.pause("three").await?;
    let since = Instant::now();
    api.kill("three", 10 * SECOND).await?;
    println!("killed a paused container in {:?}", since.elapsed());
    ensure!(api.state("three").await? == State::Exited);
    api.kill("three", SECOND).await?;
    tokio::time::sleep(SECOND).await;
    ensure!(
        api.state("three").await? == State::Exited,
        "its restart policy brought it back"
    );
    let missing = api.kill("nobody", SECOND).await.unwrap_err();
    ensure!(
        missing.not_found() && missing.to_string().contains("nobody"),
        "{missing}"
    );
    Ok(())
}

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
    let length = runtime(from).export_image(reference, &archive).await?;
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
    ensure!(
        serde_json::from_slice::<lifeboat::containers::TwinSpec>(&serde_json::to_vec(&spec)?)?
            == spec
    );

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
    let pid = |inspect: &Value| inspect["State"]["Pid"].as_i64().unwrap_or(0);
    let die = async || -> Result<()> {
        let inspect = api.inspect("db").await?;
        // Not through the runtime: it must look like a crash.
        host.run(["kill", "-9", &pid(&inspect).to_string()])?;
        tokio::time::sleep(3 * SECOND).await;
        Ok(())
    };
    die().await?;
    ensure!(
        api.state("db").await? == State::Running,
        "the restart policy does not work here"
    );

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
    die().await?;
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

    let fence: lifeboat::containers::Fence = serde_json::from_slice(&serde_json::to_vec(&fence)?)?;
    api.lift_fence(&fence).await?;
    api.lift_fence(&fence).await?;
    api.start("db").await?;
    die().await?;
    ensure!(
        api.state("db").await? == State::Running,
        "lifting did not restore the restart policy"
    );
    Ok(())
}

#[tokio::test]
async fn readiness_is_the_health_check_else_the_ports_else_the_settle_time() -> Result<()> {
    let Some(lab) = lab("ready", &["a"])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    let api = runtime(host);
    let rules = |ports: &[u16]| ReadyRules {
        service_ports: ports.iter().copied().collect(),
        settle: 2 * SECOND,
        timeout: 20 * SECOND,
    };
    let check = ["--health-cmd=test -f /tmp/ok", "--health-interval=1s"];
    start(
        host,
        "checked",
        &check,
        &["sh", "-c", "sleep 2; touch /tmp/ok; sleep 1000"],
    )?;
    let ready = api.wait_ready("checked", &rules(&[])).await?;
    ensure!(
        ready.how == How::HealthCheck && ready.after >= SECOND,
        "{ready:?}"
    );

    start(
        host,
        "served",
        &[],
        &["sh", "-c", "sleep 1; nc -ll -p 4000 -e echo"],
    )?;
    let ready = api.wait_ready("served", &rules(&[4000])).await?;
    ensure!(ready.how == How::PortsListening(vec![4000]), "{ready:?}");

    start(host, "plain", &[], &["sleep", "1000"])?;
    let ready = api.wait_ready("plain", &rules(&[])).await?;
    ensure!(
        ready.how == How::Settled && ready.after >= 2 * SECOND,
        "{ready:?}"
    );

    let mut short = rules(&[4001]);
    short.timeout = SECOND;
    let silent = api.wait_ready("plain", &short).await.unwrap_err();
    ensure!(
        silent.to_string().contains("does not listen on port 4001"),
        "{silent}"
    );

    start(
        host,
        "broken",
        &[],
        &["sh", "-c", "echo no database; sleep 1; exit 3"],
    )?;
    let since = Instant::now();
    match api.wait_ready("broken", &rules(&[4000])).await {
        Err(NotReady::Ended {
            exit_code: 3, logs, ..
        }) => ensure!(logs.contains("no database")),
        other => anyhow::bail!("{other:?}"),
    }
    ensure!(
        since.elapsed() < 10 * SECOND,
        "the end was not noticed at once"
    );
    Ok(())
}

#[tokio::test]
async fn births_and_deaths_come_as_events() -> Result<()> {
    let Some(lab) = lab("events", &["a"])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    let api = runtime(host);
    let mut events = Box::pin(api.events().await?);
    let id = start(host, "brief", &[], &["echo", "hello"])?;
    let mut actions = Vec::new();
    while !actions.contains(&"die".to_owned()) {
        let event = tokio::time::timeout(20 * SECOND, events.next()).await?;
        let event = event.context("the events ended")??;
        if event.id == id {
            ensure!(event.name == "brief");
            actions.push(event.action);
        }
    }
    ensure!(actions.contains(&"start".to_owned()), "{actions:?}");
    Ok(())
}

#[tokio::test]
async fn a_refusal_carries_the_runtimes_own_words() -> Result<()> {
    let Some(lab) = lab("refuse", &["a"])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    let error: RuntimeError = runtime(host).inspect("nobody").await.unwrap_err();
    let text = error.to_string();
    ensure!(error.not_found() && !error.retry_helps());
    ensure!(
        text.contains("inspect container nobody") && text.contains("404"),
        "{text}"
    );
    ensure!(text.contains(PODMAN_SOCKET), "{text}");
    Ok(())
}
