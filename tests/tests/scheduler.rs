//! Run-queue delay on this kernel: whose it is, and that nobody is forgotten. Needs root.

use lifeboat::model::telemetry::{Latencies, RunQueueStats, Snapshot};
use lifeboat_tests::scope::{Scope, container, now};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A process in a cgroup from its first instant; ends when dropped.
struct Placed(Child);

impl Placed {
    fn start(cgroup: &Path, command: &str) -> Self {
        let script = format!("echo $$ > \"$0/cgroup.procs\" && {command}");
        let child = Command::new("sh")
            .args(["-c", &script])
            .arg(cgroup)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        Self(child.expect("a shell"))
    }

    /// Waits until it runs a program of this name and that sleeps.
    fn falls_asleep(&self, program: &str) {
        let stat = format!("/proc/{}/stat", self.0.id());
        let asleep = format!("({program}) S");
        let end = Instant::now() + Duration::from_secs(60);
        while !std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(&asleep)) {
            assert!(Instant::now() < end, "{program} does not fall asleep");
            sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_queue<'s>(snapshot: &'s Snapshot, name: &str) -> &'s RunQueueStats {
    let stats = &snapshot.containers;
    let of = stats.iter().find(|stats| stats.name.as_str() == name);
    let run_queue = of.and_then(|stats| stats.run_queue.as_ref());
    run_queue.expect("the programs run")
}

#[test]
fn the_delay_of_a_wake_up_lands_on_the_woken_and_not_on_the_waker() {
    let Some(scope) = Scope::new("woken") else {
        return;
    };
    let (hog, woken, waker) = (
        scope.cgroup("hog"),
        scope.cgroup("woken"),
        scope.cgroup("waker"),
    );
    let mut senses = scope.senses();
    // It has CPU 0 most of the time, so that the other one there, which is nice, must wait for it.
    let _hog = Placed::start(&hog, "exec taskset -c 0 sh -c 'while :; do :; done'");
    let mut woken = Placed::start(&woken, "exec taskset -c 0 nice -n 19 cat");
    let waker = Placed::start(&waker, "exec sleep 1000");
    let containers = ["hog", "woken", "waker"].map(|name| container(name, 0));
    waker.falls_asleep("sleep");
    senses.sweep(&containers, now());
    let mut pipe = woken.0.stdin.take().expect("piped");
    let (mut delay, mut of_waker) = (Latencies::default(), 0);
    // Where the one CPU is everybody's it takes longer.
    let end = Instant::now() + Duration::from_secs(60);
    while delay.count() < 25 || delay.percentile(99.0).is_none_or(|p99| p99 < 1e6) {
        assert!(
            Instant::now() < end,
            "it was woken more often and waited for a time slice: {delay:?}"
        );
        // While it waits, more bytes do not wake it again.
        for _ in 0..10 {
            pipe.write_all(b"x").expect("cat reads");
            sleep(Duration::from_millis(20));
        }
        let snapshot = senses.sweep(&containers, now());
        delay.merge(&run_queue(&snapshot, "woken").latency);
        of_waker += run_queue(&snapshot, "waker").latency.count();
    }
    // Asleep, beside the one who was woken.
    assert_eq!(of_waker, 0);
    drop(waker);
}

#[test]
fn cgroups_born_and_gone_between_two_sweeps_are_counted_and_their_places_given_back() {
    let Some(scope) = Scope::new("brief") else {
        return;
    };
    let mut senses = scope.senses();
    senses.sweep(&[], now());
    // More of them than there are places, in rounds that each fit.
    for round in 0..6 {
        for brief in 0..200 {
            let cgroup = scope.cgroup(&format!("brief-{round}-{brief}"));
            let mut ran = Placed::start(&cgroup, "exec true");
            ran.0.wait().expect("it ends");
            std::fs::remove_dir(&cgroup).expect("nobody is in it");
        }
        let snapshot = senses.sweep(&[], now());
        let host = snapshot.host.run_queue.expect("the programs run");
        // One that its CPU runs on at once after it moved there never waits; few are that lucky.
        assert!(
            host.latency.count() >= 100,
            "most were on a run queue: {host:?}"
        );
        let lost = snapshot.losses.iter().find(|loss| loss.map == "run-queue");
        assert_eq!(lost.map(|loss| loss.lost), Some(0), "round {round}");
    }
    let idle = senses.sweep(&[], now()).host.run_queue;
    let idle = idle.expect("the programs run");
    assert_eq!((idle.latency.count(), idle.waiting), (0, 0));
}
