//! The lab on the real machine. Needs root: without it these tests say so and end.

use std::collections::BTreeSet;
use std::fs;
use std::panic;
use std::time::Duration;

use super::{Fault, Lab, LabSpec, directory};
use crate::process::{is_root, output};

/// What a lab could leave behind on the machine.
fn machine(lab: &str) -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let links = output(std::process::Command::new("ip").args(["-o", "link"])).unwrap();
    let namespaces = output(std::process::Command::new("ip").arg("netns")).unwrap();
    let cgroups = output(
        std::process::Command::new("find")
            .args(["/sys/fs/cgroup", "-name"])
            .arg(format!("*{lab}*")),
    )
    .unwrap();
    let processes = output(std::process::Command::new("ps").args(["-eo", "args"])).unwrap();
    mounts
        .lines()
        .chain(links.lines())
        .chain(namespaces.lines())
        .chain(cgroups.lines())
        .chain(processes.lines().filter(|line| line.contains(lab)))
        .map(str::to_owned)
        .collect()
}

fn skip() -> bool {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
    }
    !is_root()
}

#[test]
fn a_lab_leaves_nothing_behind_neither_in_order_nor_in_a_panic() {
    if skip() {
        return;
    }
    let spec = LabSpec::of("leave", &["a", "b"]);
    let before = machine(&spec.name);
    let lab = Lab::up(&spec).unwrap();
    assert!(directory(lab.name()).exists());
    let a = lab.host("a").unwrap();
    lab.fault(a, Fault::Cpu { workers: 1 }, Duration::from_secs(60))
        .unwrap();
    assert_eq!(a.run(["hostname"]).unwrap(), "a");
    lab.down().unwrap();
    assert_eq!(machine(&spec.name), before);

    let panicked = panic::catch_unwind(|| {
        let lab = Lab::up(&spec).unwrap();
        assert_eq!(lab.hosts().len(), 0, "the panic that is wanted");
    });
    assert!(panicked.is_err());
    assert_eq!(machine(&spec.name), before);
    assert!(!directory(&spec.name).exists());
}

#[test]
fn hosts_reach_each_other_until_the_fabric_says_otherwise() {
    if skip() {
        return;
    }
    let lab = Lab::up(&LabSpec::of("fabric", &["a", "b", "c"])).unwrap();
    let [a, b, c] = lab.hosts() else {
        unreachable!("three hosts were asked for")
    };
    let reaches = |from: &super::Host, to: &super::Host| {
        from.run(["busybox", "ping", "-c", "1", "-W", "1", to.name()])
            .is_ok()
    };
    assert!(reaches(a, b));
    lab.partition(a, b, true).unwrap();
    assert!(!reaches(a, b) && reaches(a, c) && reaches(b, c));
    lab.partition(a, b, false).unwrap();
    assert!(reaches(a, b));
    lab.loss(a, 100).unwrap();
    assert!(!reaches(a, b) && reaches(b, c));
    lab.loss(a, 0).unwrap();
    assert!(reaches(a, b));
    lab.link(c, false).unwrap();
    assert!(!reaches(a, c));
    lab.link(c, true).unwrap();
    assert!(reaches(a, c));
    lab.shape(a, Some(50)).unwrap();
    assert!(
        a.run(["tc", "qdisc", "show", "dev", "eth0"])
            .unwrap()
            .contains("rate 50Mbit")
    );
    lab.shape(a, None).unwrap();
    assert!(
        !a.run(["tc", "qdisc", "show", "dev", "eth0"])
            .unwrap()
            .contains("tbf")
    );
}
