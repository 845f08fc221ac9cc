//! Access before arrival through a mount: a plan's target shows a volume as a directory while its data is still
//! on the source, and ordinary programs work on it.

use anyhow::{Context as _, Result, bail, ensure};
use lifeboat_tests::stage::{Fault, PATIENCE, SOURCE, Service, Stage, TARGET, device, policy};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs::{self, File, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use xtask::crew::Device;
use xtask::lab::Host;
use xtask::process::{output, wait_for};

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

const AT: &str = "/srv/served";
/// A plain copy of the volume on the target, by `cp`.
const MODEL: &str = "/srv/model";
const ROWS_FILE: &str = "rows.sqlite";
const ROWS: usize = 20_000;

/// Everything that a tree can have.
const TREE: &str = r#"
set -e
head -c 16777216 /dev/urandom >image
head -c 3000001 /dev/urandom >odd; truncate -s 64M sparse; printf end >>sparse
mkdir -p a/b/c empty; head -c 100000 /dev/urandom >a/b/c/deep; ln a/b/c/deep a/linked
ln -s b/c a/down; ln -s /nowhere broken; mkfifo pipe; mknod null c 1 3; mknod disk b 259 70000
printf '#!/bin/sh\n' >tool; chown 12:34 tool; chmod 6755 tool; chmod 1777 empty
for n in $(seq 300); do printf "file $n" >"a/b/$n"; done
printf x >"$(printf 'no\377utf8')"; printf x >'a space'; touch nothing
setfattr -n user.comment -v hello odd; setfattr -n trusted.secret -v 0x00ff odd
setfattr -n user.dir -v d a; setfacl -m u:7:rw,g:8:r odd; setfacl -d -m u:7:rwx a/b
setcap cap_net_raw+ep a/linked
touch -d '1969-12-31 23:59:58.25 UTC' odd; touch -d '2001-02-03 04:05:06.123456789 UTC' a/b
touch -h -d '2002-02-03 04:05:06.5 UTC' broken; chown -h 5:6 broken
"#;

/// Changes of every kind; what they leave is the same on any file system.
const CHANGES: &str = r#"
set -e
umask 027
mv a/b/c/deep moved; ln moved again; mv a/b/17 a/b/18; rm a/b/1* ; mv a/b a/bb
printf new >image.new; mv image.new a/linked.new; rm -r a/bb/c; mkdir made; mkdir a/bb/inherits
printf i >a/bb/inherits/file; ln -s made to-made; mkfifo made/pipe; mknod made/zero c 1 5
chmod 2770 made; chown :34 made; printf g >made/grouped; mkdir made/below
chmod 600 odd; chown 1:2 odd; setfattr -n user.more -v m odd; setfattr -x user.comment odd
setfacl -m u:9:r odd
printf head | dd of=odd conv=notrunc bs=1 seek=100001 status=none
printf appended >>odd; truncate -s 2000003 odd; truncate -s 5000000 odd
fallocate -p -o 70001 -l 200000 image; fallocate -o 20000000 -l 5000 image
dd if=odd of=image bs=64K count=3 seek=100 conv=notrunc status=none
cp -a a/bb copied; rm sparse; touch -d '1955-11-05 06:00:00.75 UTC' tool; chmod 755 empty
"#;

#[test]
fn programs_work_on_a_mounted_volume_whose_data_is_still_on_the_source() -> Result<()> {
    let source = Device {
        policy: Some(policy(Fault::Busy, "")),
        migration: vec!["prepare_pause_seconds: 1".into()],
        ..Device::new(SOURCE)
    };
    let mut target = device(TARGET, None);
    target.migration.push("device_nodes: true".into());
    let devices = [source, target];
    let Some(stage) = Stage::up("mounted", &devices, &[CACHE])? else {
        return Ok(());
    };
    let root = stage.source()?.path(&CACHE.notes());
    sh(&root, TREE)?;
    let rows = format!("{}/{ROWS_FILE}", CACHE.notes());
    sqlite(
        stage.source()?,
        &rows,
        &format!(
            "CREATE TABLE rows (id INTEGER PRIMARY KEY, word TEXT);
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})
             INSERT INTO rows SELECT i, hex(randomblob(40)) FROM n;
             CREATE INDEX words ON rows (word);"
        ),
    )?;
    let plan = stage.prepared_plan()?;
    let volume = stage.volume_at(&plan, &CACHE.notes())?;
    let mounted = stage.target()?.path(AT);
    let mut it = Mounted {
        stage,
        plan,
        volume,
        root,
        mounted,
    };
    let done = it.run();
    let log = it.stage.crew.log(TARGET);
    done.with_context(|| log)?;
    it.stage.writes_go_on(&CACHE)
}

struct Mounted {
    stage: Stage,
    plan: String,
    volume: String,
    /// The volume on the source, and where the target has it mounted.
    root: PathBuf,
    mounted: PathBuf,
}

impl Mounted {
    fn run(&mut self) -> Result<()> {
        self.everything_is_there()?;
        self.the_link_fails()?;
        self.serve(&["--end"])?;
        ensure!(!self.is_mounted()?, "it is still mounted");

        self.changes_are_kept()?;
        self.the_agent_is_killed()?;
        self.all_arrives()?;
        self.it_ends_while_it_is_used()
    }

    fn serve(&self, more: &[&str]) -> Result<String> {
        let (plan, volume) = (self.plan.as_str(), self.volume.as_str());
        let arguments = [&["serve", plan, volume], more].concat();
        self.stage.crew.tell(TARGET, &arguments)
    }

    fn figures(&self) -> Result<Value> {
        let (_, served) = self.stage.crew.ask(TARGET, &["serve"])?;
        Ok(served[0]["figures"].clone())
    }

    fn is_mounted(&self) -> Result<bool> {
        let mounts = self.stage.target()?.run(["cat", "/proc/self/mounts"])?;
        Ok(mounts.contains(AT))
    }

    fn everything_is_there(&self) -> Result<()> {
        let target = self.stage.target()?;
        target.run(["mkdir", "-p", &format!("{AT}/full")])?;
        let refused = self.serve(&["--mount", AT, "--no-fill"]);
        let refused = refused.map_err(|error| format!("{error:#}"));
        ensure!(
            refused
                .as_ref()
                .is_err_and(|error| error.contains("empty directory")),
            "{refused:?}"
        );
        target.run(["rmdir", &format!("{AT}/full")])?;
        self.serve(&["--mount", AT, "--no-fill", "--patience", "5"])?;
        output(Command::new("ls").arg("-lRA").arg(&self.mounted))?;
        ensure!(
            self.figures()?["on_demand"] == 0,
            "a listing fetched something"
        );
        let model = target.path(MODEL);
        output(Command::new("cp").arg("-a").args([&self.root, &model]))?;
        compare(target, &["--times"])?;
        let free = nix::sys::statvfs::statvfs(&self.mounted)?;
        ensure!(free.blocks_available() > 0, "{free:?}");
        Ok(())
    }

    /// A fresh copy: nothing of it is here.
    fn again(&self, patience: &str) -> Result<()> {
        self.serve(&["--mount", AT, "--no-fill", "--patience", patience])?;
        Ok(())
    }

    fn the_link_fails(&self) -> Result<()> {
        self.serve(&["--end"])?;
        self.again("1")?;
        let (source, target) = (self.stage.source()?, self.stage.target()?);
        let plain = fs::read(self.root.join("image"))?;
        let image = File::options()
            .read(true)
            .write(true)
            .open(self.mounted.join("image"))?;
        let read = |offset: usize| -> std::io::Result<bool> {
            let mut bytes = [0; 5000];
            image.read_exact_at(&mut bytes, offset as u64)?;
            Ok(bytes == plain[offset..offset + 5000])
        };
        ensure!(read(1_000_000)?, "what was read differs");
        self.stage.lab.partition(source, target, true)?;
        let failed = read(9_000_000).map_err(|error| error.raw_os_error());
        let eio = Some(nix::libc::EIO);
        ensure!(failed == Err(eio), "{failed:?}");
        ensure!(read(1_000_000)?, "what is here is not read");
        image.write_all_at(&[7; 8192], 8 << 20)?;
        self.stage.lab.partition(source, target, false)?;
        wait_for("the link", PATIENCE, || Ok(read(9_000_000).ok()))?;
        let mut mine = [0; 8192];
        image.read_exact_at(&mut mine, 8 << 20)?;
        ensure!(mine == [7; 8192], "an arrival won over a write");
        Ok(())
    }

    fn changes_are_kept(&self) -> Result<()> {
        self.again("30")?;
        let model = self.stage.target()?.path(MODEL);
        let odd = |root: &Path| output(Command::new("ls").arg("-l").arg(root.join("odd")));
        ensure!(
            odd(&model)?.split(' ').next() == odd(&self.mounted)?.split(' ').next(),
            "an ACL is not shown"
        );
        for root in [&model, &self.mounted] {
            sh(root, CHANGES)?;
        }
        compare(self.stage.target()?, &[])?;
        let tool = |root: &Path| fs::metadata(root.join("tool"))?.modified();
        ensure!(tool(&model)? == tool(&self.mounted)?, "a time before 1970");
        ensure!(
            !self.root.join("made").exists(),
            "the source was written to"
        );

        // A program that goes on with a file that has no name any more.
        let path = self.mounted.join("again");
        let mut open = File::options().read(true).write(true).open(&path)?;
        for name in ["again", "moved", "a/linked"] {
            fs::remove_file(self.mounted.join(name))?;
        }
        let mut bytes = Vec::new();
        open.read_to_end(&mut bytes)?;
        ensure!(bytes.len() == 100_000 && open.metadata()?.len() == 100_000);
        open.set_len(10)?;
        ensure!(open.metadata()?.len() == 10);

        self.fio("--do_verify=1", "mmap")?;
        ensure!(self.rows("")? == ROWS);
        let more = format!(
            "PRAGMA journal_mode=wal;
             INSERT INTO rows SELECT id + {ROWS}, word FROM rows;"
        );
        ensure!(self.rows(&more)? == 2 * ROWS);
        Ok(())
    }

    /// Runs `statements` on the mounted database, and gives the number of its rows when it is whole.
    fn rows(&self, statements: &str) -> Result<usize> {
        let all = format!("{statements} PRAGMA integrity_check; SELECT count(*) FROM rows;");
        let said = sqlite(self.stage.target()?, &format!("{AT}/{ROWS_FILE}"), &all)?;
        let said: Vec<&str> = said.lines().collect();
        let [.., "ok", rows] = said[..] else {
            bail!("{said:?}");
        };
        Ok(rows.parse()?)
    }

    fn fio(&self, verify: &str, engine: &str) -> Result<String> {
        output(
            Command::new("fio")
                .args(["--name=work", "--rw=randwrite", "--bs=4k", "--size=8M"])
                .args([
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    verify,
                ])
                .arg(format!("--ioengine={engine}"))
                .arg(format!(
                    "--filename={}",
                    self.mounted.join("image").display()
                )),
        )
    }

    fn the_agent_is_killed(&mut self) -> Result<()> {
        // Told to end, it unmounts.
        self.stage.crew.signal_agent(TARGET, Signal::SIGTERM)?;
        self.stage.crew.await_agent_end(TARGET, PATIENCE)?;
        ensure!(!self.is_mounted()?, "an agent that ended left its mount");
        self.stage.crew.start_agent(TARGET)?;
        self.again("30")?;
        let delete = format!("DELETE FROM rows WHERE id > {};", ROWS + ROWS / 2);
        self.rows(&delete)?;
        self.stage.crew.kill_agent(TARGET)?;
        let dead = fs::metadata(&self.mounted).map_err(|error| error.raw_os_error());
        ensure!(
            matches!(dead, Err(Some(nix::libc::ENOTCONN))),
            "a killed agent's mount answers: {dead:?}"
        );
        self.stage.crew.start_agent(TARGET)?;
        self.serve(&["--mount", AT])?;
        ensure!(self.rows("")? == ROWS + ROWS / 2, "a write was lost");
        Ok(())
    }

    fn all_arrives(&self) -> Result<()> {
        wait_for("everything to be here", PATIENCE, || {
            Ok(self.figures()?["detached"].as_bool().filter(|done| *done))
        })?;
        self.whole_files_pass_by()?;
        self.fio("--verify_only=1", "psync")?;
        fs::copy(self.mounted.join("image"), self.mounted.join("odd"))?;
        ensure!(fs::read(self.mounted.join("odd"))? == fs::read(self.mounted.join("image"))?);
        self.fio("--do_verify=1", "psync")?;
        self.fio("--verify_only=1", "mmap")?;
        ensure!(self.rows("")? == ROWS + ROWS / 2);
        Ok(())
    }

    /// The kernel reads a whole file by itself, where it can: also while the agent stands still.
    fn whole_files_pass_by(&self) -> Result<()> {
        if self
            .stage
            .crew
            .log(TARGET)
            .contains("FUSE has no passthrough")
        {
            println!("not tried: this kernel has no passthrough");
            return Ok(());
        }
        let image = File::open(self.mounted.join("image"))?;
        // What the kernel kept of it from the agent would answer too.
        posix_fadvise(&image, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        self.stage.crew.signal_agent(TARGET, Signal::SIGSTOP)?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 20];
            // Nobody listens any more when it came too late.
            let _ = sender.send(image.read_exact_at(&mut bytes, 3 << 20));
        });
        let read = receiver.recv_timeout(Duration::from_secs(20));
        self.stage.crew.signal_agent(TARGET, Signal::SIGCONT)?;
        read.context("a whole file is read through the agent")??;

        // While the kernel serves it, nobody else can: also with bits that the agent would have to take away.
        let path = self.mounted.join("image");
        let held = File::open(&path)?;
        let plain = held.metadata()?.permissions();
        fs::set_permissions(&path, Permissions::from_mode(0o4755))?;
        File::open(&path).context("a set-user-id file that is open is opened once more")?;
        fs::set_permissions(&path, plain)?;
        Ok(())
    }

    fn it_ends_while_it_is_used(&self) -> Result<()> {
        let _held = File::open(self.mounted.join("image"))?;
        self.serve(&["--end"])?;
        ensure!(!self.is_mounted()?, "it is still mounted");
        ensure!(fs::read_dir(&self.mounted)?.next().is_none());
        Ok(())
    }
}

fn sh(at: &Path, script: &str) -> Result<()> {
    output(Command::new("sh").args(["-c", script]).current_dir(at)).map(drop)
}

/// Says what differs between the model and the mounted volume, both ways.
fn compare(host: &Host, more: &[&str]) -> Result<()> {
    for (from, to) in [(MODEL, AT), (AT, MODEL)] {
        let (from, to) = (format!("{from}/"), format!("{to}/"));
        let plain = ["rsync", "-rlpgoDHAXS", "--checksum", "--delete"];
        // Times, where they are asked for, to the nanosecond.
        let dry = ["--modify-window=-1", "--dry-run", "--itemize-changes"];
        let said = host.run([&plain[..], &dry, more, &[&from, &to]].concat())?;
        ensure!(said.trim().is_empty(), "{from} -> {to}:\n{said}");
    }
    Ok(())
}

fn sqlite(host: &Host, file: &str, statements: &str) -> Result<String> {
    host.run(["sqlite3", file, statements])
}
