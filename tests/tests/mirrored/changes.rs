//! Random changes of a tree below a mount whose server and source die meanwhile.

use super::*;

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

impl Scene {
    pub(super) fn change_at_random(&mut self, seed: u64) -> Result<()> {
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
