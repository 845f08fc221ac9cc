//! Who depends on whom, found by the built agent among real containers whose relations are known.

use anyhow::{Result, ensure};
use xtask::process::is_root;
use xtask::topology::{self, Outcome};

/// Every kind must be found exactly: nothing missing, nothing that is not so, and the figures right.
/// Not run, and said, where a program is missing.
fn all_exact(needed: &[&str], run: impl FnOnce() -> Result<Vec<Outcome>>) -> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    if let Some(missing) = needed.iter().find(|program| !topology::has(program)) {
        eprintln!("skipped: {missing} is not here: `cargo xtask setup`");
        return Ok(());
    }
    let outcomes = run()?;
    println!("{}", topology::table(&outcomes));
    let inexact: Vec<&Outcome> = outcomes
        .iter()
        .filter(|outcome| !outcome.is_exact())
        .collect();
    ensure!(inexact.is_empty(), "{inexact:#?}");
    Ok(())
}

#[test]
fn every_kind_of_connection_between_podman_containers_is_found() -> Result<()> {
    all_exact(&["podman"], topology::podman)
}

#[test]
fn every_kind_of_connection_between_containers_of_an_ordinary_user_is_found() -> Result<()> {
    all_exact(&["podman", "slirp4netns", "catatonit"], topology::rootless)
}

#[test]
fn every_kind_of_connection_between_docker_containers_is_found() -> Result<()> {
    all_exact(&["dockerd"], || topology::docker(true))
}

#[test]
fn every_kind_of_connection_between_docker_containers_without_its_proxy_is_found() -> Result<()> {
    all_exact(&["dockerd"], || topology::docker(false))
}

#[test]
fn every_kind_of_connection_between_containers_of_containerd_is_found() -> Result<()> {
    all_exact(&["containerd", "ctr"], topology::containerd)
}

#[test]
fn every_kind_of_connection_between_plain_cgroups_is_found() -> Result<()> {
    all_exact(&[], topology::plain)
}
