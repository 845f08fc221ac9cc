//! Who depends on whom, found by the built agent among real containers whose relations are known.

use anyhow::{Result, ensure};
use xtask::process::is_root;
use xtask::topology::{self, Outcome};

/// Every kind must be found exactly: nothing missing, nothing that is not so, and the figures right.
fn all_exact(outcomes: &[Outcome]) -> Result<()> {
    println!("{}", topology::table(outcomes));
    let inexact: Vec<&Outcome> = outcomes
        .iter()
        .filter(|outcome| !outcome.is_exact())
        .collect();
    ensure!(inexact.is_empty(), "{inexact:#?}");
    Ok(())
}

#[test]
fn every_kind_of_connection_between_podman_containers_is_found() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    all_exact(&topology::podman()?)
}

#[test]
fn every_kind_of_connection_between_docker_containers_is_found() -> Result<()> {
    if !is_root() || !topology::has("dockerd") {
        eprintln!("skipped: lab hosts need root and dockerd (Debian: docker.io)");
        return Ok(());
    }
    all_exact(&topology::docker(true)?)?;
    all_exact(&topology::docker(false)?)
}

#[test]
fn every_kind_of_connection_between_plain_cgroups_is_found() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    all_exact(&topology::plain()?)
}
