//! A source whose file system lost some of its own blocks.

use super::disks::{Disk, tool};
use super::*;

/// An ext4 image of which single blocks can be damaged while it is not mounted.
struct Damageable {
    image: PathBuf,
    dir: PathBuf,
}

impl Damageable {
    fn mount(&self, options: &str) -> Disk {
        assert!(tool("mount", &["-o", options], &[&self.image, &self.dir]));
        Disk {
            dir: self.dir.clone(),
        }
    }

    /// What `debugfs` answers.
    fn ask(&self, question: &str) -> String {
        let answer = Command::new("debugfs")
            .args(["-R", question])
            .arg(&self.image)
            .output();
        String::from_utf8(answer.unwrap().stdout).unwrap()
    }

    /// The number behind `before` in an answer.
    fn number(&self, question: &str, before: &str) -> u64 {
        let answer = self.ask(question);
        let (_, rest) = answer.split_once(before).expect(&answer);
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().expect(&answer)
    }

    /// Turns a byte over, and back when asked again.
    fn turn(&self, offset: u64) {
        let image = fs::File::options()
            .read(true)
            .write(true)
            .open(&self.image)
            .unwrap();
        let mut byte = [0];
        image.read_exact_at(&mut byte, offset).unwrap();
        image.write_all_at(&[!byte[0]], offset).unwrap();
        image.sync_all().unwrap();
    }
}

#[test]
fn what_a_damaged_file_system_hides_is_named_kept_from_before_and_all_else_arrives() {
    let bench = Bench::new(EngineChoice::Auto);
    if !Command::new("debugfs")
        .arg("-V")
        .output()
        .is_ok_and(|done| done.status.success())
    {
        return println!("no debugfs here: not tested");
    }
    let mkfs = ["mkfs.ext4", "-q", "-b", "4096", "-O", "metadata_csum"];
    let Some(disk) = Disk::new(&bench, 32, &mkfs) else {
        return;
    };
    let tree = disk.dir.join("tree");
    for directory in ["good", "listed/sub"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    for file in [
        "good/file",
        "good/gone",
        "listed/a",
        "listed/sub/b",
        "inode",
        "z",
    ] {
        fs::write(tree.join(file), file).unwrap();
    }
    fs::write(tree.join("attributes"), noise(1, 5000)).unwrap();
    xattr::set(tree.join("attributes"), "user.large", &noise(2, 600)).unwrap();
    // More extents than an inode holds.
    let sparse = fs::File::create(tree.join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    for island in 0..8 {
        sparse.write_all_at(&noise(3, 4096), island << 18).unwrap();
    }
    drop(sparse);
    let image = Damageable {
        image: bench.source.parent().unwrap().join("disk.img"),
        dir: disk.dir.clone(),
    };
    disk.unmount();
    let inode = image.number("imap /tree/inode", "at block ") * 4096;
    let within = image.ask("imap /tree/inode");
    let (_, within) = within.split_once("offset 0x").unwrap();
    let within = u64::from_str_radix(within.trim(), 16).unwrap();
    let extents = image.ask("dump_extents -n /tree/sparse");
    let (_, extents) = extents.split_once(" - ").expect(&extents);
    let extents: u64 = extents.split_whitespace().nth(1).unwrap().parse().unwrap();
    let listed: u64 = image.ask("bmap /tree/listed 0").trim().parse().unwrap();
    let attributes = image.number("stat /tree/attributes", "File ACL: ");
    // The modification time, and bytes that every reader looks at.
    let damage = [
        inode + within + 16,
        extents * 4096 + 12,
        listed * 4096 + 100,
        attributes * 4096 + 4000,
    ];
    let turn = || damage.iter().for_each(|&offset| image.turn(offset));
    let mut sender = bench.sender(bench.path(Way::Direct));
    let mut volume = bench.volume();
    volume.source_path.clone_from(&tree);
    let mut send = |epoch, previous: Option<&TreeState>| {
        sender
            .send_epoch(&volume, Epoch(epoch), false, previous, &Arc::default())
            .unwrap()
    };
    let lost = |report: &EpochReport| -> Vec<String> {
        let lost = report.unreadable.iter().map(|lost| {
            println!("{lost}");
            lost.path.clone()
        });
        let mut lost: Vec<String> = lost.collect();
        lost.dedup();
        lost
    };
    let there = |path: &str| fs::read(bench.target.join(path));

    turn();
    let disk = image.mount("loop,ro");
    let (state, report) = send(1, None);
    let all = ["attributes", "inode", "listed", "sparse"];
    assert_eq!(lost(&report), all);
    assert_eq!(there("good/file").unwrap(), b"good/file");
    assert_eq!(there("z").unwrap(), b"z");
    assert_eq!(there("attributes").unwrap(), noise(1, 5000));
    assert_eq!(there("sparse").unwrap(), vec![0; 3 << 20]);
    assert!(there("inode").is_err() && bench.target.join("listed").is_dir());
    // As a proof reads it, and as a plan counts it.
    let key = FleetKey(FLEET);
    let (kept, _) = crate::volume::scan_as_sent(
        &crate::volume::Confined::open(&tree).unwrap(),
        &key,
        state.block_size,
    )
    .unwrap();
    assert_eq!(kept.root, state.root);
    let told = kept.unreadable.iter().map(|lost| &lost.path);
    assert!(told.eq(&all));
    assert_eq!(crate::volume::measure(&tree).unwrap().unreadable, 2);
    // Whoever must know a tree whole is refused.
    assert!(crate::volume::scan(&tree, &key, state.block_size).is_err());
    disk.unmount();

    turn();
    let disk = image.mount("loop");
    let (state, report) = send(2, Some(&state));
    assert_eq!(report.unreadable, []);
    assert_same_tree(&tree, &bench.target);
    fs::remove_file(tree.join("good/gone")).unwrap();
    disk.unmount();

    turn();
    let disk = image.mount("loop,ro");
    let (_, report) = send(3, Some(&state));
    let lost = lost(&report);
    assert!(
        ["inode", "listed"]
            .iter()
            .all(|path| lost.iter().any(|lost| lost == path))
    );
    for kept in ["inode", "listed/a", "listed/sub/b"] {
        assert_eq!(there(kept).unwrap(), kept.as_bytes());
    }
    assert!(there("good/gone").is_err());
    disk.unmount();
}
