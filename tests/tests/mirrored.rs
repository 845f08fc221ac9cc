//! The mirror of a served tree: what is written on the mount is on the source when a sync was answered, and the log
//! written over the old tree makes it the new one, whoever is killed meanwhile.

#[path = "mirrored/disks.rs"]
mod disks;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lifeboat::model::ids::{PlanId, VolumeId};
use lifeboat::model::trace::FetchOrder;
use lifeboat::serve::{Filler, Mirrored, Mount, Store};
use lifeboat::transfer::fetch::{FetchPlan, Grant};
use lifeboat::transfer::{DataKey, DataServer, Hop, LinkKey, Options, ProvidePlan, ProvideVolume};
use lifeboat::volume::mirror::{Log, write_back};
use lifeboat::volume::{BlockSize, FleetKey, scan};
use lifeboat_tests::disk::{self, Disk};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, OFlag, RenameFlags, fallocate, openat, renameat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::symlinkat;
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

const PATIENCE: Duration = Duration::from_secs(60);
/// How long a sync waits for the source.
const SYNC_PATIENCE: Duration = Duration::from_secs(2);
/// What a process started by a test does.
const ROLE: &str = "LIFEBOAT_MIRRORED_ROLE";
const PLACE: &str = "LIFEBOAT_MIRRORED_PLACE";
const DOOR: &str = "LIFEBOAT_MIRRORED_DOOR";

/// The directories of one test: the source's tree, the mirror's log beside it, the target's store and mount.
struct Place(PathBuf);

impl Place {
    fn source(&self) -> PathBuf {
        self.0.join("source")
    }
    fn log(&self) -> PathBuf {
        self.0.join("log")
    }
    fn store(&self) -> PathBuf {
        self.0.join("store")
    }
    fn mount(&self) -> PathBuf {
        self.0.join("mount")
    }
    fn status(&self) -> PathBuf {
        self.0.join("status")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It may be unmounted already.
        self.clear();
    }
}

impl Place {
    /// Removes what an earlier run left.
    fn clear(&self) {
        for mount in [self.mount(), self.log(), self.store()] {
            let _ = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that serves the mount or writes back; killed when it is dropped.
struct Actor(Child);

impl Actor {
    fn start(role: &str, place: &Place, door: SocketAddr, test: &str) -> Result<Self> {
        let child = Command::new(env::current_exe()?)
            .args(["--exact", test, "--nocapture"])
            .env(ROLE, role)
            .env(PLACE, &place.0)
            .env(DOOR, door.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.kill();
    }
}

/// Does what this process was started for, if it was by a test.
fn act() -> Result<bool> {
    let Ok(role) = env::var(ROLE) else {
        return Ok(false);
    };
    let place = std::mem::ManuallyDrop::new(Place(env::var(PLACE)?.into()));
    if role == "return" {
        write_back(&place.log(), &place.0.join("copy"))?;
        return Ok(true);
    }
    let store = open(&place.store(), env::var(DOOR)?.parse()?, false)?;
    store.mirror(SYNC_PATIENCE)?;
    let _mount = Mount::at(&place.mount(), store.clone(), false)?;
    let parent = nix::unistd::getppid();
    while nix::unistd::getppid() == parent {
        let new = place.0.join("status.new");
        // The disk may be full.
        if fs::write(&new, serde_json::to_vec(&store.mirrored())?).is_ok() {
            fs::rename(new, place.status())?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

/// The store in `directory` of what lies at the source whose data plane is at `addr`.
fn open(directory: &Path, addr: SocketAddr, proves: bool) -> Result<Arc<Store>> {
    let plan = FetchPlan {
        plan: PlanId::from("plan"),
        volume: VolumeId(1),
        fleet_key: FleetKey([3; 32]),
        admit: Box::new(move || {
            Ok(Grant {
                hop: Hop {
                    addr,
                    link_key: LinkKey([1; 32]),
                },
                data_key: DataKey([2; 32]),
            })
        }),
    };
    let (options, patience) = (options(), SYNC_PATIENCE);
    Ok(Store::open(
        directory, "tree", plan, &options, patience, true, proves,
    )?)
}

fn options() -> Options {
    Options {
        patience: Duration::from_secs(5),
        backoff: Duration::from_millis(50),
        ..Options::default()
    }
}

/// The source's data plane, at `addr` when it was there before.
fn source(place: &Place, addr: Option<SocketAddr>) -> Result<DataServer> {
    let addr = addr.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
    let server = wait_for("the source's address", PATIENCE, || {
        Ok(DataServer::bind(addr, options(), None).ok())
    })?;
    server.admit_provide(ProvidePlan {
        plan: PlanId::from("plan"),
        link_key: LinkKey([1; 32]),
        data_key: DataKey([2; 32]),
        fleet_key: FleetKey([3; 32]),
        volumes: vec![ProvideVolume {
            id: VolumeId(1),
            path: place.source(),
            mirror: Some(place.log()),
            times: Default::default(),
        }],
    });
    Ok(server)
}

struct Scene {
    place: Place,
    server: Option<DataServer>,
    door: SocketAddr,
    actor: Actor,
    test: &'static str,
}

impl Scene {
    /// None where this cannot be run.
    fn up(test: &'static str) -> Result<Option<Self>> {
        Self::up_with(test, "")
    }

    /// As [`Self::up`], with what a script adds to the source's tree.
    fn up_with(test: &'static str, more: &str) -> Result<Option<Self>> {
        let place = Place(Path::new(env!("CARGO_TARGET_TMPDIR")).join(test));
        Self::up_at(place, test, more)
    }

    fn up_at(place: Place, test: &'static str, more: &str) -> Result<Option<Self>> {
        if !is_root() {
            println!("skipped: needs root for the mount");
            return Ok(None);
        }
        place.clear();
        for directory in [place.source(), place.mount()] {
            fs::create_dir_all(directory)?;
        }
        sh(
            &place.source(),
            "mkdir -p d0/d1 d2; head -c 700001 /dev/urandom >d0/n0; head -c 3000 /dev/urandom >n1; \
             head -c 100000 /dev/urandom >d2/n2; ln d2/n2 d0/n3; ln -s n1 n4; mkfifo d2/n5; \
             setfattr -n user.a -v b n1; setfacl -d -m u:7:rwx d2; truncate -s 1M n5",
        )?;
        sh(&place.source(), more)?;
        output(
            Command::new("cp")
                .arg("-a")
                .args([place.source(), place.0.join("copy")]),
        )?;
        let server = source(&place, None)?;
        let door = server.addr();
        let actor = Actor::start("serve", &place, door, test)?;
        let mut scene = Self {
            place,
            server: Some(server),
            door,
            actor,
            test,
        };
        scene.is_mounted()?;
        Ok(Some(scene))
    }

    fn is_mounted(&mut self) -> Result<()> {
        let there = self.place.status();
        let actor = &mut self.actor.0;
        wait_for("the mount", PATIENCE, || {
            ensure!(actor.try_wait()?.is_none(), "who serves it ended");
            Ok(there.exists().then_some(()))
        })
    }

    /// Kills who serves the mount and lets another take it up.
    fn kill_target(&mut self) -> Result<()> {
        self.actor.kill()?;
        fs::remove_file(self.place.status())?;
        self.actor = Actor::start("serve", &self.place, self.door, self.test)?;
        self.is_mounted()
    }

    fn cut_source(&mut self) {
        self.server = None;
    }

    fn mend_source(&mut self) -> Result<()> {
        self.server = Some(source(&self.place, Some(self.door))?);
        Ok(())
    }

    fn mirrored(&self) -> Result<Mirrored> {
        let read = || Ok(fs::read(self.place.status()).ok());
        let bytes = wait_for("the mirror's figures", PATIENCE, read)?;
        let figures: Option<Mirrored> = serde_json::from_slice(&bytes)?;
        figures.context("it is not mirrored")
    }

    fn is_unmirrored(&self) -> Result<()> {
        wait_for("the figures to say so", PATIENCE, || {
            Ok(self.mirrored()?.unmirrored.map(drop))
        })
    }

    fn all_is_mirrored(&self) -> Result<Mirrored> {
        wait_for("the source to have all", PATIENCE, || {
            let figures = self.mirrored()?;
            let all = figures.changes == figures.acknowledged && figures.unmirrored.is_none();
            Ok(all.then_some(figures))
        })
    }

    /// Writes the log over a copy of the old tree, killed so many times, and compares it with the mount.
    fn return_to_copy(&self, deaths: u32) -> Result<()> {
        let copy = self.place.0.join("copy");
        for death in 0..deaths {
            let mut actor = Actor::start("return", &self.place, self.door, self.test)?;
            std::thread::sleep(Duration::from_millis(u64::from(5 + death * 9)));
            actor.kill()?;
        }
        self.return_to(copy)
    }

    fn return_to(&self, copy: PathBuf) -> Result<()> {
        let changes = write_back(&self.place.log(), &copy)?;
        wait_for("the figures to say so", PATIENCE, || {
            Ok((changes > 0 && changes == self.mirrored()?.changes).then_some(()))
        })?;
        ensure!(
            write_back(&self.place.log(), &copy)? == changes,
            "it is done once"
        );
        for (from, to) in [
            (self.place.mount(), copy.clone()),
            (copy, self.place.mount()),
        ] {
            let said = output(
                Command::new("rsync")
                    .args([
                        "-aHAXS",
                        "--checksum",
                        "--delete",
                        "--dry-run",
                        "--itemize-changes",
                    ])
                    .args([format!("{}/", from.display()), format!("{}/", to.display())]),
            )?;
            ensure!(
                said.trim().is_empty(),
                "{} -> {}:\n{said}",
                from.display(),
                to.display()
            );
        }
        Ok(())
    }
}

fn sh(at: &Path, script: &str) -> Result<()> {
    output(Command::new("sh").args(["-ec", script]).current_dir(at)).map(drop)
}

fn some_path(chance: &mut Chance, root: &Path) -> PathBuf {
    let directory = ["", "d0", "d2", "d0/d1", "d3"][chance.below(5) as usize];
    root.join(directory).join(format!("n{}", chance.below(7)))
}

fn some_directory(chance: &mut Chance, root: &Path) -> PathBuf {
    root.join(["d0", "d2", "d0/d1", "d3", "d2/d1", "d0/d4"][chance.below(6) as usize])
}

/// One random change; one that cannot be is none.
fn change(chance: &mut Chance, root: &Path, held: &mut Vec<File>) -> std::io::Result<()> {
    let (path, other) = (some_path(chance, root), some_path(chance, root));
    let (offset, length) = (chance.below(900_000), 1 + chance.below(150_000));
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match chance.below(24) {
        0..5 => {
            // A FIFO that is opened so does not wait.
            let file = options.create(chance.below(3) == 0).open(&path)?;
            let bytes: Vec<u8> = (0..length).map(|n| (n * 7 + offset) as u8).collect();
            file.write_all_at(&bytes, offset)?;
            if chance.below(3) == 0 {
                file.sync_all()?;
            }
            if held.len() < 4 {
                held.push(file);
            }
        }
        5..7 if !held.is_empty() => {
            let at = chance.below(held.len() as u64) as usize;
            held[at].write_all_at(&[chance.below(255) as u8; 5000], offset)?;
            if chance.below(3) == 0 {
                held.swap_remove(at);
            }
        }
        7 => options.open(&path)?.set_len(offset)?,
        8..10 => {
            let flags = match chance.below(4) {
                0 => FallocateFlags::empty(),
                1 => FallocateFlags::FALLOC_FL_ZERO_RANGE,
                _ => FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            };
            fallocate(&options.open(&path)?, flags, offset as i64, length as i64)?;
        }
        10..13 => {
            let flags = match chance.below(4) {
                0 => RenameFlags::RENAME_EXCHANGE,
                _ => RenameFlags::empty(),
            };
            renameat2(AT_FDCWD, &path, AT_FDCWD, &other, flags)?;
        }
        13 => {
            let (from, to) = (some_directory(chance, root), some_directory(chance, root));
            renameat2(AT_FDCWD, &from, AT_FDCWD, &to, RenameFlags::empty())?;
        }
        14 => fs::hard_link(&path, &other)?,
        15 => fs::remove_file(&path)?,
        16 => fs::create_dir(some_directory(chance, root))?,
        17 => fs::remove_dir(some_directory(chance, root))?,
        18 => std::os::unix::fs::symlink("d0/n0", &path)?,
        19 => nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o640))?,
        20 => fs::set_permissions(
            &path,
            fs::Permissions::from_mode(0o600 + chance.below(64) as u32),
        )?,
        21 => std::os::unix::fs::lchown(&path, Some(chance.below(9) as u32), None)?,
        22 => {
            let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(offset * 1_000_003);
            options.open(&path)?.set_modified(time)?;
        }
        _ => {
            let how = if chance.below(2) == 0 {
                ["-v", "c"]
            } else {
                ["-v", "longer"]
            };
            let set = Command::new("setfattr")
                .args(["-h", "-n", "user.a"])
                .args(how)
                .arg(&path)
                .stderr(Stdio::null())
                .status();
            set.map(drop)?;
        }
    }
    Ok(())
}

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

impl Scene {
    fn change_at_random(&mut self, seed: u64) -> Result<()> {
        let root = self.place.mount();
        let mut chance = Chance::new("mirrored", Some(seed));
        let mut held = Vec::new();
        let mut made = 0;
        for step in 0..600 {
            match step {
                150 | 450 => {
                    // In the midst of a change, if it can be.
                    held.clear();
                    let writer = std::thread::spawn({
                        let root = root.clone();
                        move || {
                            let bytes = vec![step as u8; 1 << 20];
                            for n in 0..200 {
                                if fs::write(root.join(format!("m{}", n % 3)), &bytes).is_err()
                                    || fs::rename(root.join("m1"), root.join("m4")).is_err()
                                        && n > 2
                                {
                                    return;
                                }
                            }
                        }
                    });
                    std::thread::sleep(Duration::from_millis(30 + seed * 10));
                    self.kill_target()?;
                    ensure!(writer.join().is_ok(), "the writer panicked");
                }
                250 => self.cut_source(),
                350 => self.mend_source()?,
                _ => made += u32::from(change(&mut chance, &root, &mut held).is_ok()),
            }
        }
        ensure!(made > 100, "only {made} changes were made");
        drop(held);
        let figures = self.all_is_mirrored()?;
        println!("{made} calls, {figures:?}");
        self.return_to_copy(4)
    }
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
