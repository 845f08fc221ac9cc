//! Debian's kernel packages, fetched and unpacked beside the build.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::{output, run};

/// Shown by Debian's own keys; other distributions have them as a package.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

const MIRROR: &str = "http://deb.debian.org/debian";

/// A kernel that was unpacked.
pub struct Unpacked {
    /// What a machine boots.
    pub image: PathBuf,
    /// The directory `lib/modules/VERSION`.
    pub modules: PathBuf,
}

/// Fetches the kernel of Debian's cloud flavour that a suite has, unless it is in `dir` already.
///
/// # Errors
/// The mirror is not reached or has no such package; the message holds apt's own words.
pub fn fetch(suite: &str, dir: &Path) -> Result<Unpacked> {
    let root = dir.join("root");
    if let Some(unpacked) = find(&root) {
        return Ok(unpacked);
    }
    let partial = dir.join("partial");
    let _ = fs::remove_dir_all(&partial);
    let lists = partial.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let source = partial.join("sources.list");
    fs::write(
        &source,
        format!("deb [signed-by={KEYRING}] {MIRROR} {suite} main\n"),
    )?;
    let apt = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.current_dir(&partial);
        for option in [
            format!("Dir::Etc::sourcelist={}", source.display()),
            "Dir::Etc::sourceparts=-".into(),
            format!("Dir::State::lists={}", lists.display()),
            "Dir::Cache::pkgcache=".into(),
            "Dir::Cache::srcpkgcache=".into(),
            "APT::Sandbox::User=root".into(),
            // Without it, apt only warns when the mirror is not reached.
            "APT::Update::Error-Mode=any".into(),
            "Acquire::Retries=3".into(),
            "Acquire::Check-Valid-Until=false".into(),
            "Acquire::Languages=none".into(),
        ] {
            command.args(["-o", &option]);
        }
        output(command.args(arguments)).with_context(|| {
            format!("the kernel of {suite} cannot be fetched from {MIRROR}; is there a network?")
        })
    };
    apt("apt-get", &["update", "-qq"])?;
    // The newest ones are split: an image package that depends on the binary and on the modules.
    let mut wanted = vec!["linux-image-cloud-amd64".to_owned()];
    let mut next = 0;
    while let Some(package) = wanted.get(next).cloned() {
        next += 1;
        for line in apt("apt-cache", &["depends", &package])?.lines() {
            let Some(name) = line.trim().strip_prefix("Depends: linux-") else {
                continue;
            };
            let name = format!("linux-{name}");
            if !name.starts_with("linux-base") && !wanted.contains(&name) {
                wanted.push(name);
            }
        }
    }
    let unpacked = partial.join("root");
    for package in &wanted[1..] {
        apt("apt-get", &["download", package])?;
    }
    for entry in fs::read_dir(&partial)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(path).arg(&unpacked))?;
        }
    }
    // Only a whole one is found the next time.
    let _ = fs::remove_dir_all(&root);
    fs::rename(&unpacked, &root)?;
    fs::remove_dir_all(&partial)?;
    find(&root).with_context(|| format!("no kernel image came with {wanted:?}"))
}

fn find(root: &Path) -> Option<Unpacked> {
    let places = ["lib/modules", "usr/lib/modules"];
    let mut places = places.iter().map(|place| root.join(place));
    let dir = places.find(|place| place.is_dir())?;
    let modules = fs::read_dir(dir).ok()?.next()?.ok()?.path();
    let version = modules.file_name()?.to_str()?;
    let images = [
        root.join(format!("boot/vmlinuz-{version}")),
        modules.join("vmlinuz"),
    ];
    let image = images.into_iter().find(|image| image.exists())?;
    Some(Unpacked { image, modules })
}
