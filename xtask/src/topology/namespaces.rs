//! What runs without a runtime that makes networks: containers of containerd, and plain cgroups as an init
//! system makes them. Their network namespaces are made here, and joined to networks by the CNI plugins.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::cases::{self, words};
use super::podman_like::bare;
use super::{Outcome, Runtime, run_cases};
use crate::images;
use crate::lab::{Host, Lab};
use crate::process::{log_tail, output_with_input, wait_for};
use crate::workspace;

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const TALKER: &str = "localhost/talker:demo";
const PLUGINS: &str = "/usr/lib/cni";

/// Networks that the plugins make.
struct Networks<'a> {
    host: &'a Host,
    /// By talker.
    addresses: RefCell<BTreeMap<String, Vec<IpAddr>>>,
}

impl<'a> Networks<'a> {
    fn of(host: &'a Host) -> Self {
        Self {
            host,
            addresses: RefCell::default(),
        }
    }

    /// Makes the network namespace that a talker's options ask for; none for the host's.
    fn namespace(&self, name: &str, options: &[String]) -> Result<Option<String>> {
        let option = |wanted: &str| {
            let mut pairs = options.windows(2).filter(|pair| pair[0] == wanted);
            pairs.next().map(|pair| pair[1].as_str())
        };
        let network = match (option("--network"), option("--pod")) {
            (_, Some(pod)) => return Ok(Some(format!("/run/netns/{pod}"))),
            (Some("host"), None) => return Ok(None),
            (Some(network), None) => network,
            (None, None) => bail!("{name} has no network"),
        };
        if let Some(other) = network.strip_prefix("container:") {
            return Ok(Some(format!("/run/netns/{other}")));
        }
        let place = self.make(name)?;
        if let Some(setting) = option("--sysctl") {
            let set = ["sysctl", "-qw", setting];
            let enter = ["nsenter".to_owned(), format!("--net={place}")];
            self.host.run(enter.iter().map(String::as_str).chain(set))?;
        }
        self.join(name, network, option("--publish"))?;
        Ok(Some(place))
    }

    fn make(&self, name: &str) -> Result<String> {
        self.host.run(["ip", "netns", "add", name])?;
        self.host
            .run(["ip", "-n", name, "link", "set", "lo", "up"])?;
        Ok(format!("/run/netns/{name}"))
    }

    fn join(&self, name: &str, network: &str, publish: Option<&str>) -> Result<()> {
        let subnets = match network {
            "front" => json!([[{ "subnet": "10.126.0.0/24" }]]),
            "back" => json!([[{ "subnet": "10.127.0.0/24" }]]),
            "six" => json!([[{ "subnet": "fd00:126::/64" }], [{ "subnet": "10.128.0.0/24" }]]),
            _ => bail!("no network {network}"),
        };
        let mut bridge = json!({
            "cniVersion": "0.4.0", "name": network, "type": "bridge", "bridge": network, "isGateway": true,
            "ipam": { "type": "host-local", "ranges": subnets, "dataDir": "/run/cni" }
        });
        bridge["ipam"]["routes"] = json!([{ "dst": "0.0.0.0/0" }]);
        let joined = self.plugin(name, &bridge)?;
        let addresses = joined["ips"].as_array().into_iter().flatten();
        let addresses = addresses
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect();
        self.addresses
            .borrow_mut()
            .insert(name.to_owned(), addresses);
        if let Some((host_port, port)) = publish.and_then(|publish| publish.split_once(':')) {
            let (port, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            let (host_port, port): (u16, u16) = (host_port.parse()?, port.parse()?);
            let map = json!({
                "cniVersion": "0.4.0", "name": network, "type": "portmap", "snat": true, "prevResult": joined,
                "runtimeConfig": { "portMappings": [
                    { "hostPort": host_port, "containerPort": port, "protocol": protocol }
                ]}
            });
            self.plugin(name, &map)?;
        }
        Ok(())
    }

    fn plugin(&self, name: &str, config: &Value) -> Result<Value> {
        let kind = config["type"].as_str().unwrap_or_default();
        let mut command = self.host.command(["env"]);
        command.args(["CNI_COMMAND=ADD", "CNI_IFNAME=eth0"]).args([
            format!("CNI_PATH={PLUGINS}"),
            format!("CNI_CONTAINERID={name}"),
            format!("CNI_NETNS=/run/netns/{name}"),
            format!("{PLUGINS}/{kind}"),
        ]);
        let answer =
            output_with_input(&mut command, config.to_string().as_bytes()).with_context(|| {
                format!("CNI plugin {kind} for {name} (containernetworking-plugins)")
            })?;
        Ok(serde_json::from_str(&answer)?)
    }

    fn address(&self, name: &str, six: bool) -> Result<String> {
        let addresses = self.addresses.borrow();
        let mut of = addresses.get(name).into_iter().flatten();
        of.find(|address| address.is_ipv6() == six)
            .map(IpAddr::to_string)
            .with_context(|| format!("{name} has no such address"))
    }
}

struct Containerd<'a>(Networks<'a>);

impl Runtime for Containerd<'_> {
    fn name(&self) -> &'static str {
        "containerd"
    }

    fn host(&self) -> &Host {
        self.0.host
    }

    fn socket(&self) -> String {
        CONTAINERD_SOCKET.to_owned()
    }

    fn prepare(&self) -> Result<()> {
        let host = self.0.host;
        // Podman makes an image of the archive that `ctr` can take.
        images::load_some(host, &["talker"])?;
        host.podman([
            "save",
            "--quiet",
            "--format",
            "oci-archive",
            "--output",
            "/srv/talker.oci",
            TALKER,
        ])?;
        host.run(["ctr", "image", "import", "/srv/talker.oci"])?;
        self.0.make("pair").map(drop)
    }

    fn start(&self, name: &str, options: &[String], talker: &[String]) -> Result<()> {
        // Shares of the processor would want the cpu controller, which cgroup2 on a hybrid machine lacks.
        let mut all = words("ctr run --detach --cpu-shares 0");
        all.push(format!("--log-uri=file:///srv/{name}.log"));
        match self.0.namespace(name, options)? {
            Some(place) => all.push(format!("--with-ns=network:{place}")),
            None => all.push("--net-host".to_owned()),
        }
        for pair in options.windows(2) {
            match pair[0].as_str() {
                // As the CRI labels the containers of a Kubernetes pod.
                "--pod" => all.push(format!("--label=io.kubernetes.pod.uid={}", pair[1])),
                "--volume" => {
                    let (from, to) = pair[1].split_once(':').context("a volume")?;
                    all.push(format!(
                        "--mount=type=bind,src={from},dst={to},options=rbind:rw"
                    ));
                }
                _ => {}
            }
        }
        all.extend([TALKER, name, "/usr/bin/talker"].map(str::to_owned));
        all.extend_from_slice(talker);
        self.0.host.run(all).map(drop)
    }

    fn address(&self, name: &str, six: bool) -> Result<String> {
        self.0.address(name, six)
    }

    fn said(&self, name: &str) -> Result<String> {
        let log = self.0.host.path(&format!("/srv/{name}.log"));
        Ok(std::fs::read_to_string(log).unwrap_or_default())
    }

    fn iptables(&self, rule: &str) -> Result<()> {
        let rule = words(&format!("iptables {rule}"));
        self.0.host.run(rule).map(drop)
    }
}

/// All kinds under containerd without Docker, started with `ctr`.
///
/// # Errors
/// The lab, containerd or the agent did not do what it must.
pub fn containerd() -> Result<Vec<Outcome>> {
    let lab = Lab::up(&bare("topo-ctr"))?;
    let host = lab.host("a")?;
    let config = format!(
        "version = 2\nroot = \"/srv/containerd\"\nstate = \"/run/containerd\"\n\
         [grpc]\naddress = \"{CONTAINERD_SOCKET}\"\n[ttrpc]\naddress = \"{CONTAINERD_SOCKET}.ttrpc\"\n"
    );
    host.write("/etc/containerd/lab.toml", config)?;
    host.spawn_logged(
        "containerd",
        ["containerd", "--config", "/etc/containerd/lab.toml"],
    )?;
    wait_for("containerd", Duration::from_secs(30), || {
        Ok(host.run(["ctr", "version"]).ok())
    })
    .with_context(|| log_tail(&host.log("containerd"), 2000))?;
    let runtime = Containerd(Networks::of(host));
    run_cases(&runtime, &cases::all(&host.address().to_string()))
}

struct Plain<'a>(Networks<'a>);

impl Runtime for Plain<'_> {
    fn name(&self) -> &'static str {
        "plain cgroup"
    }

    fn host(&self) -> &Host {
        self.0.host
    }

    fn socket(&self) -> String {
        "/nonexistent".to_owned()
    }

    fn prepare(&self) -> Result<()> {
        self.0.make("pair").map(drop)
    }

    fn start(&self, name: &str, options: &[String], talker: &[String]) -> Result<()> {
        let mut all = Vec::new();
        if let Some(place) = self.0.namespace(name, options)? {
            all.extend(["nsenter".to_owned(), format!("--net={place}")]);
        }
        all.push(workspace::binary("talker").display().to_string());
        all.extend_from_slice(talker);
        self.0.host.spawn_logged(name, all).map(drop)
    }

    fn address(&self, name: &str, six: bool) -> Result<String> {
        self.0.address(name, six)
    }

    fn said(&self, name: &str) -> Result<String> {
        Ok(log_tail(&self.0.host.log(name), 2000))
    }

    fn iptables(&self, rule: &str) -> Result<()> {
        let rule = words(&format!("iptables {rule}"));
        self.0.host.run(rule).map(drop)
    }

    /// A cgroup goes by its path.
    fn shown(&self, name: &str) -> String {
        format!("/{name}")
    }
}

/// Cgroups without a runtime, as an init system makes them for its services.
///
/// # Errors
/// The lab or the agent did not do what it must.
pub fn plain() -> Result<Vec<Outcome>> {
    let lab = Lab::up(&bare("topo-plain"))?;
    let host = lab.host("a")?;
    let mut cases = cases::all(&host.address().to_string());
    // Pods are made by runtimes.
    cases.retain(|case| case.kind != cases::POD);
    run_cases(&Plain(Networks::of(host)), &cases)
}
