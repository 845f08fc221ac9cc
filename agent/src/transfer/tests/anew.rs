//! A file that was made anew in the inode of the one before, on a disk that fails.

use super::disks::{Disk, place};
use super::*;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

#[test]
fn a_file_made_anew_in_the_inode_of_another_keeps_none_of_its_blocks() {
    for target_begins_anew in [true, false] {
        let mut bench = Bench::new(EngineChoice::Auto);
        // Without a journal ext4 waits for minutes before it gives a number again.
        let Some(disk) = Disk::new(&bench, 64, &["mkfs.ext4", "-q", "-b", "4096"]) else {
            return;
        };
        bench.source = disk.dir.join("tree");
        fs::create_dir(&bench.source).unwrap();
        let path = bench.source.join("file");
        let make = |seed| {
            fs::write(&path, noise(seed, 200_000)).unwrap();
            let file = fs::File::open(&path).unwrap();
            file.sync_all().unwrap();
            file.metadata().unwrap().ino()
        };
        let inode = make(1);
        bench.admit_target(&bench.target);
        let mut sender = bench.sender(bench.path(Way::Direct));
        let (state, _) = bench.send(&mut sender, 1, None).unwrap();
        // The clock by which files are born moves on in steps.
        let seen = SystemTime::now();
        while SystemTime::now() < seen + Duration::from_millis(20) {
            std::thread::yield_now();
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(make(2), inode, "the disk gave another number");
        let own = fs::read(&path).unwrap();
        let cut = place(&path) + 70_000_u64.next_multiple_of(4096);
        let file = fs::File::open(&path).unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let image = disk.dir.with_file_name("disk.img");
        let image = fs::File::options().write(true).open(image).unwrap();
        image.set_len(cut).unwrap();
        if target_begins_anew {
            bench.admit_target(&bench.target);
        }
        let (_, report) = bench.send(&mut sender, 2, Some(&state)).unwrap();
        assert_eq!(report.root, report.target_root);
        assert!(!report.unreadable.is_empty());
        assert!(report.unreadable.iter().all(|lost| !lost.kept));
        let there = fs::read(bench.target.join("file")).unwrap();
        let zero_or_own = |(at, byte): (usize, &u8)| *byte == 0 || *byte == own[at];
        assert!(there.iter().enumerate().all(zero_or_own));
    }
}
