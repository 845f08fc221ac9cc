//! Container runtimes, for real: Podman in lab hosts, driven through its API from outside.

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use lifeboat::containers::{How, NotReady, ReadyRules, RuntimeError, Runtimes, Scope};
use lifeboat::model::container::{Container, State};
use lifeboat_tests::boxes::{SECOND, by_name, lab, runtime, runtimes, socket, start, start_bare};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use xtask::lab::PODMAN_SOCKET;

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
    let held = [
        "--env=REGISTERED=shop",
        "--label=com.docker.compose.project=stack",
        "--label=io.kubernetes.pod.uid=5a0e",
    ];
    start(host, "held", &held, &["sleep", "1000"])?;
    start(host, "done", &[], &["echo", "bye"])?;
    host.podman(["create", "--name", "made", "localhost/box:1", "echo"])?;
    host.podman(["pause", "held"])?;
    start_bare(host)?;

    let mut sockets = vec![socket(host)];
    sockets.push("/nonexistent/docker.sock".to_owned());
    let scope = Scope {
        cgroup_root: host.cgroup().to_owned(),
    };
    let all = Runtimes::new(&sockets, scope).registered_by(Some("REGISTERED".to_owned()));
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
    ensure!(db.addresses.len() == 1 && db.registration_ids.contains("shop"));
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

    let held = by_name(&seen.containers, "held")?;
    ensure!(held.state == State::Paused);
    let ids: Vec<&str> = held.registration_ids.iter().map(String::as_str).collect();
    ensure!(
        ids == ["compose project stack", "pod 5a0e", "shop"],
        "{ids:?}"
    );
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
async fn looking_every_second_asks_only_a_runtime_that_has_something_new() -> Result<()> {
    let Some(lab) = lab("follow", &["a"])? else {
        return Ok(());
    };
    let host = lab.host("a")?;
    start(host, "one", &[], &["sleep", "1000"])?;
    let door = Door::before(socket(host), host.path("/run/door.sock"))?;
    let scope = Scope {
        cgroup_root: host.cgroup().to_owned(),
    };
    let all = Runtimes::new(&[door.path.display().to_string()], scope);

    // At first it is asked every time: nobody says when its events begin.
    let mut quiet = 0;
    let since = Instant::now();
    while quiet < 10 {
        let before = door.asked();
        by_name(&all.follow().await.containers, "one")?;
        quiet = if door.asked() == before { quiet + 1 } else { 0 };
        ensure!(since.elapsed() < 12 * SECOND, "it is asked every time");
        tokio::time::sleep(SECOND / 10).await;
    }

    let seen = async |what: &str, is: &dyn Fn(&[Container]) -> bool| {
        // Far below the time after which a runtime is asked in any case.
        let since = Instant::now();
        while !is(&all.follow().await.containers) {
            ensure!(since.elapsed() < 5 * SECOND, "{what}: not seen");
            tokio::time::sleep(SECOND / 20).await;
        }
        println!("{what}: seen after {:?}", since.elapsed());
        anyhow::Ok(())
    };
    let is = |name: &'static str, state: State| {
        move |containers: &[Container]| by_name(containers, name).is_ok_and(|c| c.state == state)
    };
    host.podman(["pause", "one"])?;
    seen("a pause", &is("one", State::Paused)).await?;
    host.podman(["unpause", "one"])?;
    seen("its end", &is("one", State::Running)).await?;
    start(host, "two", &[], &["sleep", "1000"])?;
    seen("a birth", &is("two", State::Running)).await?;
    host.podman(["rename", "two", "other"])?;
    seen("another name", &is("other", State::Running)).await?;
    host.podman(["create", "--name", "made", "localhost/box:1", "echo"])?;
    seen("one that never ran", &is("made", State::Created)).await?;
    let pid = by_name(&all.follow().await.containers, "other")?.pid;
    host.run(["kill", "-9", &pid.to_string()])?;
    seen("a death", &is("other", State::Exited)).await?;
    host.podman(["rm", "other"])?;
    let gone = |containers: &[Container]| by_name(containers, "other").is_err();
    seen("a removal", &gone).await?;
    start_bare(host)?;
    seen("a bare cgroup", &is("/plain", State::Running)).await?;
    Ok(())
}

/// A socket before a runtime's own that counts who comes.
struct Door {
    path: PathBuf,
    asked: Arc<AtomicUsize>,
}

impl Door {
    fn before(runtime: String, path: PathBuf) -> Result<Self> {
        let listener = tokio::net::UnixListener::bind(&path)?;
        let asked = Arc::<AtomicUsize>::default();
        let count = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let runtime = runtime.clone();
                tokio::spawn(async move {
                    let mut far = tokio::net::UnixStream::connect(runtime).await?;
                    tokio::io::copy_bidirectional(&mut near, &mut far).await
                });
            }
        });
        Ok(Self { path, asked })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
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

    // Many writers, of which none may write between the pause and its end.
    let write = "n=0; while test $n -lt 40; do
        (while :; do echo x >>/data/$n; done) &
        n=$((n + 1)); done; wait";
    host.run(["mkdir", "-p", "/srv/written"])?;
    let mount = ["--restart=always", "--volume=/srv/written:/data"];
    start(host, "writers", &mount, &["sh", "-c", write])?;
    let seen = all.discover().await.containers;
    let writers = by_name(&seen, "writers")?;
    tokio::time::sleep(SECOND / 2).await;
    all.pause_all(&[writers]).await?;
    let written = || host.run(["sh", "-c", "cat /srv/written/* | wc -c"]);
    let before = written()?;
    ensure!(before.trim() != "0", "nobody wrote");
    all.kill(writers, 10 * SECOND).await?;
    ensure!(
        written()? == before,
        "a killed container wrote after its pause"
    );
    tokio::time::sleep(SECOND).await;
    ensure!(api.state("writers").await? == State::Exited);

    let missing = api.kill("nobody", SECOND).await.unwrap_err();
    ensure!(
        missing.not_found() && missing.to_string().contains("nobody"),
        "{missing}"
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
    // Podman says nothing before the first event, not even that it listens.
    tokio::time::sleep(SECOND).await;
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
