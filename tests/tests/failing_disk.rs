//! A disk that does not give up everything: what is lost is named, and nothing leaves without an operator's word.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::boxes;
use lifeboat_tests::disk::{Disk, output};
use lifeboat_tests::shop::{self, CONTAINER, DATA, DUPLICATOR, SOURCE, TARGET, says};
use lifeboat_tests::stage::{Fault, policy};
use xtask::crew::{Crew, Device};
use xtask::process::wait_for;

/// A file system of which the end of the file `large` cannot be read, made and mounted read-only on the
/// source as the shop's data; the offset in `large` from which it is lost.
fn failing(disk: &Disk) -> Result<u64> {
    output("mkfs.ext4", &["-q", "-b", "4096", disk.device()]);
    let at = disk.mount();
    let fill = "cd \"$0\" && mkdir -p kept/small && for n in 1 2 3; do head -c 5000 /dev/urandom >kept/small/$n; done
        head -c 24M /dev/urandom >kept/large && sync -f kept";
    output("sh", &["-c", fill, &at]);
    let extents = output("filefrag", &["-v", "-b4096", &format!("{at}/kept/large")]);
    let (logical, physical, length) = last_extent(&extents).context(extents.clone())?;
    disk.unmount();
    let lost = (600_000_u64.next_multiple_of(4096)).min(length);
    let backing = OpenOptions::new()
        .write(true)
        .open(disk.directory.join("disk"))?;
    backing.set_len(physical + length - lost)?;
    Ok(logical + length - lost)
}

/// Offset in the file, on the device, and length of the extent that lies last on the device, of lines like
/// `   0:        0..    6143:      34816..     40959:   6144:             last,eof`.
fn last_extent(listed: &str) -> Option<(u64, u64, u64)> {
    let extents = listed.lines().filter_map(|line| {
        let mut fields = line.split(':').skip(1);
        let mut first = || -> Option<u64> {
            let field = fields.next()?;
            field.split("..").next()?.trim().parse().ok()
        };
        Some((first()? * 4096, first()? * 4096, first()? * 4096))
    });
    extents.max_by_key(|(_, physical, _)| *physical)
}

#[test]
fn a_volume_with_unreadable_bytes_leaves_only_when_an_operator_accepts_the_loss() -> Result<()> {
    let Some(lab) = shop::lab("failing", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "failing", 64) else {
        return Ok(());
    };
    let lost_from = failing(&disk)?;
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    source.run(["mkdir", "-p", DATA])?;
    source.run(["mount", "-o", "ro,noload", disk.device(), DATA])?;
    let crew = shop::fleet(&lab, |_| ())?;
    let volume = format!("--volume={DATA}:/data:ro");
    boxes::start(
        source,
        CONTAINER,
        &["--restart=always", &volume],
        &["sleep", "1000"],
    )?;
    shop::known(&crew)?;

    let mut asked = crew.begin(SOURCE, "evacuate", &["evacuate", "--all", "--yes"])?;
    let role = format!("loss:{DATA}");
    let waits = || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        let plan = &status["plans"][0];
        let waits = plan["awaits"].to_string().contains(&role);
        Ok(waits.then(|| {
            (
                plan["plan"].as_str().unwrap_or_default().to_owned(),
                plan.to_string(),
            )
        }))
    };
    let (plan, told) = wait_for(
        "the plan to wait for a word",
        Duration::from_secs(90),
        waits,
    )
    .with_context(|| crew.log(SOURCE))?;
    println!("the operator reads: {told}");
    says(&told, &[DATA, "kept/large", &lost_from.to_string()])?;
    let state = ["inspect", "--format", "{{.State.Status}}", CONTAINER];
    ensure!(
        source.podman(state)? == "running",
        "it was stopped meanwhile"
    );
    ensure!(
        target.podman(["ps", "--quiet"])?.is_empty(),
        "a twin runs already"
    );

    crew.tell(SOURCE, &["approve", &plan, "--as", &role])?;
    ensure!(asked.wait()?.success(), "{}", crew.log(SOURCE));
    let report = crew.tell(SOURCE, &["report", &plan])?;
    println!("{report}");
    says(
        &report,
        &["zeros on the target", "kept/large", &lost_from.to_string()],
    )?;
    crew.tell(SOURCE, &["verify", &plan])?;
    let same = format!(
        "cd \"$1\" && cmp --bytes={lost_from} large \"$0/large\" && diff -r small \"$0/small\"
        tail -c +$(({lost_from} + 1)) large | tr -d '\\0' | wc -c"
    );
    let kept = |host: &xtask::lab::Host| host.path(&format!("{DATA}/kept"));
    let (from, to) = (kept(source), kept(target));
    let not_zero = output(
        "sh",
        &[
            "-ec",
            &same,
            from.to_str().context("plain")?,
            to.to_str().context("plain")?,
        ],
    );
    ensure!(
        not_zero == "0",
        "{not_zero} bytes of what is lost are not zeros"
    );
    Ok(())
}

#[test]
fn an_operator_who_accepts_the_loss_beforehand_is_not_asked() -> Result<()> {
    let Some(lab) = shop::lab("failing-yes", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "failing-yes", 64) else {
        return Ok(());
    };
    failing(&disk)?;
    let source = lab.host(SOURCE)?;
    source.run(["mkdir", "-p", DATA])?;
    source.run(["mount", "-o", "ro,noload", disk.device(), DATA])?;
    let crew = shop::fleet(&lab, |_| ())?;
    let volume = format!("--volume={DATA}:/data:ro");
    boxes::start(source, CONTAINER, &[&volume], &["sleep", "1000"])?;
    shop::known(&crew)?;
    let done = crew.tell(
        SOURCE,
        &["evacuate", "--all", "--yes", "--accept-loss", DATA],
    );
    let done = done.with_context(|| crew.log(SOURCE))?;
    says(&done, &["zeros on the target", "completed"])
}

#[test]
fn what_the_disk_gave_up_before_stays_on_the_target_when_it_is_gone_and_the_source_began_anew()
-> Result<()> {
    let Some(lab) = shop::lab("failing-anew", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "failing-anew", 64) else {
        return Ok(());
    };
    output("mkfs.ext4", &["-q", "-b", "4096", disk.device()]);
    let at = disk.mount();
    let fill = "cd \"$0\" && mkdir kept && head -c 24M /dev/urandom >kept/large && sync -f kept";
    output("sh", &["-c", fill, &at]);
    let extents = output("filefrag", &["-v", "-b4096", &format!("{at}/kept/large")]);
    let (logical, physical, length) = last_extent(&extents).context(extents.clone())?;
    disk.unmount();
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    source.run(["mkdir", "-p", DATA])?;
    source.run(["mount", "-o", "ro,noload", disk.device(), DATA])?;
    let from = Device {
        policy: Some(policy(Fault::Busy, "")),
        migration: vec!["prepare_pause_seconds: 1".into()],
        ..Device::new(SOURCE)
    };
    let mut crew = Crew::start(&lab, DUPLICATOR, &[from, Device::new(TARGET)])?;
    let volume = format!("--volume={DATA}:/data:ro");
    boxes::start(source, CONTAINER, &[&volume], &["sleep", "1000"])?;
    let file = format!("{DATA}/kept/large");
    let bytes = std::fs::read(source.path(&file))?;
    let arrived = || std::fs::read(target.path(&file)).is_ok_and(|there| there == bytes);
    let patience = Duration::from_secs(90);
    let prepared = wait_for("the data in advance", patience, || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        let plan = &status["plans"][0];
        let id = plan["plan"]
            .as_str()
            .filter(|_| plan["phase"] == "prepared");
        Ok(id.map(str::to_owned))
    });
    let plan = prepared.with_context(|| crew.log(SOURCE))?;
    ensure!(arrived(), "it was not copied in advance");

    crew.kill_agent(SOURCE)?;
    let backing = disk.directory.join("disk");
    let backing = OpenOptions::new().write(true).open(backing)?;
    backing.set_len(physical + length - 600_000_u64.next_multiple_of(4096).min(length))?;
    source.run(["dd", &format!("if={file}"), "iflag=nocache", "count=0"])?;
    ensure!(
        std::fs::read(source.path(&file)).is_err(),
        "its end can be read: {logical} {physical} {length}"
    );
    crew.start_agent(SOURCE)?;
    let kept = "around which the target keeps what came before";
    wait_for("a round that finds the loss", patience, || {
        let report = crew.tell(SOURCE, &["report", &plan])?;
        Ok(report.contains(kept).then_some(()))
    })
    .with_context(|| crew.log(SOURCE))?;
    let evacuate = ["evacuate", "--all", "--yes", "--accept-loss", DATA];
    let done = crew.tell(SOURCE, &evacuate);
    let done = done.with_context(|| crew.log(SOURCE))?;
    says(&done, &[&plan, "completed", "kept/large", kept])?;
    ensure!(!done.contains("zeros on the target"), "{done}");
    ensure!(arrived(), "the target has less than it had");
    let proof = crew.tell(SOURCE, &["verify", &plan])?;
    says(
        &proof,
        &[
            "unread  ",
            "not read again",
            "kept/large",
            "bytes at offset",
        ],
    )
}

/// A file system of which one file's inode is damaged, as its checksum says.
fn damaged(disk: &Disk) {
    output(
        "mkfs.ext4",
        &["-q", "-b", "4096", "-O", "metadata_csum", disk.device()],
    );
    let at = disk.mount();
    let fill =
        "cd \"$0\" && mkdir kept && echo 1 >kept/first && echo 2 >kept/hidden && echo 3 >kept/last";
    output("sh", &["-c", fill, &at]);
    disk.unmount();
    // debugfs would make the checksum right again for any other field.
    let harm = "set_inode_field /kept/hidden checksum 0x1234";
    output("debugfs", &["-w", "-R", harm, disk.device()]);
    output(
        "debugfs",
        &[
            "-w",
            "-R",
            "set_inode_field /kept/hidden i_extra_isize 999",
            disk.device(),
        ],
    );
}

#[test]
fn a_damaged_inode_is_a_loss_that_an_operator_can_accept_and_all_else_moves() -> Result<()> {
    let Some(lab) = shop::lab("failing-inode", &[])? else {
        return Ok(());
    };
    let Some(disk) = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "failing-inode", 64) else {
        return Ok(());
    };
    damaged(&disk);
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    source.run(["mkdir", "-p", DATA])?;
    source.run(["mount", "-o", "ro,noload", disk.device(), DATA])?;
    let crew = shop::fleet(&lab, |_| ())?;
    let volume = format!("--volume={DATA}:/data:ro");
    boxes::start(source, CONTAINER, &[&volume], &["sleep", "1000"])?;
    shop::known(&crew)?;
    let mut asked = crew.begin(SOURCE, "evacuate", &["evacuate", "--all", "--yes"])?;
    let role = format!("loss:{DATA}");
    let waits = || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        let plan = &status["plans"][0];
        let waits = plan["awaits"].to_string().contains(&role);
        let id = plan["plan"].as_str().unwrap_or_default().to_owned();
        Ok(waits.then(|| (id, plan.to_string())))
    };
    let patience = Duration::from_secs(90);
    let (plan, told) = wait_for("the plan to wait for a word", patience, waits)
        .with_context(|| crew.log(SOURCE))?;
    println!("the operator reads: {told}");
    says(&told, &[DATA, "kept/hidden", "cannot be looked at"])?;
    crew.tell(SOURCE, &["approve", &plan, "--as", &role])?;
    ensure!(asked.wait()?.success(), "{}", crew.log(SOURCE));
    let report = crew.tell(SOURCE, &["report", &plan])?;
    println!("{report}");
    says(&report, &["not read", "kept/hidden"])?;
    says(
        &crew.tell(SOURCE, &["verify", &plan])?,
        &["agrees", "not read again", "kept/hidden"],
    )?;
    let kept = |name: &str| std::fs::read_to_string(target.path(&format!("{DATA}/kept/{name}")));
    ensure!(kept("first")? == "1\n" && kept("last")? == "3\n");
    ensure!(kept("hidden").is_err(), "what cannot be read is there");
    Ok(())
}
