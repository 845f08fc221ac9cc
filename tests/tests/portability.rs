//! The agent where something is missing: it names what it lost, and the rest works; and it keeps no
//! capability that it does not need.

use anyhow::{Context as _, Result, ensure};
use lifeboat::daemon::privileges::KEPT;
use lifeboat_tests::stage::{SOURCE, Service, Stage, TARGET, device};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;
use xtask::lab::{Host, HostSpec, Lab, LabSpec};
use xtask::process::{is_root, output, wait_for};
use xtask::topology;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// The capability sets of every thread of a process, by their names in proc(5).
fn capabilities(pid: u32) -> Result<Vec<(String, u64)>> {
    let mut sets = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // One that ended since it was listed has none.
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else {
            continue;
        };
        for line in status.lines().filter(|line| line.starts_with("Cap")) {
            let (name, set) = line.split_once(":\t").context("proc(5)")?;
            sets.push((name.to_owned(), u64::from_str_radix(set, 16)?));
        }
    }
    Ok(sets)
}

/// The process of an agent: the only one in its cgroup.
fn agent_of(host: &Host) -> Result<u32> {
    let processes = fs::read_to_string(host.cgroup().join("agent/cgroup.procs"))?;
    Ok(processes.trim().parse()?)
}

#[test]
fn a_move_passes_with_the_documented_capabilities_and_no_others() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(stage) = Stage::up("caps", &devices, &[CACHE])? else {
        return Ok(());
    };
    let documented = KEPT
        .iter()
        .fold(0, |set, (capability, _)| set | capability.bitmask());
    // What this machine gives to nobody, an agent cannot keep.
    let here = capabilities(std::process::id())?;
    let bounding = here.iter().find(|(name, _)| name == "CapBnd");
    let documented = documented & bounding.context("proc(5)")?.1;
    stage
        .crew
        .tell(SOURCE, &["evacuate", CACHE.name, "--yes"])?;
    for name in [SOURCE, TARGET] {
        let sets = capabilities(agent_of(stage.lab.host(name)?)?)?;
        ensure!(sets.len() >= 15, "five sets of several threads: {sets:?}");
        for (set, has) in sets {
            let wanted = match set.as_str() {
                "CapInh" | "CapAmb" => 0,
                _ => documented,
            };
            ensure!(has == wanted, "{name}: {set} is {has:x}, not {wanted:x}");
        }
    }
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.crew.tell(SOURCE, &["verify", &stage.plan()?])?;
    stage.lab.down()
}

/// A lab host without containers.
fn bare(name: &str) -> Result<Option<Lab>> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(None);
    }
    let mut spec = LabSpec::of(name, &[]);
    spec.hosts.push(HostSpec {
        containers: false,
        ..HostSpec::from("box")
    });
    Lab::up(&spec).map(Some)
}

/// Runs an agent behind a prefix, and returns its second view of the host.
fn observed(lab: &Lab, prefix: &[&str]) -> Result<Value> {
    let host = lab.host("box")?;
    host.write(
        "/run/agent.yaml",
        "device: box\nstate: /run/state\nsocket: /run/agent.sock\nruntimes: []\n",
    )?;
    let binary = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("debug/lifeboat");
    let binary = binary.to_str().context("a path of text")?;
    let argv = [binary, "agent", "--config", "/run/agent.yaml"];
    let mut agent = host.spawn_logged("agent", prefix.iter().chain(&argv))?;
    let ask = [binary, "--json", "--socket", "/run/agent.sock", "status"];
    let mut seen = Vec::new();
    let view = wait_for("two views", Duration::from_secs(20), || {
        let Ok(text) = output(&mut host.command(ask)) else {
            return Ok(None);
        };
        let status: Value = serde_json::from_str(&text)?;
        let snapshot = status["view"]["snapshot"].clone();
        let at = snapshot["at"].as_u64().filter(|at| *at > 0);
        if let Some(at) = at.filter(|at| !seen.contains(at)) {
            seen.push(at);
        }
        Ok((seen.len() == 2).then_some(snapshot))
    })
    .with_context(|| fs::read_to_string(host.log("agent")).unwrap_or_default());
    agent.kill()?;
    agent.wait()?;
    view
}

fn disabled(snapshot: &Value) -> Vec<(String, String)> {
    let list = snapshot["disabled"].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    list.map(|one| (text(&one["what"]), text(&one["why"])))
        .collect()
}

fn has(snapshot: &Value, metric: &str) -> bool {
    let samples = snapshot["samples"].as_array();
    samples.is_some_and(|all| all.iter().any(|sample| sample["metric"] == metric))
}

/// `lost` is named with `why`, nothing of the kernel programs is reported, and the rest works.
fn only_the_programs_are_lost(snapshot: &Value, lost: &str, why: &str) -> Result<()> {
    let named = disabled(snapshot);
    ensure!(
        named
            .iter()
            .any(|(what, reason)| what == lost && reason.contains(why)),
        "{lost} with {why:?} is not in {named:?}"
    );
    ensure!(
        !has(snapshot, "sched.run_queue_latency_p99"),
        "a lost sense has no samples"
    );
    ensure!(snapshot["host"]["run_queue"].is_null() && snapshot["host"]["block"].is_null());
    ensure!(has(snapshot, "memory.used"), "the rest works: {snapshot}");
    Ok(())
}

#[test]
fn nothing_is_lost_without_tracefs_and_without_cap_sys_resource() -> Result<()> {
    let Some(lab) = bare("tracefs")? else {
        return Ok(());
    };
    let script = "for at in debug tracing; do umount -l /sys/kernel/$at; done; test ! -e /sys/kernel/tracing/events && \
                  exec prlimit --memlock=65536:65536 setpriv --bounding-set=-sys_resource \"$0\" \"$@\"";
    let without = ["unshare", "--mount", "sh", "-c", script];
    let snapshot = observed(&lab, &without)?;
    ensure!(disabled(&snapshot).is_empty(), "{:?}", disabled(&snapshot));
    ensure!(has(&snapshot, "sched.run_queue_latency_p99"));
    lab.down()
}

#[test]
fn where_the_kernel_permits_no_map_what_helps_is_named_and_the_rest_works() -> Result<()> {
    let Some(lab) = bare("memlock")? else {
        return Ok(());
    };
    if !topology::has("strace") {
        println!("not run: strace is not installed");
        return lab.down();
    }
    // As Linux before 5.11 answers where maps take more than may be locked.
    let refused = "--inject=bpf:error=EPERM";
    let script = "exec strace --quiet=all -f -o /run/calls --trace=bpf \"$@\"";
    let limited = [
        "prlimit",
        "--memlock=65536:65536",
        "setpriv",
        "--bounding-set=-sys_resource",
    ];
    let traced = ["sh", "-c", script, "sh", refused];
    let snapshot = observed(&lab, &[&limited[..], &traced].concat())?;
    for why in ["LimitMEMLOCK=infinity", "CAP_SYS_RESOURCE", "64 KiB"] {
        only_the_programs_are_lost(&snapshot, "kernel programs", why)?;
    }
    lab.down()
}

#[test]
fn without_the_capabilities_for_kernel_programs_their_names_are_told_and_the_rest_works()
-> Result<()> {
    let Some(lab) = bare("perfmon")? else {
        return Ok(());
    };
    let none = ["setpriv", "--bounding-set=-sys_admin,-bpf,-perfmon"];
    only_the_programs_are_lost(&observed(&lab, &none)?, "kernel programs", "CAP_BPF")?;
    let no_perfmon = ["setpriv", "--bounding-set=-sys_admin,-perfmon"];
    only_the_programs_are_lost(
        &observed(&lab, &no_perfmon)?,
        "kernel programs",
        "CAP_PERFMON",
    )?;
    // Those two are enough for all but the kernel's measuring.
    let snapshot = observed(&lab, &["setpriv", "--bounding-set=-sys_admin"])?;
    let named = disabled(&snapshot);
    ensure!(
        named
            .iter()
            .all(|(what, _)| what == "cost of the kernel programs"),
        "{named:?}"
    );
    ensure!(has(&snapshot, "sched.run_queue_latency_p99"));
    lab.down()
}

#[test]
fn without_cgroup2_the_mount_is_asked_for_and_the_rest_works() -> Result<()> {
    let Some(lab) = bare("cgroup2")? else {
        return Ok(());
    };
    let script = "umount -l /sys/fs/cgroup && exec \"$0\" \"$@\"";
    let without = ["unshare", "--mount", "sh", "-c", script];
    let snapshot = observed(&lab, &without)?;
    only_the_programs_are_lost(&snapshot, "kernel programs", "cgroup2")?;
    lab.down()
}

#[test]
fn without_btf_the_kernel_option_is_named_and_the_rest_works() -> Result<()> {
    let Some(lab) = bare("btf")? else {
        return Ok(());
    };
    let script = "mount --bind /dev/null /sys/kernel/btf/vmlinux && exec \"$0\" \"$@\"";
    let without = ["unshare", "--mount", "sh", "-c", script];
    let snapshot = observed(&lab, &without)?;
    only_the_programs_are_lost(&snapshot, "kernel programs", "BTF")?;
    lab.down()
}

#[test]
fn with_the_defaults_all_kernel_maps_take_at_most_16_mib() -> Result<()> {
    let Some(lab) = bare("maps")? else {
        return Ok(());
    };
    let snapshot = observed(&lab, &["env"])?;
    let memory = snapshot["map_memory"].as_u64().context("absent")?;
    println!("{memory} bytes");
    ensure!((1 << 20..=16 << 20).contains(&memory), "{memory} bytes");
    lab.down()
}
