//! The demo application on a lab host: nginx → a small service → PostgreSQL and Redis.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::images;
use crate::lab::Host;
use crate::process::wait_for;

/// Port of the host on which the application answers.
pub const PORT: u16 = 8080;

/// Its containers, parents first.
pub const CONTAINERS: [&str; 4] = ["db", "cache", "app", "web"];

/// Builds and loads the images, makes network and volumes, starts the four containers and waits until a
/// request goes through all of them.
///
/// # Errors
/// Podman refused a step, or the application did not answer within a minute.
pub fn deploy(host: &Host) -> Result<()> {
    images::load(host)?;
    host.podman(["network", "create", "demo"])?;
    host.podman(["volume", "create", "demo-db"])?;
    host.run(["mkdir", "-p", "/srv/demo-cache"])?;
    run(
        host,
        "db",
        &["--volume", "demo-db:/var/lib/postgresql/data"],
        "postgres",
    )?;
    run(
        host,
        "cache",
        &["--volume", "/srv/demo-cache:/data"],
        "redis",
    )?;
    run(
        host,
        "app",
        &["--env", "DB=db:5432", "--env", "CACHE=cache:6379"],
        "demo-app",
    )?;
    run(host, "web", &["--publish", &format!("{PORT}:80")], "nginx")?;
    wait_until_healthy(host, Duration::from_secs(60))
}

fn run(host: &Host, name: &str, options: &[&str], image: &str) -> Result<()> {
    let image = format!("localhost/{image}:demo");
    let fixed = [
        "run",
        "--detach",
        "--name",
        name,
        "--network",
        "demo",
        "--restart",
        "always",
    ];
    host.podman(fixed.iter().chain(options).chain(&[image.as_str()]))
        .map(drop)
}

/// Waits until the application on `host` answers that both databases take requests.
///
/// # Errors
/// It did not within `patience`; the message holds the state of the containers.
pub fn wait_until_healthy(host: &Host, patience: Duration) -> Result<()> {
    let url = format!("http://127.0.0.1:{PORT}/health");
    wait_for("the demo application's health", patience, || {
        Ok(host
            .run(["curl", "--silent", "--fail", "--max-time", "2", &url])
            .ok())
    })
    .map(drop)
    .with_context(|| state(host))
}

/// What an operator would look at when the application does not answer: its containers, what it answers, how long the
/// name server takes to find a database, and the last lines of each container's log.
#[must_use]
pub fn state(host: &Host) -> String {
    let mut questions = vec![
        "podman ps --all --format '{{.Names}}: {{.Status}}'".to_owned(),
        format!("curl --silent --show-error --max-time 9 http://127.0.0.1:{PORT}/health"),
        "time nsenter --net --target $(podman inspect --format '{{.State.Pid}}' app) \
         busybox nslookup db.dns.podman $(podman network inspect --format '{{(index .Subnets 0).Gateway}}' demo)"
            .to_owned(),
    ];
    questions.extend(CONTAINERS.map(|name| format!("podman logs --tail 5 {name}")));
    let answers = questions.iter().map(|question| {
        let script = format!("({question}) 2>&1 || true");
        let answer = host.run(["bash", "-c", &script]);
        format!(
            "$ {question}\n{}",
            answer.unwrap_or_else(|error| format!("{error:#}"))
        )
    });
    answers.collect::<Vec<_>>().join("\n")
}
