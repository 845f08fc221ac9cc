//! The catalogue: every metric, in the order in which it is shown.

use super::{Metric, Per, Unit};

macro_rules! catalogue {
    ($($name:literal $unit:ident [$($per:ident)+] $about:literal from $source:literal;)+) => {
        /// Every metric this version measures.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: $name,
            unit: Unit::$unit,
            per: &[$(Per::$per),+],
            about: $about,
            source: $source,
        }),+];
    };
}

catalogue! {
    "sched.run_queue_latency_p50" Nanoseconds [Device Container]
        "median wait between wake-up and running" from "kernel programs: sched_switch";
    "sched.run_queue_latency_p99" Nanoseconds [Device Container]
        "99th percentile of the wait between wake-up and running" from "kernel programs: sched_switch";
    "sched.waiting" Count [Device Container]
        "runnable tasks that wait for a CPU now" from "kernel programs: sched_waiting";

    "cpu.load1" Count [Device] "1-minute load average" from "/proc/loadavg";
    "cpu.load_per_core" Count [Device] "1-minute load average divided by online CPUs" from "/proc/loadavg, /proc/stat";
    "cpu.used" Percent [Device Cpu Container]
        "share of CPU time not idle; of a container, of the time of all CPUs; of the device, where its cgroup tells, without stolen time" from "/proc/stat, cgroup cpu.stat";
    "cpu.steal" Percent [Device Cpu] "share of CPU time that the hypervisor gave to others" from "/proc/stat";
    "cpu.waiting_for_io" Percent [Device] "share of CPU time idle while a task waited for I/O" from "/proc/stat";
    "cpu.runnable" Count [Device] "tasks that run or want to" from "/proc/stat procs_running";
    "cpu.blocked" Count [Device] "tasks that wait for I/O and cannot be interrupted" from "/proc/stat procs_blocked";
    "cpu.quota_throttled" Percent [Container]
        "share of quota periods in which the container was stopped for having used its quota" from "cgroup cpu.stat nr_throttled, nr_periods";
    "cpu.throttled" Percent [Container]
        "share of the time of all CPUs in which the container was off them for having used its quota" from "cgroup cpu.stat throttled_usec, throttled_time";
    "cpu.throttle_events" Events [Device Cpu]
        "times a core or its package was slowed down for its heat" from "/sys/devices/system/cpu/cpu*/thermal_throttle";
    "cpu.instructions_per_second" PerSecond [Device Container] "instructions retired a second, all CPUs" from "perf_event_open";
    "cpu.cycles_per_instruction" Count [Device Container] "unhalted cycles for each instruction retired" from "perf_event_open";
    "cpu.temperature" Celsius [Device Sensor] "temperature of the hottest, or of each, sensor of a processor" from "hwmon, thermal zones";
    "cpu.temperature_limit" Celsius [Device Sensor]
        "the part's own limit for that sensor" from "hwmon tempN_crit or tempN_max, thermal trip points";
    "cpu.temperature_margin" Celsius [Device Sensor] "limit less temperature; the smallest of the device" from "as the two above";
    "sensor.temperature" Celsius [Sensor] "temperature of other parts: boards, network cards, graphics, power supplies" from "hwmon";
    "sensor.temperature_limit" Celsius [Sensor] "their own limit" from "hwmon";

    "pressure.cpu_some" Percent [Device Container]
        "share of the last 10 s in which some task waited for CPU" from "/proc/pressure/cpu, cgroup cpu.pressure";
    "pressure.memory_some" Percent [Device Container]
        "share of the last 10 s in which some task waited for memory" from "/proc/pressure/memory, cgroup memory.pressure";
    "pressure.memory_full" Percent [Device Container]
        "share of the last 10 s in which all tasks waited for memory" from "/proc/pressure/memory, cgroup memory.pressure";
    "pressure.io_some" Percent [Device Container]
        "share of the last 10 s in which some task waited for I/O" from "/proc/pressure/io, cgroup io.pressure";
    "pressure.io_full" Percent [Device Container]
        "share of the last 10 s in which all tasks waited for I/O" from "/proc/pressure/io, cgroup io.pressure";

    "memory.used" Percent [Device Container]
        "1 - MemAvailable / MemTotal; of a container with a limit, its share of that" from "/proc/meminfo, cgroup memory.current, memory.stat, memory.max";
    "memory.used_bytes" Bytes [Device Container] "MemTotal - MemAvailable; what is charged to a container, without file pages that were used once" from "/proc/meminfo, cgroup memory.current, memory.stat";
    "memory.available" Bytes [Device] "MemAvailable" from "/proc/meminfo";
    "memory.swap_used" Percent [Device] "share of swap in use" from "/proc/meminfo";
    "memory.major_faults" PerSecond [Device Container] "page faults a second that had to read from disk" from "/proc/vmstat, cgroup memory.stat";
    "memory.minor_faults" PerSecond [Device Container] "page faults a second that did not" from "/proc/vmstat, cgroup memory.stat";
    "memory.swap_in" PerSecond [Device] "bytes a second read back from swap" from "/proc/vmstat pswpin";
    "memory.swap_out" PerSecond [Device] "bytes a second written to swap" from "/proc/vmstat pswpout";
    "memory.oom_kills" Events [Device Container] "tasks killed for want of memory" from "/proc/vmstat oom_kill, cgroup memory.events";
    "memory.ecc_corrected" Events [Device Controller] "memory errors that ECC corrected" from "EDAC ce_count";
    "memory.ecc_uncorrected" Events [Device Controller] "memory errors that ECC could not correct" from "EDAC ue_count";
    "memory.bandwidth" PerSecond [Device] "bytes a second between caches and memory" from "resctrl mbm_total_bytes, or uncore_imc by perf_event_open";

    "block.latency_p50" Nanoseconds [Device Disk Container]
        "median time from issue to completion" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.latency_p99" Nanoseconds [Device Disk Container]
        "99th percentile of the time from issue to completion" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.iops" PerSecond [Device Disk Container]
        "completed requests a second" from "kernel programs: block_rq_complete";
    "block.bytes_per_second" PerSecond [Device Disk Container]
        "completed bytes a second" from "kernel programs: block_rq_complete";
    "block.errors" Events [Device Disk Container]
        "requests that completed with an error" from "kernel programs: block_rq_complete";
    "block.read_latency_p99" Nanoseconds [Device Disk Container] "99th percentile of the time from issue to completion, reads alone" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.write_latency_p99" Nanoseconds [Device Disk Container] "99th percentile of the time from issue to completion, writes alone" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.sequential" Percent [Device Disk Container] "share of reads and writes that begin where the one before them ended" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.media_errors" Events [Device Disk Container] "requests that failed because the medium lost the data" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.timeout_errors" Events [Device Disk Container] "requests without an answer in time" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.transport_errors" Events [Device Disk Container] "requests that failed because the path to the device failed or the device is gone" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.protection_errors" Events [Device Disk Container] "requests that failed because integrity data did not match" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.target_errors" Events [Device Disk Container] "requests that the device refused" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.no_space_errors" Events [Device Disk Container] "requests that failed because a thin device is full" from "kernel programs: block_rq_issue, block_rq_complete";
    "block.queue_depth" Count [Device Disk] "requests under way on the deepest, or on each, disk; mean of the interval" from "/proc/diskstats, weighted time in queue";
    "block.busy" Percent [Disk] "share of the interval with a request under way" from "/proc/diskstats, time doing I/O";

    "disk.used" Percent [Device Mount] "used share of the fullest, or of each, file system" from "statvfs";
    "disk.capacity" Bytes [Mount] "size of the file system" from "statvfs";
    "disk.used_bytes" Bytes [Mount] "used part of it" from "statvfs";
    "disk.inodes_used" Percent [Device Mount] "used share of its inodes, where it has a fixed number" from "statvfs";
    "disk.time_to_full" Nanoseconds [Device Mount]
        "time until the soonest, or each, file system is full at the rate of the last hour; at most a year" from "statvfs, least squares over the last hour";
    "disk.offline" Count [Device Disk]
        "1 for a disk or path that its driver has given up" from "/sys/block/*/device/state, /sys/class/nvme/*/state";
    "disk.smart_failed" Count [Device Disk]
        "1 for a drive that by its own judgement fails" from "smartctl, ATA SMART, or NVMe log page 02h";
    "disk.attributes_failing" Count [Disk] "SMART attributes at or below the drive's own threshold" from "smartctl, or ATA SMART";
    "disk.wear" Percent [Device Disk] "used part of the endurance that the maker promises; may pass 100 %" from "smartctl, NVMe log page 02h, eMMC life_time";
    "disk.spare_margin" Percent [Device Disk]
        "spare blocks left above the drive's own threshold; the smallest of the device" from "smartctl, or NVMe log page 02h";
    "disk.media_errors" Count [Device Disk] "errors of the medium that the drive could not correct, in its life" from "smartctl, ATA SMART, or NVMe log page 02h";
    "disk.reallocated_sectors" Count [Disk] "sectors that the drive replaced" from "smartctl, or ATA SMART, attribute 5";
    "disk.pending_sectors" Count [Disk] "sectors that the drive cannot read now" from "smartctl, or ATA SMART, attribute 197";
    "disk.bytes_written" Bytes [Disk] "data written in the drive's life" from "smartctl, or NVMe log page 02h";
    "disk.power_on" Nanoseconds [Disk] "time powered on in the drive's life" from "smartctl, ATA SMART, or NVMe log page 02h";
    "disk.time_between_failures" Nanoseconds [Disk]
        "time powered on divided by uncorrected errors so far, for drives that had some" from "as the two above";
    "disk.temperature" Celsius [Device Disk] "temperature of the hottest, or of each, drive" from "hwmon nvme and drivetemp, smartctl, ATA SMART, NVMe log page 02h";
    "disk.temperature_limit" Celsius [Disk] "the drive's own limit (WCTEMP, SCT)" from "hwmon, smartctl";
    "disk.temperature_margin" Celsius [Device Disk] "limit less temperature; the smallest of the device" from "as the two above";

    "raid.missing_disks" Count [Device Array] "members that an array lacks" from "/sys/block/md*/md/degraded, device-mapper status";
    "raid.failed" Count [Device Array] "1 for an array that no longer serves its data" from "/sys/block/md*/md/array_state, device-mapper status";
    "raid.rebuilding" Count [Device Array] "1 for an array that copies to a member" from "/sys/block/md*/md/sync_action, device-mapper status";
    "raid.mismatches" Count [Array] "sectors that differed at the last check" from "/sys/block/md*/md/mismatch_cnt, device-mapper status";
    "lun.failed_paths" Count [Device Disk] "paths of a multipath device that failed" from "device-mapper status";
    "lun.active_paths" Count [Disk] "paths that work" from "device-mapper status";

    "filesystem.errors" Events [Device Mount] "errors that the file system found" from "/sys/fs/ext4/*/errors_count, /sys/fs/btrfs/*/devinfo/*/error_stats";
    "filesystem.known_errors" Count [Device Mount] "the same since the file system was made or its counters reset" from "as above";
    "filesystem.read_only" Count [Device Mount]
        "1 for a file system that went read-only by itself or shut down" from "/proc/self/mountinfo, /dev/kmsg";
    "filesystem.mounted" Count [Device Mount] "file systems on disks that are mounted; 1 for each" from "/proc/self/mountinfo";

    "network.errors" Events [Device Interface] "receive and transmit errors" from "/proc/net/dev";
    "network.drops" Events [Device Interface] "receive and transmit drops" from "/proc/net/dev";
    "network.bytes_per_second" PerSecond [Device Interface] "bytes both ways a second" from "/proc/net/dev";
    "network.packets_per_second" PerSecond [Device Interface] "packets both ways a second" from "/proc/net/dev";
    "network.retransmits" Events [Device] "TCP segments sent again" from "/proc/net/snmp";
    "network.retransmit_share" Percent [Device] "TCP segments sent again, of those sent in the interval" from "/proc/net/snmp";
    "network.link_down" Count [Device Interface]
        "1 for an interface that is administratively up without carrier" from "/sys/class/net/*/carrier";
    "network.link_losses" Events [Device Interface] "times the carrier was lost" from "/sys/class/net/*/carrier_down_count";
    "network.link_speed" PerSecond [Interface] "bits a second that the link carries one way" from "/sys/class/net/*/speed";
    "network.link_used" Percent [Interface]
        "bytes of the busier direction, of what the link carries" from "/proc/net/dev, /sys/class/net/*/speed";
    "network.connections_tracked" Percent [Device] "fill of the table of tracked connections" from "/proc/sys/net/netfilter/nf_conntrack_count, _max";

    "peer.latency" Nanoseconds [Device Peer] "smoothed round trip to the slowest, or to each, peer" from "TCP_INFO of the agent's own connections";
    "peer.jitter" Nanoseconds [Device Peer] "mean deviation of the round trip" from "TCP_INFO of the agent's own connections";
    "peer.loss" Percent [Device Peer] "segments sent again, of those sent to the peer lately" from "TCP_INFO of the agent's own connections";
    "peer.bandwidth_delay_product" Bytes [Peer]
        "delivery rate times least round trip: what fills the link" from "TCP_INFO of the agent's own connections";

    "kernel.machine_checks" Events [Device] "machine check exceptions" from "/dev/kmsg";
    "kernel.pci_errors_corrected" Events [Device] "PCIe errors that the hardware corrected (AER)" from "/dev/kmsg";
    "kernel.pci_errors_uncorrected" Events [Device] "PCIe errors that it did not (AER)" from "/dev/kmsg";
    "kernel.io_errors" Events [Device Disk] "I/O errors that the block layer logged" from "/dev/kmsg";
    "kernel.disk_resets" Events [Device] "commands that timed out, links and controllers that were reset" from "/dev/kmsg";
    "kernel.hung_tasks" Events [Device] "tasks blocked for longer than the kernel's limit (120 s by default)" from "/dev/kmsg";
    "kernel.lockups" Events [Device] "soft and hard lockups, stalls of RCU" from "/dev/kmsg";
    "kernel.filesystem_errors" Events [Device Disk] "file system errors that the kernel logged" from "/dev/kmsg";
    "kernel.read_only_remounts" Events [Device Disk] "file systems that went read-only or shut down" from "/dev/kmsg";
    "kernel.oopses" Events [Device] "faults in the kernel itself" from "/dev/kmsg";
}
