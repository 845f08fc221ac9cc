//! The kernel programs: loading, attaching and reading their maps.
//!
//! Invariants: a missing kernel feature disables its family with a named reason and never stops the
//! agent; what the maps could not hold is counted. Non-goals: meaning, which is given by the sweep.

mod births;
mod block;
mod cost;
pub mod mapped;
pub mod ports;
mod sched;

use super::btf::KernelTypes;
use super::layout::{self, Family};
use super::memory;
use super::scope::{self, Scope};
use crate::model::telemetry::Disabled;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya::programs::raw_trace_point::RawTracePoint;
use aya::programs::{
    BtfTracePoint, CgroupAttachMode, CgroupSock, CgroupSockAddr, Iter, Program, ProgramError,
    RawTracePointRunOptions, TestRun,
};
use aya::{Btf, Ebpf, EbpfLoader, Pod};
use caps::{CapSet, Capability};
use lifeboat_ebpf::{Ancestors, Layout};
use nix::sys::resource::{Resource, getrlimit};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lifeboat-ebpf.o"));

/// The same programs for kernels before Linux 5.12.
static PLAIN: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lifeboat-plain.o"));

/// Where the running kernel describes its types.
pub const BTF_PATH: &str = "sys/kernel/btf/vmlinux";

/// How a program comes to run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hook {
    /// At the kernel's tracepoint of the same name, with typed arguments.
    Tracepoint,
    /// The same, but detached most of the time while it comes too often.
    Sampled,
    /// When the agent asks (`BPF_PROG_TEST_RUN`).
    OnDemand,
    /// When the agent asks, for each task.
    Tasks,
    /// When a socket of the scope's cgroups names a peer.
    SocketAddress,
    /// When a socket of the scope's cgroups ends.
    SocketEnd,
}

/// A family runs when all of its programs do.
const PROGRAMS: &[(Family, Hook, &str)] = &[
    (Family::Sched, Hook::Sampled, sched::SWITCH),
    (Family::Sched, Hook::Tasks, sched::WAITING),
    (Family::Births, Hook::Tracepoint, "cgroup_mkdir"),
    (Family::Block, Hook::Tracepoint, "block_rq_issue"),
    (Family::Block, Hook::Tracepoint, "block_rq_complete"),
    (Family::WriteBack, Hook::Tracepoint, "block_rq_insert"),
    (Family::WriteBack, Hook::Tracepoint, "writeback_dirty_folio"),
    (Family::Ports, Hook::OnDemand, "ports_refresh"),
    (Family::Ports, Hook::Tracepoint, "inet_sock_set_state"),
    (Family::Datagrams, Hook::SocketEnd, "udp_release"),
    (Family::Datagrams, Hook::SocketAddress, "udp_connect4"),
    (Family::Datagrams, Hook::SocketAddress, "udp_connect6"),
    (Family::Datagrams, Hook::SocketAddress, "udp_sendmsg4"),
    (Family::Datagrams, Hook::SocketAddress, "udp_sendmsg6"),
    (Family::Datagrams, Hook::SocketAddress, "udp_recvmsg4"),
    (Family::Datagrams, Hook::SocketAddress, "udp_recvmsg6"),
];

/// Tracepoints with their name on older kernels.
const FORMERLY: [(&str, &str); 1] = [("writeback_dirty_folio", "writeback_dirty_page")];

/// The programs that run, and those that do not.
pub struct Kernel {
    /// None when not even the object could be loaded.
    ebpf: Option<Ebpf>,
    running: Vec<Family>,
    own_cgroup: Option<u64>,
    /// How deep the scope lies in the kernel's hierarchy.
    scope_level: u32,
    /// None when the scheduler programs do not run.
    run_queues: Option<sched::RunQueues>,
    /// None when the block programs do not run.
    blocks: Option<block::Blocks>,
    /// None when no program of connections runs.
    connections: Option<ports::Connections>,
    /// Keeps the kernel's measuring of programs on.
    measuring: Option<OwnedFd>,
}

impl Kernel {
    /// Loads and attaches what this kernel can run; `sizes` replaces the capacity of maps by name.
    pub fn start(
        root: &Path,
        cgroup: &Path,
        sizes: &[(&str, u32)],
        disabled: &mut Vec<Disabled>,
    ) -> Self {
        let nothing = |disabled: &mut Vec<Disabled>, why: String| {
            disabled.push(Disabled {
                what: "kernel programs".to_owned(),
                why,
            });
            Self {
                ebpf: None,
                running: Vec::new(),
                own_cgroup: None,
                scope_level: 0,
                run_queues: None,
                blocks: None,
                connections: None,
                measuring: None,
            }
        };
        if let Some(why) = forbidden() {
            return nothing(disabled, why);
        }
        let types = fs::read(root.join(BTF_PATH))
            .map_err(|error| {
                format!(
                    "this kernel does not describe its types ({}: {error}); it needs CONFIG_DEBUG_INFO_BTF",
                    root.join(BTF_PATH).display()
                )
            })
            .and_then(|data| KernelTypes::parse(data).map_err(|error| error.to_string()));
        let types = match types {
            Ok(types) => types,
            Err(why) => return nothing(disabled, why),
        };
        let (mut layout, missing) = layout::find(&types);
        let btf = hooks(&types);
        drop(types);
        let btf = match btf {
            Ok(btf) => btf,
            Err(why) => return nothing(disabled, why),
        };
        if let [(_, of_all), others @ ..] = &missing[..]
            && others.len() + 1 == Family::ALL.len()
        {
            return nothing(disabled, of_all.why.clone());
        }
        layout.open_groups = sizes
            .iter()
            .find(|(map, _)| *map == "OPEN_KEYS")
            .map_or(lifeboat_ebpf::OPEN_GROUPS, |(_, groups)| *groups);
        allow_locked_memory();
        let own_cgroups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        if layout::has_v1_write_back(&own_cgroups) {
            layout.write_back_uncharged = 1;
        }
        match find_scope(root, cgroup, &layout) {
            Ok((object, scope, own_cgroup)) => {
                layout.scope_id = scope.id;
                layout.scope_level = scope.level;
                match Self::load(object, &layout, sizes) {
                    Ok(ebpf) => {
                        let mut kernel = Self {
                            ebpf: Some(ebpf),
                            running: Vec::new(),
                            own_cgroup,
                            scope_level: scope.level,
                            run_queues: None,
                            blocks: None,
                            connections: None,
                            measuring: None,
                        };
                        let needed = |family| match family {
                            Family::WriteBack => layout.write_back_uncharged != 0,
                            Family::Watch | Family::Trace => false,
                            _ => true,
                        };
                        kernel.attach(&btf, cgroup, needed, &missing, disabled);
                        drop(btf);
                        // Parsing the kernel's types took some MiB of small pieces.
                        memory::give_back();
                        kernel
                    }
                    Err(why) => nothing(disabled, why),
                }
            }
            Err(why) => nothing(disabled, why),
        }
    }

    fn load(object: &[u8], layout: &Layout, sizes: &[(&str, u32)]) -> Result<Ebpf, String> {
        let mut loader = EbpfLoader::new();
        loader.btf(None).override_global("LAYOUT", layout, true);
        for &(map, size) in sizes {
            loader.map_max_entries(map, size);
        }
        loader
            .load(object)
            .map_err(|error| unloadable("the kernel programs", &error))
    }

    fn attach(
        &mut self,
        btf: &Btf,
        cgroup: &Path,
        needed: impl Fn(Family) -> bool,
        missing: &[(Family, Disabled)],
        disabled: &mut Vec<Disabled>,
    ) {
        for family in Family::ALL.into_iter().filter(|&family| needed(family)) {
            if let Some((_, reason)) = missing.iter().find(|(missed, _)| *missed == family) {
                disabled.push(reason.clone());
                continue;
            }
            match self.attach_family(btf, cgroup, family) {
                Ok(()) => self.running.push(family),
                Err((what, why)) => disabled.push(Disabled { what, why }),
            }
        }
    }

    fn attach_family(
        &mut self,
        btf: &Btf,
        cgroup: &Path,
        family: Family,
    ) -> Result<(), (String, String)> {
        let prepared = match family {
            Family::Sched => self.prepare_sched(),
            Family::Block => self.prepare_block(),
            Family::Ports | Family::Datagrams => self.prepare_ports(),
            _ => Ok(()),
        };
        prepared.map_err(|why| (family.name().to_owned(), why))?;
        if let Some(ebpf) = &mut self.ebpf {
            attach_family(ebpf, btf, cgroup, family)?;
        }
        if family == Family::Sched {
            self.attach_sched()
                .map_err(|why| (family.name().to_owned(), why))?;
        }
        Ok(())
    }

    /// Whether a family's programs run.
    #[must_use]
    pub fn runs(&self, family: Family) -> bool {
        self.running.contains(&family)
    }

    /// The agent's own cgroup2 id, when the programs could be loaded.
    #[must_use]
    pub fn own_cgroup(&self) -> Option<u64> {
        self.own_cgroup
    }

    /// Forgets what is counted for cgroups that are gone.
    pub fn forget_cgroups(&mut self, gone: &HashSet<u64>) {
        if !gone.is_empty() {
            self.forget_sched(gone);
            self.forget_block(gone);
            self.forget_ports_of(gone);
        }
    }

    fn map(&self, name: &str) -> Option<&Map> {
        self.ebpf.as_ref()?.map(name)
    }

    fn entries<K: Pod, V: Pod>(&self, name: &str) -> Vec<(K, V)> {
        self.map(name)
            .and_then(|map| HashMap::<&MapData, K, V>::try_from(map).ok())
            .map(|map| map.iter().filter_map(Result::ok).collect())
            .unwrap_or_default()
    }

    fn remove_keys<K: Pod, V: Pod>(&mut self, name: &str, gone: impl Fn(&K) -> bool) {
        let Some(map) = self.ebpf.as_mut().and_then(|ebpf| ebpf.map_mut(name)) else {
            return;
        };
        if let Ok(mut map) = HashMap::<&mut MapData, K, V>::try_from(map) {
            let keys: Vec<K> = map.keys().filter_map(Result::ok).filter(gone).collect();
            for key in keys {
                // Gone already is as good.
                let _ = map.remove(&key);
            }
        }
    }
}

fn attach_family(
    ebpf: &mut Ebpf,
    btf: &Btf,
    cgroup: &Path,
    family: Family,
) -> Result<(), (String, String)> {
    for &(_, hook, name) in PROGRAMS.iter().filter(|(of, ..)| *of == family) {
        let attached = match hook {
            Hook::Tracepoint => attach(ebpf, btf, name, name),
            Hook::Sampled => load(ebpf, btf, name, name).map(drop),
            Hook::OnDemand => program::<RawTracePoint>(ebpf, name)
                .and_then(|program| program.load().map_err(|error| refused("load", &error))),
            Hook::Tasks => load_for_tasks(ebpf, btf, name),
            Hook::SocketAddress => attach_to_cgroup::<CgroupSockAddr>(ebpf, cgroup, name),
            Hook::SocketEnd => attach_to_cgroup::<CgroupSock>(ebpf, cgroup, name),
        };
        attached.map_err(|why| (name.to_owned(), why))?;
    }
    Ok(())
}

/// Loads a program and attaches it to a tracepoint.
///
/// # Errors
/// What the kernel refuses.
pub fn attach(ebpf: &mut Ebpf, btf: &Btf, name: &str, tracepoint: &str) -> Result<(), String> {
    load(ebpf, btf, name, tracepoint)?
        .attach()
        .map_err(|error| refused("attach", &error))?;
    Ok(())
}

fn load<'e>(
    ebpf: &'e mut Ebpf,
    btf: &Btf,
    name: &str,
    tracepoint: &str,
) -> Result<&'e mut BtfTracePoint, String> {
    let program: &mut BtfTracePoint = program(ebpf, name)?;
    program
        .load(tracepoint, btf)
        .or_else(
            |error| match FORMERLY.iter().find(|(now, _)| *now == name) {
                Some((_, formerly)) if matches!(error, ProgramError::Btf(_)) => {
                    program.load(formerly, btf)
                }
                _ => Err(error),
            },
        )
        .map_err(|error| refused("load", &error))?;
    Ok(program)
}

fn load_for_tasks(ebpf: &mut Ebpf, btf: &Btf, name: &str) -> Result<(), String> {
    let program: &mut Iter = program(ebpf, name)?;
    program
        .load("task", btf)
        .map_err(|error| refused("load", &error))
}

/// A program that runs for the tasks of a cgroup and of all below it.
trait ForCgroup {
    fn load(&mut self) -> Result<(), ProgramError>;
    fn attach(&mut self, cgroup: File) -> Result<(), ProgramError>;
}

impl ForCgroup for CgroupSockAddr {
    fn load(&mut self) -> Result<(), ProgramError> {
        self.load()
    }

    fn attach(&mut self, cgroup: File) -> Result<(), ProgramError> {
        // A link never displaces the programs of others, whatever the mode.
        self.attach(cgroup, CgroupAttachMode::Single).map(drop)
    }
}

impl ForCgroup for CgroupSock {
    fn load(&mut self) -> Result<(), ProgramError> {
        self.load()
    }

    fn attach(&mut self, cgroup: File) -> Result<(), ProgramError> {
        self.attach(cgroup, CgroupAttachMode::Single).map(drop)
    }
}

fn attach_to_cgroup<T: ForCgroup>(ebpf: &mut Ebpf, cgroup: &Path, name: &str) -> Result<(), String>
where
    for<'e> &'e mut T: TryFrom<&'e mut Program>,
{
    let directory = File::open(cgroup)
        .map_err(|error| format!("cannot open the cgroup {}: {error}", cgroup.display()))?;
    let program: &mut T = program(ebpf, name)?;
    program.load().map_err(|error| refused("load", &error))?;
    program
        .attach(directory)
        .map_err(|error| refused("attach", &error))
}

fn refused(what: &str, error: &ProgramError) -> String {
    format!("the kernel refuses to {what} it: {}", chain(error))
}

/// Which capability is missing to load kernel programs; without it the kernel's own answer to each of many
/// calls is only that it is not permitted.
#[must_use]
pub fn forbidden() -> Option<String> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    if has(Capability::CAP_SYS_ADMIN) {
        return None;
    }
    let missing = [Capability::CAP_BPF, Capability::CAP_PERFMON]
        .into_iter()
        .find(|capability| !has(*capability))?;
    Some(format!(
        "the agent lacks {missing} to load them; start it with {missing} or with CAP_SYS_ADMIN"
    ))
}

/// A program of the embedded object.
fn program<'e, T>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut T, String>
where
    &'e mut T: TryFrom<&'e mut Program>,
{
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or_else(|| "it is not in the embedded object; build the agent anew".to_owned())
}

/// Asks the kernel where this process lies, and places the scope by it. Also the object that this kernel can
/// run, and the process's own cgroup.
///
/// # Errors
/// The kernel refuses, or the scope cannot be placed.
pub fn find_scope(
    root: &Path,
    cgroup: &Path,
    layout: &Layout,
) -> Result<(&'static [u8], Scope, Option<u64>), String> {
    let (object, ancestors) = match own_ancestors(OBJECT, layout) {
        Ok(ancestors) => (OBJECT, ancestors),
        Err(why) => (PLAIN, own_ancestors(PLAIN, layout).map_err(|_| why)?),
    };
    let scope = scope::place(root, cgroup, &ancestors).map_err(|error| error.to_string())?;
    Ok((object, scope, ancestors.last().copied()))
}

/// The ids of this process's cgroup and those above it, root first.
fn own_ancestors(object: &[u8], layout: &Layout) -> Result<Vec<u64>, String> {
    let mut ebpf = EbpfLoader::new()
        .btf(None)
        .override_global("LAYOUT", layout, true)
        .load(object)
        .map_err(|error| unloadable("the scope probe", &error))?;
    let program: &mut RawTracePoint = program(&mut ebpf, "scope_probe")?;
    program
        .load()
        .and_then(|()| program.test_run(RawTracePointRunOptions::default()))
        .map_err(|error| format!("the scope probe cannot run: {}", chain(&error)))?;
    let map = ebpf.map("ANCESTORS").ok_or("the scope probe has no map")?;
    let ancestors = Array::<&MapData, Ancestors>::try_from(map)
        .and_then(|array| array.get(&0, 0))
        .map_err(|error| format!("the scope probe's answer cannot be read: {error}"))?;
    let known = ancestors.ids.iter().take_while(|&&id| id != 0);
    Ok(known.copied().collect())
}

/// Before Linux 5.11 maps count as locked memory, and the usual limit is less than they take.
pub fn allow_locked_memory() {
    let all = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // Without CAP_SYS_RESOURCE the limit stays; where it matters the kernel then refuses the maps.
    // SAFETY: `all` lives for the call, which reads it.
    unsafe {
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const all);
    }
}

/// Why an object cannot be loaded, and where only a map was not permitted, what helps: the capabilities are there,
/// they were asked for before.
fn unloadable(what: &str, error: &(dyn std::error::Error + 'static)) -> String {
    let why = format!("{what} cannot be loaded: {}", chain(error));
    let not_permitted = |error: &(dyn std::error::Error + 'static)| {
        let io = error.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.raw_os_error() == Some(libc::EPERM))
    };
    let causes = std::iter::successors(Some(error), |error| error.source());
    let of_a_map = causes.clone().any(<dyn std::error::Error>::is::<MapError>);
    if !of_a_map || !causes.clone().any(not_permitted) {
        return why;
    }
    let limit = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft != libc::RLIM_INFINITY => format!("{} KiB", soft / 1024),
        _ => "any amount".to_owned(),
    };
    format!(
        "{why}; before Linux 5.11 maps count as locked memory, of which the agent may have {limit}: start it with \
         CAP_SYS_RESOURCE or with LimitMEMLOCK=infinity; later kernels refuse them by seccomp or a security module"
    )
}

/// What aya needs of the kernel's types to attach to tracepoints and iterators.
///
/// # Errors
/// They are malformed.
pub fn hooks(types: &KernelTypes) -> Result<Btf, String> {
    let data = types.hooks().map_err(|error| error.to_string())?;
    Btf::parse(&data, aya::Endianness::default())
        .map_err(|error| format!("the kernel's BTF cannot be used: {error}"))
}

/// What the verifier's log ends with: totals, which say nothing about why a program was refused.
const TOTALS: [&str; 4] = [
    "processed ",
    "verification time ",
    "stack depth ",
    "subprog ",
];

/// An error with its causes, on one line. Of the verifier's log, which is long, the last line before its
/// totals: it says what was refused.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let message = error.to_string();
        let mut lines = message.lines();
        let mut line = lines.next().unwrap_or_default().to_owned();
        let total = |line: &str| TOTALS.iter().any(|start| line.starts_with(start));
        let refused = |line: &&str| !line.is_empty() && !total(line);
        if let Some(why) = lines.rfind(refused) {
            line = format!("{line} … {why}");
        }
        if !text.contains(&line) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&line);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    const CGROUP2: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];

    /// The programs on this kernel; none, with the reason printed, where they may not be loaded.
    fn kernel(sizes: &[(&str, u32)]) -> Option<Kernel> {
        if !nix::unistd::geteuid().is_root() {
            println!("not run: kernel programs need root");
            return None;
        }
        let cgroup = CGROUP2
            .iter()
            .map(Path::new)
            .find(|path| scope::cgroup_id(path).is_ok())?;
        let mut disabled = Vec::new();
        let kernel = Kernel::start(Path::new("/"), cgroup, sizes, &mut disabled);
        assert_eq!(disabled, [], "this kernel can run every program");
        Some(kernel)
    }

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !holds() {
            assert!(Instant::now() < end, "not within 10 s: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_request_that_is_given_up_is_under_way_no_more_unless_its_place_is_anothers() {
        let Some(mut kernel) = kernel(&[]) else {
            return;
        };
        let mut file = tempfile::tempfile().expect("a file");
        until("a row of somebody", || {
            let synced = file.write_all(b"x").and_then(|()| file.sync_all());
            synced.expect("written");
            !kernel.block().is_empty()
        });
        let find = |kernel: &Kernel| {
            let mut all = kernel.in_flight().into_iter();
            all.find(|one| one.number == 42)
        };
        kernel.put_in_flight(42, 7);
        let missed = find(&kernel).expect("it is under way");
        kernel.put_in_flight(42, 8);
        kernel.forget_request(&missed);
        let again = find(&kernel).expect("it began anew");
        kernel.forget_request(&again);
        assert!(find(&kernel).is_none());
    }

    #[test]
    fn waking_tasks_fill_the_histogram_and_cost_is_measured() {
        let Some(mut kernel) = kernel(&[]) else {
            return;
        };
        kernel.measure(true).expect("this kernel measures programs");
        until("a woken task has run", || {
            let counted = kernel.run_queue();
            counted
                .iter()
                .any(|(_, latency)| latency.slots.iter().any(|&count| count > 0))
        });
        until("sched_switch has a cost", || {
            let costs = kernel.costs();
            let mut switch = costs.iter().filter(|cost| cost.name == "sched_switch");
            switch.any(|cost| cost.runs > 0 && cost.run_time_ns > 0)
        });
    }

    /// A thread that spins until it is told to end.
    struct Busy(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

    impl Busy {
        fn spin(first: impl FnOnce() + Send + 'static) -> Self {
            let over = Arc::new(AtomicBool::new(false));
            let told = over.clone();
            let thread = std::thread::spawn(move || {
                first();
                while !told.load(Ordering::Relaxed) {}
            });
            Self(over, Some(thread))
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
            if let Some(thread) = self.1.take() {
                let _ = thread.join();
            }
        }
    }

    #[test]
    fn a_detached_program_sees_no_switches_and_who_waits_is_told_all_the_same() {
        let Some(mut kernel) = kernel(&[]) else {
            return;
        };
        // More than there are CPUs, so that at any time some wait.
        let _crowd: Vec<Busy> = (0..12).map(|_| Busy::spin(|| ())).collect();
        let waiting = |kernel: &mut Kernel| kernel.waiting().expect("the tasks can be walked");
        until("some wait", || waiting(&mut kernel).len() > 4);
        let (mut attaching, mut detaching) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..5 {
            let start = Instant::now();
            kernel.detach_sched();
            detaching = detaching.max(start.elapsed());
            let switches = kernel.switches();
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(kernel.switches(), switches, "detached");
            until("some wait", || waiting(&mut kernel).len() > 4);
            let start = Instant::now();
            kernel.attach_sched().expect("this kernel attaches it");
            attaching = attaching.max(start.elapsed());
            until("switches are seen again", || kernel.switches() > switches);
        }
        let start = Instant::now();
        let waits = waiting(&mut kernel);
        println!(
            "at most: attaching {attaching:?}, detaching {detaching:?}; the walk {:?}",
            start.elapsed()
        );
        let minute = Duration::from_secs(60).as_nanos();
        assert!(
            waits.iter().all(|(_, age_ns)| u128::from(*age_ns) < minute),
            "{waits:?}"
        );
    }

    #[test]
    fn who_is_moved_to_another_cpu_while_he_waits_has_waited_from_the_beginning() {
        let Some(mut kernel) = kernel(&[]) else {
            return;
        };
        let cpus = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).expect("known");
        let mut cpus =
            (0..nix::sched::CpuSet::count()).filter(|&cpu| cpus.is_set(cpu).unwrap_or(false));
        let (Some(first), Some(second)) = (cpus.next(), cpus.next()) else {
            println!("not run: it needs two CPUs");
            return;
        };
        let keep_to = |thread: i32, cpu| {
            let mut set = nix::sched::CpuSet::new();
            set.set(cpu).expect("a CPU");
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(thread), &set)
                .expect("its own");
        };
        // What has waited for so long.
        let long = |kernel: &mut Kernel| -> u64 {
            let counted = kernel.run_queue();
            let slots = counted
                .iter()
                .flat_map(|(_, latency)| latency.slots.iter().enumerate());
            let long =
                slots.filter(|(slot, _)| lifeboat_ebpf::latency_from_ns(*slot) > 150_000_000);
            long.map(|(_, count)| u64::from(*count)).sum()
        };
        let (said, told) = std::sync::mpsc::channel();
        let (start, begins) = std::sync::mpsc::channel::<()>();
        let waits = Busy::spin(move || {
            keep_to(0, first);
            said.send(nix::unistd::gettid().as_raw()).expect("heard");
            begins.recv().expect("told");
        });
        let waiter = told.recv().expect("it says who it is");
        // Nothing of ordinary priority runs there meanwhile.
        let real_time = Busy::spin(move || {
            keep_to(0, first);
            let priority = libc::sched_param { sched_priority: 1 };
            // SAFETY: the kernel reads the structure, which lives for the call.
            let code =
                unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
            assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
        });
        std::thread::sleep(Duration::from_millis(50));
        let before = long(&mut kernel);
        start.send(()).expect("it waits for that");
        std::thread::sleep(Duration::from_millis(300));
        keep_to(waiter, second);
        until("its wait is counted whole", || long(&mut kernel) > before);
        drop((waits, real_time));
    }

    #[test]
    fn programs_for_old_kernels_pass_the_verifier_of_this_one_too() {
        if forbidden().is_some() {
            println!("not run: kernel programs need root");
            return;
        }
        let types = fs::read(Path::new("/").join(BTF_PATH)).expect("this kernel has BTF");
        let types = KernelTypes::parse(types).expect("well-formed");
        let (layout, _) = layout::find(&types);
        let btf = hooks(&types).expect("well-formed");
        let mut ebpf = Kernel::load(PLAIN, &layout, &[]).expect("an object");
        for &(_, hook, name) in PROGRAMS {
            let loaded = match hook {
                Hook::Tracepoint | Hook::Sampled => load(&mut ebpf, &btf, name, name).map(drop),
                Hook::OnDemand => program::<RawTracePoint>(&mut ebpf, name)
                    .and_then(|program| program.load().map_err(|error| refused("load", &error))),
                Hook::Tasks => load_for_tasks(&mut ebpf, &btf, name),
                Hook::SocketAddress => program::<CgroupSockAddr>(&mut ebpf, name)
                    .and_then(|program| program.load().map_err(|error| refused("load", &error))),
                Hook::SocketEnd => program::<CgroupSock>(&mut ebpf, name)
                    .and_then(|program| program.load().map_err(|error| refused("load", &error))),
            };
            assert_eq!(loaded, Ok(()), "{name}");
        }
    }

    /// A process in a cgroup of its own that wakes all the time; both end when dropped.
    struct Apart(std::process::Child, std::path::PathBuf);

    impl Apart {
        fn start(above: &Path) -> Self {
            let cgroup = above.join(format!("lifeboat-apart-{}", std::process::id()));
            fs::create_dir(&cgroup).expect("a cgroup");
            let script = "echo $$ >\"$0/cgroup.procs\"; while :; do sleep 0.02; done";
            let mut shell = std::process::Command::new("sh");
            let shell = shell.args(["-c", script]).arg(&cgroup).spawn();
            Self(shell.expect("a shell"), cgroup)
        }
    }

    impl Drop for Apart {
        fn drop(&mut self) {
            let _ = fs::write(self.1.join("cgroup.kill"), "1");
            let _ = self.0.kill();
            let _ = self.0.wait();
            let end = Instant::now() + Duration::from_secs(5);
            // What sleeps in it ends by itself.
            while fs::remove_dir(&self.1).is_err() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    #[test]
    fn a_map_that_is_too_small_is_counted_as_loss() {
        let Some(kernel) = kernel(&[("FREE_ROWS", 1)]) else {
            return;
        };
        let mut places = CGROUP2.iter().map(Path::new);
        let above = places.find(|path| scope::cgroup_id(path).is_ok());
        let _apart = Apart::start(above.expect("the programs run"));
        until("one of two cgroups finds no room", || {
            let losses = kernel.losses();
            losses
                .iter()
                .any(|loss| loss.map == "run-queue" && loss.lost > 0)
        });
    }
}
