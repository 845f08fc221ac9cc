//! Instructions and cycles from the processors' own counters, of the host and of each container.
//!
//! A counter of a cgroup costs every switch into and out of it, so one container is counted at a time, between two
//! sweeps now and then, and what was found holds until its next turn.

use super::files::{entries, online_cpus};
use super::perf_event::{CYCLES, Event, INSTRUCTIONS, count, open, why};
use super::{HostReading, Look};
use crate::model::container::{Container, State};
use crate::model::metric::Per;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const METRICS: [&str; 2] = ["cpu.instructions_per_second", "cpu.cycles_per_instruction"];
const EVENTS: [Event; 2] = [INSTRUCTIONS, CYCLES];

/// Counters of each CPU, by event.
type Counters = Vec<[File; 2]>;

/// Counters of every CPU, opened at the start: reading them later needs no capability.
pub struct Performance {
    counters: Result<Counters, String>,
    before: Option<[f64; 2]>,
}

impl Performance {
    pub fn open(root: &Path) -> Self {
        Self {
            counters: open_all(root),
            before: None,
        }
    }

    /// Whether this host counts at all.
    pub fn counts(&self) -> bool {
        self.counters.is_ok()
    }

    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        let counters = match &mut self.counters {
            Ok(counters) => counters,
            Err(why) => return reading.absent(&METRICS, why),
        };
        let now = sums(counters);
        let Some(before) = self.before.replace(now) else {
            return;
        };
        let more = [now[0] - before[0], now[1] - before[1]];
        if let Some(values) = values(more, look.elapsed.as_secs_f64()) {
            for (metric, value) in METRICS.into_iter().zip(values) {
                reading.device(metric, value);
            }
        }
    }
}

/// Between the turns of two containers.
const EVERY: Duration = Duration::from_secs(10);

struct Turn {
    name: String,
    since: Instant,
    counters: Counters,
}

/// Counts one container after the other.
pub struct OfContainers {
    scope: PathBuf,
    events: [Event; 2],
    /// Between two turns.
    every: Duration,
    /// Who is counted now.
    turn: Option<Turn>,
    /// Whose turn was the last, and when it began.
    last: Option<(String, Instant)>,
    found: BTreeMap<String, [f64; 2]>,
}

impl OfContainers {
    pub fn new(scope: PathBuf) -> Self {
        Self {
            scope,
            events: EVENTS,
            every: EVERY,
            turn: None,
            last: None,
            found: BTreeMap::new(),
        }
    }

    pub fn read(&mut self, containers: &[Container], root: &Path, reading: &mut HostReading) {
        let runs = |container: &&Container| {
            container.state == State::Running && container.cgroup_path.len() > 1
        };
        let running: BTreeMap<&str, &str> = containers
            .iter()
            .filter(runs)
            .map(|container| (container.name.as_str(), container.cgroup_path.as_str()))
            .collect();
        if let Some(mut turn) = self.turn.take() {
            let seconds = turn.since.elapsed().as_secs_f64();
            match values(sums(&mut turn.counters), seconds) {
                Some(values) => self.found.insert(turn.name, values),
                // It did nothing, of which there is no ratio.
                None => self.found.remove(&turn.name),
            };
        }
        self.found
            .retain(|name, _| running.contains_key(name.as_str()));
        if self
            .last
            .as_ref()
            .is_none_or(|(_, since)| since.elapsed() >= self.every)
        {
            self.begin(&running, root);
        }
        for (name, values) in &self.found {
            for (metric, value) in METRICS.into_iter().zip(*values) {
                reading.of(metric, Per::Container, name, value);
            }
        }
    }

    /// Begins the turn of the container after the last one, by name.
    fn begin(&mut self, running: &BTreeMap<&str, &str>, root: &Path) {
        let last = self.last.take().map(|(name, _)| name);
        let after = last.as_deref().unwrap_or_default();
        let next = running.range(after..).find(|(name, _)| **name != after);
        let Some((&name, path)) = next.or_else(|| running.first_key_value()) else {
            return;
        };
        let (name, since) = (name.to_owned(), Instant::now());
        self.last = Some((name.clone(), since));
        let cgroup = self.scope.join(path.trim_start_matches('/'));
        // One that has just ended has no turn.
        if let Ok(counters) = open_of(&cgroup, root, self.events) {
            self.turn = Some(Turn {
                name,
                since,
                counters,
            });
        }
    }
}

/// Instructions a second and cycles for each of them.
fn values([instructions, cycles]: [f64; 2], seconds: f64) -> Option<[f64; 2]> {
    let counted = instructions > 0.0 && seconds > 0.0;
    counted.then(|| [instructions / seconds, cycles / instructions])
}

fn sums(counters: &mut Counters) -> [f64; 2] {
    let mut sums = [0.0; 2];
    for cpu in counters {
        for (sum, counter) in sums.iter_mut().zip(cpu) {
            // A CPU that went offline, or that the cgroup did not run on, answers with nothing.
            *sum += count(counter).unwrap_or(0.0);
        }
    }
    sums
}

fn open_of(cgroup: &Path, root: &Path, events: [Event; 2]) -> io::Result<Counters> {
    let cgroup = File::open(cgroup)?;
    online_cpus(root)
        .into_iter()
        .map(|cpu| {
            Ok([
                open(events[0], cpu, Some(&cgroup))?,
                open(events[1], cpu, Some(&cgroup))?,
            ])
        })
        .collect()
}

fn open_all(root: &Path) -> Result<Counters, String> {
    let devices = root.join("sys/bus/event_source/devices");
    // `cpu`, or on heterogeneous processors `cpu_core`, `armv8_…`.
    let has_counters = entries(&devices).iter().any(|device| {
        let name = super::files::name(device);
        name.starts_with("cpu") || name.starts_with("arm")
    });
    if !has_counters {
        return Err(format!(
            "no processor's counters in {}: the hypervisor does not hand them on, or the kernel has no driver",
            devices.display()
        ));
    }
    online_cpus(root)
        .into_iter()
        .map(|cpu| Ok([open(INSTRUCTIONS, cpu, None)?, open(CYCLES, cpu, None)?]))
        .collect::<io::Result<_>>()
        .map_err(|error| format!("instructions and cycles: {}", why(&error)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::value;
    use super::*;
    use std::fs;
    use std::process::{Child, Command};

    #[test]
    fn counters_exist_here_or_the_reason_is_named() {
        match open_all(Path::new("/")) {
            Ok(mut counters) => {
                let first = count(&mut counters[0][0]).expect("a count");
                let spent: u64 = (0..1_000_000).fold(0, |sum, next| sum ^ next);
                assert!(spent < u64::MAX);
                assert!(count(&mut counters[0][0]).expect("a count") >= first);
            }
            Err(why) => assert!(why.contains("counters") || why.contains("count"), "{why}"),
        }
        let root = tempfile::tempdir().expect("a directory");
        assert!(open_all(root.path()).is_err_and(|why| why.contains("hypervisor")));
    }

    /// A process in a cgroup2 of its own; both end with it.
    struct Busy(PathBuf, Child);

    impl Busy {
        fn start(scope: &Path, name: &str, script: &str) -> Option<Self> {
            let cgroup = scope.join(name);
            if let Err(error) = fs::create_dir(&cgroup) {
                println!("not run: cannot make a cgroup: {error}");
                return None;
            }
            let script = format!("echo $$ > {}/cgroup.procs && {script}", cgroup.display());
            let child = Command::new("sh").args(["-c", &script]).spawn();
            Some(Self(cgroup, child.expect("a shell")))
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            let _ = self.1.kill();
            let _ = self.1.wait();
            for _ in 0..100 {
                if fs::remove_dir(&self.0).is_ok() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    #[test]
    fn each_container_is_counted_in_its_turn_and_only_what_it_did_itself() {
        // PERF_COUNT_SW_TASK_CLOCK, nanoseconds: the same way as the counters of hardware, which few
        // virtual machines have.
        let clock = Event { kind: 1, config: 1 };
        let scope = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let Some(scope) = scope
            .into_iter()
            .find(|path| path.join("cgroup.procs").exists() && nix::unistd::geteuid().is_root())
        else {
            println!("not run: it needs root and cgroup2");
            return;
        };
        let name = |what: &str| format!("performance-{what}-{}", std::process::id());
        let (busy, idle) = (name("busy"), name("idle"));
        let Some(_busy) = Busy::start(scope, &busy, "while :; do :; done") else {
            return;
        };
        let Some(_idle) = Busy::start(scope, &idle, "exec sleep 1000") else {
            return;
        };
        if let Err(error) = open_of(&scope.join(&busy), Path::new("/"), [clock; 2]) {
            println!("not run: {}", why(&error));
            return;
        }
        std::thread::sleep(Duration::from_millis(300));
        let containers = [&busy, &idle].map(|name| Container {
            name: name.as_str().into(),
            ..Container::of_cgroup(&format!("/{name}"), 1, 0)
        });
        let mut counting = OfContainers::new(scope.to_owned());
        counting.events = [clock; 2];
        counting.every = Duration::ZERO;
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let mut reading = HostReading::default();
            counting.read(&containers, Path::new("/"), &mut reading);
            assert_eq!(value(&reading, METRICS[0], &idle), None, "it only slept");
            if let Some(rate) = value(&reading, METRICS[0], &busy) {
                assert!(
                    (1e6..1.1e9).contains(&rate),
                    "of one CPU: {rate} ns a second"
                );
                let ratio = value(&reading, METRICS[1], &busy);
                // The same clock twice, read one after the other.
                assert!(
                    ratio.is_some_and(|ratio| (0.9..1.1).contains(&ratio)),
                    "{ratio:?}"
                );
                break;
            }
            assert!(Instant::now() < end, "it was never counted");
            std::thread::sleep(Duration::from_millis(200));
        }
        let mut reading = HostReading::default();
        counting.read(&[], Path::new("/"), &mut reading);
        assert_eq!(reading.values, [], "a container that is gone has no value");
    }
}
