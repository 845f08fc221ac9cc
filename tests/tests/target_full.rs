//! A target without room: refused in advance where that can be known, rolled back where it cannot.

use anyhow::{Result, ensure};
use lifeboat_tests::shop::{self, FEW, Goods, SOURCE, TARGET, WHOLE, last_plan, says};
use xtask::lab::Host;

/// A file system of its own for the volume's place on the target.
fn small_disk(target: &Host, options: &str) -> Result<()> {
    target.run(["mkdir", "-p", "/srv/shop"])?;
    let mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/srv/shop"];
    target.run(mount).map(drop)
}

fn resize(target: &Host, options: &str) -> Result<()> {
    let options = format!("remount,{options}");
    target.run(["mount", "-o", &options, "/srv/shop"]).map(drop)
}

#[test]
fn a_target_with_too_little_room_refuses_in_advance_and_names_free_and_needed() -> Result<()> {
    let Some(lab) = shop::lab("full-before", &[])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let crew = shop::fleet(&lab, |_| ())?;
    shop::open(
        &crew,
        Goods {
            large_mib: 24,
            ..FEW
        },
    )?;
    let before = shop::digest(source)?;

    small_disk(target, "size=16m")?;
    let error = shop::refused(&crew)?;
    says(
        &error,
        &[TARGET, "16.0 MiB free", shop::DATA, "need 24", "free space"],
    )?;
    shop::runs_on(source)?;
    shop::nothing_left_on(target)?;

    resize(target, "size=64m,nr_inodes=8")?;
    let error = shop::refused(&crew)?;
    says(
        &error,
        &[TARGET, "inodes free", shop::DATA, "need 1", "remove files"],
    )?;
    shop::runs_on(source)?;
    shop::nothing_left_on(target)?;

    resize(target, "nr_inodes=1000")?;
    shop::moved(&lab, &crew, &before)?;
    Ok(())
}

#[test]
fn a_target_that_fills_up_while_it_receives_rolls_the_plan_back() -> Result<()> {
    let Some(lab) = shop::lab("full-during", &[])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let crew = shop::fleet(&lab, |_| ())?;
    // Space for these cannot be set aside when the first of them arrives.
    shop::open(&crew, WHOLE)?;
    let before = shop::digest(source)?;
    small_disk(target, "size=80m")?;

    // Slow enough to be overtaken: 32 MiB take about five seconds.
    lab.shape(target, Some(50))?;
    let fill = "cat /dev/zero >/srv/shop/filler 2>/dev/null; true";
    let error = shop::refused_while(&crew, target, &["sh", "-c", fill])?;
    says(
        &error,
        &[
            "rolled back",
            "sending to haven",
            "run on here",
            shop::DATA,
            "kept/small/",
            "no space left",
            "free space there or choose another target",
        ],
    )?;
    ensure!(last_plan(&crew)?["over"] == true, "the plan is not over");
    shop::runs_on(source)?;
    shop::nothing_left_on(target)?;

    lab.shape(target, None)?;
    target.run(["rm", "/srv/shop/filler"])?;
    shop::moved(&lab, &crew, &before)?;
    Ok(())
}
