//! A store alone on a disk that has no space, takes nothing more, or forgets what it was given.

use super::*;

/// Lets all of a store come, again and again, until `done` says so.
fn filled<T>(store: &Arc<Store>, mut done: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let mut filler = Filler::start(store, FetchOrder::default())?;
    wait_for("what arrives", PATIENCE, || {
        if filler.is_over() {
            filler = Filler::start(store, FetchOrder::default())?;
        }
        done()
    })
}

/// A source with a tree of two files, in a directory that is removed when it is dropped, and its data plane.
fn small_source(name: &str) -> Result<Option<(Place, DataServer)>> {
    if !is_root() {
        println!("skipped: needs root for the file systems");
        return Ok(None);
    }
    let place = Place(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
    place.clear();
    fs::create_dir_all(place.source())?;
    sh(
        &place.source(),
        "head -c 6000000 /dev/urandom >one; head -c 6000000 /dev/urandom >two",
    )?;
    let server = source(&place, None)?;
    Ok(Some((place, server)))
}

#[test]
fn what_cannot_be_given_to_who_makes_it_is_not_made() -> Result<()> {
    let Some((place, server)) = small_source("not-given")? else {
        return Ok(());
    };
    fs::set_permissions(place.source(), fs::Permissions::from_mode(0o777))?;
    fs::create_dir(place.mount())?;
    let store = open(&place.store(), server.addr(), false)?;
    let mount = std::thread::scope(|scope| {
        // Its threads have what this one has: no owner can be given.
        let mounted = scope.spawn(|| -> Result<Mount> {
            caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_CHOWN)?;
            Ok(Mount::at(&place.mount(), Arc::clone(&store), false)?)
        });
        mounted.join().expect("no panic")
    })?;
    let names = || -> Result<Vec<_>> {
        let names = fs::read_dir(place.mount())?.map(|name| Ok(name?.file_name()));
        let mut names = names.collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    let before = names()?;
    let directory = File::open(place.mount())?;
    let refused = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            nix::unistd::setfsuid(65534.into());
            let flags = OFlag::O_CREAT | OFlag::O_WRONLY;
            let made = openat(&directory, "file", flags, Mode::from_bits_truncate(0o644));
            let linked = symlinkat("file", &directory, "link");
            let mode = Mode::from_bits_truncate(0o755);
            [
                made.map(drop),
                mkdirat(&directory, "directory", mode),
                linked,
            ]
        });
        asked.join().expect("no panic")
    });
    ensure!(refused == [Err(Errno::EPERM); 3], "{refused:?}");
    ensure!(names()? == before, "{:?}", names()?);
    drop(mount);
    Ok(())
}

#[test]
fn a_log_that_could_not_be_written_back_keeps_what_is_on_the_disk_however_often_it_is_opened()
-> Result<()> {
    let Some((place, _server)) = small_source("lost-log")? else {
        return Ok(());
    };
    // A disk that says that it is larger than it is.
    let below = place.log();
    fs::create_dir(&below)?;
    sh(&below, "mount -t tmpfs -o size=24m tmpfs .")?;
    let Some(disk) = Disk::new(&below, "log", 64) else {
        return Ok(());
    };
    disk::output("mkfs.ext4", &["-q", "-O", "^has_journal", disk.device()]);
    let path = Path::new(&disk.mount()).join("log");
    let anew = || Ok([7; 16]);
    let mut log = Log::open(&path, anew)?;
    log.append(b"here")?;
    ensure!(log.sync()? == 1);
    nix::unistd::syncfs(File::open(&path)?)?;
    sh(&below, "cat /dev/zero >filling 2>/dev/null || true")?;
    // No more than what the inode itself can say the place of.
    log.append(&[7; 1 << 20])?;
    drop(log);
    // As the kernel does after a while: nobody is told yet.
    let _ = nix::unistd::syncfs(File::open(&path)?);
    for opened in 1..=3 {
        let log = Log::open(&path, anew)?;
        ensure!(
            log.last() == 1,
            "{} records when opened {opened}",
            log.last()
        );
    }
    Ok(())
}

fn root_of(tree: &Path) -> Result<lifeboat::model::ids::Signature> {
    let (state, _) = scan(tree, &FleetKey([3; 32]), BlockSize::for_volume(0))?;
    Ok(state.root)
}

#[test]
fn what_the_targets_disk_did_not_take_is_not_proven_and_comes_again_in_the_hosts_next_life()
-> Result<()> {
    let Some((place, server)) = small_source("thin")? else {
        return Ok(());
    };
    let below = place.log();
    let Some((disk, directory)) = thin(&below)? else {
        return Ok(());
    };
    let store = open(&directory, server.addr(), true)?;
    nix::unistd::syncfs(File::open(&directory)?)?;
    fill(&below)?;
    let said = filled(&store, || Ok(store.unsafe_here()))?;
    println!("{said}");
    ensure!(
        said.contains("could not be written back") && said.contains("volume tree"),
        "{said}"
    );
    fs::remove_file(below.join("filling"))?;
    for store in [&store, &open(&directory, server.addr(), true)?] {
        let filler = Filler::start(store, FetchOrder::default())?;
        wait_for("the filler", PATIENCE, || {
            Ok(filler.is_over().then_some(()))
        })?;
        let said = store.root().map_err(|error| error.to_string());
        let said = said.err().context("it was proven")?;
        ensure!(said.contains("could not be written back"), "{said}");
        ensure!(!store.figures().detached);
    }
    drop(store);
    for (name, at) in [
        ("live", 8),
        ("signatures", 0),
        ("unsafe", 0),
        ("arriving", 0),
    ] {
        let file = File::options().write(true).open(directory.join(name))?;
        file.write_all_at(&[b'x'; 36], at)?;
    }
    let store = open(&directory, server.addr(), true)?;
    ensure!(store.figures().absent > 0, "what was lost counts as here");
    let root = filled(&store, || Ok(store.root()?))?;
    ensure!(root == root_of(&place.source())?);
    ensure!(root == root_of(&directory.join("data"))?);
    drop((store, disk));
    Ok(())
}

/// A disk that says that it is larger than it is, as long as `below`, where it lies, has no more; with the place of a
/// store.
fn thin(below: &Path) -> Result<Option<(Disk, PathBuf)>> {
    fs::create_dir(below)?;
    sh(below, "mount -t tmpfs -o size=24m tmpfs .")?;
    let Some(disk) = Disk::new(below, "thin", 64) else {
        return Ok(None);
    };
    let make = ["-q", "-b", "4096", "-O", "^has_journal", disk.device()];
    disk::output("mkfs.ext4", &make);
    let directory = Path::new(&disk.mount()).join("store");
    Ok(Some((disk, directory)))
}

/// Uses up what a file system has, in its file `filling`.
fn fill(directory: &Path) -> Result<()> {
    sh(directory, "cat /dev/zero >filling 2>/dev/null || true")
}

#[test]
fn what_failed_on_the_file_system_counts_though_every_file_of_the_store_was_synced() -> Result<()> {
    let Some((place, server)) = small_source("elsewhere")? else {
        return Ok(());
    };
    let below = place.log();
    let Some((disk, directory)) = thin(&below)? else {
        return Ok(());
    };
    let store = open(&directory, server.addr(), true)?;
    let filler = Filler::start(&store, FetchOrder::default())?;
    wait_for("the filler", PATIENCE, || {
        Ok(filler.is_over().then_some(()))
    })?;
    nix::unistd::syncfs(File::open(&directory)?)?;
    fill(&below)?;
    sh(
        &disk.directory.join("mount"),
        "head -c 8000000 /dev/urandom >other; sync -f . 2>/dev/null || true",
    )?;
    fs::remove_file(below.join("filling"))?;
    ensure!(store.unsafe_here().is_none(), "a file of it failed");
    let said = store.root().map_err(|error| error.to_string());
    println!("{said:?}");
    ensure!(said.is_err(), "it was proven");
    let said = store.unsafe_here().context("nobody hears of it")?;
    ensure!(said.contains("could not be written back"), "{said}");
    drop((filler, store, disk));
    Ok(())
}

#[test]
fn a_mend_that_did_not_come_to_the_disk_is_not_believed_the_next_time() -> Result<()> {
    let Some((place, server)) = small_source("unmended")? else {
        return Ok(());
    };
    let below = place.log();
    let Some((disk, directory)) = thin(&below)? else {
        return Ok(());
    };
    let store = open(&directory, server.addr(), true)?;
    filled(&store, || Ok(store.root()?))?;
    nix::unistd::syncfs(File::open(&directory)?)?;
    let one = place.source().join("one");
    let modified = fs::metadata(&one)?.modified()?;
    let file = File::options().read(true).write(true).open(&one)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 100)?;
    file.write_all_at(&[!byte[0]], 100)?;
    file.set_modified(modified)?;

    // The disk has no more space for the file's beginning.
    let extents = output(
        Command::new("filefrag")
            .args(["-b4096", "-v"])
            .arg(directory.join("data/one")),
    )?;
    let first = extents
        .lines()
        .find_map(|line| line.trim().strip_prefix("0:"));
    let first = first.and_then(|line| line.split(':').nth(1)?.split("..").next());
    let first: i64 = first.context("no extent")?.trim().parse()?;
    ensure!(store.doubt()?);
    let backing = File::options()
        .write(true)
        .open(disk.directory.join("disk"))?;
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&backing, hole, first * 4096, 16 * 4096)?;
    fill(&below)?;
    let told = wait_for("the mend", PATIENCE, || {
        if store.unsafe_here().is_none() {
            // What it lacks is asked for.
            let _ = store.root();
        }
        Ok(store.doubted())
    })?;
    println!("{told}");
    ensure!(told.contains("`one` at offset 0"), "{told}");
    fs::remove_file(below.join("filling"))?;
    ensure!(store.doubt()?);
    let until = Instant::now() + Duration::from_secs(5);
    let said = loop {
        match store.root() {
            // Fetched again, as long as nobody says what failed.
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            said => break said.map_err(|error| error.to_string()),
        }
    };
    let said = said.err().context("it was believed")?;
    ensure!(said.contains("could not be written back"), "{said}");
    drop((store, disk));
    Ok(())
}

#[test]
fn a_mend_on_a_full_disk_takes_no_capability_away_for_good() -> Result<()> {
    let Some((place, server)) = small_source("mended")? else {
        return Ok(());
    };
    // Of zeros, so that what is written over takes the space of the capability, which it removes.
    sh(
        &place.source(),
        "head -c 4000 /dev/zero >three; setcap cap_net_raw+ep three
         touch -d '2001-02-03 04:05:06 UTC' three",
    )?;
    let Some(disk) = Disk::new(&place.0, "mended", 64) else {
        return Ok(());
    };
    // Every attribute takes a block of its own.
    let make = ["-q", "-b", "4096", "-I", "128", "-m", "0", disk.device()];
    disk::output("mkfs.ext4", &make);
    let mount = disk.mount();
    let directory = Path::new(&mount).join("store");
    let store = open(&directory, server.addr(), true)?;
    filled(&store, || Ok(store.root()?))?;
    let (three, here) = (place.source().join("three"), directory.join("data/three"));
    let capability = || output(Command::new("getcap").arg(&here));
    ensure!(capability()?.contains("cap_net_raw"));
    let modified = fs::metadata(&three)?.modified()?;
    let file = File::options().write(true).open(&three)?;
    file.write_all_at(b"x", 100)?;
    sh(&place.source(), "setcap cap_net_raw+ep three")?;
    file.set_modified(modified)?;

    ensure!(store.doubt()?, "{:?}", store.doubted());
    // Their signatures have space still.
    ensure!(store.root()?.is_none());
    let blocks = 2 * 6_000_000_usize.div_ceil(65536) + 1;
    wait_for("signatures", PATIENCE, || {
        let known = fs::read(directory.join("signatures"))?;
        let mut known = known.get(64..).unwrap_or_default().chunks(32);
        let all = known.len() == blocks && known.all(|known| known != [0; 32]);
        Ok(all.then_some(()))
    })?;
    let filling = Path::new(&mount).join("filling");
    let mut file = File::create(&filling)?;
    wait_for("a full disk", PATIENCE, || {
        while file.write_all(&[7; 4096]).is_ok() {}
        file.sync_all()?;
        let free = nix::sys::statvfs::fstatvfs(&file)?.blocks_available();
        Ok((free == 0).then_some(()))
    })?;
    drop(file);
    let told = wait_for("the mend", PATIENCE, || {
        store.root()?;
        Ok(store.doubted())
    })?;
    ensure!(
        told.contains("`three` at offset 0") && told.contains("refuses"),
        "{told}"
    );
    ensure!(
        capability()?.is_empty(),
        "the disk had space for the capability"
    );
    fs::remove_file(&filling)?;
    nix::unistd::syncfs(File::open(&mount)?)?;
    ensure!(fs::metadata(&here)?.nlink() == 2 && store.is_unfinished());
    // As it came, until it is doubted again.
    filled(&store, || Ok(store.root()?))?;
    ensure!(
        fs::metadata(&here)?.nlink() == 1,
        "a name of the store is left of what was refused"
    );
    ensure!(store.doubt()?);
    let root = wait_for("the proof", PATIENCE, || Ok(store.root()?))?;
    ensure!(root == root_of(&place.source())?);
    ensure!(fs::read(&here)? == fs::read(&three)?);
    ensure!(capability()?.contains("cap_net_raw"), "it is lost");
    ensure!(fs::metadata(&here)?.modified()? == modified);
    ensure!(
        fs::metadata(&here)?.nlink() == 1,
        "a name of the store is left"
    );
    drop((store, disk));
    Ok(())
}

#[test]
fn a_presence_that_a_full_disk_refuses_fails_a_sync_until_there_is_space() -> Result<()> {
    let Some((place, server)) = small_source("presence")? else {
        return Ok(());
    };
    let disk = place.log();
    fs::create_dir(&disk)?;
    sh(&disk, "mount -t tmpfs -o size=24m tmpfs .")?;
    let directory = disk.join("store");
    let store = open(&directory, server.addr(), true)?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(directory.join("data/one"))?;
    let number = store.number(file.metadata()?.ino());
    store.write(&file, number, &[7; 4096], 0)?;
    let durable = File::options()
        .write(true)
        .open(directory.join("durable"))?;
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&durable, hole, 0, 4096)?;
    fill(&disk)?;
    let refused = store.sync(&file, number).err();
    let refused = refused.and_then(|error| error.raw_os_error());
    ensure!(refused == Some(Errno::ENOSPC as i32), "{refused:?}");
    fs::remove_file(disk.join("filling"))?;
    store.sync(&file, number)?;
    let said = store.unsafe_here();
    ensure!(said.is_none(), "nothing was lost: {said:?}");
    // Behind the head, which was punched out with the rest.
    let known = fs::read(directory.join("durable"))?;
    let is_noted = known.iter().skip(64).any(|byte| *byte != 0);
    ensure!(is_noted, "its page is not noted as durable");
    Ok(())
}

#[test]
fn a_quota_of_the_target_that_is_used_up_is_named_and_the_rest_arrives_once_it_is_raised()
-> Result<()> {
    let Some((place, server)) = small_source("quota-target")? else {
        return Ok(());
    };
    let Some((_disk, limited)) = counted("quota-target") else {
        return Ok(());
    };
    limit("8M", &limited);
    let directory = limited.join("store");
    let store = open(&directory, server.addr(), true)?;
    let said = filled(&store, || Ok(store.unkept()))?;
    println!("{said}");
    ensure!(
        said.contains("uota exceeded") && said.contains("volume tree"),
        "{said}"
    );
    ensure!(store.root()?.is_none(), "it is proven");
    limit("none", &limited);
    let root = filled(&store, || Ok(store.root()?))?;
    ensure!(store.unkept().is_none());
    ensure!(root == root_of(&place.source())?);
    ensure!(root == root_of(&directory.join("data"))?);
    Ok(())
}
