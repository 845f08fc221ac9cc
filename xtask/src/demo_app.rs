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
    .with_context(|| {
        host.podman(["ps", "--all", "--format", "{{.Names}}: {{.Status}}"])
            .unwrap_or_else(|error| format!("{error:#}"))
    })
}
