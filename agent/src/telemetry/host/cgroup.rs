//! What the kernel counts of each container's cgroup: CPU, throttling, memory, faults, kills, pressure.
//!
//! A controller is read from the container's cgroup2 directory, and from its cgroup v1 directory where
//! the host still has that controller there.

use super::counters::Counters;
use super::cpu::pressures;
use super::files::{field, number, online_cpus};
use super::{HostReading, Look};
use crate::model::container::{Container, State};
use crate::model::metric::Per;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

pub struct Containers {
    scope: PathBuf,
    /// CPUs online.
    cpus: f64,
    counters: Counters,
    /// Where cgroup v1 controllers are mounted, by name, with the cgroup that is the mount's root.
    v1: Option<BTreeMap<String, (String, PathBuf)>>,
    /// cgroup v1 directories of each container by its first process.
    known: BTreeMap<String, (i32, V1)>,
}

/// A container's cgroup v1 directories.
#[derive(Clone, Debug, Default, PartialEq)]
struct V1 {
    cpu: Option<PathBuf>,
    cpuacct: Option<PathBuf>,
    memory: Option<PathBuf>,
}

impl Containers {
    pub fn new(scope: PathBuf) -> Self {
        Self {
            scope,
            cpus: 0.0,
            counters: Counters::default(),
            v1: None,
            known: BTreeMap::new(),
        }
    }

    pub fn read(&mut self, containers: &[Container], look: Look, reading: &mut HostReading) {
        self.counters.turn();
        self.cpus = online_cpus(look.root).len() as f64;
        let running: Vec<&Container> = containers
            .iter()
            .filter(|container| matches!(container.state, State::Running | State::Paused))
            .collect();
        self.known
            .retain(|name, _| running.iter().any(|running| running.name.as_str() == name));
        for container in &running {
            let v1 = self.v1_of(container, look);
            let path = container.cgroup_path.trim_start_matches('/');
            let v2 = self.scope.join(path);
            let name = container.name.as_str();
            let mut push = |metric, value| reading.of(metric, Per::Container, name, value);
            self.cpu(look, &v2, &v1, name, &mut push);
            self.memory(look, &v2, &v1, name, &mut push);
            pressures(&v2, None, &mut |metric, value| {
                if let Ok(value) = value {
                    push(metric, value);
                }
            });
        }
        let why = if running.is_empty() {
            "no container runs here"
        } else {
            "no container here has a CPU quota"
        };
        reading.absent(&["cpu.quota_throttled", "cpu.throttled"], why);
    }

    fn cpu(
        &mut self,
        look: Look,
        v2: &Path,
        v1: &V1,
        name: &str,
        push: &mut impl FnMut(&'static str, f64),
    ) {
        let stat = fs::read_to_string(v2.join("cpu.stat")).unwrap_or_default();
        let of_v1 = || Some(number::<u64>(&v1.cpuacct.as_ref()?.join("cpuacct.usage"))? / 1000);
        let used_us = field(&stat, "usage_usec").or_else(of_v1);

        let cpus = self.cpus;
        if let Some(more) = used_us.and_then(|us| self.counters.more("used", name, us))
            && let Some(us_a_second) = look.a_second(more)
            && cpus > 0.0
        {
            push("cpu.used", (us_a_second / 1e4 / cpus).min(100.0));
        }
        let throttling = if stat.contains("nr_periods") {
            stat
        } else {
            let path = v1.cpu.as_ref().map(|cpu| cpu.join("cpu.stat"));
            path.and_then(|path| fs::read_to_string(path).ok())
                .unwrap_or_default()
        };
        // Microseconds, in cgroup v1 nanoseconds; each CPU that was withheld counts.
        let off_us = field(&throttling, "throttled_usec")
            .or_else(|| Some(field(&throttling, "throttled_time")? / 1000))
            .and_then(|us| self.counters.more("throttled", name, us));
        let mut more = |key: &'static str| self.counters.more(key, name, field(&throttling, key)?);
        // Without a quota there is no period at all.
        if let (Some(periods), Some(throttled)) = (more("nr_periods"), more("nr_throttled"))
            && field(&throttling, "nr_periods").is_some_and(|periods| periods > 0)
        {
            let share = 100.0 * throttled as f64 / periods.max(1) as f64;
            push("cpu.quota_throttled", share.min(100.0));
            if let Some(us_a_second) = off_us.and_then(|us| look.a_second(us))
                && cpus > 0.0
            {
                push("cpu.throttled", (us_a_second / 1e4 / cpus).min(100.0));
            }
        }
    }

    fn memory(
        &mut self,
        look: Look,
        v2: &Path,
        v1: &V1,
        name: &str,
        push: &mut impl FnMut(&'static str, f64),
    ) {
        let old = |file: &str| v1.memory.as_ref().map(|memory| memory.join(file));
        let read = |path: PathBuf| fs::read_to_string(path).ok();
        let stat = read(v2.join("memory.stat")).or_else(|| read(old("memory.stat")?));
        let stat = stat.unwrap_or_default();
        // cgroup v1 shows a cgroup's own beside those with all below it.
        let count = |total: &str, own: &str| field(&stat, total).or_else(|| field(&stat, own));
        let current = number::<u64>(&v2.join("memory.current"))
            .or_else(|| number(&old("memory.usage_in_bytes")?));
        if let Some(current) = current {
            // Whoever reads files fills its limit with pages that the kernel takes back when they are wanted.
            let spare = count("total_inactive_file", "inactive_file").unwrap_or(0);
            let current = current.saturating_sub(spare);
            push("memory.used_bytes", current as f64);
            let limit = number::<u64>(&v2.join("memory.max"))
                .or_else(|| number(&old("memory.limit_in_bytes")?));
            // cgroup v1 writes no limit as the largest multiple of a page below 2^63.
            if let Some(limit) = limit.filter(|&limit| limit > 0 && limit < 1 << 62) {
                let share = 100.0 * current as f64 / limit as f64;
                push("memory.used", share.min(100.0));
            }
        }
        let all = count("total_pgfault", "pgfault");
        let major = count("total_pgmajfault", "pgmajfault");
        let all = all.and_then(|all| self.counters.more("faults", name, all));
        let major = major.and_then(|major| self.counters.more("major", name, major));
        if let (Some(all), Some(major)) = (all, major) {
            let minor = all.saturating_sub(major);
            for (metric, count) in [
                ("memory.major_faults", major),
                ("memory.minor_faults", minor),
            ] {
                if let Some(rate) = look.a_second(count) {
                    push(metric, rate);
                }
            }
        }
        let events = read(v2.join("memory.events")).or_else(|| read(old("memory.oom_control")?));
        let kills = events.and_then(|events| field(&events, "oom_kill"));
        if let Some(more) = kills.and_then(|kills| self.counters.more("kills", name, kills)) {
            push("memory.oom_kills", more as f64);
        }
    }

    fn v1_of(&mut self, container: &Container, look: Look) -> V1 {
        let mounts = self.v1.get_or_insert_with(|| {
            let path = look.path("proc/self/mountinfo");
            v1_mounts(&fs::read_to_string(path).unwrap_or_default())
        });
        if mounts.is_empty() || container.pid == 0 {
            return V1::default();
        }
        let name = container.name.as_str();
        if let Some((pid, known)) = self.known.get(name)
            && *pid == container.pid
        {
            return known.clone();
        }
        let path = look.path(format!("proc/{}/cgroup", container.pid));
        let memberships = fs::read_to_string(path).unwrap_or_default();
        let of = |controller: &str| {
            let found = v1_directory(mounts, &memberships, controller)?;
            let below = found.strip_prefix("/").unwrap_or(&found);
            Some(look.path(below))
        };
        let found = V1 {
            cpu: of("cpu"),
            cpuacct: of("cpuacct"),
            memory: of("memory"),
        };
        self.known
            .insert(name.to_owned(), (container.pid, found.clone()));
        found
    }
}

/// Mounted cgroup v1 controllers from mountinfo (proc_pid_mountinfo(5)).
fn v1_mounts(mountinfo: &str) -> BTreeMap<String, (String, PathBuf)> {
    let mut mounts = BTreeMap::new();
    for line in mountinfo.lines() {
        let Some((mount, rest)) = line.split_once(" - cgroup ") else {
            continue;
        };
        let mut fields = mount.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else {
            continue;
        };
        for option in rest.split(' ').nth(1).unwrap_or_default().split(',') {
            let place = (root.to_owned(), PathBuf::from(point));
            mounts.entry(option.to_owned()).or_insert(place);
        }
    }
    mounts
}

/// A process's cgroup v1 directory of one controller (cgroups(7), `/proc/PID/cgroup`). The root of the
/// hierarchy is the whole host and no container.
fn v1_directory(
    mounts: &BTreeMap<String, (String, PathBuf)>,
    memberships: &str,
    controller: &str,
) -> Option<PathBuf> {
    let (root, point) = mounts.get(controller)?;
    let path = memberships.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers
            .split(',')
            .any(|one| one == controller)
            .then_some(path)
    })?;
    let below = path.strip_prefix(root.trim_end_matches('/'))?;
    let below = below.trim_start_matches('/');
    (!below.is_empty()).then(|| point.join(below))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{value, write};
    use super::super::{Host, HostReading};
    use super::*;
    use std::time::Duration;

    fn web(pid: i32) -> Container {
        Container {
            name: "web".into(),
            ..Container::of_cgroup("/pod/web", 1, pid)
        }
    }

    fn read_twice(before: &[(&str, &str)], after: &[(&str, &str)]) -> HostReading {
        let root = tempfile::tempdir().expect("a directory");
        write(root.path(), before);
        write(root.path(), &[("sys/devices/system/cpu/online", "0-3\n")]);
        let mut host = Host::new(root.path().to_owned(), root.path().join("cg"));
        host.read(&[web(41)], Duration::from_secs(2));
        write(root.path(), after);
        host.read(&[web(41)], Duration::from_secs(2))
    }

    #[test]
    fn a_container_on_cgroup2_has_cpu_memory_faults_kills_and_pressure() {
        let reading = read_twice(
            &[
                (
                    "cg/pod/web/cpu.stat",
                    "usage_usec 1000\nuser_usec 1\nsystem_usec 1\nnr_periods 10\nnr_throttled 1\nthrottled_usec 9000\n",
                ),
                ("cg/pod/web/memory.current", "1048576\n"),
                ("cg/pod/web/memory.max", "4194304\n"),
                (
                    "cg/pod/web/memory.stat",
                    "anon 1\npgfault 100\npgmajfault 4\n",
                ),
                (
                    "cg/pod/web/memory.events",
                    "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n",
                ),
                (
                    "cg/pod/web/io.pressure",
                    "some avg10=12.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n",
                ),
            ],
            &[
                (
                    "cg/pod/web/cpu.stat",
                    "usage_usec 201000\nuser_usec 1\nsystem_usec 1\nnr_periods 30\nnr_throttled 6\nthrottled_usec 2009000\n",
                ),
                (
                    "cg/pod/web/memory.stat",
                    "anon 1\ninactive_file 524288\npgfault 124\npgmajfault 8\n",
                ),
                (
                    "cg/pod/web/memory.events",
                    "low 0\nhigh 0\nmax 9\noom 3\noom_kill 3\n",
                ),
            ],
        );
        let of = |metric| value(&reading, metric, "web");
        assert_eq!(of("cpu.used"), Some(2.5), "of four CPUs");
        assert_eq!(of("cpu.quota_throttled"), Some(25.0));
        assert_eq!(of("cpu.throttled"), Some(25.0), "one of four CPUs");
        // Without what of files the kernel takes back first.
        assert_eq!(of("memory.used_bytes"), Some(524_288.0));
        assert_eq!(of("memory.used"), Some(12.5));
        assert_eq!(of("memory.major_faults"), Some(2.0));
        assert_eq!(of("memory.minor_faults"), Some(10.0));
        assert_eq!(of("memory.oom_kills"), Some(2.0));
        assert_eq!(of("pressure.io_full"), Some(3.0));
        assert_eq!(of("pressure.cpu_some"), None);
    }

    #[test]
    fn a_container_whose_controllers_are_cgroup_v1_is_read_there_and_without_a_limit_has_no_share()
    {
        let mounts = "30 1 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 1 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n";
        let memory = "sys/fs/cgroup/memory/docker/web";
        let cpu = "sys/fs/cgroup/cpu/docker/web";
        let at = |directory: &str, file: &str| format!("{directory}/{file}");
        let reading = read_twice(
            &[
                ("proc/self/mountinfo", mounts),
                (
                    "proc/41/cgroup",
                    "4:memory:/docker/web\n3:cpu,cpuacct:/docker/web\n0::/pod/web\n",
                ),
                (&at(memory, "memory.usage_in_bytes"), "2000\n"),
                (
                    &at(memory, "memory.limit_in_bytes"),
                    "9223372036854771712\n",
                ),
                (
                    &at(memory, "memory.oom_control"),
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
                ),
                (
                    &at(memory, "memory.stat"),
                    "pgfault 1\npgmajfault 0\ntotal_pgfault 10\ntotal_pgmajfault 2\n",
                ),
                (&at(cpu, "cpuacct.usage"), "1000000\n"),
                (
                    &at(cpu, "cpu.stat"),
                    "nr_periods 4\nnr_throttled 0\nthrottled_time 0\n",
                ),
            ],
            &[
                (
                    &at(memory, "memory.oom_control"),
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
                ),
                (
                    &at(memory, "memory.stat"),
                    "inactive_file 9\npgfault 1\npgmajfault 0\ntotal_pgfault 30\ntotal_pgmajfault 4\ntotal_inactive_file 500\n",
                ),
                (
                    &at(cpu, "cpu.stat"),
                    "nr_periods 8\nnr_throttled 2\nthrottled_time 800000005\n",
                ),
            ],
        );
        let of = |metric| value(&reading, metric, "web");
        assert_eq!(of("memory.used_bytes"), Some(1500.0));
        assert_eq!(of("memory.used"), None);
        assert_eq!(of("memory.oom_kills"), Some(1.0));
        assert_eq!(of("memory.major_faults"), Some(1.0));
        assert_eq!(of("memory.minor_faults"), Some(9.0));
        assert_eq!(of("cpu.used"), Some(0.0));
        assert_eq!(of("cpu.quota_throttled"), Some(50.0));
        assert_eq!(of("cpu.throttled"), Some(10.0));
    }

    #[test]
    fn the_root_of_a_v1_hierarchy_is_no_container() {
        let mounts = v1_mounts("30 1 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
        assert_eq!(v1_directory(&mounts, "4:memory:/\n", "memory"), None);
        assert_eq!(
            v1_directory(&mounts, "4:memory:/a/b\n", "memory"),
            Some(PathBuf::from("/sys/fs/cgroup/memory/a/b"))
        );
    }
}
