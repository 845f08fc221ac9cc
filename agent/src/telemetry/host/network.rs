//! Network interfaces, TCP, and the table of tracked connections.

use super::counters::Counters;
use super::files::{entries, name as file_name, number, text, why};
use super::{HostReading, Look, Value, sum};
use crate::model::metric::Per;
use procfs::FromRead;
use procfs::net::{DeviceStatus, InterfaceDeviceStatus, Snmp};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Carrier, speed and the like are files of each interface: read in one sweep of so many.
const LINKS_EVERY: u32 = 5;

#[derive(Default)]
pub struct Network {
    counters: Counters,
    links: BTreeMap<String, Link>,
    until_links: u32,
}

/// What sysfs says of an interface's link.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    down: Option<bool>,
    losses: Option<u64>,
    bits_per_second: Option<f64>,
    outwards: Outwards,
}

/// Whether what an interface carries leaves the host there, and is not told by another one again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Outwards {
    /// What it carries goes through another one: a bond, a bridge, a VLAN, or what is plugged into a bridge.
    Through,
    /// Nothing is known below it; of a host with hardware it ends in a container.
    #[default]
    Perhaps,
    /// Hardware.
    Yes,
}

impl Network {
    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        self.counters.turn();
        let path = look.path("proc/net/dev");
        match InterfaceDeviceStatus::from_file(&path) {
            Ok(status) => self.interfaces(look, reading, &status),
            Err(_) => {
                let why = why(&path, "procfs is not mounted below the root");
                let metrics = [
                    "network.errors",
                    "network.drops",
                    "network.bytes_per_second",
                    "network.packets_per_second",
                    "network.link_down",
                    "network.link_losses",
                    "network.link_speed",
                    "network.link_used",
                ];
                reading.absent(&metrics, &why);
            }
        }
        self.tcp(look, reading);
        tracked(look, reading);
    }

    fn interfaces(
        &mut self,
        look: Look,
        reading: &mut HostReading,
        status: &InterfaceDeviceStatus,
    ) {
        let fresh = self.until_links == 0;
        self.until_links = if fresh { LINKS_EVERY } else { self.until_links } - 1;
        if fresh {
            self.links.clear();
        }
        for (name, status) in &status.0 {
            if name == "lo" {
                continue;
            }
            if fresh {
                self.links.insert(name.clone(), Link::read(look, name));
            }
            let link = self.links.get(name).copied().unwrap_or_default();
            self.interface(look, reading, name, status);
            self.link(look, reading, name, status, link);
        }
        let known = self.links.values().map(|link| link.outwards);
        let furthest = known.max().unwrap_or_default();
        for metric in [
            "network.errors",
            "network.drops",
            "network.bytes_per_second",
            "network.packets_per_second",
            "network.link_down",
            "network.link_losses",
        ] {
            let of_host = |(name, subject, value): &Value| {
                let link = self.links.get(&subject.name).copied().unwrap_or_default();
                (*name == metric && link.outwards == furthest).then_some(*value)
            };
            if let Some(value) = reading.values.iter().filter_map(of_host).reduce(sum) {
                reading.device(metric, value);
            }
        }
        let why = "no interface here has a link whose state or speed its driver tells";
        let speed = ["network.link_speed", "network.link_used"];
        reading.absent(&speed, why);
        reading.absent(&["network.link_down", "network.link_losses"], why);
    }

    fn interface(&mut self, look: Look, reading: &mut HostReading, name: &str, now: &DeviceStatus) {
        for (metric, count) in [
            ("network.errors", now.recv_errs + now.sent_errs),
            ("network.drops", now.recv_drop + now.sent_drop),
        ] {
            if let Some(more) = self.counters.more(metric, name, count) {
                reading.of(metric, Per::Interface, name, more as f64);
            }
        }
        for (metric, count) in [
            ("network.bytes_per_second", now.recv_bytes + now.sent_bytes),
            (
                "network.packets_per_second",
                now.recv_packets + now.sent_packets,
            ),
        ] {
            let more = self.counters.more(metric, name, count);
            if let Some(rate) = more.and_then(|more| look.a_second(more)) {
                reading.of(metric, Per::Interface, name, rate);
            }
        }
    }

    fn link(
        &mut self,
        look: Look,
        reading: &mut HostReading,
        name: &str,
        now: &DeviceStatus,
        link: Link,
    ) {
        if let Some(down) = link.down {
            let value = f64::from(u8::from(down));
            reading.of("network.link_down", Per::Interface, name, value);
        }
        let losses = link.losses;
        if let Some(more) = losses.and_then(|count| self.counters.more("losses", name, count)) {
            reading.of("network.link_losses", Per::Interface, name, more as f64);
        }
        let received = self.counters.more("received", name, now.recv_bytes);
        let sent = self.counters.more("sent", name, now.sent_bytes);
        let Some(speed) = link.bits_per_second else {
            return;
        };
        reading.of("network.link_speed", Per::Interface, name, speed);
        if let (Some(received), Some(sent)) = (received, sent)
            && let Some(busier) = look.a_second(received.max(sent))
        {
            let used = (100.0 * 8.0 * busier / speed).min(100.0);
            reading.of("network.link_used", Per::Interface, name, used);
        }
    }

    fn tcp(&mut self, look: Look, reading: &mut HostReading) {
        let path = look.path("proc/net/snmp");
        let Ok(snmp) = Snmp::from_file(&path) else {
            let metrics = ["network.retransmits", "network.retransmit_share"];
            let why = why(&path, "procfs is not mounted below the root");
            reading.absent(&metrics, &why);
            return;
        };
        let again = self.counters.more("again", "", snmp.tcp_retrans_segs);
        let sent = self.counters.more("segments", "", snmp.tcp_out_segs);
        let (Some(again), Some(sent)) = (again, sent) else {
            return;
        };
        reading.device("network.retransmits", again as f64);
        // `OutSegs` leaves out what is sent again (RFC 4022, tcpOutSegs).
        let all = (sent + again) as f64;
        let share = if all > 0.0 {
            100.0 * again as f64 / all
        } else {
            0.0
        };
        reading.device("network.retransmit_share", share);
    }
}

impl Link {
    fn read(look: Look, name: &str) -> Self {
        let directory = look.path("sys/class/net").join(name);
        let has_device = directory.join("device").exists();
        let is_below = |entry: &PathBuf| file_name(entry).starts_with("lower_");
        let is_through = entries(&directory).iter().any(is_below);
        let outwards = match (has_device, is_through) {
            (_, true) => Outwards::Through,
            (true, false) => Outwards::Yes,
            (false, false) if directory.join("master").exists() => Outwards::Through,
            (false, false) => Outwards::Perhaps,
        };
        // A bridge has no carrier while nothing is plugged in, which is no fault.
        if directory.join("bridge").exists() {
            return Self {
                outwards: Outwards::Through,
                ..Self::default()
            };
        }
        let flags = text(&directory.join("flags"))
            .and_then(|flags| u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok());
        // IFF_UP; reading the carrier of an interface that is down is refused.
        let up = flags.is_some_and(|flags| flags & 1 == 1);
        let carrier = up.then(|| text(&directory.join("carrier"))).flatten();
        // -1 and refusals stand for a speed that is not known; a virtual link invents one.
        let mbits: Option<i64> = number(&directory.join("speed"));
        Self {
            down: carrier.map(|carrier| carrier == "0"),
            losses: number(&directory.join("carrier_down_count")),
            bits_per_second: mbits
                .filter(|&mbits| mbits > 0 && has_device)
                .map(|mbits| mbits as f64 * 1e6),
            outwards,
        }
    }
}

fn tracked(look: Look, reading: &mut HostReading) {
    let directory = look.path("proc/sys/net/netfilter");
    let count: Option<f64> = number(&directory.join("nf_conntrack_count"));
    let most: Option<f64> = number(&directory.join("nf_conntrack_max"));
    match (count, most) {
        (Some(count), Some(most)) if most > 0.0 => {
            reading.device("network.connections_tracked", 100.0 * count / most);
        }
        _ => {
            let why = why(
                &directory.join("nf_conntrack_count"),
                "connections are not tracked here",
            );
            reading.absent(&["network.connections_tracked"], &why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{recorded, value, write};
    use std::time::Duration;

    const DEV: &str = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0
  eth0: RX 10 1 2 0 0 0 0 500 5 0 0 0 0 0 0
";

    #[test]
    fn interface_counters_become_rates_and_events() {
        let (root, mut host) = recorded(&[
            ("proc/net/dev", &DEV.replace("RX", "1000")),
            ("sys/class/net/eth0/flags", "0x1003\n"),
            ("sys/class/net/eth0/carrier", "0\n"),
            ("sys/class/net/eth0/carrier_down_count", "3\n"),
            ("sys/class/net/eth0/speed", "1000\n"),
            ("sys/class/net/eth0/device/vendor", "0x8086\n"),
        ]);
        let first = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&first, "network.bytes_per_second", "eth0"), None);
        assert_eq!(value(&first, "network.link_down", "eth0"), Some(1.0));
        assert_eq!(value(&first, "network.link_speed", "eth0"), Some(1e9));
        write(
            root.path(),
            &[
                ("proc/net/dev", &DEV.replace("RX", "25001000")),
                ("sys/class/net/eth0/carrier_down_count", "5\n"),
            ],
        );
        let second = host.read(&[], Duration::from_secs(2));
        let of = |metric| value(&second, metric, "eth0");
        assert_eq!(of("network.bytes_per_second"), Some(12_500_000.0));
        assert_eq!(of("network.link_used"), Some(10.0));
        assert_eq!(of("network.errors"), Some(0.0));
        assert_eq!(value(&second, "network.bytes_per_second", "lo"), None);
        assert_eq!(
            value(&second, "network.bytes_per_second", ""),
            Some(12_500_000.0)
        );
        // The link's files are read again in the sixth sweep.
        let later: Vec<f64> = (0..4)
            .filter_map(|_| {
                let reading = host.read(&[], Duration::from_secs(1));
                value(&reading, "network.link_losses", "eth0")
            })
            .collect();
        assert_eq!(later, [0.0, 0.0, 0.0, 2.0]);
    }

    #[test]
    fn what_several_interfaces_carry_one_through_another_is_counted_once_in_the_hosts_sum() {
        let lines = |names: &[&str], bytes: u64| {
            let line = |name: &&str| format!("  {name}: {bytes} 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n");
            let head: String = DEV
                .lines()
                .take(2)
                .map(|line| format!("{line}\n"))
                .collect();
            head + &names.iter().map(line).collect::<String>()
        };
        let sum_of = |names: &[&str], files: &[(&str, &str)]| {
            let (root, mut host) = recorded(files);
            write(root.path(), &[("proc/net/dev", &lines(names, 0))]);
            host.read(&[], Duration::from_secs(1));
            write(root.path(), &[("proc/net/dev", &lines(names, 100))]);
            let reading = host.read(&[], Duration::from_secs(1));
            let each = value(&reading, "network.bytes_per_second", names[0]);
            assert_eq!(each, Some(100.0));
            value(&reading, "network.bytes_per_second", "")
        };
        let [eth0, eth1, bond0] = ["eth0", "eth1", "bond0"];
        let files = [
            ("sys/class/net/eth0/device/vendor", ""),
            ("sys/class/net/eth1/device/vendor", ""),
            ("sys/class/net/eth0/master/ifindex", ""),
            ("sys/class/net/bond0/lower_eth0/ifindex", ""),
            ("sys/class/net/br0/bridge/bridge_id", ""),
            ("sys/class/net/br0/lower_veth1/ifindex", ""),
            ("sys/class/net/veth1/master/ifindex", ""),
            ("sys/class/net/veth0/ifindex", ""),
        ];
        assert_eq!(
            sum_of(&[eth0, eth1, bond0, "br0", "veth1", "veth0"], &files),
            Some(200.0)
        );
        // A network namespace without hardware: the way out of it.
        assert_eq!(sum_of(&["veth0", "br0", "veth1"], &files), Some(100.0));
        assert_eq!(sum_of(&["br0", "veth1"], &files), Some(200.0));
    }

    #[test]
    fn retransmits_are_told_relative_to_what_was_sent() {
        let snmp = |out: u32, again: u32| {
            let ip = "Ip: Forwarding DefaultTTL InReceives InHdrErrors InAddrErrors ForwDatagrams InUnknownProtos InDiscards InDelivers OutRequests OutDiscards OutNoRoutes ReasmTimeout ReasmReqds ReasmOKs ReasmFails FragOKs FragFails FragCreates\nIp: 1 64 1 0 0 0 0 0 1 1 0 0 0 0 0 0 0 0 0\n";
            let icmp = "Icmp: InMsgs InErrors InCsumErrors InDestUnreachs InTimeExcds InParmProbs InSrcQuenchs InRedirects InEchos InEchoReps InTimestamps InTimestampReps InAddrMasks InAddrMaskReps OutMsgs OutErrors OutDestUnreachs OutTimeExcds OutParmProbs OutSrcQuenchs OutRedirects OutEchos OutEchoReps OutTimestamps OutTimestampReps OutAddrMasks OutAddrMaskReps\nIcmp: 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n";
            let tcp = format!(
                "Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs OutSegs RetransSegs InErrs OutRsts InCsumErrors\nTcp: 1 200 120000 -1 1 1 0 0 1 5 {out} {again} 0 0 0\n"
            );
            let udp = "Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti\nUdp: 0 0 0 0 0 0 0 0\nUdpLite: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti\nUdpLite: 0 0 0 0 0 0 0 0\n";
            format!("{ip}{icmp}{tcp}{udp}")
        };
        let (root, mut host) = recorded(&[("proc/net/snmp", &snmp(1000, 10))]);
        host.read(&[], Duration::from_secs(1));
        write(root.path(), &[("proc/net/snmp", &snmp(1095, 15))]);
        let reading = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&reading, "network.retransmits", ""), Some(5.0));
        assert_eq!(value(&reading, "network.retransmit_share", ""), Some(5.0));
    }

    #[test]
    fn the_fill_of_the_connection_table_is_a_share_of_its_size() {
        let (_root, mut host) = recorded(&[
            ("proc/sys/net/netfilter/nf_conntrack_count", "196608\n"),
            ("proc/sys/net/netfilter/nf_conntrack_max", "262144\n"),
        ]);
        let reading = host.read(&[], Duration::from_secs(1));
        assert_eq!(
            value(&reading, "network.connections_tracked", ""),
            Some(75.0)
        );
    }
}
