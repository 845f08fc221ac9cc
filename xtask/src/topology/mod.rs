//! Scripted topologies of real containers whose relations are known, and what the agent makes of them.
//!
//! Every kind has containers of its own (`KIND-server`, `KIND-client`), so that an edge that is missing or
//! wrong belongs to exactly one kind. The answer comes from the built agent through its command line.

mod cases;
mod namespaces;
mod podman_like;

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use self::cases::{BRIEF, Call, Case, OLDER, POD, SHARE, TRANSLATED};
pub use self::namespaces::{containerd, plain};
pub use self::podman_like::{docker, podman, rootless};
use crate::lab::Host;
use crate::process::{log_tail, wait_for};
use crate::workspace;

/// child, parent, transport, port, `observed` or `inferred`.
pub type Edge = (String, String, String, u64, String);

/// What came of one kind of connection under one runtime.
#[derive(Debug)]
pub struct Outcome {
    /// Runtime.
    pub runtime: &'static str,
    /// Kind of connection.
    pub kind: &'static str,
    /// The truth.
    pub expected: BTreeSet<Edge>,
    /// What of the truth was found.
    pub found: usize,
    /// Edges with a container of this kind that are not true.
    pub wrong: Vec<Edge>,
    /// What the found edges' figures get wrong; empty when nothing.
    pub figures: Vec<String>,
}

impl Outcome {
    /// Whether everything was found, and nothing else.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.found == self.expected.len() && self.wrong.is_empty() && self.figures.is_empty()
    }
}

const LEAST_MOVED: u64 = 1 << 20;

/// Something that runs talkers on a lab host.
trait Runtime {
    fn name(&self) -> &'static str;
    fn host(&self) -> &Host;
    /// Its socket, for the agent's configuration.
    fn socket(&self) -> String;
    /// Makes the networks `front`, `back` and `six`, and the pod `pair` where there are pods.
    fn prepare(&self) -> Result<()>;
    /// Starts a talker, with options as Docker has them.
    fn start(&self, name: &str, options: &[String], talker: &[String]) -> Result<()>;
    /// An address of a talker in its network.
    fn address(&self, name: &str, six: bool) -> Result<String>;
    /// What a talker has written.
    fn said(&self, name: &str) -> Result<String>;
    /// Changes the packet filter where the networks are.
    fn iptables(&self, rule: &str) -> Result<()>;
    /// The agent's name for a talker.
    fn shown(&self, name: &str) -> String {
        name.to_owned()
    }
}

fn start_client(runtime: &dyn Runtime, case: &Case) -> Result<()> {
    let server = case.server_name();
    let options: Vec<String> = case
        .client
        .iter()
        .map(|word| word.replace("SERVER", &server))
        .collect();
    let call = match &case.calls {
        Call::To(call) => call.clone(),
        Call::ServerAt("tcp6", port) => {
            format!("tcp=[{}]:{port}", runtime.address(&server, true)?)
        }
        Call::ServerAt(how, port) => format!("{how}={}:{port}", runtime.address(&server, false)?),
    };
    runtime.start(&case.client_name(), &options, &["call".into(), call])
}

/// Waits until a client's talker has done everything.
fn await_ready(runtime: &dyn Runtime, name: &str) -> Result<()> {
    wait_for(
        &format!("{name} to be ready"),
        Duration::from_secs(20),
        || Ok(runtime.said(name)?.contains("ready").then_some(())),
    )
    .with_context(|| runtime.said(name).unwrap_or_default())
}

fn start_agent(host: &Host, socket: &str) -> Result<()> {
    host.write(
        "/etc/lifeboat/agent.yaml",
        format!("device: {}\nruntimes: [{socket}]\n", host.name()),
    )?;
    let lifeboat = workspace::binary("lifeboat");
    ensure!(lifeboat.exists(), "lifeboat is not built: `cargo build`");
    host.spawn_logged("agent", [lifeboat.as_os_str(), "agent".as_ref()])?;
    wait_for("the agent's first view", Duration::from_secs(20), || {
        Ok(relations(host).ok())
    })
    .with_context(|| log_tail(&host.log("agent"), 2000))
    .map(drop)
}

/// What `lifeboat relations` says.
fn relations(host: &Host) -> Result<Value> {
    ask(host, "relations")
}

/// When the agent's last sweep was, by its clock.
fn swept(host: &Host) -> Result<Option<u64>> {
    Ok(ask(host, "status")?["view"]["snapshot"]["at"].as_u64())
}

fn ask(host: &Host, what: &str) -> Result<Value> {
    let lifeboat = workspace::binary("lifeboat");
    let text = host.run([lifeboat.as_os_str(), "--json".as_ref(), what.as_ref()])?;
    Ok(serde_json::from_str(&text)?)
}

fn edges(relations: &Value) -> impl Iterator<Item = &Value> {
    relations["edges"].as_array().into_iter().flatten()
}

fn as_edge(edge: &Value) -> Edge {
    let text = |field: &str| edge[field].as_str().unwrap_or_default().to_owned();
    let port = edge["port"].as_u64().unwrap_or(0);
    (
        text("child"),
        text("parent"),
        text("protocol"),
        port,
        text("learnt"),
    )
}

/// Clients of `front` reach the server of `back` at an address that nobody has, and from one that is not theirs.
fn translate(runtime: &dyn Runtime, case: &Case) -> Result<()> {
    let server = runtime.address(&case.server_name(), false)?;
    let (address, port) = TRANSLATED.split_once(':').context("address and port")?;
    runtime.iptables(&format!(
        "-t nat -I PREROUTING -d {address} -p tcp --dport {port} -j DNAT --to-destination {server}:80"
    ))?;
    runtime.iptables(&format!(
        "-t nat -I POSTROUTING -s 10.126.0.0/24 -d {server} -j MASQUERADE"
    ))?;
    runtime.iptables("-I FORWARD -j ACCEPT")
}

/// Runs all kinds under a runtime and compares what the agent says with the truth.
fn run_cases(runtime: &dyn Runtime, cases: &[Case]) -> Result<Vec<Outcome>> {
    let host = runtime.host();
    host.run(["mkdir", "-p", "--mode", "1777", SHARE])?;
    host.run(["chmod", "1777", SHARE])?;
    runtime.prepare()?;
    for case in cases {
        let talker = ["serve".into(), case.serves.clone()];
        runtime
            .start(&case.server_name(), &case.server, &talker)
            .with_context(|| case.kind)?;
    }
    if let Some(case) = cases.iter().find(|case| case.kind.starts_with("NAT")) {
        translate(runtime, case)?;
    }
    let (older, rest): (Vec<&Case>, Vec<&Case>) = cases.iter().partition(|case| case.kind == OLDER);
    for case in &older {
        start_client(runtime, case)?;
        await_ready(runtime, &case.client_name())?;
    }
    start_agent(host, &runtime.socket())?;
    for case in &rest {
        start_client(runtime, case).with_context(|| case.kind)?;
    }
    for case in &rest {
        await_ready(runtime, &case.client_name())?;
    }
    let shown = |name: &str| runtime.shown(name);
    let truth: BTreeSet<Edge> = cases.iter().flat_map(|case| case.truth(&shown)).collect();
    // What is still missing after this long is missing.
    let _ = wait_for("all edges", Duration::from_secs(25), || {
        let seen: BTreeSet<Edge> = edges(&relations(host)?).map(as_edge).collect();
        Ok(truth.is_subset(&seen).then_some(()))
    });
    // Two more sweeps, for figures and for edges that are not true.
    for _ in 0..2 {
        let before = swept(host)?;
        wait_for("a sweep", Duration::from_secs(20), || {
            Ok((swept(host)? > before).then_some(()))
        })?;
    }
    let seen = relations(host)?;
    Ok(cases
        .iter()
        .map(|case| judge(runtime, case, &seen))
        .collect())
}

fn judge(runtime: &dyn Runtime, case: &Case, seen: &Value) -> Outcome {
    let expected = case.truth(&|name| runtime.shown(name));
    let names = [case.client_name(), case.server_name()].map(|name| runtime.shown(&name));
    let (right, wrong): (Vec<&Value>, Vec<&Value>) = edges(seen)
        .filter(|edge| {
            let ours = |end: &str| names.iter().any(|name| edge[end] == **name);
            ours("child") || ours("parent")
        })
        .partition(|edge| expected.contains(&as_edge(edge)));
    let mut figures = Vec::new();
    for edge in &right {
        let moved = edge["bytes_to_parent"].as_u64();
        let bulk = matches!(case.kind, "sendfile" | "splice");
        let least = if bulk { LEAST_MOVED } else { 1_000 };
        if case.transport == "tcp"
            && case.learnt == "observed"
            && moved.is_none_or(|moved| moved < least)
        {
            figures.push(format!("{moved:?} bytes instead of {least}"));
        }
        if case.transport == "tcp" && case.learnt == "observed" {
            for figure in ["srtt_us", "retransmits"] {
                if !edge[figure].is_u64() {
                    figures.push(format!("no {figure}"));
                }
            }
        }
        if case.kind == BRIEF && edge["connections"] != 100 {
            figures.push(format!(
                "{} connections instead of 100",
                edge["connections"]
            ));
        }
    }
    if case.kind == POD {
        let correlated = seen["correlated"].as_array().into_iter().flatten();
        let pairs: Vec<BTreeSet<&str>> = correlated
            .filter_map(|pair| Some(pair.as_array()?.iter().filter_map(Value::as_str).collect()))
            .collect();
        let pair: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        if !pairs.contains(&pair) {
            figures.push("the containers of the pod are not correlated".to_owned());
        }
    }
    Outcome {
        runtime: runtime.name(),
        kind: case.kind,
        found: right.len(),
        wrong: wrong.into_iter().map(as_edge).collect(),
        figures,
        expected,
    }
}

/// Whether a program is on this machine.
#[must_use]
pub fn has(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|run| run.status.success())
}

/// The table of `docs/relations-accuracy.md`.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut text =
        String::from("| runtime | kind | recall | precision | figures |\n|---|---|---|---|---|\n");
    for outcome in outcomes {
        let all = outcome.expected.len();
        let said = outcome.found + outcome.wrong.len();
        let percent = |part: usize, whole: usize| match whole {
            0 => "–".to_owned(),
            _ => format!("{} %", part * 100 / whole),
        };
        let figures = if outcome.figures.is_empty() {
            "right".to_owned()
        } else {
            outcome.figures.join("; ")
        };
        text.push_str(&format!(
            "| {} | {} | {} | {} | {figures} |\n",
            outcome.runtime,
            outcome.kind,
            percent(outcome.found, all),
            percent(outcome.found, said)
        ));
    }
    text
}
