//! Access traces on this kernel, held against what fio itself says that it did. Needs root.

use lifeboat::model::trace::{Of, Touch, Trace};
use lifeboat::telemetry::trace::{EXTENT, Recorder, What};
use lifeboat_tests::disk::{Disk, output};
use lifeboat_tests::scope::{Scope, container, now};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xtask::workspace;

fn disk(name: &str, mib: u64) -> Option<Disk> {
    Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), name, mib)
}

/// One thing after the other and past the page cache, so that fio's log has the order of the block layer.
fn fio(cgroup: Option<&Path>, log: &Path, what: &[&str]) -> Vec<u64> {
    let mut script =
        "exec fio --name=f --direct=1 --ioengine=psync --thread --allow_file_create=0 \
        --write_iolog=\"$0\" \"$@\""
            .to_owned();
    if let Some(cgroup) = cgroup {
        script = format!("echo $$ > {}/cgroup.procs && {script}", cgroup.display());
    }
    let log = log.to_str().expect("plain");
    output("sh", &[&["-c", &script, log], what].concat());
    let text = fs::read_to_string(log).expect("fio wrote it");
    let offsets: Vec<u64> = text
        .lines()
        .filter(|line| line.contains(" read ") || line.contains(" write "))
        .map(|line| {
            let mut fields = line.rsplit(' ').skip(1);
            fields.next().and_then(|offset| offset.parse().ok())
        })
        .map(|offset| offset.expect("a log of version 2 or 3"))
        .collect();
    assert!(offsets.len() >= 100, "{text}");
    offsets
}

/// Extents in the order of their first access, with their heat.
fn expected(offsets: &[u64]) -> Vec<(u64, u64)> {
    let mut order = Vec::new();
    let mut heat: HashMap<u64, u64> = HashMap::new();
    for extent in offsets.iter().map(|offset| offset / EXTENT) {
        let heat = heat.entry(extent).or_default();
        if *heat == 0 {
            order.push(extent);
        }
        *heat += 1;
    }
    order.iter().map(|extent| (*extent, heat[extent])).collect()
}

fn of(trace: &Trace, wanted: impl Fn(&Touch) -> bool) -> Vec<(u64, u64)> {
    let touches = trace.touches.iter().filter(|touch| wanted(touch));
    touches.map(|touch| (touch.extent, touch.heat)).collect()
}

#[test]
fn order_and_heat_of_a_device_are_those_of_each_container() {
    let (Some(scope), Some(disk)) = (Scope::new("trace"), disk("trace", 256)) else {
        return;
    };
    let (zipf, writer) = (scope.cgroup("zipf"), scope.cgroup("writer"));
    let what = What::Device(disk.device.clone());
    let mut recorder =
        Recorder::start(Path::new("/"), scope.path(), what, now()).expect("recorded");
    let log = |name: &str| disk.directory.join(name);
    let reads = fio(
        Some(&zipf),
        &log("zipf"),
        &[
            "--rw=randread",
            "--random_distribution=zipf:1.1",
            "--norandommap",
            "--bs=4k",
            "--number_ios=3000",
            "--size=128m",
            "--filename",
            disk.device(),
        ],
    );
    recorder.sweep();
    let both = [container("zipf", 0), container("writer", 0)];
    recorder.name(&both);
    let target = ["--filename", disk.device()];
    let sequential = ["--rw=write", "--bs=16k", "--offset=64m", "--size=16m"];
    let writes = fio(
        Some(&writer),
        &log("writer"),
        &[&sequential[..], &target].concat(),
    );
    // Across a sweep, and again what was read before.
    recorder.sweep();
    let random = [
        "--rw=randread",
        "--bs=4k",
        "--size=128m",
        "--number_ios=500",
    ];
    let more = fio(
        Some(&zipf),
        &log("random"),
        &[&random[..], &target].concat(),
    );
    // Beyond the scope.
    fio(None, &log("stranger"), &[&random[..], &target].concat());
    recorder.sweep();
    recorder.name(&both);
    let trace = recorder.finish().expect("finished");
    let trace = Trace::decode(&trace.encode()).expect("its own file");

    assert_eq!(trace.of, Of::Device(disk.device().to_owned()));
    assert_eq!((trace.lost, trace.elsewhere), (0, 0));
    let cause = |name: &str| {
        let of = |cause: &lifeboat::model::trace::Cause| {
            cause
                .container
                .as_ref()
                .is_some_and(|is| is.as_str() == name)
        };
        trace.causes.iter().position(of).expect("named") as u32
    };
    let (zipf, writer) = (cause("zipf"), cause("writer"));
    assert_eq!(trace.causes.len(), 2, "{:?}", trace.causes);
    let read = of(&trace, |touch| touch.cause == zipf && !touch.write);
    assert_eq!(read, expected(&[reads, more].concat()));
    let written = of(&trace, |touch| touch.cause == writer);
    assert_eq!(written, expected(&writes));
    assert!(
        trace
            .touches
            .iter()
            .all(|touch| touch.write == (touch.cause == writer))
    );
    let times: Vec<u64> = trace.touches.iter().map(|touch| touch.at_ms).collect();
    assert!(times.is_sorted() && times.last() <= Some(&(trace.lasted.as_millis() as u64)));
    let heat: HashMap<u64, u64> = read.iter().copied().collect();
    let hottest = trace.hottest(|_| true);
    assert_eq!(hottest.len(), read.len());
    assert!(hottest.is_sorted_by_key(|(_, extent, _)| u64::MAX - heat[extent]));
}

/// Runs `lifeboat record --trace` over a directory while `load` runs, and shows what it wrote.
fn traced(directory: &str, file: &PathBuf, load: impl FnOnce()) -> Value {
    let lifeboat = workspace::binary("lifeboat");
    let mut recording = Command::new(&lifeboat)
        .args(["record", "--volume", directory, "--trace"])
        .arg(file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("lifeboat");
    let mut said = BufReader::new(recording.stderr.take().expect("piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("a line");
    assert!(line.contains("tracing"), "{line}");
    load();
    output("kill", &["-INT", &recording.id().to_string()]);
    assert!(recording.wait().expect("ended").success());
    let shown = output(
        lifeboat.to_str().expect("plain"),
        &["--json", "trace", file.to_str().expect("plain")],
    );
    serde_json::from_str(&shown).expect("JSON")
}

fn on_a_file_system(name: &str, make: &[&str]) {
    let Some(disk) = disk(&format!("trace-{name}"), 400) else {
        return;
    };
    output(make[0], &[&make[1..], &[disk.device()]].concat());
    let at = disk.mount();
    let data = format!("{at}/volume");
    fs::create_dir_all(format!("{data}/sub")).expect("directories");
    let path = |name: &str| format!("{data}/{name}");
    for file in ["hot", "sub/sequential"] {
        fs::write(path(file), vec![1; 24 << 20]).expect("written");
    }
    fs::write(format!("{at}/outside"), vec![1; 1 << 20]).expect("written");
    output("sync", &["--file-system", &at]);
    let (mut hot, mut sequential) = (Vec::new(), Vec::new());
    let log = |name: &str| disk.directory.join(name);
    let shown = traced(&data, &disk.directory.join("trace"), || {
        hot = fio(
            None,
            &log("hot"),
            &[
                "--rw=randread",
                "--random_distribution=zipf:1.1",
                "--norandommap",
                "--bs=4k",
                "--number_ios=2000",
                "--filename",
                &path("hot"),
            ],
        );
        let file = path("sub/sequential");
        sequential = fio(
            None,
            &log("sequential"),
            &["--rw=read", "--bs=16k", "--filename", &file],
        );
        output(
            "dd",
            &[&format!("if={at}/outside"), "of=/dev/null", "iflag=direct"],
        );
    });
    let touches = shown["touches"].as_array().expect("touches");
    let of = |file: &str| -> Vec<(u64, u64)> {
        let touches = touches.iter().filter(|touch| touch["path"] == file);
        touches
            .map(|touch| {
                assert_eq!(touch["write"], false, "{touch}");
                let number = |name: &str| touch[name].as_u64().expect("a number");
                (number("offset") / EXTENT, number("heat"))
            })
            .collect()
    };
    assert_eq!(of("hot"), expected(&hot));
    assert_eq!(of("sub/sequential"), expected(&sequential));
    // dd read another file of the same device by sectors.
    assert!(
        shown["elsewhere"].as_u64() >= Some(2048),
        "{}",
        shown["elsewhere"]
    );
    assert!(touches.iter().all(|touch| touch["path"] != "outside"));
    assert_eq!(shown["lost"], 0);
    let times = touches.iter().map(|touch| touch["at_ms"].as_u64());
    assert!(times.is_sorted());
}

#[test]
fn order_and_heat_of_a_directory_are_by_file_on_ext4() {
    on_a_file_system("ext4", &["mkfs.ext4", "-q"]);
}

#[test]
fn order_and_heat_of_a_directory_are_by_file_on_xfs() {
    on_a_file_system("xfs", &["mkfs.xfs", "-q"]);
}

#[test]
fn what_lies_on_no_block_device_is_refused_by_name() {
    let start = |what| Recorder::start(Path::new("/"), Path::new("/sys/fs/cgroup"), what, now());
    for what in [
        What::Directory("/proc".into()),
        What::Device("/dev/null".into()),
    ] {
        let Err(error) = start(what.clone()) else {
            panic!("{what:?} is on no block device");
        };
        assert!(error.to_string().contains("cannot be traced"), "{error}");
    }
}
