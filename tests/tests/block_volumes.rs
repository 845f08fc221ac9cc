//! Containers over a block device and over a disk image move with the bytes of both.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::boxes;
use lifeboat_tests::disk::{Disk, output};
use lifeboat_tests::shop::{self, CONTAINER, SOURCE, TARGET, says};
use lifeboat_tests::stage::dies_at;
use xtask::crew::{Crew, Device, wait_for_end};
use xtask::lab::{Host, Lab};
use xtask::process::wait_for;

/// Where a target keeps the images of devices.
const IMAGES: &str = "/var/lib/lifeboat/images";

/// The disk image that the container mounts as a single file.
const IMAGE: &str = "/srv/shop/disk.img";

/// Block of 512 bytes at which the container keeps how many blocks it has written below it.
const COUNTER: u64 = 20_000;

/// Detaches what is left over images below a host's [`IMAGES`]; to be dropped before the lab.
struct Attached(PathBuf);

impl Attached {
    fn devices(&self) -> Vec<String> {
        let images = fs::read_dir(&self.0).into_iter().flatten().flatten();
        images
            .flat_map(|image| {
                let path = image.path();
                let arguments = ["--noheadings", "--output", "NAME", "--associated"];
                let names = output(
                    "losetup",
                    &[&arguments[..], &[path.to_str().expect("plain")]].concat(),
                );
                names.lines().map(str::to_owned).collect::<Vec<_>>()
            })
            .collect()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        for device in self.devices() {
            let _ = Command::new("losetup").args(["-d", &device]).status();
        }
    }
}

/// Starts the container over device and image: it counts on from what it finds on the device, and writes each
/// number to its own place of both.
fn open(crew: &Crew, device: &str) -> Result<()> {
    let host = crew.host(SOURCE)?;
    host.run(["sh", "-c", &format!("mkdir -p /srv/shop && truncate -s 12M {IMAGE} && dd if=/dev/urandom of={IMAGE} bs=1M seek=8 count=4 conv=notrunc 2>&1")])?;
    let write = format!(
        "cd /tmp; n=$(busybox dd if=/dev/xvda bs=512 skip={COUNTER} count=1 2>/dev/null | busybox tr -d '\\0')
        while :; do n=$((n+1)); echo $n >n
        for disk in /dev/xvda /disk.img; do busybox dd if=n of=$disk bs=512 seek=$n conv=notrunc,fsync 2>/dev/null; done
        busybox dd if=n of=/dev/xvda bs=512 seek={COUNTER} conv=notrunc,fsync 2>/dev/null
        sleep 0.1; done"
    );
    let arguments = [
        "--restart=always",
        &format!("--device={device}:/dev/xvda"),
        &format!("--volume={IMAGE}:/disk.img"),
    ];
    boxes::start(host, CONTAINER, &arguments, &["sh", "-c", &write])?;
    shop::known(crew)
}

fn text_at(path: &Path, block: u64) -> Result<String> {
    let mut bytes = [0; 512];
    fs::File::open(path)
        .and_then(|file| file.read_exact_at(&mut bytes, block * 512))
        .with_context(|| format!("{} at block {block}", path.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.trim_end_matches('\0').trim().to_owned())
}

fn counter(path: &Path) -> Result<u64> {
    let text = text_at(path, COUNTER)?;
    text.parse()
        .with_context(|| format!("{} counts {text:?}", path.display()))
}

fn counts_on(path: &Path, from: u64) -> Result<()> {
    wait_for("the container's count", Duration::from_secs(30), || {
        Ok((counter(path).unwrap_or(0) > from).then_some(()))
    })
}

fn fleet(lab: &Lab, allowed: Option<&str>) -> Result<Crew> {
    let mut devices = [Device::new(SOURCE), Device::new(TARGET)];
    let line = allowed.map(|device| format!("block_roots: [{device}]"));
    devices[0].migration.extend(line);
    Crew::start(lab, shop::DUPLICATOR, &devices)
}

fn left_on(target: &Host) -> Vec<PathBuf> {
    let images = fs::read_dir(target.path(IMAGES)).into_iter().flatten();
    images.flatten().map(|entry| entry.path()).collect()
}

#[test]
fn a_container_moves_with_its_block_device_and_its_disk_image() -> Result<()> {
    let Some(lab) = shop::lab("block", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "moved", 24) else {
        return Ok(());
    };
    let kept = "dd if=/dev/urandom of=\"$0\" bs=1M seek=12 count=6 oflag=direct 2>&1";
    output("sh", &["-c", kept, disk.device()]);
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let attached = Attached(target.path(IMAGES));
    let crew = fleet(&lab, Some(disk.device()))?;
    open(&crew, disk.device())?;
    counts_on(&disk.device, 3)?;

    let plan = crew.tell(SOURCE, &["plan", "--all"])?;
    says(
        &plan,
        &[disk.device(), "24.0 MiB", IMAGE, "by dirty extents"],
    )?;
    // Given up on the way: the target is as it was.
    let slow = lab.shape(target, Some(20)).and_then(|()| {
        let mut asked = crew.begin(SOURCE, "given-up", &["evacuate", "--all", "--yes"])?;
        wait_for("data on the target", Duration::from_secs(60), || {
            Ok((!left_on(target).is_empty()).then_some(()))
        })?;
        let plan = shop::last_plan(&crew)?["plan"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        crew.tell(SOURCE, &["abort", &plan])?;
        asked.wait()?;
        lab.shape(target, None)
    });
    slow?;
    let empty = || Ok((left_on(target).is_empty() && attached.devices().is_empty()).then_some(()));
    wait_for("the target to be as it was", Duration::from_secs(30), empty)?;
    ensure!(!target.path(IMAGE).exists(), "the image was left there");
    counts_on(&disk.device, counter(&disk.device)?)?;

    crew.tell(SOURCE, &["evacuate", "--all", "--yes"])
        .with_context(|| format!("{}\n{}", crew.log(SOURCE), crew.log(TARGET)))?;
    let devices = attached.devices();
    ensure!(devices.len() == 1, "attached on the target: {devices:?}");
    let there = PathBuf::from(&devices[0]);
    let last = counter(&disk.device)?;
    counts_on(&there, last + 2)?;
    for number in 1..=last {
        for place in [&there, &target.path(IMAGE)] {
            let found = text_at(place, number)?;
            ensure!(
                found == number.to_string(),
                "{}: {number} is {found:?}",
                place.display()
            );
        }
    }
    let random = |path: &Path, mib: u64| -> Result<Vec<u8>> {
        let mut bytes = vec![0; 1 << 20];
        fs::File::open(path)?.read_exact_at(&mut bytes, mib << 20)?;
        Ok(bytes)
    };
    for mib in 11..19 {
        ensure!(
            random(&disk.device, mib)? == random(&there, mib)?,
            "MiB {mib} differs"
        );
    }
    let image = |host: &Host| random(&host.path(IMAGE), 10);
    ensure!(image(source)? == image(target)?, "the image differs");
    let id = shop::last_plan(&crew)?["plan"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    crew.tell(SOURCE, &["verify", &id])?;
    let report = crew.tell(SOURCE, &["report", &id])?;
    ensure!(
        !report.contains("on the twin"),
        "the twin differs from its source:\n{report}"
    );
    Ok(())
}

/// Fills a file system with noise, keeps some of it, and returns the bytes of what is kept.
fn fill(mounted: &str) {
    let noise = "cd \"$0\"; for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=gone-$n bs=1M count=8; done
        mkdir kept; for n in 1 2 3; do dd if=/dev/urandom of=kept/$n bs=1M count=2; done; sync; rm gone-*";
    output("sh", &["-c", &format!("exec 2>&1; {noise}"), mounted]);
}

/// Sums of the files that are kept, by a file system that is mounted only for that.
fn sums(image: &Path, within: &Path) -> Result<String> {
    fs::create_dir_all(within)?;
    let (image, at) = (
        image.to_str().context("plain")?,
        within.to_str().context("plain")?,
    );
    output("mount", &["-o", "loop,ro", image, at]);
    let sums = Command::new("sh")
        .args(["-c", "cd \"$0\" && sha256sum kept/*", at])
        .output();
    output("umount", &[at]);
    let sums = sums?;
    ensure!(
        sums.status.success(),
        "{}",
        String::from_utf8_lossy(&sums.stderr)
    );
    Ok(String::from_utf8(sums.stdout)?)
}

#[test]
fn what_file_systems_do_not_use_stays_behind_and_the_copies_are_whole() -> Result<()> {
    let Some(lab) = shop::lab("unused", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "unused", 96) else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    output("mkfs.ext4", &["-q", disk.device()]);
    fill(&disk.mount());
    disk.unmount();
    let image = source.path(IMAGE);
    fs::create_dir_all(image.parent().context("a directory")?)?;
    fs::File::create(&image)?.set_len(320 << 20)?;
    let (image_text, at) = (
        image.to_str().context("plain")?,
        disk.directory.join("mount"),
    );
    output("mkfs.xfs", &["-q", image_text]);
    output(
        "mount",
        &["-o", "loop", image_text, at.to_str().context("plain")?],
    );
    fill(at.to_str().context("plain")?);
    output("umount", &[at.to_str().context("plain")?]);

    let _attached = Attached(target.path(IMAGES));
    let crew = fleet(&lab, Some(disk.device()))?;
    let arguments = [
        &*format!("--device={}:/dev/xvda", disk.device()),
        &format!("--volume={IMAGE}:/disk.img"),
    ];
    boxes::start(
        source,
        CONTAINER,
        &arguments,
        &["sh", "-c", "while :; do sleep 1; done"],
    )?;
    shop::known(&crew)?;
    let plan = crew.tell(SOURCE, &["plan", "--all"])?;
    says(
        &plan,
        &[
            "that its ext4 does not use are left out",
            "that its xfs does not use are left out",
        ],
    )?;
    crew.tell(SOURCE, &["evacuate", "--all", "--yes"])
        .with_context(|| format!("{}\n{}", crew.log(SOURCE), crew.log(TARGET)))?;

    let images = left_on(target);
    ensure!(images.len() == 1, "devices of the target: {images:?}");
    let arrived = target.path(IMAGE);
    output(
        "e2fsck",
        &["-f", "-n", images[0].to_str().context("plain")?],
    );
    output("xfs_repair", &["-n", arrived.to_str().context("plain")?]);
    for (here, there) in [
        (&disk.directory.join("disk"), &images[0]),
        (&image, &arrived),
    ] {
        let name = there.display();
        ensure!(
            sums(here, &at)? == sums(there, &at)?,
            "files of {name} differ"
        );
    }
    let id = shop::last_plan(&crew)?["plan"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    crew.tell(SOURCE, &["verify", &id])?;
    let report = crew.tell(SOURCE, &["report", &id])?;
    says(&report, &["left out that its file system does not use"])?;
    // Twelve MiB of files are kept, 96 are gone.
    let told: serde_json::Value =
        serde_json::from_str(&crew.tell(SOURCE, &["--json", "report", &id])?)?;
    let wire = told["wire"].as_u64().context("bytes on the wire")?;
    ensure!(wire < 40 << 20, "{wire} bytes were sent:\n{report}");
    Ok(())
}

/// Writes numbered files to a directory, each synced before the next, until it is told to stop; tells how many.
fn write_on(directory: &Path, written: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let number = written.load(Ordering::Relaxed) + 1;
        let mut file = fs::File::create(directory.join(number.to_string()))?;
        file.write_all(number.to_string().repeat(3000).as_bytes())?;
        file.sync_all()?;
        written.store(number, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn what_is_mounted_from_a_device_is_frozen_for_the_last_changes_and_let_go_after_a_kill()
-> Result<()> {
    let Some(lab) = shop::lab("mounted", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "mounted", 64) else {
        return Ok(());
    };
    output("mkfs.ext4", &["-q", disk.device()]);
    let at = PathBuf::from(disk.mount());
    let target = lab.host(TARGET)?;
    let _attached = Attached(target.path(IMAGES));
    let mut crew = fleet(&lab, Some(disk.device()))?;
    let arguments = [&*format!("--device={}:/dev/xvda", disk.device())];
    boxes::start(
        lab.host(SOURCE)?,
        CONTAINER,
        &arguments,
        &["sh", "-c", "while :; do sleep 1; done"],
    )?;
    shop::known(&crew)?;
    let plan = crew.tell(SOURCE, &["plan", "--all"])?;
    says(
        &plan,
        &[
            "is mounted at",
            "frozen while its last changes are sent",
            "are left out",
        ],
    )?;
    crew.kill_agent(SOURCE)?;
    crew.start_agent_with(SOURCE, &dies_at("release"))?;

    let (written, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (before, id) = thread::scope(|scope| -> Result<_> {
        let writer = scope.spawn(|| write_on(&at, &written, &stop));
        let moved = (|| -> Result<_> {
            shop::known(&crew)?;
            let before = written.load(Ordering::Relaxed);
            let mut asked = crew.begin(SOURCE, "asked", &["evacuate", "--all", "--yes"])?;
            crew.await_agent_end(SOURCE, MOVED)?;
            asked.wait()?;
            let mut touch = Command::new("touch").arg(at.join("touched")).spawn()?;
            thread::sleep(Duration::from_millis(300));
            let is_frozen = touch.try_wait()?.is_none();
            crew.start_agent(SOURCE)?;
            wait_for("the file system to be let go", MOVED, || {
                Ok(touch.try_wait()?)
            })?;
            ensure!(is_frozen, "the file system was not frozen");
            let id = shop::last_plan(&crew)?["plan"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            let report = wait_for_end(&crew, SOURCE, &id, MOVED)?;
            ensure!(report["state"] == "completed", "{report:#}");
            let now = written.load(Ordering::Relaxed);
            wait_for("writes after the switch", MOVED, || {
                Ok((written.load(Ordering::Relaxed) > now + 2).then_some(()))
            })?;
            Ok((before, id))
        })();
        stop.store(true, Ordering::Relaxed);
        if moved.is_err() {
            // Whatever went wrong, the writer must not wait for ever.
            let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&at).status();
        }
        writer.join().expect("it does not panic")?;
        moved
    })?;
    let images = left_on(target);
    ensure!(images.len() == 1, "devices of the target: {images:?}");
    let image = images[0].to_str().context("plain")?;
    output("e2fsck", &["-f", "-n", image]);
    let copy = disk.directory.join("copy");
    fs::create_dir(&copy)?;
    output(
        "mount",
        &["-o", "loop,ro", image, copy.to_str().context("plain")?],
    );
    let looked = (|| -> Result<u64> {
        let mut number = 1;
        while copy.join(number.to_string()).exists() {
            let text = fs::read_to_string(copy.join(number.to_string()))?;
            let whole = number.to_string().repeat(3000);
            // The one that was being written when everything stopped may be shorter.
            let is_last = !copy.join((number + 1).to_string()).exists();
            ensure!(
                text == whole || is_last && whole.starts_with(&text),
                "file {number} differs"
            );
            number += 1;
        }
        Ok(number - 1)
    })();
    output("umount", &[copy.to_str().context("plain")?]);
    let arrived = looked?;
    ensure!(
        arrived >= before && arrived > 0,
        "{arrived} files arrived, {before} were there"
    );
    crew.tell(SOURCE, &["verify", &id])?;
    Ok(())
}

/// Longer than any step takes on a busy machine.
const MOVED: Duration = Duration::from_secs(120);

#[test]
fn a_device_that_nobody_allowed_to_move_blocks_the_plan() -> Result<()> {
    let Some(lab) = shop::lab("block-no", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "refused", 24) else {
        return Ok(());
    };
    let crew = fleet(&lab, Some("/dev/nothing"))?;
    open(&crew, disk.device())?;
    let error = shop::refused(&crew)?;
    says(&error, &[CONTAINER, disk.device(), "`block_roots`"])?;
    shop::nothing_left_on(lab.host(TARGET)?)
}
