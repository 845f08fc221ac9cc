//! The maps of real file systems, made and filled by their own tools.

use super::*;
use crate::volume::scan::Holes;
use crate::volume::sign::is_zero;
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

/// Runs a program; false, and said, where it is missing.
fn runs(program: &str, arguments: &[&str]) -> bool {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program} {arguments:?}: {said}");
            true
        }
        Err(error) => {
            println!("not run: {program}: {error}");
            false
        }
    }
}

/// An image with a file system, which was all zeros before.
struct Made {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
}

impl Made {
    fn new(mib: u64, program: &str, arguments: &[&str]) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        File::create(&path).unwrap().set_len(mib << 20).unwrap();
        let path_text = path.to_str().unwrap();
        let all = [arguments, &[path_text]].concat();
        runs(program, &all).then_some(Self {
            _directory: directory,
            path,
        })
    }

    fn map(&self, trust: Trust) -> Result<Option<Map>, (&'static str, Doubt)> {
        let file = File::open(&self.path).unwrap();
        let size = file.metadata().unwrap().len();
        let mut image = OpenFile {
            file: &file,
            size,
            memory: Aligned::default(),
            window: 0..0,
        };
        find(&mut image, BlockSize::default(), trust)
    }

    fn change(&self, bytes: &[u8], offset: u64) {
        let file = File::options().write(true).open(&self.path).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }
}

/// Nothing was written to what `map` calls unused.
fn is_covered(map: &Map, path: &Path) {
    let file = File::open(path).unwrap();
    let holes = Holes::of(&file, &nix::sys::stat::fstat(&file).unwrap()).unwrap();
    let mut bytes = vec![0; 1 << 16];
    for block in map.runs().flatten() {
        if !holes.covers(block << 16, 1 << 16) {
            read_full(&file, &mut bytes, block << 16).unwrap();
            assert!(is_zero(&bytes), "block {block} is in use");
        }
    }
}

#[test]
fn what_tools_wrote_to_an_empty_image_is_never_unused_and_nearly_all_else_is() {
    let files = tempfile::tempdir().unwrap();
    for number in 0..40 {
        let bytes: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8 + 1).collect();
        fs::write(files.path().join(format!("file-{number}")), bytes).unwrap();
    }
    let files = files.path().to_str().unwrap();
    let ext: [&[&str]; 8] = [
        &["-t", "ext4"],
        &["-t", "ext4", "-b", "1024"],
        &["-t", "ext4", "-O", "^metadata_csum,uninit_bg"],
        &["-t", "ext4", "-O", "meta_bg,^resize_inode"],
        &["-t", "ext4", "-O", "^flex_bg,^64bit"],
        &[
            "-t",
            "ext4",
            "-O",
            "metadata_csum_seed,orphan_file",
            "-b",
            "1024",
            "-g",
            "2048",
        ],
        &["-t", "ext3", "-b", "2048"],
        &["-t", "ext2", "-O", "sparse_super2"],
    ];
    for arguments in ext {
        let all = [
            &["-q", "-F", "-E", "lazy_itable_init=1", "-d", files],
            arguments,
        ]
        .concat();
        let Some(made) = Made::new(100, "mkfs.ext4", &all) else {
            return;
        };
        let map = made.map(Trust::Unmounted).unwrap().expect("a file system");
        assert_eq!(map.file_system, "ext4");
        is_covered(&map, &made.path);
        let used = (100 << 20) - map.bytes().0;
        assert!(used < 40 << 20, "{arguments:?}: {used} bytes are used");
    }
}

#[test]
fn of_an_xfs_the_free_extents_are_unused_while_its_log_is_empty() {
    for arguments in [
        &["-q"][..],
        &["-q", "-m", "crc=0"],
        &["-q", "-d", "agcount=4", "-b", "size=1024"],
    ] {
        let Some(made) = Made::new(320, "mkfs.xfs", arguments) else {
            return;
        };
        let map = made.map(Trust::Unmounted).unwrap().expect("a file system");
        assert_eq!(map.file_system, "xfs");
        is_covered(&map, &made.path);
        let used = (320 << 20) - map.bytes().0;
        assert!(used < 90 << 20, "{arguments:?}: {used} bytes are used");
    }
}

#[test]
fn a_map_that_may_be_old_or_was_changed_is_not_believed() {
    let Some(made) = Made::new(64, "mkfs.ext4", &["-q", "-F", "-b", "4096"]) else {
        return;
    };
    let all = made.map(Trust::Unmounted).unwrap().unwrap().bytes();
    // A bitmap that says that everything is free: its checksum is another one.
    let descriptor = fs::read(&made.path).unwrap()[4096..4160].to_vec();
    let bitmap = u64::from(u32::from_le_bytes(number(&descriptor, 0))) * 1024;
    let block = u64::from(u32::from_le_bytes(number(
        &fs::read(&made.path).unwrap(),
        1024 + 0x18,
    )));
    made.change(&[0; 64], bitmap << block);
    let less = made
        .map(Trust::Unmounted)
        .unwrap()
        .map_or(Bytes(0), |map| map.bytes());
    assert!(less < all, "{less} of {all}");
    // A superblock with other numbers.
    made.change(&[1], 1024 + 0x4);
    assert!(matches!(
        made.map(Trust::Unmounted),
        Err((_, Doubt::Damaged(_)))
    ));

    let Some(made) = Made::new(64, "mkfs.ext4", &["-q", "-F", "-O", "^metadata_csum"]) else {
        return;
    };
    made.change(&[0x55, 0xaa], 510);
    assert!(matches!(made.map(Trust::Hint), Err((_, Doubt::BootSector))));
    made.change(&[0, 0], 510);
    // As after a crash: the journal is to be replayed.
    let incompat = fs::read(&made.path).unwrap()[1024 + 0x60] | 4;
    made.change(&[incompat], 1024 + 0x60);
    assert!(matches!(
        made.map(Trust::Unmounted),
        Err((_, Doubt::Journal))
    ));
    assert!(made.map(Trust::Frozen).unwrap().is_some());

    let Some(made) = Made::new(320, "mkfs.xfs", &["-q"]) else {
        return;
    };
    let bytes = fs::read(&made.path).unwrap();
    let (block, log) = (
        u64::from(u32::from_be_bytes(number(&bytes, 4))),
        u64::from_be_bytes(number(&bytes, 48)),
    );
    let log = (log >> bytes[124]) * u64::from(u32::from_be_bytes(number(&bytes, 84)))
        + (log & ((1 << bytes[124]) - 1));
    // No longer the record of an unmount.
    let record = (0..64_u64)
        .map(|at| log * block + at * 512)
        .find(|at| bytes[*at as usize..][..4] == [0xfe, 0xed, 0xba, 0xbe]);
    made.change(&[0], record.unwrap() + 512 + 9);
    assert!(matches!(
        made.map(Trust::Unmounted),
        Err((_, Doubt::Journal))
    ));
    assert!(made.map(Trust::Hint).unwrap().is_some());
}

#[test]
fn runs_and_bytes_of_a_map_are_those_that_were_released() {
    let mut map = Map::new(BlockSize::default(), (10 << 16) + 5).unwrap();
    map.release(&(1..3 << 16));
    map.release(&(4 << 16..7 << 16));
    map.release(&((9 << 16) + 1..(10 << 16) + 5));
    map.keep(&((5 << 16) + 1..(5 << 16) + 2));
    let runs: Vec<Range<u64>> = map.runs().collect();
    assert_eq!(runs, [1..3, 4..5, 6..7, 10..11]);
    assert_eq!(map.bytes(), Bytes((4 << 16) + 5));
    assert!(!map.has(11) && !map.has(u64::MAX));
}

/// The first bytes of an image of which all the rest are zeros.
struct Head<'b>(&'b [u8]);

impl Image for Head<'_> {
    fn size(&self) -> u64 {
        1 << 30
    }

    fn read(&mut self, into: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.saturating_add(into.len() as u64) > self.size() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (byte, at) in into.iter_mut().zip(offset as usize..) {
            *byte = self.0.get(at).copied().unwrap_or(0);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn of_a_changed_image_no_map_breaks_or_is_larger_than_it(
        changes in proptest::collection::vec((0..600_usize, prop_oneof![any::<u8>(), Just(0), Just(0xff)]), 1..8),
        which in 0..2_usize,
        frozen in any::<bool>(),
    ) {
        const SEEDS: [&[u8]; 2] = [
            include_bytes!("../../../../tests/fuzz/corpus/ext4/small"),
            include_bytes!("../../../../tests/fuzz/corpus/xfs/v4"),
        ];
        // Superblock and first descriptor, or superblock, head of the first group and root of its tree.
        let starts: [&[usize]; 2] = [&[1024, 2048], &[0, 512, 2048]];
        let mut bytes = SEEDS[which].to_vec();
        for (at, byte) in changes {
            let start = starts[which][at % starts[which].len()];
            bytes[start + at / 2] = byte;
        }
        let trust = if frozen { Trust::Frozen } else { Trust::Unmounted };
        if let Ok(Some(map)) = find(&mut Head(&bytes), BlockSize::default(), trust) {
            prop_assert!(map.bytes() <= Bytes(1 << 30));
        }
    }
}
