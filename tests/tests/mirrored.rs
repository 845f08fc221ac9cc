//! The mirror of a served tree: what is written on the mount is on the source when a sync was answered, and the log
//! written over the old tree makes it the new one, whoever is killed meanwhile.

#[path = "mirrored/changes.rs"]
mod changes;
#[path = "mirrored/disks.rs"]
mod disks;
#[path = "mirrored/scene.rs"]
mod scene;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lifeboat::model::fleet::Role;
use lifeboat::model::ids::{PlanId, VolumeId};
use lifeboat::model::trace::FetchOrder;
use lifeboat::serve::{Filler, Mirrored, Mount, Store};
use lifeboat::transfer::fetch::{FetchPlan, Grant};
use lifeboat::transfer::{
    DataKey, DataServer, Door, Hop, LinkKey, Options, ProvidePlan, ProvideVolume, Sealing,
    Whereabouts,
};
use lifeboat::volume::mirror::{Log, write_back};
use lifeboat::volume::{BlockSize, FleetKey, scan};
use lifeboat_tests::disk::{self, Disk};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, OFlag, RenameFlags, fallocate, openat, renameat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::symlinkat;
use scene::*;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};
use xtask::process::{is_root, output, wait_for};
use xtask::soak::Chance;

#[test]
fn random_changes_on_a_mount_written_over_the_old_tree_lead_to_the_same_tree() -> Result<()> {
    if act()? {
        return Ok(());
    }
    let test = "random_changes_on_a_mount_written_over_the_old_tree_lead_to_the_same_tree";
    for seed in 1..=2 {
        let Some(mut scene) = Scene::up(test)? else {
            return Ok(());
        };
        let done = scene.change_at_random(seed);
        done.with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

#[test]
fn a_sync_is_answered_when_the_source_has_it_or_when_it_is_noted_that_it_has_not() -> Result<()> {
    if act()? {
        return Ok(());
    }
    let test = "a_sync_is_answered_when_the_source_has_it_or_when_it_is_noted_that_it_has_not";
    let Some(mut scene) = Scene::up(test)? else {
        return Ok(());
    };
    let note = scene.place.store().join("mirror/unmirrored");
    let file = File::create(scene.place.mount().join("synced"))?;
    let in_log = |scene: &Scene, what: &[u8]| -> Result<bool> {
        let log = fs::read(scene.place.log().join("log"))?;
        Ok(log.windows(what.len()).any(|window| window == what))
    };
    file.write_all_at(b"what was acknowledged first", 0)?;
    file.sync_all()?;
    ensure!(in_log(&scene, b"what was acknowledged first")? && !note.exists());

    let (mirrored, plain) = (cost(&scene.place.mount())?, cost(&scene.place.0)?);
    println!("4 KiB and fdatasync: {mirrored:?} mirrored, {plain:?} on the disk below");

    scene.cut_source();
    file.write_all_at(b"what nobody else has", 4096)?;
    let began = Instant::now();
    file.sync_all()?;
    ensure!(
        began.elapsed() >= SYNC_PATIENCE && note.exists(),
        "nothing says that it is not mirrored"
    );
    scene.is_unmirrored()?;
    let began = Instant::now();
    file.sync_data()?;
    ensure!(
        began.elapsed() < SYNC_PATIENCE,
        "each sync waits for a source that is away"
    );
    ensure!(!in_log(&scene, b"what nobody else has")?);

    // Also what was not acknowledged by the source before the target died.
    scene.kill_target()?;
    scene.is_unmirrored()?;
    scene.mend_source()?;
    scene.all_is_mirrored()?;
    ensure!(in_log(&scene, b"what nobody else has")? && !note.exists());
    scene.cut_source();
    let at = scene.place.mount().join("dsync");
    sh(
        &scene.place.0,
        &format!(
            "dd if=/dev/zero bs=4k count=4 oflag=dsync status=none of={}",
            at.display()
        ),
    )?;
    ensure!(
        note.exists(),
        "a write that is synced at once does not wait"
    );
    scene.mend_source()?;
    scene.all_is_mirrored()?;
    scene.return_to_copy(0)?;
    let other = scene.place.0.join("other");
    fs::create_dir(&other)?;
    if write_back(&other, &scene.place.source()).is_ok() {
        bail!("a log that is not there was written back");
    }
    Ok(())
}

/// Time of a write of 4 KiB with its sync, the mean of 200.
fn cost(directory: &Path) -> Result<Duration> {
    let file = File::create(directory.join("timed"))?;
    let began = Instant::now();
    for n in 0..200 {
        file.write_all_at(&[7; 4096], n * 4096)?;
        file.sync_data()?;
    }
    Ok(began.elapsed() / 200)
}

/// A scene whose source has all changes, and whose target died then; none where there can be none.
fn dead_target(test: &'static str) -> Result<Option<Scene>> {
    let Some(mut scene) = Scene::up(test)? else {
        return Ok(None);
    };
    let file = File::create(scene.place.mount().join("synced"))?;
    file.write_all_at(b"what was acknowledged", 0)?;
    file.sync_all()?;
    scene.all_is_mirrored()?;
    scene.actor.kill()?;
    Ok(Some(scene))
}

impl Scene {
    /// The mirror is lost for good and says why; what is written is kept here all the same.
    fn is_lost(&mut self, why: &str) -> Result<()> {
        for _ in 0..2 {
            self.kill_target()?;
            let file = File::options()
                .write(true)
                .open(self.place.mount().join("synced"))?;
            file.write_all_at(&[7; 100_000], 4096)?;
            file.sync_all()?;
            let said = wait_for("the figures to say so", PATIENCE, || {
                Ok(self.mirrored()?.unmirrored)
            })?;
            ensure!(said.contains(why), "{said}");
        }
        let kept = fs::read(self.place.mount().join("synced"))?;
        ensure!(kept.starts_with(b"what was acknowledged") && kept.ends_with(&[7; 4096]));
        Ok(())
    }
}

#[test]
fn a_target_whose_host_died_says_that_its_mirror_is_lost() -> Result<()> {
    if act()? {
        return Ok(());
    }
    let Some(mut scene) = dead_target("a_target_whose_host_died_says_that_its_mirror_is_lost")?
    else {
        return Ok(());
    };
    // As if it had run in another life of the host.
    fs::write(scene.place.store().join("mirror/boot"), "another boot")?;
    scene.is_lost("the host was started anew")
}

#[test]
fn a_mirror_whose_log_is_at_its_cap_ends_and_says_so() -> Result<()> {
    if act()? {
        return Ok(());
    }
    let Some(mut scene) = dead_target("a_mirror_whose_log_is_at_its_cap_ends_and_says_so")? else {
        return Ok(());
    };
    // As if 64 GiB had gone through it: its head says where its records begin.
    let log = File::options()
        .write(true)
        .open(scene.place.store().join("mirror/log"))?;
    log.write_all_at(&((64_u64 << 30) - 50_000).to_le_bytes(), 32)?;
    drop(log);
    scene.is_lost("at its cap of 64 GiB")
}

/// A reader of one file from its beginning to its end, or until who serves it is killed.
fn reader(path: PathBuf) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        if let Ok(mut file) = File::open(path) {
            // It is killed sometimes.
            let _ = std::io::copy(&mut file, &mut std::io::sink());
        }
    })
}

#[test]
fn arriving_is_no_modification_whoever_is_killed_in_it_and_takes_no_modification_back() -> Result<()>
{
    if act()? {
        return Ok(());
    }
    let files = 24;
    let Some(mut scene) = Scene::up_with(
        "arriving_is_no_modification_whoever_is_killed_in_it_and_takes_no_modification_back",
        "for n in $(seq 24); do head -c 8000000 /dev/urandom >k$n; head -c 2000000 /dev/urandom >s$n
         setcap cap_net_raw+ep k$n; touch -d '2001-02-03 04:05:06.7 UTC' k$n; done",
    )?
    else {
        return Ok(());
    };
    let mount = scene.place.mount();
    for number in 1..=files {
        let reads = reader(mount.join(format!("k{number}")));
        std::thread::sleep(Duration::from_millis(3 + 2 * number % 9));
        scene.kill_target()?;
        ensure!(reads.join().is_ok(), "the reader panicked");
    }
    let set = SystemTime::UNIX_EPOCH + Duration::from_secs(987_654_321);
    for number in 1..=files {
        let path = mount.join(format!("s{number}"));
        let file = File::options().read(true).write(true).open(&path)?;
        let reads = reader(path);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 400_000)?;
        file.set_modified(set)?;
        ensure!(reads.join().is_ok(), "the reader panicked");
    }
    let data = scene.place.store().join("data");
    let mut wrong = Vec::new();
    for number in 1..=files {
        let (kept, changed) = (format!("k{number}"), data.join(format!("s{number}")));
        let modified = |path: &Path| fs::metadata(path)?.modified();
        if modified(&changed)? != set {
            wrong.push(format!("{}: its time was taken back", changed.display()));
        }
        let there = scene.place.source().join(&kept);
        if modified(&data.join(&kept))? != modified(&there)? {
            wrong.push(format!("{kept}: its time is that of its arrival"));
        }
        let capability = output(Command::new("getcap").arg(data.join(&kept)))?;
        if !capability.contains("cap_net_raw") {
            wrong.push(format!("{kept}: its capability is gone"));
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

#[test]
fn a_full_disk_refuses_writes_and_the_mirror_has_all_the_others() -> Result<()> {
    if act()? {
        return Ok(());
    }
    let test = "a_full_disk_refuses_writes_and_the_mirror_has_all_the_others";
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "full", 64) else {
        return Ok(());
    };
    disk::output("mkfs.ext4", &["-q", disk.device()]);
    let place = Place(Path::new(&disk.mount()).join("place"));
    let Some(scene) = Scene::up_at(place, test, "")? else {
        return Ok(());
    };
    let mount = scene.place.mount();
    let filling = File::create(mount.join("filling"))?;
    let bytes = vec![7; 64 << 10];
    let mut refused = None;
    for block in 0..1200_u64 {
        // From the disk's end on over what is there already: the data needs no space then, but its log does.
        let at = if refused.is_some() { block % 16 } else { block };
        match filling.write_all_at(&bytes, at << 16) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::ENOSPC as i32) => {
                refused = refused.or(Some(block));
            }
            Err(error) => return Err(error.into()),
        }
    }
    println!("refused from {refused:?} on: {:?}", scene.mirrored()?);
    ensure!(refused.is_some(), "the disk was never full");
    ensure!(!scene.place.store().join("mirror/lost").exists());
    drop(filling);
    fs::remove_file(mount.join("filling"))?;
    fs::write(mount.join("after"), &bytes)?;
    scene.all_is_mirrored()?;
    // Not on the full disk, which has both logs already.
    let copy = disk.directory.join("copy");
    output(
        Command::new("cp")
            .arg("-a")
            .args([&scene.place.0.join("copy"), &copy]),
    )?;
    scene.return_to(copy)
}

#[test]
fn a_source_whose_disk_has_no_space_for_the_log_says_so_and_has_every_change_once_it_has()
-> Result<()> {
    if act()? {
        return Ok(());
    }
    let Some(scene) = Scene::up_with(
        "a_source_whose_disk_has_no_space_for_the_log_says_so_and_has_every_change_once_it_has",
        "mkdir ../log; mount -t tmpfs -o size=2m tmpfs ../log",
    )?
    else {
        return Ok(());
    };
    scene.outgrows_the_log("No space left")?;
    sh(&scene.place.0, "mount -o remount,size=64m log")?;
    scene.all_is_mirrored()?;
    scene.return_to_copy(0)
}

#[test]
fn a_source_that_cannot_take_its_tree_back_says_why_and_does_once_it_can() -> Result<()> {
    if act()? {
        return Ok(());
    }
    let test = "a_source_that_cannot_take_its_tree_back_says_why_and_does_once_it_can";
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "back", 64) else {
        return Ok(());
    };
    disk::output("mkfs.ext4", &["-q", disk.device()]);
    let tree = Path::new(&disk.mount()).join("tree");
    let Some(scene) = Scene::up(test)? else {
        return Ok(());
    };
    let mount = scene.place.mount();
    fs::write(mount.join("made"), vec![7; 24 << 20])?;
    fs::write(mount.join("d0/n0"), vec![8; 300_000])?;
    sh(&mount, "rm d2/n2; mv n1 d0/d1/moved; sync")?;
    scene.all_is_mirrored()?;
    output(
        Command::new("cp")
            .arg("-a")
            .args([&scene.place.0.join("copy"), &tree]),
    )?;
    let refused = |parts: [&str; 2]| {
        let said = write_back(&scene.place.log(), &tree).map_err(|error| error.to_string());
        let said = said.err().context("it was written back")?;
        ensure!(parts.iter().all(|part| said.contains(part)), "{said}");
        Ok(())
    };
    sh(&tree, "chattr +i d0/n0")?;
    refused(["`d0/n0`", "`chattr -i -a` allows it, and it goes on"])?;
    sh(&tree, "chattr -i d0/n0")?;
    sh(&tree, "head -c 100M /dev/zero >../filling || true")?;
    refused(["`made`", "no space left on the source"])?;
    // Whatever it has done by then.
    sh(&tree, "rm ../filling")?;
    scene.return_to(tree)
}

#[test]
fn a_file_that_is_removed_by_one_and_made_by_another_can_be_opened_at_every_instant() -> Result<()>
{
    if act()? {
        return Ok(());
    }
    let test = "a_file_that_is_removed_by_one_and_made_by_another_can_be_opened_at_every_instant";
    let Some(scene) = Scene::up(test)? else {
        return Ok(());
    };
    let (path, other) = (
        scene.place.mount().join("d0/fought"),
        scene.place.mount().join("other"),
    );
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let removes = scope.spawn(|| {
            let mut removed = 0;
            while !over.load(Ordering::Relaxed) {
                removed += u32::from(fs::remove_file(&path).is_ok());
                fs::write(&other, b"other")?;
                // Over whatever is there.
                fs::rename(&other, &path)?;
            }
            Ok::<_, std::io::Error>(removed)
        });
        let mut made = Ok(());
        for _ in 0..4000 {
            made = made.and_then(|()| {
                let mut options = OpenOptions::new();
                let file = options.read(true).write(true).create(true).open(&path)?;
                file.write_all_at(b"made", 0)?;
                let mut there = [0; 4];
                file.read_exact_at(&mut there, 0)?;
                file.metadata().map(drop)
            });
        }
        over.store(true, Ordering::Relaxed);
        let removed = removes.join().map_err(|_| anyhow!("it panicked"))??;
        made.context("while another process removed it")?;
        println!("removed {removed} times");
        ensure!(removed > 10, "nobody was in the way");
        Ok(())
    })?;
    scene.all_is_mirrored()?;
    scene.return_to_copy(0)
}

#[test]
fn what_is_made_below_a_default_acl_keeps_its_set_id_bits_and_names_of_trusted_are_roots_alone()
-> Result<()> {
    if act()? {
        return Ok(());
    }
    let Some(scene) = Scene::up(
        "what_is_made_below_a_default_acl_keeps_its_set_id_bits_and_names_of_trusted_are_roots_alone",
    )?
    else {
        return Ok(());
    };
    let (plain, mount) = (scene.place.0.join("copy"), scene.place.mount());
    let mut made = Vec::new();
    for root in [&plain, &mount] {
        let (file, directory) = (root.join("d2/file"), root.join("d2/directory"));
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o6755)
            .open(&file)?;
        fs::DirBuilder::new().mode(0o1777).create(&directory)?;
        for path in [file, directory] {
            let mode = fs::metadata(&path)?.permissions().mode();
            made.push((mode, output(Command::new("getfacl").arg("-c").arg(&path))?));
        }
    }
    let (on_disk, mounted) = made.split_at(2);
    ensure!(
        on_disk == mounted,
        "{on_disk:?} on the disk, {mounted:?} on the mount"
    );
    ensure!(mounted[0].0 & 0o6000 == 0o6000, "{mounted:?}");

    sh(&mount, "setfattr -n trusted.secret -v x n1")?;
    let listed = |who: &str| {
        let list = format!("setpriv --reuid {who} --clear-groups getfattr -m - n1");
        output(Command::new("sh").args(["-ec", &list]).current_dir(&mount))
    };
    let (by_root, by_another) = (listed("0")?, listed("65534")?);
    ensure!(by_root.contains("trusted.secret"), "{by_root}");
    ensure!(
        by_another.contains("user.a") && !by_another.contains("trusted"),
        "{by_another}"
    );
    Ok(())
}

#[test]
fn a_capability_that_finds_no_space_on_a_full_disk_is_there_again_once_there_is_some() -> Result<()>
{
    if act()? {
        return Ok(());
    }
    let test = "a_capability_that_finds_no_space_on_a_full_disk_is_there_again_once_there_is_some";
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "capability", 64) else {
        return Ok(());
    };
    // Every attribute takes a block of its own, which a write frees and takes.
    disk::output(
        "mkfs.ext4",
        &["-q", "-b", "4096", "-I", "128", "-m", "0", disk.device()],
    );
    let on_disk = Path::new(&disk.mount()).join("store");
    fs::create_dir(&on_disk)?;
    // Blocks of equal attributes would be one.
    let more = format!(
        "mkdir ../store; mount --bind {} ../store; for cap in raw admin; do head -c 4000 /dev/urandom >$cap
         setcap cap_net_$cap+ep $cap; touch -d '2001-02-03 04:05:06 UTC' $cap; done",
        on_disk.display()
    );
    let Some(mut scene) = Scene::up_with(test, &more)? else {
        return Ok(());
    };
    let filling = disk.directory.join("mount/filling");
    for (name, dies) in [("raw", false), ("admin", true)] {
        let mut file = File::create(&filling)?;
        wait_for("a full disk", PATIENCE, || {
            // Until nothing more can be written, and what was has its place.
            while file.write_all(&[7; 4096]).is_ok() {}
            file.sync_all()?;
            let free = nix::sys::statvfs::fstatvfs(&file)?.blocks_available();
            Ok((free == 0).then_some(()))
        })?;
        drop(file);
        let (mounted, data) = (
            scene.place.mount().join(name),
            scene.place.store().join("data").join(name),
        );
        let capability = || output(Command::new("getcap").arg(&data));
        // Who reads is told so, or the kernel tries once more.
        let _ = fs::read(&mounted);
        ensure!(
            capability()?.is_empty(),
            "the disk had space for the capability"
        );
        fs::remove_file(&filling)?;
        nix::unistd::syncfs(File::open(disk.directory.join("mount"))?)?;
        if dies {
            scene.kill_target()?;
        } else {
            ensure!(fs::read(&mounted)? == fs::read(scene.place.source().join(name))?);
        }
        ensure!(
            capability()?.contains(&format!("cap_net_{name}")),
            "{name} lost its capability"
        );
        ensure!(
            fs::metadata(&data)?.modified()?
                == fs::metadata(scene.place.source().join(name))?.modified()?,
            "{name} has another time"
        );
    }
    Ok(())
}

impl Scene {
    /// Writes more than there is place for in the log, whose figures then say why it is not all there.
    fn outgrows_the_log(&self, why: &str) -> Result<()> {
        let file = File::create(self.place.mount().join("made"))?;
        for block in 0..8 {
            file.write_all_at(&vec![7; 1 << 20], block << 20)?;
        }
        file.sync_all()?;
        wait_for("the figures to say so", PATIENCE, || {
            let said = self.mirrored()?.unmirrored.unwrap_or_default();
            Ok(said.contains(why).then_some(()))
        })
    }
}

/// A btrfs at a path, of which quotas are counted; none where there can be none.
fn counted(name: &str) -> Option<(Disk, PathBuf)> {
    if !Command::new("mkfs.btrfs")
        .arg("--version")
        .output()
        .is_ok_and(|done| done.status.success())
    {
        println!("not run: there is no mkfs.btrfs");
        return None;
    }
    let disk = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), name, 256)?;
    disk::output("mkfs.btrfs", &["-q", disk.device()]);
    let at = disk.mount();
    disk::output("btrfs", &["quota", "enable", &at]);
    let limited = Path::new(&at).join("limited");
    disk::output("btrfs", &["subvolume", "create", limited.to_str()?]);
    Some((disk, limited))
}

fn limit(to: &str, directory: &Path) {
    disk::output(
        "btrfs",
        &["qgroup", "limit", to, directory.to_str().expect("plain")],
    );
}

#[test]
fn a_source_whose_quota_is_used_up_by_the_log_has_every_change_once_it_is_raised_and_takes_its_tree_back()
-> Result<()> {
    if act()? {
        return Ok(());
    }
    let test = "a_source_whose_quota_is_used_up_by_the_log_has_every_change_once_it_is_raised_and_takes_its_tree_back";
    let Some((_disk, limited)) = counted("quota-log") else {
        return Ok(());
    };
    limit("2M", &limited);
    let bind = format!("mkdir ../log; mount --bind {} ../log", limited.display());
    let Some(scene) = Scene::up_with(test, &bind)? else {
        return Ok(());
    };
    scene.outgrows_the_log("uota exceeded")?;
    limit("none", &limited);
    scene.all_is_mirrored()?;

    // Its tree has a quota too.
    let Some((_disk, tree)) = counted("quota-back") else {
        return Ok(());
    };
    output(
        Command::new("cp")
            .arg("-a")
            .args([&scene.place.0.join("copy/."), &tree]),
    )?;
    limit("4M", &tree);
    let said = write_back(&scene.place.log(), &tree).map_err(|error| error.to_string());
    let said = said.err().context("it was written back")?;
    println!("{said}");
    ensure!(
        said.contains("`made`") && said.contains("the source's disk quota is used up"),
        "{said}"
    );
    ensure!(!said.contains("target"), "{said}");
    limit("none", &tree);
    scene.return_to(tree)
}
