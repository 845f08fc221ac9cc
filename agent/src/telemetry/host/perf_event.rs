//! Counters of the kernel and its processors (perf_event_open(2)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct perf_event_attr` of the first version (PERF_ATTR_SIZE_VER0), which every kernel accepts.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_kind: u64,
    read_format: u64,
    flags: u64,
    wake_up: u32,
    break_point: u32,
    config1: u64,
}

/// What is counted: PERF_TYPE_… or the number of a PMU, and its event.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    pub kind: u32,
    pub config: u64,
}

const HARDWARE: u32 = 0;
pub const CYCLES: Event = Event {
    kind: HARDWARE,
    config: 0,
};
pub const INSTRUCTIONS: Event = Event {
    kind: HARDWARE,
    config: 1,
};

/// PERF_FLAG_FD_CLOEXEC
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;
/// PERF_FLAG_PID_CGROUP
const OF_CGROUP: libc::c_ulong = 1 << 2;
/// PERF_FORMAT_TOTAL_TIME_ENABLED and _RUNNING: the counter may have shared the hardware with others.
const WITH_TIMES: u64 = 0b11;

/// Opens a counter of everything on a CPU, or of what the tasks of a cgroup do there.
pub fn open(event: Event, cpu: usize, cgroup: Option<&File>) -> io::Result<File> {
    let attributes = Attributes {
        kind: event.kind,
        size: size_of::<Attributes>() as u32,
        config: event.config,
        read_format: WITH_TIMES,
        ..Attributes::default()
    };
    let (whose, flags) = match cgroup {
        Some(cgroup) => (cgroup.as_raw_fd(), CLOSE_ON_EXEC | OF_CGROUP),
        None => (-1, CLOSE_ON_EXEC),
    };
    // SAFETY: the kernel reads `size` bytes of the attributes, which live until the call returns.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            whose,
            cpu as libc::c_int,
            -1,
            flags,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// The count, extrapolated over the time in which the counter did not have the hardware; none of a counter
/// that never ran.
pub fn count(counter: &mut File) -> Option<f64> {
    let mut words = [0; 24];
    counter.read_exact(&mut words).ok()?;
    let word = |place: usize| {
        let bytes = words[8 * place..8 * place + 8].try_into().ok()?;
        Some(u64::from_ne_bytes(bytes) as f64)
    };
    let (value, enabled, running) = (word(0)?, word(1)?, word(2)?);
    (running > 0.0).then(|| value * enabled / running)
}

/// Why an event cannot be counted.
pub fn why(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            "no permission to count system-wide: it needs CAP_PERFMON".to_owned()
        }
        Some(libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV) => {
            "this processor does not count it".to_owned()
        }
        _ => format!("perf_event_open: {error}"),
    }
}
