//! A small fleet, and a container on its source whose data is known to the byte: what a bad input must not
//! touch.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use xtask::crew::{Crew, Device};
use xtask::lab::{Host, HostSpec, Lab, LabSpec};
use xtask::process::{is_root, wait_for};

use crate::boxes;

/// Hosts of every such fleet; tests may add more.
pub const SOURCE: &str = "source";
/// The only device that can become the target.
pub const TARGET: &str = "haven";
/// Runs no containers.
pub const DUPLICATOR: &str = "duplicator";

/// The container that is to move.
pub const CONTAINER: &str = "shop";
/// Its volume: a bind mount.
pub const DATA: &str = "/srv/shop/data";

/// A lab with source, target, duplicator and `more` hosts without containers; the source has the box
/// image. `None`, and said, where there can be none.
///
/// # Errors
/// When the lab does not come up.
pub fn lab(name: &str, more: &[&str]) -> Result<Option<Lab>> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(None);
    }
    let without = [DUPLICATOR].into_iter().chain(more.iter().copied());
    let mut spec = LabSpec::of(name, &[SOURCE, TARGET]);
    spec.hosts.extend(without.map(|host| HostSpec {
        containers: false,
        ..host.into()
    }));
    let lab = Lab::up(&spec)?;
    let import = "tar -c -C /tmp/image . | podman import - localhost/box:1 2>&1";
    let script = format!("{}{import}", boxes::ROOT);
    lab.host(SOURCE)?.run(["sh", "-c", &script])?;
    Ok(Some(lab))
}

/// The fleet on `lab`; `target` says what is special about the target's configuration.
///
/// # Errors
/// As [`Crew::start`].
pub fn fleet(lab: &Lab, target: impl FnOnce(&mut Device)) -> Result<Crew> {
    let mut devices = [Device::new(SOURCE), Device::new(TARGET)];
    target(&mut devices[1]);
    Crew::start(lab, DUPLICATOR, &devices)
}

/// What the container's volume holds below `kept/`, all of it random.
#[derive(Debug, Clone, Copy)]
pub struct Goods {
    /// Size of the one large file, in MiB.
    pub large_mib: u32,
    /// Number of small files.
    pub files: u32,
    /// Size of each small file, in KiB.
    pub file_kib: u32,
}

/// Goods of which every file travels whole, 32 MiB together.
pub const WHOLE: Goods = Goods {
    large_mib: 0,
    files: 64,
    file_kib: 512,
};

/// Goods of no weight.
pub const FEW: Goods = Goods {
    large_mib: 1,
    files: 5,
    file_kib: 1,
};

/// Starts the container over these goods; it adds a line to the file `log` beside `kept/` five times a
/// second. Waits until the source's agent knows it.
///
/// # Errors
/// When it does not start.
pub fn open(crew: &Crew, goods: Goods) -> Result<()> {
    let host = crew.host(SOURCE)?;
    let Goods {
        large_mib,
        files,
        file_kib,
    } = goods;
    let make = format!(
        "mkdir -p {DATA}/kept/small && cd {DATA}/kept
        head -c {large_mib}M /dev/urandom >large
        i=0; while [ $i -lt {files} ]; do head -c {file_kib}K /dev/urandom >small/$i; i=$((i+1)); done"
    );
    host.run(["sh", "-c", &make])?;
    let volume = format!("--volume={DATA}:/data");
    let write = "while :; do echo sold >>/data/log; sleep 0.2; done";
    boxes::start(
        host,
        CONTAINER,
        &["--restart=always", &volume],
        &["sh", "-c", write],
    )?;
    runs_on(host)?;
    known(crew)
}

/// Waits until the source's agent sees the container.
///
/// # Errors
/// It does not.
pub fn known(crew: &Crew) -> Result<()> {
    wait_for(
        "the agent's view of the container",
        Duration::from_secs(10),
        || {
            let (_, status) = crew.ask(SOURCE, &["status"])?;
            let mut containers = status["view"]["containers"]
                .as_array()
                .into_iter()
                .flatten();
            Ok(containers
                .any(|container| container["name"] == CONTAINER)
                .then_some(()))
        },
    )
}

/// A digest over names and bytes of everything below `kept/`.
///
/// # Errors
/// When it cannot be read.
pub fn digest(host: &Host) -> Result<String> {
    let all = format!(
        "cd {DATA}/kept && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
    );
    host.run(["sh", "-c", &all])
}

/// Fails unless the container runs on `host`, is started again when it ends, and writes.
///
/// # Errors
/// It does not.
pub fn runs_on(host: &Host) -> Result<()> {
    let format = "{{.State.Status}} {{.HostConfig.RestartPolicy.Name}}";
    let state = host.podman(["inspect", "--format", format, CONTAINER])?;
    ensure!(
        state == "running always",
        "{CONTAINER} is {state} on {}",
        host.name()
    );
    let log = host.path(&format!("{DATA}/log"));
    let length = || fs::metadata(&log).map_or(0, |file| file.len());
    let before = length();
    let wait = Duration::from_secs(10);
    wait_for("a line of the running container", wait, || {
        Ok((length() > before).then_some(()))
    })
}

/// Fails when a rolled-back or refused plan left anything on the target: containers, volumes, data, or a
/// plan that is not over.
///
/// # Errors
/// Something was left; the message names it.
pub fn nothing_left_on(target: &Host) -> Result<()> {
    for list in [
        &["ps", "--all", "--quiet"][..],
        &["volume", "ls", "--quiet"],
    ] {
        let left = target.podman(list)?;
        ensure!(left.is_empty(), "podman {} lists {left}", list.join(" "));
    }
    ensure!(
        !target.path(DATA).exists(),
        "{DATA} was left on {}",
        target.name()
    );
    Ok(())
}

/// `lifeboat evacuate --all --yes` on the source, which must fail; returns what the operator reads.
///
/// # Errors
/// It succeeded.
pub fn refused(crew: &Crew) -> Result<String> {
    match crew.tell(SOURCE, &["evacuate", "--all", "--yes"]) {
        Ok(report) => bail!("the evacuation succeeded:\n{report}"),
        Err(error) => {
            let text = format!("{error:#}");
            println!("the operator reads: {text}");
            Ok(text)
        }
    }
}

/// As [`refused`], and runs `act` on the target as soon as data arrives there.
///
/// # Errors
/// No data arrived, the act failed, or the evacuation succeeded.
pub fn refused_while(crew: &Crew, target: &Host, act: &[&str]) -> Result<String> {
    thread::scope(|scope| {
        let evacuation = scope.spawn(|| refused(crew));
        let arrives = target.path(&format!("{DATA}/kept"));
        wait_for("data on the target", Duration::from_secs(30), || {
            Ok(arrives.exists().then_some(()))
        })?;
        target.run(act)?;
        evacuation.join().expect("it only returns errors")
    })
}

/// `lifeboat evacuate --all --yes` and then `verify`, both of which must succeed, with the container on the
/// target and never on the source; returns the plan's id.
///
/// # Errors
/// They do not.
pub fn moved(lab: &Lab, crew: &Crew, digest_before: &str) -> Result<String> {
    crew.tell(SOURCE, &["evacuate", "--all", "--yes"])
        .with_context(|| format!("{}\n{}", crew.log(SOURCE), crew.log(TARGET)))?;
    let plan = last_plan(crew)?["plan"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    crew.tell(SOURCE, &["verify", &plan])?;
    runs_on(lab.host(TARGET)?)?;
    ensure!(
        digest(lab.host(TARGET)?)? == digest_before,
        "the target's data differs"
    );
    ensure!(
        lab.host(SOURCE)?.podman(["start", CONTAINER]).is_err(),
        "the fenced source started {CONTAINER} again"
    );
    Ok(plan)
}

/// State of the newest plan of the source.
///
/// # Errors
/// There is none.
pub fn last_plan(crew: &Crew) -> Result<Value> {
    let (_, status) = crew.ask(SOURCE, &["status"])?;
    let plans = status["plans"].as_array();
    plans
        .and_then(|plans| plans.last())
        .cloned()
        .context("the source has no plan")
}

/// Fails unless `text` holds every one of `parts`.
///
/// # Errors
/// The message names the missing part.
pub fn says(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(text.contains(part), "{part:?} is not in: {text}");
    }
    Ok(())
}

/// Waits until a line of the log of a device's agent holds every one of `parts`, and returns it.
///
/// # Errors
/// No line does in ten seconds.
pub fn logged(read: impl Fn() -> String, parts: &[&str]) -> Result<String> {
    let patience = Duration::from_secs(10);
    wait_for(&format!("a log line with {parts:?}"), patience, || {
        let log = read();
        let line = log
            .lines()
            .find(|line| parts.iter().all(|part| line.contains(part)));
        Ok(line.map(str::to_owned))
    })
    .with_context(read)
}
