//! Which capabilities the agent keeps once its senses are attached.
//!
//! Invariant: it is called while the process has one thread, so every later thread and child has no more.

use caps::{CapSet, Capability, CapsHashSet};

/// Capabilities that stay, each with its reason.
pub const KEPT: [(Capability, &str); 15] = [
    (Capability::CAP_BPF, "maps of the kernel programs"),
    (
        Capability::CAP_CHOWN,
        "a volume's files keep their owners on the target",
    ),
    (
        Capability::CAP_DAC_OVERRIDE,
        "volumes are read and written whoever owns them",
    ),
    (
        Capability::CAP_DAC_READ_SEARCH,
        "volumes are walked whoever owns them",
    ),
    (
        Capability::CAP_FOWNER,
        "modes, times and attributes of files of others are kept",
    ),
    (
        Capability::CAP_FSETID,
        "set-user-id and set-group-id bits survive a change of owner",
    ),
    (
        Capability::CAP_IPC_LOCK,
        "io_uring's rings, which Linux before 5.12 counts as locked memory",
    ),
    (
        Capability::CAP_KILL,
        "all processes of a container that has left, whoever runs them",
    ),
    (Capability::CAP_MKNOD, "device nodes in volumes"),
    (
        Capability::CAP_NET_BIND_SERVICE,
        "forwarding the ports below 1024 of a container that has left",
    ),
    (Capability::CAP_SETFCAP, "file capabilities in volumes"),
    (
        Capability::CAP_SYS_ADMIN,
        "measuring of the kernel programs, mounts of served volumes, trusted attributes, NVMe health",
    ),
    (
        Capability::CAP_SYS_PTRACE,
        "/proc/PID/root and namespaces of containers",
    ),
    (
        Capability::CAP_SYS_RAWIO,
        "a drive's own health, by ATA pass-through",
    ),
    (Capability::CAP_SYSLOG, "the kernel's log"),
];

/// A set of capabilities could not be changed.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot drop capabilities ({what}): {source}; the agent needs CAP_SETPCAP at its start for that"
)]
pub struct PrivilegesError {
    what: &'static str,
    source: caps::errors::CapsError,
}

/// Drops every capability that is not [`KEPT`] from all sets of this thread.
///
/// # Errors
/// The kernel refuses; the message says for which set.
pub fn drop_others() -> Result<(), PrivilegesError> {
    let failed = |what| move |source| PrivilegesError { what, source };
    let kept: CapsHashSet = KEPT.iter().map(|(capability, _)| *capability).collect();
    // The bounding set first: changing it takes CAP_SETPCAP, which is dropped below.
    let bounded = bound(&kept).map_err(failed("bounding set"));
    if caps::runtime::ambient_set_supported().is_ok() {
        caps::clear(None, CapSet::Ambient).map_err(failed("ambient set"))?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(failed("inheritable set"))?;
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed("permitted set"))?;
    let left: CapsHashSet = permitted.intersection(&kept).copied().collect();
    caps::set(None, CapSet::Effective, &left).map_err(failed("effective set"))?;
    caps::set(None, CapSet::Permitted, &left).map_err(failed("permitted set"))?;
    bounded
}

fn bound(kept: &CapsHashSet) -> Result<(), caps::errors::CapsError> {
    for capability in caps::runtime::thread_all_supported().difference(kept) {
        if caps::has_cap(None, CapSet::Bounding, *capability)? {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_and_the_unit_name_the_same_capabilities() {
        let manual = include_str!("../../../docs/configuration.md");
        let table: Vec<String> = KEPT
            .iter()
            .map(|(capability, why)| format!("| `{capability}` | {why} |"))
            .collect();
        let table = table.join("\n");
        assert!(
            manual.contains(&table),
            "docs/configuration.md lacks:\n{table}"
        );
        let names: Vec<String> = KEPT.iter().map(|(kept, _)| kept.to_string()).collect();
        let unit = include_str!("../../../docs/lifeboat.service");
        let line = format!("CapabilityBoundingSet={} CAP_SETPCAP\n", names.join(" "));
        assert!(unit.contains(&line), "docs/lifeboat.service lacks:\n{line}");
    }

    #[test]
    fn a_thread_that_drops_them_has_no_more_in_any_set() {
        // A thread of its own: the others of the test program go on with all they have.
        let sets = std::thread::spawn(|| {
            let can = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP);
            if !matches!(can, Ok(true)) {
                println!("not run: CAP_SETPCAP is not here");
                return;
            }
            drop_others().expect("the kernel allows it");
            let kept: CapsHashSet = KEPT.iter().map(|(capability, _)| *capability).collect();
            for set in [
                CapSet::Bounding,
                CapSet::Permitted,
                CapSet::Effective,
                CapSet::Inheritable,
                CapSet::Ambient,
            ] {
                let left = caps::read(None, set).expect("readable");
                assert!(left.is_subset(&kept), "{set:?}: {left:?}");
            }
        });
        sets.join().expect("no assertion failed");
    }
}
