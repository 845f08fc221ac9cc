//! Kernel maps and /proc to samples.
//!
//! Invariants: starting never fails for a missing kernel feature: it is disabled with a named reason;
//! nothing on the host is changed to observe it; nothing outside the scope is reported.

mod block;
mod book;
pub mod btf;
mod cgroups;
pub mod device;
pub mod dirty;
mod disks;
mod edges;
pub mod extents;
mod host;
mod interval;
mod kernel;
mod layout;
pub mod links;
mod listeners;
pub mod memory;
mod names;
mod ports;
mod sampling;
mod scope;
mod sockets;
mod stacks;
pub mod trace;
mod unix;

use crate::model::container::{Container, State};
use crate::model::edge::Edge;
use crate::model::ids::ContainerName;
use crate::model::metric::{METRICS, Metric, Per, Sample, Subject};
use crate::model::telemetry::{
    BlockIo, ContainerStats, Disabled, DiskStats, HostFacts, Latencies, RunQueueStats, Snapshot,
};
use crate::model::units::{Bytes, UnixMillis};
use cgroups::Cgroups;
use disks::Again;
pub use host::{Heard, understands};
use host::{Host, Value};
use interval::{Counters, add_waiting, run_queue_values};
use kernel::Kernel;
use layout::Family;
use ports::{Clock, Ports};
use sampling::{LOOK_EVERY, Next, Sampling};
use stacks::Stacks;
use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The kernel measures its programs during one sweep in so many: measuring always would cost as much
/// as the programs do.
const MEASURED_SWEEP: u64 = 60;

/// What asking all tasks whether they wait may take of a sweep: where it takes longer, it is asked more rarely.
const WALK: Duration = Duration::from_millis(5);

/// The metric of those who wait.
const WAITING: &str = "sched.waiting";

/// In one sweep of so many, free memory goes back to the kernel: reading the sockets of a crowded network namespace
/// takes some MiB for a moment.
const TIDIED_SWEEP: u64 = 10;

/// Containers that ended and are remembered; the oldest give way.
const ENDED: usize = 64;

/// Where the senses look.
#[derive(Clone, Debug)]
pub struct TelemetryConfig {
    /// Root of procfs and sysfs; `/` on the host itself.
    pub root: PathBuf,
    /// cgroup2 directory of the scope: nothing beyond it is reported.
    pub cgroup: PathBuf,
    /// How long an edge is kept after it was last seen.
    pub edge_age: Duration,
    /// Edges of an earlier life of this agent.
    pub remembered: Vec<Edge>,
    /// How much the kernel may hold of connections.
    pub limits: ConnectionLimits,
}

/// Capacities of the kernel's maps of connections, whose memory is taken at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Connections open at once; of more, the bytes are not known.
    pub open: u32,
    /// Kinds of connections, one for each client, service and side, between two sweeps; more are lost.
    pub kinds: u32,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            open: 24_576,
            kinds: 8_192,
        }
    }
}

/// The agent's senses.
pub struct Telemetry {
    config: TelemetryConfig,
    kernel: Kernel,
    map_memory: Option<Bytes>,
    disabled: Vec<Disabled>,
    cgroups: Cgroups,
    counters: Counters,
    sampling: Sampling,
    /// Switches, and when, at the last [`Self::judge_switches`] and the last [`Self::account`].
    judged: (u64, Instant),
    accounted: Instant,
    /// Of the last sweep in which switches were seen, by cgroup2 id.
    run_queues: HashMap<u64, Latencies>,
    /// Who waited at the last walk over all tasks: cgroup2 ids, and for how long, ns; or why it failed.
    waiting: Result<Vec<(u64, u64)>, String>,
    /// The sweep of the next walk.
    next_walk: u64,
    block: block::Counters,
    /// Numbers of disks that programs serve.
    served: BTreeSet<u32>,
    ports: Ports,
    stacks: Stacks,
    /// Names that runtimes gave to container ids.
    heard: BTreeMap<String, ContainerName>,
    ended: BTreeMap<ContainerName, (UnixMillis, Vec<Sample>)>,
    host: Host,
    last_sweep: Instant,
    sweeps: u64,
    always_measured: bool,
}

/// What is read at once, and what is common to all of a sweep.
struct Sweep {
    owners: HashMap<u64, ContainerName>,
    interval: Duration,
    now_ns: u64,
    values: Vec<Value>,
}

impl Telemetry {
    /// Starts every sense that works here; the others are in [`Telemetry::disabled`].
    #[must_use]
    pub fn start(mut config: TelemetryConfig) -> Self {
        let mut disabled = Vec::new();
        let ConnectionLimits { open, kinds } = config.limits;
        let sizes = kernel::ports::sizes(open, kinds);
        let mut kernel = Kernel::start(&config.root, &config.cgroup, &sizes, &mut disabled);
        for Disabled { what, why } in &disabled {
            tracing::warn!("telemetry: {what} is disabled: {why}");
        }
        let mut host = Host::new(config.root.clone(), config.cgroup.clone());
        host.watch_drives();
        // Attaching takes seconds on a busy host: what came meanwhile is not of the first interval, which begins now.
        let last_sweep = Instant::now();
        let (mut counters, mut block) = (Counters::default(), block::Counters::default());
        counters.run_queue(&kernel.run_queue());
        let now_ns = ports::monotonic_ns();
        block.interval(&kernel.block(), &kernel.in_flight(), now_ns);
        let judged = (kernel.switches(), Instant::now());
        Self {
            map_memory: kernel.map_memory(),
            kernel,
            disabled,
            cgroups: Cgroups::new(config.cgroup.clone()),
            counters,
            sampling: Sampling::default(),
            judged,
            accounted: Instant::now(),
            run_queues: HashMap::new(),
            waiting: Ok(Vec::new()),
            next_walk: 0,
            block,
            served: BTreeSet::new(),
            ports: Ports::remembering(std::mem::take(&mut config.remembered)),
            stacks: Stacks::default(),
            heard: BTreeMap::new(),
            ended: BTreeMap::new(),
            host,
            last_sweep,
            sweeps: 0,
            always_measured: false,
            config,
        }
    }

    /// Programs and sources that do not work here, with the reason.
    #[must_use]
    pub fn disabled(&self) -> &[Disabled] {
        &self.disabled
    }

    /// Has the kernel measure its programs all the time, rather than during one sweep in sixty.
    pub fn measure_programs(&mut self, always: bool) {
        self.always_measured = always;
        self.measure();
    }

    /// Takes the names that runtimes gave to container ids, of which some may be gone already.
    pub fn hear(&mut self, heard: BTreeMap<String, ContainerName>) {
        self.heard = heard;
    }

    /// Waits until `end`, when the next sweep is due. On a host that switches tasks too often the scheduler's program
    /// is attached only for the last part of this.
    pub fn rest(&mut self, end: Instant) {
        let left = || end.saturating_duration_since(Instant::now());
        if self.kernel.runs(Family::Sched) {
            match self.sampling.next(left()) {
                Next::Always => {
                    while self.kernel.sched_attached() && left() > LOOK_EVERY {
                        std::thread::sleep(LOOK_EVERY);
                        self.judge_switches();
                    }
                }
                Next::Window(window) => {
                    std::thread::sleep(left().saturating_sub(window));
                    self.attach_sched();
                    std::thread::sleep(left());
                    self.judge_switches();
                }
            }
        }
        std::thread::sleep(left());
    }

    fn attach_sched(&mut self) {
        self.account();
        if let Err(why) = self.kernel.attach_sched() {
            self.without_sched(why);
        }
        self.judged = (self.kernel.switches(), Instant::now());
    }

    /// Asks who waits, so often that it takes at most [`WALK`] of a sweep.
    fn walk(&mut self) {
        if self.sweeps < self.next_walk {
            return;
        }
        let start = Instant::now();
        self.waiting = self.kernel.waiting().map_err(|error| error.to_string());
        let rests = start.elapsed().as_micros() / WALK.as_micros();
        self.next_walk = self.sweeps + 1 + u64::try_from(rests).unwrap_or(0);
    }

    fn without_sched(&mut self, why: String) {
        let what = Family::Sched.name().to_owned();
        tracing::warn!("telemetry: {what} is disabled: {why}");
        self.kernel.end_sched();
        self.disabled.push(Disabled { what, why });
    }

    /// Detaches the scheduler's program if it has seen too much since this was last asked.
    fn judge_switches(&mut self) {
        let now = (self.kernel.switches(), Instant::now());
        let (before, at) = std::mem::replace(&mut self.judged, now);
        if !self.sampling.look(now.0 - before, now.1 - at) {
            self.account();
            self.kernel.detach_sched();
        }
    }

    /// Notes for how long the scheduler's program was attached, or not.
    fn account(&mut self) {
        let now = Instant::now();
        let time = now - std::mem::replace(&mut self.accounted, now);
        self.sampling.passed(self.kernel.sched_attached(), time);
    }

    /// Reads everything. Blocking (files and system calls, milliseconds); meant for about once a second.
    /// Statistics are over the time since the sweep before; edges accumulate since the start.
    pub fn sweep(&mut self, containers: &[Container], now: UnixMillis) -> Snapshot {
        let clock = Clock::new(now);
        let mut sweep = Sweep {
            owners: HashMap::new(),
            interval: self.last_sweep.elapsed(),
            now_ns: clock.monotonic_ns,
            values: Vec::new(),
        };
        self.last_sweep = Instant::now();

        // Ids first, the tree after: an id that the tree lacks is then gone for good.
        let mut run_queue = self.kernel.run_queue();
        let mut block = self.kernel.block();
        let mut connections = self.kernel.ports();
        let mut listening = self.kernel.listening();
        let mut ids: HashSet<u64> = run_queue
            .iter()
            .map(|(cgroup, _)| *cgroup)
            .chain(block.iter().map(|(key, _)| key.cgroup))
            .chain(connections.iter().map(|(key, _)| key.cgroup))
            .chain(listening.iter().map(|(key, _)| key.cgroup))
            .collect();
        let born = self.kernel.born();
        self.cgroups.know(ids.iter().copied());
        self.cgroups.born(born);
        sweep.owners = self.cgroups.owners(containers);
        let listed = containers.iter().map(|one| (one.id.as_str(), &one.name));
        let heard = self.heard.iter().map(|(id, name)| (id.as_str(), name));
        let names = heard.chain(listed).collect();
        let (owners_of_gone, unnamed) = self.cgroups.owners_of_gone(&ids, &names);
        self.ports.name(&names);
        // Left in the kernel's maps until its name is known.
        run_queue.retain(|(cgroup, _)| !unnamed.contains(cgroup));
        block.retain(|(key, _)| !unnamed.contains(&key.cgroup));
        connections.retain(|(key, _)| !unnamed.contains(&key.cgroup));
        listening.retain(|(key, _)| !unnamed.contains(&key.cgroup));
        ids.retain(|id| !unnamed.contains(id));

        let mut stats = containers
            .iter()
            .filter(|container| matches!(container.state, State::Running | State::Paused))
            .map(|container| (container.name.clone(), (None, None)))
            .collect::<BTreeMap<_, (Option<RunQueueStats>, Option<BlockIo>)>>();
        let names_of_gone = owners_of_gone.values().cloned();
        let ended: BTreeSet<ContainerName> = names_of_gone
            .filter(|name| !stats.contains_key(name))
            .collect();
        for name in &ended {
            stats.insert(name.clone(), (None, None));
        }
        sweep.owners.extend(owners_of_gone);
        let mut reading = self.host.read(containers, sweep.interval);
        let throttled = interval::throttled(&reading.values);
        let host_run_queue = self.run_queue(&run_queue, &throttled, &mut sweep, &mut stats);
        let (host_block, devices) = self.block(&block, containers, &mut sweep, &mut stats);
        self.ports.sweep(
            &self.config.root,
            &self.config.cgroup,
            self.config.edge_age,
            &ports::Seen {
                containers,
                owners: &sweep.owners,
                own_cgroup: self.kernel.own_cgroup(),
                connections: &connections,
                listening: &listening,
                released: &|netns, port| self.kernel.released(netns, port),
                clock,
            },
        );
        self.log_first_seen(&sweep);
        let gone: HashSet<u64> = ids
            .into_iter()
            .filter(|&id| !self.cgroups.has(id))
            .collect();
        self.kernel.forget_cgroups(&gone);
        let crowded = self.config.limits.kinds as usize / 2;
        self.ports.forget(&mut self.kernel, &gone, crowded, clock);

        self.keep_ended(&ended, &mut sweep, &stats, now);
        stats.retain(|name, _| !ended.contains(name));

        if let Err(why) = &self.waiting {
            reading.absent(&[WAITING], why);
        }
        links::read(&mut reading);
        sweep.values.extend(reading.values);
        let absent = self.absent(reading.absent, &sweep.values);
        let mut losses = self.kernel.losses();
        losses.extend(reading.losses);
        let host = HostFacts {
            run_queue: host_run_queue,
            block: host_block,
            load1: reading.load1,
            cpus: reading.cpus,
            memory_total: reading.memory_total,
            memory_available: reading.memory_available,
        };
        self.sweeps += 1;
        self.measure();
        if self.sweeps.is_multiple_of(TIDIED_SWEEP) {
            memory::give_back();
        }
        Snapshot {
            at: now,
            samples: samples(sweep.values, now),
            edges: self.stacks.without_hops(
                &self.config.root,
                &self.config.cgroup,
                self.ports.edges(now),
            ),
            external: self.ports.external(),
            listening: self.ports.listening(),
            containers: stats
                .into_iter()
                .map(|(name, (run_queue, block))| ContainerStats {
                    name,
                    run_queue,
                    block,
                })
                .collect(),
            devices,
            host,
            addresses: self.ports.host_addresses(),
            losses,
            programs: self.kernel.costs(),
            map_memory: self.map_memory,
            disabled: self.disabled.clone(),
            absent,
            ended: self
                .ended
                .values()
                .flat_map(|(_, samples)| samples.iter().cloned())
                .collect(),
            watched_percent: self.sampling.percent(),
        }
    }

    /// Takes what was measured of containers that are gone out of the sweep, so that nobody judges it, and keeps
    /// it for those who ask.
    fn keep_ended(
        &mut self,
        ended: &BTreeSet<ContainerName>,
        sweep: &mut Sweep,
        running: &BTreeMap<ContainerName, (Option<RunQueueStats>, Option<BlockIo>)>,
        now: UnixMillis,
    ) {
        let of_ended = |(_, subject, _): &mut Value| {
            subject.per == Per::Container && ended.contains(&ContainerName(subject.name.clone()))
        };
        let values: Vec<Value> = sweep.values.extract_if(.., of_ended).collect();
        for sample in samples(values, now) {
            let name = ContainerName(sample.subject.name.clone());
            let (at, samples) = self.ended.entry(name).or_insert((now, Vec::new()));
            if *at != now {
                (*at, *samples) = (now, Vec::new());
            }
            samples.push(sample);
        }
        self.ended.retain(|name, (at, samples)| {
            (ended.contains(name) || !running.contains_key(name))
                && now.since(*at) < self.config.edge_age
                && samples.iter().any(|sample| sample.value != 0.0)
        });
        while self.ended.len() > ENDED {
            let oldest = self.ended.iter().min_by_key(|(_, (at, _))| *at);
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else {
                break;
            };
            self.ended.remove(&oldest);
        }
    }

    /// Why each metric without a value has none.
    fn absent(&self, mut told: BTreeMap<&'static str, String>, values: &[Value]) -> Vec<Disabled> {
        let present: HashSet<&str> = values.iter().map(|(metric, ..)| *metric).collect();
        METRICS
            .iter()
            .filter(|metric| !present.contains(metric.name))
            .map(|metric| {
                let why = told
                    .remove(metric.name)
                    .or_else(|| self.without_programs(metric))
                    .unwrap_or_else(|| "no value yet: it needs two readings".to_owned());
                let what = metric.name.to_owned();
                Disabled { what, why }
            })
            .collect()
    }

    fn without_programs(&self, metric: &Metric) -> Option<String> {
        let family = Family::ALL
            .into_iter()
            .find(|family| metric.name.split('.').next() == Some(family.name()))?;
        let why: Vec<&str> = self.disabled.iter().map(|one| one.why.as_str()).collect();
        (!self.kernel.runs(family)).then(|| why.join("; "))
    }

    fn run_queue(
        &mut self,
        now: &[(u64, lifeboat_ebpf::Latency)],
        throttled: &HashSet<ContainerName>,
        sweep: &mut Sweep,
        stats: &mut BTreeMap<ContainerName, (Option<RunQueueStats>, Option<BlockIo>)>,
    ) -> Option<RunQueueStats> {
        if !self.kernel.runs(Family::Sched) {
            return None;
        }
        self.walk();
        for (run_queue, _) in stats.values_mut() {
            *run_queue = Some(RunQueueStats::default());
        }
        self.account();
        if self.sampling.sweep() {
            self.run_queues = self.counters.run_queue(now);
        }
        let is_stopped = |sweep: &Sweep, cgroup| {
            let owner = sweep.owners.get(&cgroup);
            owner.is_some_and(|name| throttled.contains(name))
        };
        let [mut host, mut stopped] = [RunQueueStats::default(), RunQueueStats::default()];
        for (&cgroup, latency) in &self.run_queues {
            let all = if is_stopped(sweep, cgroup) {
                &mut stopped
            } else {
                &mut host
            };
            all.latency.merge(latency);
            if let Some((Some(run_queue), _)) = sweep.stats_of(cgroup, stats) {
                run_queue.latency.merge(latency);
            }
        }
        for &(cgroup, age_ns) in self.waiting.iter().flatten() {
            let all = if is_stopped(sweep, cgroup) {
                &mut stopped
            } else {
                &mut host
            };
            add_waiting(all, age_ns, sweep.interval);
            if let Some((Some(run_queue), _)) = sweep.stats_of(cgroup, stats) {
                add_waiting(run_queue, age_ns, sweep.interval);
            }
        }
        let host = interval::of_host(host, stopped);
        let is_known = |(metric, ..): &Value| self.waiting.is_ok() || *metric != WAITING;
        for (name, (run_queue, _)) in stats {
            let subject = interval::subject(Per::Container, name.as_str());
            let values = run_queue
                .iter()
                .flat_map(|stats| run_queue_values(&subject, stats));
            sweep.values.extend(values.filter(is_known));
        }
        let values = run_queue_values(&Subject::device(), &host);
        sweep.values.extend(values.into_iter().filter(is_known));
        Some(host)
    }

    fn block(
        &mut self,
        now: &[(lifeboat_ebpf::BlockKey, lifeboat_ebpf::BlockStats)],
        containers: &[Container],
        sweep: &mut Sweep,
        stats: &mut BTreeMap<ContainerName, (Option<RunQueueStats>, Option<BlockIo>)>,
    ) -> (Option<BlockIo>, Vec<DiskStats>) {
        if !self.kernel.runs(Family::Block) {
            return (None, Vec::new());
        }
        for (_, block) in stats.values_mut() {
            *block = Some(BlockIo::default());
        }
        let mut host = BlockIo::default();
        let mut disks: BTreeMap<u32, Option<(Again, DiskStats)>> = BTreeMap::new();
        let (root, served) = (&self.config.root, &mut self.served);
        // Only loop devices need them, of which there may be many.
        let table = LazyCell::new(|| {
            fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default()
        });
        let mounts = LazyCell::new(|| disks::mounts(&table));
        let mut disk_of = |device| {
            let name = disks::own(root, device, served)?;
            let block = BlockIo::default();
            let again = disks::counted_again(root, || mounts.as_slice(), &name);
            Some((again, DiskStats { name, block }))
        };
        let scope = &self.config.cgroup;
        let in_scope = [false, true].map(|passes_on| disks::is_charged(scope, passes_on));
        let mut charged: BTreeMap<ContainerName, bool> = BTreeMap::new();
        // Whether the sums of the host, and of a container, have it from another disk.
        let mut has_again = |again: Again, owner: Option<&ContainerName>| match (again, owner) {
            (Again::No, _) => false,
            (Again::AsPath, _) => true,
            (Again::ByItsFile { charged }, None) => in_scope[usize::from(charged)],
            (Again::ByItsFile { charged: false }, Some(_)) => false,
            (Again::ByItsFile { charged: true }, Some(name)) => {
                *charged.entry(name.clone()).or_insert_with(|| {
                    let mut known = containers.iter().filter(|one| one.name == *name);
                    known.any(|one| {
                        let below = one.cgroup_path.trim_start_matches('/');
                        disks::is_charged(&scope.join(below), true)
                    })
                })
            }
        };
        let mut in_flight = self.kernel.in_flight();
        let answers = |device| self.block.answers(device, now);
        let counted = |device| disks::under_way(root, device);
        let (at, interval) = (sweep.now_ns, sweep.interval);
        let ended = block::ended_unseen(&in_flight, at, interval, answers, counted);
        for request in &ended {
            self.kernel.forget_request(request);
        }
        in_flight.retain(|request| ended.iter().all(|one| one.place != request.place));
        let of_interval = self.block.interval(now, &in_flight, sweep.now_ns);
        let counted = of_interval
            .iter()
            .map(|(key, more)| (key, What::Counted(more)));
        let under_way = in_flight.iter().map(|one| (&one.key, What::UnderWay(one)));
        for (key, what) in counted.chain(under_way) {
            let disk = disks.entry(key.device);
            let Some((again, disk)) = disk.or_insert_with(|| disk_of(key.device)) else {
                continue;
            };
            let owner = sweep.owners.get(&key.cgroup);
            let of_host = (!has_again(*again, None)).then_some(&mut host);
            let of_owner = owner.filter(|name| !has_again(*again, Some(name)));
            let of_owner = of_owner.and_then(|name| stats.get_mut(name)?.1.as_mut());
            let all = [of_host, Some(&mut disk.block), of_owner];
            for io in all.into_iter().flatten() {
                match what {
                    What::Counted(more) => block::add(io, key, more, sweep.interval),
                    What::UnderWay(one) => {
                        block::add_in_flight(io, one, sweep.now_ns, sweep.interval);
                    }
                }
            }
        }
        for (name, (_, block)) in stats {
            let subject = interval::subject(Per::Container, name.as_str());
            let values = block.iter().flat_map(|io| block::values(&subject, io));
            sweep.values.extend(values);
        }
        sweep
            .values
            .extend(block::values(&Subject::device(), &host));
        let devices = disks.into_values().flatten().map(|(_, disk)| disk);
        let devices: Vec<DiskStats> = devices.collect();
        for disk in &devices {
            let subject = interval::subject(Per::Disk, &disk.name);
            sweep.values.extend(block::values(&subject, &disk.block));
        }
        (Some(host), devices)
    }

    fn log_first_seen(&mut self, sweep: &Sweep) {
        for key in self.kernel.first_seen() {
            if let Some(owner) = sweep.owners.get(&key.cgroup) {
                let peer = ports::address(key.peer);
                let (protocol, role, port) = (key.protocol, key.role, key.port);
                tracing::debug!(%owner, protocol, role, %peer, port, "first connection of its kind");
            }
        }
    }

    fn measure(&mut self) {
        let wanted = self.always_measured || self.sweeps.is_multiple_of(MEASURED_SWEEP);
        if let Err(why) = self.kernel.measure(wanted)
            && self.disabled.iter().all(|known| known.why != why)
        {
            let what = "cost of the kernel programs".to_owned();
            self.disabled.push(Disabled { what, why });
        }
    }
}

/// What is added to block I/O.
#[derive(Clone, Copy)]
enum What<'a> {
    Counted(&'a block::Interval),
    UnderWay(&'a block::Request),
}

impl Sweep {
    fn stats_of<'s, T>(
        &self,
        cgroup: u64,
        stats: &'s mut BTreeMap<ContainerName, T>,
    ) -> Option<&'s mut T> {
        stats.get_mut(self.owners.get(&cgroup)?)
    }
}

fn samples(values: Vec<Value>, at: UnixMillis) -> Vec<Sample> {
    values
        .into_iter()
        .map(|(metric, subject, value)| Sample {
            metric: metric.to_owned(),
            subject,
            value,
            at,
        })
        .collect()
}

/// Ports that containers listen on, as the snapshot has them.
type Listening = BTreeMap<ContainerName, BTreeSet<u16>>;
