//! Transfers, and plans that switch first, whose sides are killed and whose link is cut at random instants: they go on
//! from what had arrived, and no change is lost.

use anyhow::{Result, ensure};
use xtask::process::is_root;
use xtask::soak::switch::{Switch, switch};
use xtask::soak::{Transfer, transfer};

#[test]
fn two_hundred_random_kills_lose_nothing_and_hardly_anything_is_sent_again() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    let tally = transfer(&Transfer {
        kills: 200,
        seed: None,
        mib: 128,
    })?;
    ensure!(tally.kills.iter().sum::<u32>() >= 200, "{tally}");
    ensure!(
        tally.kills.iter().all(|&kills| kills > 0),
        "a side was spared: {tally}"
    );
    ensure!(
        tally.epochs.iter().all(|&kills| kills > 0),
        "an epoch was spared: {tally}"
    );
    Ok(())
}

#[test]
fn a_plan_that_switches_first_and_its_abort_lose_no_change_whichever_agent_is_killed() -> Result<()>
{
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    let tally = switch(&Switch {
        kills: 8,
        seed: None,
        mib: 12,
    })?;
    ensure!(tally.kills.iter().sum::<u32>() >= 8, "{tally}");
    ensure!(tally.completed > 0 && tally.returned > 0, "{tally}");
    ensure!(tally.changes[0] > 50, "{tally}");
    Ok(())
}
