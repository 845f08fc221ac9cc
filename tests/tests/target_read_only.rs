//! A target whose file system takes no writes: the operator reads where and what to do, and the source goes on.

use std::path::Path;

use anyhow::{Result, ensure};
use lifeboat_tests::disk::{Disk, output};
use lifeboat_tests::shop::{self, FEW, SOURCE, TARGET, WHOLE, last_plan, says};

#[test]
fn a_read_only_target_is_named_and_the_same_evacuation_goes_on_once_it_is_writable() -> Result<()> {
    let Some(lab) = shop::lab("protected", &[])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let crew = shop::fleet(&lab, |_| ())?;
    shop::open(&crew, FEW)?;
    let before = shop::digest(source)?;
    target.run(["mkdir", "-p", "/srv/shop"])?;
    let mount = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "ro,size=64m",
        "tmpfs",
        "/srv/shop",
    ];
    target.run(mount)?;
    let error = shop::refused(&crew)?;
    let what = format!("cannot create {}: Read-only file system", shop::DATA);
    says(
        &error,
        &["rolled back", TARGET, &what, "choose another target"],
    )?;
    shop::runs_on(source)?;
    shop::nothing_left_on(target)?;

    target.run(["mount", "-o", "remount,rw", "/srv/shop"])?;
    shop::moved(&lab, &crew, &before)?;
    Ok(())
}

#[test]
fn a_target_whose_file_system_fails_while_it_receives_rolls_the_plan_back() -> Result<()> {
    let Some(lab) = shop::lab("protected-during", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "read-only", 128) else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let crew = shop::fleet(&lab, |_| ())?;
    shop::open(&crew, WHOLE)?;
    let before = shop::digest(source)?;
    output("mkfs.ext4", &["-q", disk.device()]);
    target.run(["mkdir", "-p", "/srv/shop"])?;
    let mount = ["mount", disk.device(), "/srv/shop"];
    target.run(mount)?;

    // Slow enough to be overtaken: 32 MiB take about five seconds.
    lab.shape(target, Some(50))?;
    // As the kernel does it when the journal cannot be written.
    let abort = ["mount", "-o", "remount,abort", "/srv/shop"];
    let error = shop::refused_while(&crew, target, &abort)?;
    says(
        &error,
        &[
            "rolled back",
            "sending to haven",
            "run on here",
            shop::DATA,
            "kept/",
            "the target's file system is read-only",
            "choose another target",
        ],
    )?;
    ensure!(last_plan(&crew)?["over"] == true, "the plan is not over");
    shop::runs_on(source)?;

    lab.shape(target, None)?;
    target.run(["umount", "/srv/shop"])?;
    target.run(mount)?;
    shop::moved(&lab, &crew, &before)?;
    Ok(())
}
