//! Devices that ask for what they may not: of another fleet, with used or foreign tokens, without pairing.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lifeboat::model::action::{Action, Actions};
use lifeboat::model::control::{RelayRequest, Secret};
use lifeboat::model::fleet::{Role, TwinNeeds};
use lifeboat::model::ids::PlanId;
use lifeboat::model::units::Bytes;
use lifeboat_tests::shop::{self, DUPLICATOR, FEW, SOURCE, TARGET, logged, says};
use serde_json::{Value, json};
use xtask::lab::{Host, Lab};
use xtask::process::wait_for;
use xtask::workspace;

const ADVERSARY: &str = env!("CARGO_BIN_EXE_adversary");
const IDENTITY: &str = "/var/lib/lifeboat";
const STRANGER: &str = "stranger";

fn control(host: &Host) -> String {
    format!("{}:7400", host.address())
}

/// A call from `from` under the identity in `identity` to the device `name` on `to`.
fn call(from: &Host, identity: &str, to: &Host, path: &str, body: &Value) -> Result<Value> {
    let (address, body) = (control(to), body.to_string());
    let answer = from.run([
        ADVERSARY,
        "call",
        identity,
        to.name(),
        &address,
        path,
        &body,
    ])?;
    Ok(serde_json::from_str(&answer)?)
}

/// A call that must be refused with an error that holds all of `parts`.
fn refused(
    from: &Host,
    identity: &str,
    (to, path): (&Host, &str),
    body: &Value,
    parts: &[&str],
) -> Result<()> {
    match call(from, identity, to, path, body) {
        Ok(answer) => bail!("{path} was answered with {answer}"),
        Err(error) => says(&format!("{error:#}"), parts),
    }
}

/// Enrols `host` in a fleet of its own, under the name of our source.
fn other_fleet(host: &Host) -> Result<()> {
    let lifeboat = workspace::binary("lifeboat").display().to_string();
    let address = format!("{}:7500", host.address());
    let dir = "/var/lib/other";
    host.run([
        &lifeboat,
        "fleet",
        "init",
        "--dir",
        dir,
        "--advertise",
        &address,
    ])?;
    let config = format!("listen: {address}\nstate: {dir}\n");
    host.write("/etc/lifeboat/other.yaml", config)?;
    host.spawn_logged(
        "other",
        [
            &lifeboat,
            "duplicator",
            "--config",
            "/etc/lifeboat/other.yaml",
        ],
    )?;
    wait_for("the other duplicator", Duration::from_secs(10), || {
        let listening = host.run(["ss", "-Hltn", "sport", "=", ":7500"])?;
        Ok((!listening.is_empty()).then_some(()))
    })?;
    let token = host.run([&lifeboat, "fleet", "invite", "--dir", dir, "--for", SOURCE])?;
    host.write("/run/token", token)?;
    let own = control(host);
    let join = ["fleet", "join", "--dir", IDENTITY, "--device", SOURCE];
    let rest = ["--advertise", &own, "--token-file", "/run/token"];
    let argv = [lifeboat.as_str()].into_iter().chain(join).chain(rest);
    host.run(argv).map(drop)
}

/// The identity in `host` with our fleet's CA in the place of its own, so that it accepts our servers and
/// only they can refuse it.
fn forge_identity(host: &Host, source: &Host) -> Result<()> {
    let read = |host: &Host| -> Result<Value> {
        let path = host.path(&format!("{IDENTITY}/identity.json"));
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    };
    let (mut forged, ours) = (read(host)?, read(source)?);
    forged["ca"] = ours["ca"].clone();
    host.write("/var/lib/forged/identity.json", forged.to_string())
}

#[test]
fn a_device_of_another_fleet_is_refused_and_named_and_stalls_nobody() -> Result<()> {
    let Some(lab) = shop::lab("wrong-ca", &[STRANGER])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let stranger = lab.host(STRANGER)?;
    let crew = shop::fleet(&lab, |_| ())?;
    shop::open(&crew, FEW)?;
    let before = shop::digest(source)?;
    other_fleet(stranger)?;
    forge_identity(stranger, source)?;

    let from = stranger.address().to_string();
    let log = |host: &Host| {
        if host.name() == DUPLICATOR {
            std::fs::read_to_string(host.log("duplicator")).unwrap_or_default()
        } else {
            crew.log(host.name())
        }
    };
    for host in [target, lab.host(DUPLICATOR)?] {
        let ask = (host, "/v1/pairings/request");
        let name = format!("{} at {}", host.name(), control(host));
        let honest = [name.as_str(), "not from this fleet's CA", "another fleet?"];
        refused(stranger, IDENTITY, ask, &json!({}), &honest)?;
        logged(|| log(host), &["refused", &from, "UnknownCA"])?;
        let forged = [
            name.as_str(),
            "refuses this device's certificate",
            "another fleet?",
        ];
        refused(stranger, "/var/lib/forged", ask, &json!({}), &forged)?;
        logged(|| log(host), &["refused", &from, "UnknownIssuer"])?;

        let idle = format!("idle-{}", host.name());
        stranger.spawn_logged(&idle, [ADVERSARY, "idle", "40", &control(host)])?;
        logged(
            || std::fs::read_to_string(stranger.log(&idle)).unwrap_or_default(),
            &["40 connections are open"],
        )?;
    }
    // The silent connections have five seconds to say something; nobody else waits for that.
    let asked = Instant::now();
    let unknown = json!({ "pairing": "none" });
    let ask = (target, "/v1/tokens/issue");
    refused(
        source,
        IDENTITY,
        ask,
        &unknown,
        &["there is no pairing none"],
    )?;
    let answered = asked.elapsed();
    ensure!(
        answered < Duration::from_secs(3),
        "answered after {answered:?}"
    );

    shop::runs_on(source)?;
    shop::moved(&lab, &crew, &before)?;
    Ok(())
}

/// Pairs `source` with the target, as an agent that was taken over could; returns the pairing's id.
fn pair(lab: &Lab, plan: &str, role: Role, actions: &Actions) -> Result<Value> {
    let ask = json!({
        "plan": plan, "role": role, "actions": actions, "quantity": 1, "volumes": [0],
        "twins": TwinNeeds::default(), "exclude": [], "configuration": null,
    });
    let (source, duplicator) = (lab.host(SOURCE)?, lab.host(DUPLICATOR)?);
    let answer = call(source, IDENTITY, duplicator, "/v1/pairings/request", &ask)?;
    ensure!(answer["answer"] == "paired", "not paired: {answer}");
    Ok(answer["notice"]["pairing"].clone())
}

fn token(lab: &Lab, pairing: &Value) -> Result<Value> {
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let ask = json!({ "pairing": pairing });
    call(source, IDENTITY, target, "/v1/tokens/issue", &ask)
}

/// Returns a token for `plan` and `actions`; `parts` is what the refusal must say, none for an acceptance.
fn authorise(
    lab: &Lab,
    (plan, actions): (&str, &Actions),
    token: &Value,
    parts: Option<&[&str]>,
) -> Result<()> {
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let ask = json!({ "plan": plan, "actions": actions, "token": token });
    match parts {
        Some(parts) => refused(source, IDENTITY, (target, "/v1/authorise"), &ask, parts),
        None => call(source, IDENTITY, target, "/v1/authorise", &ask).map(drop),
    }
}

/// The token with one bit of its sealed part changed.
fn altered(token: &Value) -> Result<Value> {
    let sealed = token["sealed"].as_str().context("a token is sealed")?;
    let other = if sealed.starts_with('0') { "1" } else { "0" };
    let mut altered = token.clone();
    altered["sealed"] = format!("{other}{}", &sealed[1..]).into();
    Ok(altered)
}

fn relay(plan: &str, actions: &Actions) -> Result<Value> {
    let address = "127.0.0.1:1".parse()?;
    Ok(serde_json::to_value(RelayRequest {
        plan: PlanId::from(plan),
        actions: actions.clone(),
        forward: Some((address, Secret([7; 32]))),
        seal_key: Some(Secret([7; 32])),
        serve: None,
        quantity: Bytes(1),
    })?)
}

/// A relay, blocks and an offer that no pairing covers.
fn without_pairing(lab: &Lab, mut plan: Value) -> Result<()> {
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let both = Actions([Action::Encrypt, Action::Transfer].into());
    let why = [
        "source is not authorised here for plan p-none",
        "return the token",
    ];
    let ask = (target, "/v1/plans/p-none/relay");
    refused(source, IDENTITY, ask, &relay("p-none", &both)?, &why)?;

    let why = ["does not answer source in the stead of the source of plan p-none"];
    let ask = (target, "/v1/plans/p-none/stand-in");
    let copy = json!({ "volume": 0, "copy": 1, "fill": true });
    refused(source, IDENTITY, ask, &copy, &why)?;
    let why = ["no plan p-none is under way on this source"];
    let ask = (target, "/v1/plans/p-none/provide");
    refused(source, IDENTITY, ask, &json!(null), &why)?;

    plan["id"] = "p-none".into();
    plan["target"] = json!({
        "device": TARGET, "address": control(target), "pairing": null, "explanation": [],
    });
    let why = [
        "plan p-none is not for us",
        "the duplicator did not lend us",
    ];
    let ask = (target, "/v1/plans/p-none/offer");
    refused(
        source,
        IDENTITY,
        ask,
        &json!({ "plan": plan, "layers": {} }),
        &why,
    )
}

#[test]
fn used_altered_and_foreign_tokens_and_requests_without_pairing_are_refused() -> Result<()> {
    let Some(lab) = shop::lab("tokens", &[])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let mut crew = shop::fleet(&lab, |_| ())?;
    shop::open(&crew, FEW)?;
    let before = shop::digest(source)?;
    let (_, plan) = crew.ask(SOURCE, &["plan", "--all"])?;
    // From here on somebody else speaks with the source's identity: its agent would end these pairings.
    crew.kill_agent(SOURCE)?;
    without_pairing(&lab, plan)?;

    let (none, seal) = (Actions::default(), Actions([Action::Encrypt].into()));
    let first = token(&lab, &pair(&lab, "p-first", Role::Target, &none)?)?;
    let second = token(&lab, &pair(&lab, "p-second", Role::Paired, &seal)?)?;
    authorise(
        &lab,
        ("p-first", &none),
        &altered(&first)?,
        Some(&["altered"]),
    )?;
    let foreign = ["is for plan p-second, not for plan p-first"];
    authorise(&lab, ("p-first", &seal), &second, Some(&foreign))?;
    let mut renamed = second.clone();
    renamed["pairing"] = first["pairing"].clone();
    let other_secret = ["sealed with another secret"];
    authorise(&lab, ("p-first", &none), &renamed, Some(&other_secret))?;
    let both = Actions([Action::Encrypt, Action::Transfer].into());
    let fewer = ["is for encrypt, not for encrypt"];
    authorise(&lab, ("p-second", &both), &second, Some(&fewer))?;
    // None of this used the tokens up; their right use does, also over a restart of the device.
    let used = ["used before", "ask for a new one"];
    for (plan, actions, token) in [("p-first", &none, &first), ("p-second", &seal, &second)] {
        authorise(&lab, (plan, actions), token, None)?;
        authorise(&lab, (plan, actions), token, Some(&used))?;
    }
    crew.kill_agent(TARGET)?;
    crew.start_agent(TARGET)?;
    authorise(&lab, ("p-first", &none), &first, Some(&used))?;
    for why in ["used before", "not for plan p-first", "altered"] {
        logged(|| crew.log(TARGET), &["token refused", why])?;
    }

    // An authorisation is good for its own plan, role and actions alone.
    let uncovered = ["covers encrypt, not encrypt"];
    let ask = (target, "/v1/plans/p-second/relay");
    refused(
        source,
        IDENTITY,
        ask,
        &relay("p-second", &both)?,
        &uncovered,
    )?;
    let ask = (target, "/v1/plans/p-first/relay");
    let wrong_role = ["not authorised here for plan p-first"];
    refused(
        source,
        IDENTITY,
        ask,
        &relay("p-first", &none)?,
        &wrong_role,
    )?;
    let announce = (target, "/v1/pairings/end");
    let only = ["only the duplicator may ask this", SOURCE];
    refused(source, IDENTITY, announce, &first["pairing"], &only)?;

    shop::runs_on(source)?;
    shop::nothing_left_on(target)?;
    crew.start_agent(SOURCE)?;
    shop::known(&crew)?;
    shop::moved(&lab, &crew, &before)?;
    Ok(())
}
