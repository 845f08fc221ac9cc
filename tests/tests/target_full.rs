//! A target without room: refused in advance where that can be known, rolled back where it cannot.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use lifeboat_tests::shop::{self, FEW, Goods, SOURCE, TARGET, last_plan, says};
use xtask::lab::Host;
use xtask::process::wait_for;

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

/// Evacuates, and runs `fill` on the target as soon as data arrives there; returns the operator's error.
fn refused_while_filling(crew: &xtask::crew::Crew, target: &Host, fill: &str) -> Result<String> {
    thread::scope(|scope| {
        let evacuation = scope.spawn(|| shop::refused(crew));
        let arrives = target.path(&format!("{}/kept", shop::DATA));
        wait_for("data on the target", Duration::from_secs(30), || {
            Ok(arrives.exists().then_some(()))
        })?;
        target.run(["sh", "-c", fill])?;
        evacuation.join().expect("it only returns errors")
    })
}

#[test]
fn a_target_that_fills_up_while_it_receives_rolls_the_plan_back() -> Result<()> {
    let Some(lab) = shop::lab("full-during", &[])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let crew = shop::fleet(&lab, |_| ())?;
    // Files that travel whole: space for them cannot be set aside when the first of them arrives.
    let goods = Goods {
        large_mib: 0,
        files: 64,
        file_kib: 512,
    };
    shop::open(&crew, goods)?;
    let before = shop::digest(source)?;
    small_disk(target, "size=80m")?;

    // Slow enough to be overtaken: 32 MiB take about five seconds.
    lab.shape(target, Some(50))?;
    let fill = "cat /dev/zero >/srv/shop/filler 2>/dev/null; true";
    let error = refused_while_filling(&crew, target, fill)?;
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
