//! Access before arrival: a plan's target serves a volume whose data is still on the source.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{Fault, SOURCE, Service, Stage, TARGET, device, policy};
use serde_json::Value;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;
use xtask::crew::Device;
use xtask::lab::Host;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

const SOCKET: &str = "/run/served.sock";
const IMAGE: u64 = 16 << 20;
/// Bytes of a sparse file, and where it has some data.
const SPARSE: u64 = 1 << 30;
const DATA: [u64; 3] = [0, 100 << 20, 900 << 20];

#[test]
fn a_volume_is_read_and_written_on_the_target_before_its_data_is_there() -> Result<()> {
    let source = Device {
        policy: Some(policy(Fault::Busy, "")),
        migration: vec!["prepare_pause_seconds: 1".into()],
        ..Device::new(SOURCE)
    };
    let Some(stage) = Stage::up("access", &[source, device(TARGET, None)], &[CACHE])? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let image = format!("{}/image", CACHE.notes());
    source.run([
        "sh",
        "-c",
        &format!("head -c {IMAGE} /dev/urandom >{image}"),
    ])?;
    let sparse = File::create(source.path(&format!("{}/sparse", CACHE.notes())))?;
    sparse.set_len(SPARSE)?;
    for at in DATA {
        let mut data = vec![0; 1 << 20];
        File::open("/dev/urandom")?.read_exact(&mut data)?;
        sparse.write_all_at(&data, at)?;
    }
    let plan = stage.prepared_plan()?;
    let volume = stage.volume_at(&plan, &CACHE.notes())?;

    nbd(&stage, &target, &plan, &volume).with_context(|| stage.crew.log(TARGET))?;
    ensure!(
        fs::read(source.path(&image))?.len() as u64 == IMAGE,
        "the source's file changed its size"
    );
    stage.writes_go_on(&CACHE)
}

/// The tools that people use speak to it, and nothing of what they write reaches the source.
fn nbd(stage: &Stage, target: &Host, plan: &str, volume: &str) -> Result<()> {
    let serve = |more: &[&str]| {
        stage
            .crew
            .tell(TARGET, &[&["serve", plan, volume], more].concat())
    };
    let address = format!("unix:{SOCKET}");
    let refused = serve(&["--nbd", "0.0.0.0:10809"]).map_err(|error| format!("{error:#}"));
    ensure!(
        refused
            .as_ref()
            .is_err_and(|error| error.contains("nobody beyond this host")),
        "{refused:?}"
    );
    // The lab's kernel decides; where it has ublk, the guests' tests are about it.
    if !Path::new("/dev/ublk-control").exists() {
        let refused = serve(&["--ublk=image"]).map_err(|error| format!("{error:#}"));
        ensure!(
            refused.as_ref().is_err_and(|error| {
                error.contains("/dev/ublk-control is not there") && error.contains("use --nbd")
            }),
            "{refused:?}"
        );
    }
    println!(
        "{}",
        serve(&["--nbd", &address, "--no-fill", "--patience", "10"])?
    );
    ensure!(
        figures(stage)?["on_demand"] == 0,
        "something was fetched unasked"
    );

    holes_are_not_fetched(stage, target)?;
    let uri = format!("nbd+unix:///image?socket={SOCKET}");
    let listed = target.run([
        "nbdinfo",
        "--list",
        &format!("nbd+unix:///?socket={SOCKET}"),
    ])?;
    ensure!(
        listed.contains("export=\"image\"") && listed.contains("export=\"deep/random\""),
        "{listed}"
    );
    let size = target.run(["nbdinfo", "--size", &uri])?;
    ensure!(size.trim() == IMAGE.to_string(), "{size}");
    target.run([
        "fio",
        "--name=reads",
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        "--rw=randread",
        "--bs=4k",
        "--iodepth=32",
        &format!("--size={IMAGE}"),
        "--io_size=2M",
    ])?;
    let after = figures(stage)?;
    ensure!(
        after["on_demand"].as_u64() > Some(0) && after["absent"].as_u64() > Some(0),
        "{after}"
    );
    target.run(["nbdcopy", &uri, "/tmp/copy"])?;
    let source = stage.source()?;
    let image = source.path(&format!("{}/image", CACHE.notes()));
    let plain = fs::read(&image)?;
    ensure!(
        fs::read(target.path("/tmp/copy"))? == plain,
        "the copy differs from the source"
    );

    // `uri` of qemu: the same.
    let commands = [
        "write -P 0xab 1M 70000",
        "write -z 3M 1M",
        "discard 5M 1M",
        "flush",
        "read -P 0xab 1M 70000",
        "read -P 0 3M 1M",
        "read -P 0 5M 1M",
    ];
    let mut io = vec!["qemu-io", "-f", "raw"];
    for command in &commands {
        io.extend(["-c", command]);
    }
    io.push(&uri);
    let said = target.run(&io)?;
    ensure!(!said.contains("failed"), "{said}");
    target.run(["qemu-img", "convert", "-O", "raw", &uri, "/tmp/written"])?;
    let mut model = plain.clone();
    model[1 << 20..(1 << 20) + 70_000].fill(0xab);
    model[3 << 20..4 << 20].fill(0);
    model[5 << 20..6 << 20].fill(0);
    ensure!(
        fs::read(target.path("/tmp/written"))? == model,
        "what was written is not what is read"
    );
    ensure!(fs::read(&image)? == plain, "the source was written to");

    stage.crew.tell(TARGET, &["serve", plan, volume, "--end"])?;
    ensure!(!target.path(SOCKET).exists(), "the socket is still there");
    let listed = stage.crew.tell(TARGET, &["serve"])?;
    ensure!(listed.contains("nothing is served"), "{listed}");
    Ok(())
}

/// What is a hole on the source is one for the tools, which copy the file for the price of its data.
fn holes_are_not_fetched(stage: &Stage, target: &Host) -> Result<()> {
    let fetched = || -> Result<u64> { Ok(figures(stage)?["on_demand"].as_u64().unwrap_or(0)) };
    let uri = format!("nbd+unix:///sparse?socket={SOCKET}");
    let before = fetched()?;
    let map: Value = serde_json::from_str(&target.run(["nbdinfo", "--json", "--map", &uri])?)?;
    let of = |map: &Value, begin: &str, is_data: fn(&Value) -> bool| -> Vec<(u64, u64)> {
        let parts = map.as_array().into_iter().flatten();
        let number = |part: &Value, name: &str| part[name].as_u64().unwrap_or(u64::MAX);
        parts
            .filter(|part| is_data(part))
            .map(|part| (number(part, begin), number(part, "length")))
            .collect()
    };
    let data: Vec<_> = DATA.iter().map(|at| (*at, 1 << 20)).collect();
    let found = of(&map, "offset", |part| part["type"] == 0);
    ensure!(found == data, "{map}");
    let map = target.run(["qemu-img", "map", "--output=json", "-f", "raw", &uri])?;
    let map: Value = serde_json::from_str(&map)?;
    let found = of(&map, "start", |part| part["data"] == true);
    ensure!(found == data, "{map}");
    ensure!(fetched()? == before, "a map was paid with blocks");

    let plain = stage.source()?.path(&format!("{}/sparse", CACHE.notes()));
    let copies: [&[&str]; 2] = [
        &["nbdcopy", &uri, "/tmp/sparse"],
        &["qemu-img", "convert", "-O", "raw", &uri, "/tmp/sparse"],
    ];
    for copy in copies {
        target.run(copy)?;
        let copied = target.path("/tmp/sparse");
        xtask::process::output(Command::new("cmp").args([&plain, &copied]))?;
        let space = fs::metadata(&copied)?.blocks() * 512;
        ensure!(space < 8 << 20, "the copy takes {space} bytes");
        fs::remove_file(copied)?;
    }
    let blocks = fetched()? - before;
    let needed = 3 * ((1 << 20) >> 16);
    ensure!(
        (needed..needed + 16).contains(&blocks),
        "{blocks} blocks were fetched for {needed}"
    );
    Ok(())
}

fn figures(stage: &Stage) -> Result<Value> {
    let (_, served) = stage.crew.ask(TARGET, &["serve"])?;
    Ok(served[0]["figures"].clone())
}
