//! From an inspect answer to the request that makes the same container again. Pure.
//!
//! Invariants: everything of `Config` and `HostConfig` is taken over unless a rule below names why not;
//! what a rule changes means the same to the runtime. [`differences`] then compares what was made with
//! what was wanted, so a field neither we nor the runtime carried is seen and not lost in silence.

use super::resources::is_empty;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Key under which [`super::Runtime::describe`] adds what only Podman's own inspect answer has.
pub(super) const LIBPOD: &str = "Libpod";

/// The request body of `POST /containers/create`.
///
/// `image` is the reference or id to run; `keep_addresses` asks for the source's addresses again;
/// `podman` says which engine will read it.
#[must_use]
pub fn body(inspect: &Value, image: &str, keep_addresses: bool, podman: bool) -> Value {
    let mut body = object(&inspect["Config"]);
    body.insert("Image".to_owned(), json!(image));
    let mut host = object(&inspect["HostConfig"]);
    let mode = network_mode(inspect);
    if hostname_is_not_its_own(inspect, &mode) {
        body.remove("Hostname");
        body.remove("Domainname");
    }
    if mode.starts_with("container:") {
        // Ports and names belong to the container whose network it shares.
        body.remove("ExposedPorts");
        host.remove("PortBindings");
    }
    fix_host(&mut host, podman);
    host.insert("Binds".to_owned(), json!(binds(inspect)));
    // Its effect is already in Mounts, with the volumes' names.
    host.remove("VolumesFrom");
    host.insert("NetworkMode".to_owned(), json!(mode));
    let annotations = &inspect[LIBPOD]["Config"]["Annotations"];
    if annotations["io.podman.annotations.init"] == "TRUE" {
        host.insert("Init".to_owned(), json!(true));
    }
    let sysctls = &inspect[LIBPOD]["Sysctls"];
    if !is_empty(sysctls) {
        host.insert("Sysctls".to_owned(), sysctls.clone());
    }
    body.insert("HostConfig".to_owned(), Value::Object(host));
    let endpoints: Map<String, Value> = endpoints(inspect, keep_addresses).into_iter().collect();
    body.insert(
        "NetworkingConfig".to_owned(),
        json!({ "EndpointsConfig": endpoints }),
    );
    Value::Object(body)
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// `host`, `none`, `container:X`, or the name of the first network.
pub(super) fn network_mode(inspect: &Value) -> String {
    let mode = inspect["HostConfig"]["NetworkMode"].as_str().unwrap_or("");
    if matches!(mode, "host" | "none") || mode.starts_with("container:") {
        return mode.to_owned();
    }
    let networks = inspect["NetworkSettings"]["Networks"].as_object();
    match networks.and_then(|networks| networks.keys().next()) {
        // Podman calls every network of a bridge driver `bridge`.
        Some(_) if networks.is_some_and(|all| all.contains_key(mode)) => mode.to_owned(),
        Some(first) => first.clone(),
        None => mode.to_owned(),
    }
}

/// The networks to join and how, by name; empty when the network is not the container's own.
pub(super) fn endpoints(inspect: &Value, keep_addresses: bool) -> Vec<(String, Value)> {
    let mode = network_mode(inspect);
    if matches!(mode.as_str(), "host" | "none") || mode.starts_with("container:") {
        return Vec::new();
    }
    let networks = object(&inspect["NetworkSettings"]["Networks"]);
    networks
        .into_iter()
        .map(|(name, network)| {
            let aliases: Vec<String> = own_aliases(inspect, &network).into_iter().collect();
            let mut endpoint = Map::new();
            // The default networks know no aliases, and refuse them.
            if !aliases.is_empty() && !matches!(name.as_str(), "bridge" | "podman") {
                endpoint.insert("Aliases".to_owned(), json!(aliases));
            }
            if keep_addresses {
                let ipam = json!({
                    "IPv4Address": network["IPAddress"],
                    "IPv6Address": network["GlobalIPv6Address"],
                });
                endpoint.insert("IPAMConfig".to_owned(), ipam);
            }
            (name, Value::Object(endpoint))
        })
        .collect()
}

/// Aliases a person chose: not the short id and not the name, which each runtime adds by itself.
fn own_aliases(inspect: &Value, network: &Value) -> BTreeSet<String> {
    let id = inspect["Id"].as_str().unwrap_or_default();
    let name = inspect["Name"].as_str().unwrap_or_default();
    network["Aliases"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .filter(|alias| alias.len() < 12 || !id.starts_with(alias))
        .filter(|alias| *alias != name.trim_start_matches('/'))
        .map(str::to_owned)
        .collect()
}

/// In the host's or another container's network the name is that of the host or the other one.
fn hostname_is_not_its_own(inspect: &Value, mode: &str) -> bool {
    mode == "host" || mode.starts_with("container:") || inspect["HostConfig"]["UTSMode"] == "host"
}

fn fix_host(host: &mut Map<String, Value>, podman: bool) {
    // Podman shows limits by the kernel's names and takes them by the shell's.
    for limit in list_mut(host, "Ulimits") {
        if let Some(name) = limit["Name"].as_str() {
            limit["Name"] = json!(name.trim_start_matches("RLIMIT_").to_lowercase());
        }
    }
    for device in list_mut(host, "Devices") {
        if is_empty(&device["CgroupPermissions"]) {
            device["CgroupPermissions"] = json!("rwm");
        }
    }
    // Podman shows the same limit both ways and refuses to be told both ways.
    if !is_empty(&host.get("NanoCpus").cloned().unwrap_or_default()) {
        host.remove("CpuPeriod");
        host.remove("CpuQuota");
    }
    if host.get("Privileged") == Some(&json!(true)) {
        host.remove("CapAdd");
        host.remove("CapDrop");
    }
    if podman {
        // Podman's word for "not set" in each of them; taken literally it would set something.
        for (key, unset) in [
            ("MemorySwappiness", json!(0)),
            ("MemorySwappiness", json!(-1)),
            ("Runtime", json!("oci")),
        ] {
            if host.get(key) == Some(&unset) {
                host.remove(key);
            }
        }
    }
}

fn list_mut<'a>(
    host: &'a mut Map<String, Value>,
    key: &str,
) -> impl Iterator<Item = &'a mut Value> {
    host.get_mut(key)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

/// The binds as configured, and every other volume by its name, so that an anonymous volume of the
/// source is found by its data on the target.
fn binds(inspect: &Value) -> Vec<String> {
    let configured: Vec<String> = inspect["HostConfig"]["Binds"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|bind| bind.as_str().map(str::to_owned))
        .collect();
    let explicit: BTreeSet<String> = configured
        .iter()
        .filter_map(|bind| bind.split(':').nth(1).map(str::to_owned))
        .chain(
            inspect["HostConfig"]["Mounts"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|mount| mount["Target"].as_str().map(str::to_owned)),
        )
        .collect();
    let implied = inspect["Mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|mount| matches!(mount["Type"].as_str(), Some("volume" | "bind")))
        .filter_map(|mount| {
            let destination = mount["Destination"].as_str()?;
            let source = match mount["Type"].as_str()? {
                "volume" => mount["Name"].as_str()?,
                _ => mount["Source"].as_str()?,
            };
            let access = if mount["RW"] == false { "ro" } else { "rw" };
            (!explicit.contains(destination)).then(|| format!("{source}:{destination}:{access}"))
        });
    configured.iter().cloned().chain(implied).collect()
}

/// What the twin has otherwise than its source, one line a field; empty when nothing.
#[must_use]
pub fn differences(source: &Value, twin: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let (wanted, got) = (comparable(source), comparable(twin));
    compare("", &wanted, &got, &mut found);
    found
}

/// The part of an inspect answer that describes the container and not its life or its host.
fn comparable(inspect: &Value) -> Value {
    let mut config = object(&inspect["Config"]);
    let mode = network_mode(inspect);
    if hostname_is_not_its_own(inspect, &mode) {
        config.remove("Hostname");
    }
    // Order carries no meaning in the environment.
    config.insert("Env".to_owned(), sorted(&inspect["Config"]["Env"]));
    let mut host = object(&inspect["HostConfig"]);
    fix_host(&mut host, true);
    for device in list_mut(&mut host, "Devices") {
        // By which name the host has it is the host's.
        device["PathOnHost"] = Value::Null;
    }
    for key in ["Binds", "Mounts", "VolumesFrom", "NetworkMode"] {
        host.remove(key); // compared below, by effect
    }
    for key in ["CapAdd", "CapDrop", "Dns", "ExtraHosts", "SecurityOpt"] {
        let value = sorted(&inspect["HostConfig"][key]);
        host.insert(key.to_owned(), value);
    }
    let mounts: Map<String, Value> = inspect["Mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|mount| {
            let kind = mount["Type"].as_str().unwrap_or_default();
            let source = match kind {
                "volume" => &mount["Name"],
                _ => &mount["Source"],
            };
            let destination = mount["Destination"].as_str().unwrap_or_default();
            let effect = json!({
                "Type": kind,
                "Source": source,
                "RW": mount["RW"],
                "Propagation": mount["Propagation"],
            });
            (destination.to_owned(), effect)
        })
        .collect();
    let networks: Map<String, Value> = object(&inspect["NetworkSettings"]["Networks"])
        .into_iter()
        .map(|(name, network)| {
            let aliases = own_aliases(inspect, &network);
            // A static address is only shown in IPAMConfig, and only by Docker.
            (
                name,
                json!({ "Aliases": aliases, "IPAMConfig": network["IPAMConfig"] }),
            )
        })
        .collect();
    // Podman's sysctls are not among these: it shows none before the first start.
    let libpod = &inspect[LIBPOD];
    json!({
        "Name": inspect["Name"],
        "Image": inspect["Image"],
        "Config": config,
        "HostConfig": host,
        "Mounts": mounts,
        "NetworkMode": mode,
        "Networks": networks,
        "Annotations": own_annotations(&libpod["Config"]["Annotations"]),
        "BoundingCaps": libpod["BoundingCaps"],
        "EffectiveCaps": libpod["EffectiveCaps"],
        "Umask": libpod["Config"]["Umask"],
        "Secrets": libpod["Config"]["Secrets"],
        "HealthcheckOnFailureAction": libpod["Config"]["HealthcheckOnFailureAction"],
    })
}

/// Annotations a person gave, without those the runtime keeps its own books in.
fn own_annotations(annotations: &Value) -> Map<String, Value> {
    const BOOKS: [&str; 3] = ["io.container.", "io.kubernetes.cri-o.", "io.podman."];
    object(annotations)
        .into_iter()
        .filter(|(key, _)| !BOOKS.iter().any(|prefix| key.starts_with(prefix)))
        .filter(|(key, _)| key != "org.opencontainers.image.stopSignal")
        .collect()
}

fn sorted(list: &Value) -> Value {
    let mut items: Vec<Value> = list.as_array().cloned().unwrap_or_default();
    items.sort_by_key(ToString::to_string);
    Value::Array(items)
}

fn compare(path: &str, wanted: &Value, got: &Value, found: &mut Vec<String>) {
    if wanted == got || (is_empty(wanted) && is_empty(got)) {
        return;
    }
    let (Some(left), Some(right)) = (wanted.as_object(), got.as_object()) else {
        found.push(format!("{path}: {wanted} on the source, {got} on the twin"));
        return;
    };
    let keys: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    for key in keys {
        let path = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        compare(&path, &wanted[key], &got[key], found);
    }
}

#[cfg(test)]
mod tests {
    use super::super::inspect::tests::recorded;
    use super::*;

    #[test]
    fn every_volume_is_bound_by_name_and_podmans_words_become_the_apis() {
        let [docker, podman] = recorded();
        for (inspect, is_podman) in [(&docker, false), (&podman, true)] {
            let body = body(inspect, "box:1", false, is_podman);
            let binds = body["HostConfig"]["Binds"].as_array().unwrap();
            let explicit = inspect["HostConfig"]["Mounts"]
                .as_array()
                .map_or(0, Vec::len);
            let mounts = inspect["Mounts"].as_array().unwrap().len();
            assert_eq!(binds.len() + explicit, mounts, "{binds:?}");
            let limits = body["HostConfig"]["Ulimits"].to_string();
            assert!(limits.contains("\"nofile\"") && !limits.contains("RLIMIT"));
            assert_eq!(body["HostConfig"]["Sysctls"].is_null(), is_podman);
            assert_eq!(body["Hostname"], inspect["Config"]["Hostname"]);
        }
        assert_eq!(
            body(&podman, "x", false, true)["HostConfig"]["Runtime"],
            Value::Null
        );
        assert_eq!(
            body(&docker, "x", false, false)["HostConfig"]["Runtime"],
            "runc"
        );
    }

    #[test]
    fn chosen_aliases_travel_and_those_the_runtime_made_do_not() {
        for inspect in recorded() {
            let endpoints = endpoints(&inspect, false);
            let aliases = endpoints[0].1["Aliases"].to_string();
            assert!(
                aliases.contains("db") || aliases.contains("pg"),
                "{aliases}"
            );
            assert!(!aliases.contains(&inspect["Id"].as_str().unwrap()[..12]));
            assert!(endpoints[0].1["IPAMConfig"].is_null());
        }
        let [docker, _] = recorded();
        let kept = endpoints(&docker, true);
        assert_eq!(kept[0].1["IPAMConfig"]["IPv4Address"], "10.126.0.9");
    }

    #[test]
    fn a_container_that_shares_anothers_network_brings_no_ports_and_no_hostname() {
        let [mut docker, _] = recorded();
        docker["HostConfig"]["NetworkMode"] = json!("container:front");
        let body = body(&docker, "box:1", false, false);
        assert!(body["Hostname"].is_null() && body["HostConfig"]["PortBindings"].is_null());
        assert_eq!(body["NetworkingConfig"]["EndpointsConfig"], json!({}));
        assert_eq!(body["HostConfig"]["NetworkMode"], "container:front");
    }

    #[test]
    fn a_container_differs_from_itself_in_nothing_and_from_another_in_each_changed_field() {
        for inspect in recorded() {
            assert_eq!(differences(&inspect, &inspect), Vec::<String>::new());
            let mut other = inspect.clone();
            // Its life and its host are not the container.
            other["State"]["Pid"] = json!(1);
            other["GraphDriver"] = Value::Null;
            assert_eq!(differences(&inspect, &other), Vec::<String>::new());
            other["Config"]["User"] = json!("0");
            other["HostConfig"]["ShmSize"] = json!(5);
            other["Mounts"][0]["RW"] = json!(false);
            let found = differences(&inspect, &other).join("\n");
            assert_eq!(found.lines().count(), 3, "{found}");
            for field in ["Config.User", "HostConfig.ShmSize", "Mounts."] {
                assert!(found.contains(field), "{field} is missing in {found}");
            }
        }
    }
}
