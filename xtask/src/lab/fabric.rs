//! The network between lab hosts: a bridge in a namespace of its own, with shaping, loss and partition.
//!
//! Delay and reordering are not offered: they need netem, which not every kernel has.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::cgroup::Cgroup;
use super::host::Host;
use crate::process::{output, output_with_input, wait_for};

/// The bridge's own address; hosts follow from .10 on.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Address of the lab's host number `index`.
pub(super) fn host_address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 10 + index)
}

/// The bridge's namespace, kept alive by one process.
#[derive(Debug, Clone)]
pub(super) struct Fabric {
    pub(super) pid: u32,
}

/// The bridge port of a host.
fn port(host: &Host) -> String {
    format!("v-{}", host.name)
}

impl Fabric {
    pub(super) fn start(lab_cgroup: &Cgroup) -> Result<(Self, Child)> {
        let cgroup = lab_cgroup.child("fabric");
        cgroup.create()?;
        let child = Command::new("setsid")
            .args([
                "sh",
                "-c",
                r#"echo $$ >"$0/cgroup.procs" && exec unshare --net sleep infinity"#,
            ])
            .arg(cgroup.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start `setsid` (package util-linux)")?;
        let pid = child.id();
        let fabric = Self { pid };
        let own = std::fs::read_link("/proc/self/ns/net")?;
        wait_for(
            "the fabric's network namespace",
            Duration::from_secs(5),
            || {
                let theirs = std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
                Ok(theirs.is_some_and(|theirs| theirs != own).then_some(()))
            },
        )?;
        fabric.ip("link set lo up")?;
        fabric.ip("link add br0 type bridge")?;
        fabric.ip(&format!("address add {GATEWAY}/24 dev br0"))?;
        fabric.ip("link set br0 up")?;
        fabric.nft(
            "add table bridge lab\n\
             add chain bridge lab loss { type filter hook forward priority 0; }\n\
             add chain bridge lab cut { type filter hook forward priority 1; }\n",
        )?;
        Ok((fabric, child))
    }

    fn enter(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--net", "--", program]);
        command
    }

    fn ip(&self, words: &str) -> Result<()> {
        output(self.enter("ip").args(words.split(' '))).map(drop)
    }

    fn nft(&self, script: &str) -> Result<()> {
        output_with_input(self.enter("nft").args(["-f", "-"]), script.as_bytes()).map(drop)
    }

    /// Plugs a host in as `eth0`.
    pub(super) fn plug(&self, host: &Host) -> Result<()> {
        let (port, pid, address) = (port(host), host.pid, host.address);
        self.ip(&format!(
            "link add {port} type veth peer name eth0 netns {pid}"
        ))?;
        self.ip(&format!("link set {port} master br0 up"))?;
        let last = address.octets()[3];
        host.run([
            "ip",
            "address",
            "add",
            &format!("{address}/24"),
            "dev",
            "eth0",
        ])?;
        // nodad: the address is usable at once.
        host.run([
            "ip",
            "address",
            "add",
            &format!("fd77::{last}/64"),
            "dev",
            "eth0",
            "nodad",
        ])?;
        host.run(["ip", "link", "set", "eth0", "up"])?;
        Ok(())
    }

    /// Caps both directions of the host's link; `None` lifts the cap.
    pub(super) fn shape(&self, host: &Host, mbit: Option<u32>) -> Result<()> {
        let port = port(host);
        let Some(mbit) = mbit else {
            // Fails when there is no cap, which is what is wanted.
            let _ = output(
                self.enter("tc")
                    .args(["qdisc", "del", "dev", &port, "root"]),
            );
            let _ = host.run(["tc", "qdisc", "del", "dev", "eth0", "root"]);
            return Ok(());
        };
        let rate = format!("{mbit}mbit");
        let tbf = |device: &str| {
            let words =
                format!("qdisc replace dev {device} root tbf rate {rate} burst 256k latency 100ms");
            words.split(' ').map(str::to_owned).collect::<Vec<_>>()
        };
        output(self.enter("tc").args(tbf(&port)))?;
        host.run(std::iter::once("tc".to_owned()).chain(tbf("eth0")))?;
        Ok(())
    }

    /// Drops this share of the packets from and to the host; 0 ends it.
    pub(super) fn loss(&self, host: &Host, percent: u8) -> Result<()> {
        let port = port(host);
        let mut script = self.without("loss", &format!("\"{port}\""))?;
        let chance = match percent {
            0 => return self.nft(&script),
            // nft knows no "less than 100 of 100".
            100.. => String::new(),
            percent => format!("numgen random mod 100 < {percent} "),
        };
        for side in ["iifname", "oifname"] {
            script.push_str(&format!(
                "add rule bridge lab loss {side} {port} {chance}drop\n"
            ));
        }
        self.nft(&script)
    }

    /// Cuts, or joins again, two hosts from each other; both still reach the rest.
    pub(super) fn partition(&self, a: &Host, b: &Host, cut: bool) -> Result<()> {
        let (a, b) = (port(a), port(b));
        let mut script = String::new();
        for (from, to) in [(&a, &b), (&b, &a)] {
            script.push_str(&self.without("cut", &format!("iifname \"{from}\" oifname \"{to}\""))?);
            if cut {
                script.push_str(&format!(
                    "add rule bridge lab cut iifname {from} oifname {to} drop\n"
                ));
            }
        }
        self.nft(&script)
    }

    /// The nft lines that delete the rules of `chain` whose text contains `part`.
    fn without(&self, chain: &str, part: &str) -> Result<String> {
        let list = output(
            self.enter("nft")
                .args(["--handle", "list", "chain", "bridge", "lab", chain]),
        )?;
        Ok(list
            .lines()
            .filter(|line| line.contains(part))
            .filter_map(|line| line.rsplit_once("# handle "))
            .map(|(_, handle)| format!("delete rule bridge lab {chain} handle {handle}\n"))
            .collect())
    }

    /// Pulls or plugs the host's cable.
    pub(super) fn link(&self, host: &Host, up: bool) -> Result<()> {
        self.ip(&format!(
            "link set {} {}",
            port(host),
            if up { "up" } else { "down" }
        ))
    }
}
