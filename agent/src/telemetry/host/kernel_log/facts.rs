//! Which of the kernel's messages tell that something is wrong. Pure.
//!
//! One message of each event counts: most events are told in several lines, and the line chosen is the one
//! that every kernel since 5.4 prints once.

/// The metric that a message adds one to, and the block device it is about.
pub fn of(message: &str) -> Option<(&'static str, Option<&str>)> {
    let has = |part: &str| message.contains(part);
    if let Some(disk) = failed_request(message) {
        let own = !crate::telemetry::disks::is_served(disk);
        return own.then_some(("kernel.io_errors", Some(disk)));
    }
    if let Some(found) = of_filesystem(message) {
        return Some(found);
    }
    let metric = if has("PCIe Bus Error: severity=Corre") {
        "kernel.pci_errors_corrected"
    } else if has("PCIe Bus Error: severity=Uncorrect") {
        "kernel.pci_errors_uncorrected"
    } else if has("Machine check events logged")
        || has("Machine Check Exception")
        || (has("[Hardware Error]") && (has(": Machine Check:") || has("error from APEI")))
    {
        "kernel.machine_checks"
    } else if has("INFO: task ") && has(" blocked ") && has(" for more than ") {
        "kernel.hung_tasks"
    } else if is_lockup(message) {
        "kernel.lockups"
    } else if is_reset(message) {
        "kernel.disk_resets"
    } else if is_oops(message) {
        "kernel.oopses"
    } else {
        return None;
    };
    Some((metric, None))
}

/// block/blk-mq.c, blk_print_req_error: `I/O error, dev sda, sector 8 …`, `critical medium error, dev …`.
/// Bio-based devices have no request to print; of them fs/buffer.c tells.
fn failed_request(message: &str) -> Option<&str> {
    if let Some((_, rest)) = message.split_once(" error, dev ") {
        let (disk, rest) = rest.split_once(',')?;
        return rest.starts_with(" sector ").then_some(disk);
    }
    let (_, rest) = message.split_once("Buffer I/O error on dev ")?;
    let disk = rest.split(',').next()?;
    (disk.starts_with("dm-") || disk.starts_with("md")).then_some(disk)
}

fn of_filesystem(message: &str) -> Option<(&'static str, Option<&str>)> {
    const ERROR: &str = "kernel.filesystem_errors";
    const READ_ONLY: &str = "kernel.read_only_remounts";
    let has = |part: &str| message.contains(part);
    let metric = if message.starts_with("EXT4-fs") {
        if has("Remounting filesystem read-only") {
            READ_ONLY
        } else if message.starts_with("EXT4-fs error") {
            ERROR
        } else {
            return None;
        }
    } else if message.starts_with("XFS (") {
        // The last line of every shutdown, whatever its cause (fs/xfs/xfs_fsops.c).
        if has("Please unmount the filesystem and rectify") {
            READ_ONLY
        } else if has("corruption") || has("Corruption") || has("I/O error") || has("I/O Error") {
            ERROR
        } else {
            return None;
        }
    } else if message.starts_with("BTRFS") {
        if has("forced readonly") {
            READ_ONLY
        } else if message.starts_with("BTRFS error")
            || message.starts_with("BTRFS critical")
            || message.starts_with("BTRFS: error")
        {
            ERROR
        } else {
            return None;
        }
    } else if message.starts_with("FAT-fs") && has("Filesystem has been set read-only") {
        READ_ONLY
    } else {
        return None;
    };
    Some((metric, device_in_brackets(message)))
}

/// `sda1` of `… (sda1): …`, `… (device sda1): …` and `… (device sda1: state EA): …`.
fn device_in_brackets(message: &str) -> Option<&str> {
    let (_, rest) = message.split_once('(')?;
    let rest = rest.strip_prefix("device ").unwrap_or(rest);
    rest.split([')', ':', ' ']).next()
}

/// kernel/watchdog.c, kernel/rcu/tree_stall.h, kernel/workqueue.c.
fn is_lockup(message: &str) -> bool {
    [
        "BUG: soft lockup - CPU#",
        "Watchdog detected hard LOCKUP on cpu",
        "detected hard LOCKUP on CPU",
        "self-detected stall on CPU",
        "detected stalls on CPUs/tasks",
        "detected expedited stalls on CPUs/tasks",
        "BUG: workqueue lockup - pool",
    ]
    .iter()
    .any(|told| message.contains(told))
}

/// drivers/ata/libata-eh.c, drivers/nvme/host/pci.c, drivers/scsi/scsi_lib.c.
fn is_reset(message: &str) -> bool {
    let ata = message.starts_with("ata") && message.contains(": hard resetting link");
    let nvme = message.starts_with("nvme ")
        && [" timeout, ", "controller is down", "resetting controller"]
            .iter()
            .any(|told| message.contains(told));
    ata || nvme || message.contains("timing out command, waited")
}

/// The line in which a fault of the kernel gets its number: `Oops: 0002 [#1] PREEMPT SMP`.
fn is_oops(message: &str) -> bool {
    let number = message
        .split_once(" [#")
        .and_then(|(_, rest)| rest.split_once(']'));
    number.is_some_and(|(number, _)| {
        !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::of;

    /// Messages as kernels from 5.4 to 7.3 print them.
    const TOLD: &[(&str, &str, &str)] = &[
        (
            "blk_update_request: I/O error, dev sda, sector 106553248 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 0",
            "kernel.io_errors",
            "sda",
        ),
        (
            "I/O error, dev nvme0n1, sector 2048 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2",
            "kernel.io_errors",
            "nvme0n1",
        ),
        (
            "critical medium error, dev sdb, sector 5120 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2",
            "kernel.io_errors",
            "sdb",
        ),
        (
            "print_req_error: critical target error, dev sdf, sector 960",
            "kernel.io_errors",
            "sdf",
        ),
        (
            "Buffer I/O error on dev dm-3, logical block 640, lost async page write",
            "kernel.io_errors",
            "dm-3",
        ),
        (
            "EXT4-fs error (device sda1): ext4_journal_check_start:83: comm cp: Detected aborted journal",
            "kernel.filesystem_errors",
            "sda1",
        ),
        (
            "EXT4-fs (sda1): Remounting filesystem read-only",
            "kernel.read_only_remounts",
            "sda1",
        ),
        (
            "XFS (dm-0): Metadata corruption detected at xfs_agf_read_verify+0x84/0x120 [xfs], xfs_agf block 0x1",
            "kernel.filesystem_errors",
            "dm-0",
        ),
        (
            "XFS (sdc1): log I/O error -5",
            "kernel.filesystem_errors",
            "sdc1",
        ),
        (
            "XFS (sdc1): Please unmount the filesystem and rectify the problem(s)",
            "kernel.read_only_remounts",
            "sdc1",
        ),
        (
            "BTRFS error (device sdd: state EA): bdev /dev/sdd errs: wr 1, rd 0, flush 0, corrupt 0, gen 0",
            "kernel.filesystem_errors",
            "sdd",
        ),
        (
            "BTRFS critical (device sdd): corrupt leaf: root=2 block=1 slot=5, bad key order",
            "kernel.filesystem_errors",
            "sdd",
        ),
        (
            "BTRFS info (device sdd: state EA): forced readonly",
            "kernel.read_only_remounts",
            "sdd",
        ),
        (
            "FAT-fs (sde1): Filesystem has been set read-only",
            "kernel.read_only_remounts",
            "sde1",
        ),
        (
            "pcieport 0000:00:1d.0: PCIe Bus Error: severity=Corrected, type=Physical Layer, (Receiver ID)",
            "kernel.pci_errors_corrected",
            "",
        ),
        (
            "pcieport 0000:00:1d.3: PCIe Bus Error: severity=Correctable, type=Data Link Layer, (Transmitter ID)",
            "kernel.pci_errors_corrected",
            "",
        ),
        (
            "nvme 0000:03:00.0: AER: PCIe Bus Error: severity=Uncorrected (Non-Fatal), type=Transaction Layer, (Requester ID)",
            "kernel.pci_errors_uncorrected",
            "",
        ),
        (
            "mce: [Hardware Error]: Machine check events logged",
            "kernel.machine_checks",
            "",
        ),
        (
            "mce: [Hardware Error]: CPU 4: Machine Check: 0 Bank 5: bea0000000000108",
            "kernel.machine_checks",
            "",
        ),
        (
            "{1}[Hardware Error]: Hardware error from APEI Generic Hardware Error Source: 1",
            "kernel.machine_checks",
            "",
        ),
        (
            "INFO: task jbd2/sda1-8:312 blocked for more than 120 seconds.",
            "kernel.hung_tasks",
            "",
        ),
        (
            "INFO: task dd:2159 blocked in I/O wait for more than 120 seconds.",
            "kernel.hung_tasks",
            "",
        ),
        (
            "watchdog: BUG: soft lockup - CPU#3 stuck for 22s! [kworker/3:1:77]",
            "kernel.lockups",
            "",
        ),
        (
            "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0",
            "kernel.lockups",
            "",
        ),
        (
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "kernel.lockups",
            "",
        ),
        (
            "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
            "kernel.lockups",
            "",
        ),
        ("ata3: hard resetting link", "kernel.disk_resets", ""),
        (
            "nvme nvme0: I/O tag 12 (100c) opcode 0x2 (I/O Cmd) QID 5 timeout, aborting req_op:READ(0) size:4096",
            "kernel.disk_resets",
            "",
        ),
        (
            "nvme nvme0: controller is down; will reset: CSTS=0xffffffff, PCI_STATUS=0xffff",
            "kernel.disk_resets",
            "",
        ),
        ("Oops: 0002 [#1] PREEMPT SMP NOPTI", "kernel.oopses", ""),
        ("invalid opcode: 0000 [#2] SMP PTI", "kernel.oopses", ""),
        (
            "Internal error: Oops: 0000000096000004 [#1] SMP",
            "kernel.oopses",
            "",
        ),
    ];

    /// Messages that look alike and are no event, or tell one a second time.
    const SILENT: &[&str] = &[
        "I/O error, dev ublkb0, sector 2048 op 0x0:(READ) flags 0x800 phys_seg 1 prio class 2",
        "EXT4-fs (vda): mounted filesystem 2a31 r/w with ordered data mode. Quota mode: none.",
        "EXT4-fs (sda1): re-mounted 2a31 ro.",
        "EXT4-fs warning (device dm-1): ext4_end_bio:316: I/O error -19 writing to inode 10223621",
        "XFS (sda1): Ending clean mount",
        "BTRFS info (device sda1): using crc32c (crc32c-intel) checksum algorithm",
        "Buffer I/O error on dev sdb, logical block 640, lost async page write",
        "sd 4:0:0:1: [sdb] tag#0 Sense Key : Medium Error [current]",
        "pcieport 0000:00:1c.1: AER: Multiple Corrected error received: 0000:00:1c.1",
        "mce: CPU0: Package temperature above threshold, cpu clock throttled (total events = 9)",
        "mce: CPU supports 20 MCE banks",
        "BUG: unable to handle page fault for address: ffffc90000000000",
        "ata3: SATA link up 6.0 Gbps (SStatus 133 SControl 300)",
        "nvme nvme0: 8/0/0 default/read/poll queues",
        "Call Trace: [#",
    ];

    #[test]
    fn each_message_adds_to_its_metric_and_names_its_disk() {
        for (message, metric, disk) in TOLD {
            let disk = (!disk.is_empty()).then_some(*disk);
            assert_eq!(of(message), Some((*metric, disk)), "{message}");
        }
    }

    #[test]
    fn messages_that_only_look_alike_add_nothing() {
        for message in SILENT {
            assert_eq!(of(message), None, "{message}");
        }
    }
}
