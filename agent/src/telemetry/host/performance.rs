//! Instructions and cycles from the processors' own counters (perf_event_open(2)).

use super::files::{entries, online_cpus};
use super::{HostReading, Look};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

const METRICS: [&str; 2] = ["cpu.instructions_per_second", "cpu.cycles_per_instruction"];

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

const HARDWARE: u32 = 0;
const CYCLES: u64 = 0;
const INSTRUCTIONS: u64 = 1;
/// PERF_FLAG_FD_CLOEXEC
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;
/// PERF_FORMAT_TOTAL_TIME_ENABLED and _RUNNING: the counter may have shared the hardware with others.
const WITH_TIMES: u64 = 0b11;

/// Counters of every CPU, opened at the start: reading them later needs no capability.
pub struct Performance {
    /// Instructions and cycles of each CPU.
    counters: Result<Vec<[File; 2]>, String>,
    before: Option<[f64; 2]>,
}

impl Performance {
    pub fn open(root: &Path) -> Self {
        Self {
            counters: open_all(root),
            before: None,
        }
    }

    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        let counters = match &mut self.counters {
            Ok(counters) => counters,
            Err(why) => return reading.absent(&METRICS, why),
        };
        let mut now = [0.0; 2];
        for cpu in counters {
            for (sum, counter) in now.iter_mut().zip(cpu) {
                // A CPU that went offline answers with nothing.
                *sum += count(counter).unwrap_or(0.0);
            }
        }
        let before = self.before.replace(now);
        let Some([instructions, cycles]) =
            before.map(|before| [now[0] - before[0], now[1] - before[1]])
        else {
            return;
        };
        if instructions > 0.0 && !look.elapsed.is_zero() {
            let rate = instructions / look.elapsed.as_secs_f64();
            reading.device(METRICS[0], rate);
            reading.device(METRICS[1], cycles / instructions);
        }
    }
}

fn open_all(root: &Path) -> Result<Vec<[File; 2]>, String> {
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
        .map(|cpu| Ok([open(cpu, INSTRUCTIONS)?, open(cpu, CYCLES)?]))
        .collect::<io::Result<_>>()
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => {
                "no permission to count system-wide: it needs CAP_PERFMON".to_owned()
            }
            Some(libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV) => {
                "this processor does not count instructions and cycles".to_owned()
            }
            _ => format!("perf_event_open: {error}"),
        })
}

fn open(cpu: usize, config: u64) -> io::Result<File> {
    let attributes = Attributes {
        kind: HARDWARE,
        size: size_of::<Attributes>() as u32,
        config,
        read_format: WITH_TIMES,
        ..Attributes::default()
    };
    // SAFETY: the kernel reads `size` bytes of the attributes, which live until the call returns.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            -1,
            cpu as libc::c_int,
            -1,
            CLOSE_ON_EXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// The count, extrapolated over the time in which the counter did not have the hardware.
fn count(counter: &mut File) -> Option<f64> {
    let mut words = [0; 24];
    counter.read_exact(&mut words).ok()?;
    let word = |place: usize| {
        let bytes = words[8 * place..8 * place + 8].try_into().ok()?;
        Some(u64::from_ne_bytes(bytes) as f64)
    };
    let (value, enabled, running) = (word(0)?, word(1)?, word(2)?);
    (running > 0.0).then(|| value * enabled / running)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
