//! A paired device to which `serve` is delegated: it answers the target in the source's stead, and fetches what it lacks.

use anyhow::{Context as _, Result, bail, ensure};
use lifeboat_tests::stage::{
    Fault, PATIENCE, SOURCE, Service, Stage, TARGET, device, lines, policy,
};
use serde_json::Value;
use std::fs;
use std::time::{Duration, Instant};
use xtask::crew::{Device, wait_for_end};
use xtask::images;
use xtask::lab::Host;
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};
/// The third device; the duplicator says which of the two others is lent for what.
const OTHER: &str = "other";
/// Where the target mounts the volume.
const MOUNT: &str = "/srv/before";
/// Bytes of each file that is read.
const FILE: u64 = 24 << 20;
/// So slow that reading a file takes several seconds.
const MBIT: u32 = 40;
/// Longest time until a read is answered by the source when the paired device fell silent, with what the reading takes.
const FALLS_BACK: Duration = Duration::from_secs(30);

fn delegate(actions: &str) -> String {
    format!("delegate:\n  - when: {{ any: [busy, starved] }}\n    actions: [{actions}]\n")
}

/// A prepared plan with these actions delegated, its target and its paired device.
struct Scene {
    stage: Stage,
    plan: String,
    volume: String,
    target: String,
    paired: String,
    delegate: String,
}

impl Scene {
    fn up(name: &str, actions: &str, trusted: bool) -> Result<Option<Self>> {
        let delegate = delegate(actions);
        let source = Device {
            policy: Some(policy(Fault::None, &delegate)),
            migration: vec!["prepare_pause_seconds: 1".into()],
            ..Device::new(SOURCE)
        };
        let devices = [source, device(TARGET, None), device(OTHER, None)];
        let Some(mut stage) = Stage::up(name, &devices, &[CACHE])? else {
            return Ok(None);
        };
        let source = stage.source()?.clone();
        for name in ["one", "two", "three"] {
            let file = format!("{}/{name}", CACHE.notes());
            source.run(["sh", "-c", &format!("head -c {FILE} /dev/urandom >{file}")])?;
        }
        for other in [TARGET, OTHER] {
            images::load_some(stage.lab.host(other)?, &["redis"])?;
        }
        if !trusted {
            let path = "/etc/lifeboat/agent.yaml";
            let text = fs::read_to_string(source.path(path))?;
            let other = text.replace("[10.77.0.0/24]", "[192.0.2.0/24]");
            ensure!(other != text, "{text}");
            source.write(path, other)?;
            stage.crew.kill_agent(SOURCE)?;
            stage.crew.start_agent(SOURCE)?;
        }
        stage.find(Fault::Busy, &delegate)?;
        let plan = stage.prepared_plan()?;
        let volume = stage.volume_at(&plan, &CACHE.notes())?;
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let role = |role: &str| status["plans"][0][role].as_str().map(str::to_owned);
        Ok(Some(Self {
            target: role("target").context("no target")?,
            paired: role("paired").context("no paired device")?,
            stage,
            plan,
            volume,
            delegate,
        }))
    }

    fn target(&self) -> Result<&Host> {
        self.stage.lab.host(&self.target)
    }

    /// Serves the volume on the target, of which only what is read is fetched.
    fn serve(&self) -> Result<()> {
        self.target()?.run(["mkdir", "-p", MOUNT])?;
        let serve = [
            "serve",
            &self.plan,
            &self.volume,
            "--mount",
            MOUNT,
            "--no-fill",
        ];
        let told = self.stage.crew.tell(&self.target, &serve);
        println!("{}", told.with_context(|| self.logs())?);
        Ok(())
    }

    fn end(&self) -> Result<()> {
        let end = ["serve", &self.plan, &self.volume, "--end"];
        self.stage.crew.tell(&self.target, &end).map(drop)
    }

    /// Reads a file of the volume on the target, which is the source's to the byte; how long it took.
    fn read(&self, name: &str) -> Result<Duration> {
        let sum = |host: &Host, directory: &str| -> Result<String> {
            let sums = host.run(["b2sum", &format!("{directory}/{name}")])?;
            Ok(sums.split(' ').next().unwrap_or_default().to_owned())
        };
        let began = Instant::now();
        let read = sum(self.target()?, MOUNT).with_context(|| self.logs())?;
        let took = began.elapsed();
        let plain = sum(self.stage.source()?, &CACHE.notes())?;
        ensure!(read == plain, "{name} differs: {read} and {plain}");
        Ok(took)
    }

    /// What the source gave to `whom`: bytes read, and on the wire.
    fn given(&self, whom: &str) -> Result<(u64, u64)> {
        let (_, status) = self.stage.crew.ask(SOURCE, &["status"])?;
        let given = &status["plans"][0]["given"][whom];
        let number = |name: &str| given[name].as_u64().with_context(|| status.to_string());
        Ok((number("read")?, number("wire")?))
    }

    /// Bytes that came to the target `from_source` or `from_paired`.
    fn came(&self, from: &str) -> Result<u64> {
        let (_, served) = self.stage.crew.ask(&self.target, &["serve"])?;
        served[0]["figures"][from]
            .as_u64()
            .with_context(|| served.to_string())
    }

    /// Nothing of the plan is on the paired device: no directory, and no file without a name that is open.
    fn nothing_is_left(&self) -> Result<()> {
        let name = format!("{}.paired", self.plan);
        let plans = self
            .stage
            .lab
            .host(&self.paired)?
            .path("/var/lib/lifeboat/plans");
        wait_for(
            "the paired device to have removed everything",
            PATIENCE,
            || {
                let open = open_files(&format!("/{name}/"));
                let is_there = plans.join(&name).exists();
                Ok((open.is_empty() && !is_there).then_some(()))
            },
        )
        .with_context(|| format!("{:?}\n{}", open_files(&name), self.logs()))
    }

    fn report(&self) -> Result<Value> {
        Ok(self.stage.crew.ask(SOURCE, &["report", &self.plan])?.1)
    }

    /// Bytes that the source read for the target itself, and for the paired device, by its journal.
    fn given_at_last(&self) -> Result<(u64, u64)> {
        let journal = format!("/var/lib/lifeboat/plans/{}.source/journal.jsonl", self.plan);
        let text = fs::read_to_string(self.stage.source()?.path(&journal)).context(journal)?;
        let entries = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut given = entries.filter(|entry| entry["event"]["event"] == "stood-in");
        let given = given.next().context("nobody stood in")?["event"]["given"].clone();
        let read = |whom: &str| {
            given[whom]["read"]
                .as_u64()
                .with_context(|| given.to_string())
        };
        Ok((read("target")?, read("paired")?))
    }

    fn logs(&self) -> String {
        let logs = [SOURCE, &self.target, &self.paired];
        let logs = logs.map(|device| format!("--- {device}\n{}", self.stage.crew.log(device)));
        logs.join("\n")
    }
}

/// Files that any process of this machine has open whose path holds `text`.
fn open_files(text: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let files = processes.flat_map(|process| fs::read_dir(process.path().join("fd")));
    let files = files.flatten().flatten();
    let links = files.filter_map(|file| fs::read_link(file.path()).ok());
    let links = links.map(|link| link.to_string_lossy().into_owned());
    links.filter(|link| link.contains(text)).collect()
}

#[test]
fn the_target_reads_through_the_paired_device_and_the_source_answers_that_alone() -> Result<()> {
    let Some(mut scene) = Scene::up("stands-in", "serve", true)? else {
        return Ok(());
    };
    let (_, status) = scene.stage.crew.ask(SOURCE, &["status"])?;
    ensure!(
        status["plans"][0]["stand_in"] == *scene.paired,
        "{status:#}"
    );
    scene.serve()?;
    scene.read("one")?;
    scene.read("one")?;
    ensure!(
        scene.given("target")? == (0, 0),
        "the target asked the source"
    );
    ensure!(
        scene.given("paired")?.0 == FILE,
        "each block once: {:?}",
        scene.given("paired")?
    );
    ensure!(scene.came("from_source")? == 0 && scene.came("from_paired")? >= FILE);
    let told = scene.stage.crew.tell(SOURCE, &["status"])?;
    ensure!(
        told.contains("answers the target in this device's stead"),
        "{told}"
    );
    ensure!(
        !open_files(&format!("/{}.paired/", scene.plan)).is_empty(),
        "the paired device keeps nothing, and what is looked for later is not found"
    );

    // Killed while it answers: the source does, and no read goes wrong.
    let slow = scene.stage.lab.host(&scene.paired)?.clone();
    scene.stage.lab.shape(&slow, Some(MBIT))?;
    let path = format!("{MOUNT}/two");
    let mut reading = scene.target()?.spawn_logged("reading", ["b2sum", &path])?;
    wait_for("a read under way", PATIENCE, || {
        Ok((scene.given("paired")?.0 > FILE).then_some(()))
    })?;
    let paired = scene.paired.clone();
    scene.stage.crew.kill_agent(&paired)?;
    let began = Instant::now();
    ensure!(reading.wait()?.success(), "{}", scene.logs());
    ensure!(began.elapsed() < FALLS_BACK, "{:?}", began.elapsed());
    println!("read on after {:?}", began.elapsed());
    scene.stage.lab.shape(&slow, None)?;
    ensure!(scene.read("two")? < FALLS_BACK);
    let took = scene.read("three")?;
    ensure!(took < FALLS_BACK, "{took:?}");
    ensure!(scene.given("target")?.0 > 0, "who answered?");
    ensure!(
        open_files(&format!("/{}.paired/", scene.plan)).is_empty(),
        "what it had lasts longer than its process"
    );

    // Back, it is asked again: for a new copy.
    scene.stage.crew.start_agent(&paired)?;
    scene.end()?;
    scene.serve()?;
    let before = scene.given("target")?;
    scene.read("three")?;
    ensure!(scene.given("target")? == before, "{}", scene.logs());
    ensure!(scene.came("from_source")? == 0);

    // Frozen, it is as good as dead.
    scene
        .stage
        .crew
        .signal_agent(&paired, nix::sys::signal::Signal::SIGSTOP)?;
    let took = scene.read("one");
    scene
        .stage
        .crew
        .signal_agent(&paired, nix::sys::signal::Signal::SIGCONT)?;
    let took = took?;
    println!("read past a frozen one in {took:?}");
    // The patience with its connection, once.
    ensure!(took < Duration::from_secs(12), "{took:?}");

    let plan = scene.plan.clone();
    scene.stage.crew.tell(SOURCE, &["abort", &plan])?;
    let report = wait_for_end(&scene.stage.crew, SOURCE, &plan, PATIENCE)?;
    ensure!(report["state"] == "aborted", "{report:#}");
    ensure!(
        lines(&report, "answered the target with").len() == 1
            && lines(&report, "read for the paired device").len() == 1,
        "{report:#}"
    );
    println!("{:#?}", lines(&report, "paired device"));
    scene.nothing_is_left()?;
    scene.stage.writes_go_on(&CACHE)?;
    scene.stage.lab.down()
}

#[test]
fn with_all_delegated_the_target_needs_no_link_to_the_source_for_the_data() -> Result<()> {
    let all = "encrypt, transfer, serve";
    let Some(scene) = Scene::up("stands-in-all", all, true)? else {
        return Ok(());
    };
    scene.serve()?;
    let (source, target) = (scene.stage.source()?, scene.target()?);
    scene.stage.lab.partition(source, target, true)?;
    let read = scene.read("one");
    let rounds = || -> Result<usize> { Ok(lines(&scene.report()?, "round ").len()) };
    let before = rounds()?;
    let copied = wait_for("a round that the paired device carries", PATIENCE, || {
        Ok((rounds()? > before).then_some(()))
    });
    scene.stage.lab.partition(source, target, false)?;
    let took = read?;
    copied.with_context(|| scene.logs())?;
    println!("read in {took:?} without a link between source and target");
    ensure!(
        scene.given("target")? == (0, 0),
        "the target asked the source"
    );
    ensure!(scene.came("from_source")? == 0);

    scene.stage.find(Fault::Starved, &scene.delegate)?;
    let report = wait_for_end(&scene.stage.crew, SOURCE, &scene.plan, PATIENCE * 2)
        .with_context(|| scene.logs())?;
    scene.stage.find(Fault::None, &scene.delegate)?;
    ensure!(report["state"] == "completed", "{report:#}");
    let did = lines(&report, "answered the target with");
    let [did] = did.as_slice() else {
        bail!("{report:#}")
    };
    println!("{did}");
    ensure!(
        lines(&report, "0 B for the target itself").len() == 1,
        "{report:#}"
    );
    scene.nothing_is_left()?;
    scene.stage.check_data_on(scene.target()?, &CACHE)?;
    scene.stage.lab.down()
}

#[test]
fn over_a_link_that_is_not_trusted_the_source_serves_and_says_why() -> Result<()> {
    let Some(scene) = Scene::up("stands-in-not", "transfer, serve", false)? else {
        return Ok(());
    };
    let report = scene.report()?;
    let kept = lines(&report, "serve stays here: the link to");
    ensure!(
        kept.len() == 1 && kept[0].contains(&scene.paired) && kept[0].contains("trusted_networks"),
        "{report:#}"
    );
    let (_, status) = scene.stage.crew.ask(SOURCE, &["status"])?;
    ensure!(status["plans"][0]["stand_in"].is_null(), "{status:#}");
    scene.serve()?;
    scene.read("one")?;
    ensure!(scene.came("from_paired")? == 0 && scene.came("from_source")? >= FILE);
    ensure!(
        scene.given("paired")? == (0, 0),
        "unsealed blocks went over it"
    );
    let plan = scene.plan.clone();
    scene.stage.crew.tell(SOURCE, &["abort", &plan])?;
    wait_for_end(&scene.stage.crew, SOURCE, &plan, PATIENCE)?;
    scene.nothing_is_left()?;
    scene.stage.lab.down()
}

/// A plan that switches first, with these actions delegated, up to where the devices are lent.
fn switched(name: &str, actions: &str) -> Result<Option<Scene>> {
    let devices = [
        device(SOURCE, None),
        device(TARGET, None),
        device(OTHER, None),
    ];
    let Some(stage) = Stage::up(name, &devices, &[CACHE])? else {
        return Ok(None);
    };
    let source = stage.source()?.clone();
    let file = format!("{}/one", CACHE.notes());
    source.run(["sh", "-c", &format!("head -c {FILE} /dev/urandom >{file}")])?;
    for other in [TARGET, OTHER] {
        images::load_some(stage.lab.host(other)?, &["redis"])?;
    }
    let mut evacuate = vec!["evacuate", CACHE.name, "--yes", "--switch-first"];
    evacuate.extend(["--delegate", actions]);
    stage.crew.begin(SOURCE, "evacuate", &evacuate)?;
    let plan = stage.plan()?;
    let lent = wait_for("a target and a paired device", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let role = |role: &str| status["plans"][0][role].as_str().map(str::to_owned);
        Ok(role("target").zip(role("paired")))
    });
    let (target, paired) = lent.with_context(|| stage.crew.log(SOURCE))?;
    Ok(Some(Scene {
        stage,
        plan,
        volume: String::new(),
        target,
        paired,
        delegate: String::new(),
    }))
}

#[test]
fn what_comes_behind_twins_comes_from_the_paired_device_which_carries_nothing_more() -> Result<()> {
    let Some(scene) = switched("stands-in-twins", "transfer,serve")? else {
        return Ok(());
    };
    let report = wait_for_end(&scene.stage.crew, SOURCE, &scene.plan, PATIENCE * 2)
        .with_context(|| scene.logs())?;
    ensure!(report["state"] == "completed", "{report:#}");
    for line in ["carries nothing more", "answered the target with"] {
        ensure!(lines(&report, line).len() == 1, "{line}: {report:#}");
    }
    println!("{:#?}", lines(&report, "paired device"));
    let (asked, read) = scene.given_at_last()?;
    // Of what the twin writes over before it comes, the source is asked for the signature alone.
    ensure!(
        read >= FILE && asked < FILE / 8,
        "{asked}, {read}: {report:#}"
    );
    scene.nothing_is_left()?;
    scene.stage.writes_go_on(&CACHE)?;
    scene.stage.check_data_on(scene.target()?, &CACHE)?;
    scene.stage.lab.down()
}

#[test]
fn twins_whose_paired_device_dies_get_the_rest_from_the_source() -> Result<()> {
    let Some(mut scene) = switched("stands-in-dies", "serve")? else {
        return Ok(());
    };
    let slow = scene.stage.lab.host(&scene.paired)?.clone();
    scene.stage.lab.shape(&slow, Some(MBIT))?;
    wait_for("some of the data to come that way", PATIENCE * 2, || {
        Ok((scene.given("paired")?.0 > 1 << 20).then_some(()))
    })
    .with_context(|| scene.logs())?;
    let paired = scene.paired.clone();
    scene.stage.crew.kill_agent(&paired)?;
    let report = wait_for_end(&scene.stage.crew, SOURCE, &scene.plan, PATIENCE * 2)
        .with_context(|| scene.logs())?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(
        lines(&report, "how much it does not say").len() == 1,
        "{report:#}"
    );
    let (asked, read) = scene.given_at_last()?;
    ensure!(asked > 0 && read > 0, "{asked}, {read}: {report:#}");
    println!("{asked} read for the target itself, {read} for the paired device before it died");
    scene.stage.lab.shape(&slow, None)?;
    scene.stage.crew.start_agent(&paired)?;
    scene.nothing_is_left()?;
    scene.stage.writes_go_on(&CACHE)?;
    scene.stage.check_data_on(scene.target()?, &CACHE)?;
    scene.stage.lab.down()
}
