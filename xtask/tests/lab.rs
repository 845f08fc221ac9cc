//! The lab on the real machine. Needs root: without it these tests say so and end.

use std::collections::BTreeSet;
use std::fs;
use std::panic;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xtask::lab::{Fault, Host, Lab, LabSpec};
use xtask::process::{is_root, output, wait_for};

/// What a lab could leave behind on the machine.
fn machine(lab: &str) -> Result<BTreeSet<String>> {
    let mut found: BTreeSet<String> = fs::read_to_string("/proc/self/mounts")?
        .lines()
        .map(str::to_owned)
        .collect();
    found.extend(
        fs::read_dir("/sys/class/net")?
            .flatten()
            .map(|link| format!("{link:?}")),
    );
    found.extend(
        output(Command::new("ip").arg("netns"))?
            .lines()
            .map(str::to_owned),
    );
    let named = format!("*{lab}*");
    let cgroups = output(Command::new("find").args(["/sys/fs/cgroup", "-name", &named]))?;
    found.extend(cgroups.lines().map(str::to_owned));
    let processes = output(Command::new("ps").args(["-eo", "args"]))?;
    found.extend(
        processes
            .lines()
            .filter(|line| line.contains(lab))
            .map(str::to_owned),
    );
    Ok(found)
}

fn without_root() -> bool {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
    }
    !is_root()
}

#[test]
fn a_lab_leaves_nothing_behind_neither_in_order_nor_in_a_panic() -> Result<()> {
    if without_root() {
        return Ok(());
    }
    let spec = LabSpec::of("leave", &["a", "b"]);
    let before = machine(&spec.name)?;
    let lab = Lab::up(&spec)?;
    let dir = lab.dir();
    ensure!(
        dir.exists() && machine(&spec.name)? != before,
        "the lab cannot be seen"
    );
    let a = lab.host("a")?;
    lab.fault(a, Fault::Cpu { workers: 1 }, Duration::from_secs(60))?;
    assert_eq!(a.run(["hostname"])?, "a");
    lab.down()?;
    assert_eq!(machine(&spec.name)?, before);

    let panicked = panic::catch_unwind(|| {
        let lab = Lab::up(&spec).unwrap();
        assert!(lab.hosts().is_empty(), "the panic that is wanted");
    });
    assert!(panicked.is_err());
    assert_eq!(machine(&spec.name)?, before);
    assert!(!dir.exists());
    Ok(())
}

#[test]
fn ctrl_c_and_sigterm_end_the_lab() -> Result<()> {
    if without_root() {
        return Ok(());
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let name = format!("signal-{}", std::process::id());
        let before = machine(&name)?;
        let mut task = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["lab", "--lab", &name, "up", "--foreground", "a"])
            .stdout(Stdio::null())
            .spawn()?;
        wait_for("the lab", Duration::from_secs(30), || {
            Ok(Lab::open(&name)
                .is_ok_and(|lab| lab.host("a").is_ok())
                .then_some(()))
        })?;
        kill(Pid::from_raw(task.id().try_into()?), signal)?;
        assert_eq!(task.wait()?.code(), Some(130));
        assert_eq!(machine(&name)?, before);
    }
    Ok(())
}

#[test]
fn hosts_reach_each_other_until_the_fabric_says_otherwise() -> Result<()> {
    if without_root() {
        return Ok(());
    }
    let lab = Lab::up(&LabSpec::of("fabric", &["a", "b", "c"]))?;
    let (a, b, c) = (lab.host("a")?, lab.host("b")?, lab.host("c")?);
    let reaches = |from: &Host, to: &Host| {
        from.run(["busybox", "ping", "-c", "1", "-W", "1", to.name()])
            .is_ok()
    };
    assert!(reaches(a, b));
    lab.partition(a, b, true)?;
    assert!(!reaches(a, b) && reaches(a, c) && reaches(b, c));
    lab.partition(a, b, false)?;
    assert!(reaches(a, b));
    lab.loss(a, 100)?;
    assert!(!reaches(a, b) && reaches(b, c));
    lab.loss(a, 0)?;
    assert!(reaches(a, b));
    lab.link(c, false)?;
    assert!(!reaches(a, c));
    lab.link(c, true)?;
    assert!(reaches(a, c));

    let capped = |rate: &str| -> Result<bool> {
        Ok(a.run(["tc", "qdisc", "show", "dev", "eth0"])?
            .contains(rate))
    };
    let fault = Fault::Net {
        mbit: 50,
        loss_percent: 1,
    };
    lab.fault(a, fault, Duration::from_secs(1))?;
    assert!(capped("rate 50Mbit")?);
    wait_for("the fault's own end", Duration::from_secs(15), || {
        Ok((!capped("tbf")?).then_some(()))
    })?;
    lab.down()
}

#[test]
fn a_fault_loads_its_host_and_ends_by_itself() -> Result<()> {
    if without_root() {
        return Ok(());
    }
    let lab = Lab::up(&LabSpec::of("fault", &["a"]))?;
    let host = lab.host("a")?;
    for fault in [
        Fault::Cpu { workers: 2 },
        Fault::Memory { mib: 64 },
        Fault::Disk { jobs: 1 },
    ] {
        let populated = || -> Result<bool> {
            let name = fault.cgroup_name();
            let events = fs::read_to_string(host.cgroup().join(name).join("cgroup.events"))?;
            Ok(events.contains("populated 1"))
        };
        lab.fault(host, fault, Duration::from_secs(2))?;
        wait_for("the fault's processes", Duration::from_secs(5), || {
            Ok(populated()?.then_some(()))
        })?;
        wait_for("the fault's own end", Duration::from_secs(30), || {
            Ok((!populated()?).then_some(()))
        })?;
    }
    lab.fault(host, Fault::Disk { jobs: 1 }, Duration::from_secs(600))?;
    lab.clear_fault(host, Fault::Disk { jobs: 1 })?;
    assert_eq!(host.run(["ls", "-A", "/srv"])?, "");
    lab.down()
}
