//! Images of the demo application, made of the machine's installed packages: no registry is asked.
//!
//! An image is the files it names, everything `ldd` says they need, and a busybox shell, in one layer. Its
//! archive is kept under `target/images`, named by a hash of what went in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::lab::Host;
use crate::process::{output, output_with_input};
use crate::workspace;

/// What an image is made of.
struct Recipe {
    name: &'static str,
    /// Files and directories of the machine, at the same place in the image.
    paths: Vec<PathBuf>,
    /// Files of this build, as (file, place in the image).
    built: Vec<(PathBuf, &'static str)>,
    entry: Option<&'static str>,
    user: &'static str,
    /// Directories that the service wants.
    directories: &'static [&'static str],
    /// `podman import --change`.
    changes: &'static [&'static str],
}

/// Names of the images, in the order in which they are loaded.
pub const NAMES: [&str; 4] = ["postgres", "redis", "demo-app", "nginx"];

fn recipe(name: &str) -> Result<Recipe> {
    let base = |name, entry, user| Recipe {
        name,
        paths: vec!["/usr/bin/setpriv".into()],
        built: Vec::new(),
        entry,
        user,
        directories: &[],
        changes: &["ENTRYPOINT [\"/entry\"]"],
    };
    Ok(match name {
        "postgres" => {
            let version = postgres_version()?;
            let mut recipe = base("postgres", Some(include_str!("postgres.sh")), "postgres");
            recipe.paths.extend([
                format!("/usr/lib/postgresql/{version}").into(),
                format!("/usr/share/postgresql/{version}").into(),
                "/usr/share/zoneinfo".into(),
            ]);
            recipe.directories = &["/var/lib/postgresql/data"];
            recipe.changes = &[
                "ENTRYPOINT [\"/entry\"]",
                "EXPOSE 5432",
                // Fast shutdown: the default signal would wait for the clients to leave.
                "STOPSIGNAL SIGINT",
            ];
            recipe
        }
        "redis" => {
            let mut recipe = base("redis", Some(include_str!("redis.sh")), "redis");
            recipe
                .paths
                .extend(["/usr/bin/redis-server".into(), "/usr/bin/redis-cli".into()]);
            recipe.directories = &["/data"];
            recipe.changes = &["ENTRYPOINT [\"/entry\"]", "EXPOSE 6379"];
            recipe
        }
        "nginx" => {
            let mut recipe = base("nginx", Some(include_str!("nginx.sh")), "nobody");
            recipe.paths.push("/usr/sbin/nginx".into());
            recipe.directories = &["/etc/nginx", "/var/log/nginx", "/var/lib/nginx"];
            recipe.changes = &["ENTRYPOINT [\"/entry\"]", "EXPOSE 80"];
            recipe
        }
        "demo-app" => {
            let mut recipe = base("demo-app", None, "nobody");
            recipe
                .built
                .push((workspace::binary("demo-app"), "/usr/bin/demo-app"));
            recipe.changes = &["ENTRYPOINT [\"/usr/bin/demo-app\"]", "EXPOSE 8000"];
            recipe
        }
        "talker" => {
            let mut recipe = base("talker", None, "nobody");
            recipe
                .built
                .push((workspace::binary("talker"), "/usr/bin/talker"));
            recipe.changes = &["ENTRYPOINT [\"/usr/bin/talker\"]"];
            recipe
        }
        _ => anyhow::bail!("no image {name:?}; there are {}", NAMES.join(", ")),
    })
}

/// The newest PostgreSQL of the machine: the package's name differs between distributions.
pub(crate) fn postgres_version() -> Result<String> {
    let dir = "/usr/lib/postgresql";
    fs::read_dir(dir)
        .ok()
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().join("bin/initdb").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .max_by_key(|version| version.parse::<u32>().unwrap_or(0))
        .with_context(|| format!("no PostgreSQL server in {dir}: `cargo xtask setup`"))
}

/// Builds what is missing and imports all images into the host's Podman.
///
/// # Errors
/// A program an image needs is not installed or not built, or Podman refused; the message says which.
pub fn load(host: &Host) -> Result<()> {
    load_some(host, &NAMES)
}

/// As [`load`], only the images of these [`NAMES`].
///
/// # Errors
/// As [`load`].
pub fn load_some(host: &Host, names: &[&str]) -> Result<()> {
    for name in names {
        let (archive, changes) = build(name)?;
        let mut command = host.command(["podman", "--log-level", "error", "import", "--quiet"]);
        for change in changes {
            command.args(["--change", change]);
        }
        output(command.arg(archive).arg(format!("localhost/{name}:demo"))).with_context(|| {
            format!("cannot import the image {name} in lab host {}", host.name())
        })?;
    }
    Ok(())
}

/// The image's archive, built if it is not there, and how it is to be imported.
pub(crate) fn build(name: &str) -> Result<(PathBuf, &'static [&'static str])> {
    let recipe = recipe(name)?;
    let files = closure(&recipe)?;
    let dir = workspace::target().join("images");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let archive = dir.join(format!("{name}-{}.tar", key(&recipe, &files)?));
    if !archive.exists() {
        for entry in fs::read_dir(&dir)?.flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file
                .strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('-'))
            {
                // An older build of this image; what stays only costs space.
                let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
            }
        }
        pack(&recipe, &files, &archive)
            .with_context(|| format!("cannot build the image {name}"))?;
    }
    Ok((archive, recipe.changes))
}

/// Everything that goes into an image, as place in the image → file of the machine.
fn closure(recipe: &Recipe) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut programs = BTreeSet::new();
    let mut add = |place: &Path, file: &Path| -> Result<()> {
        let metadata = file
            .symlink_metadata()
            .with_context(|| format!("{} is missing: `cargo xtask setup`", file.display()))?;
        let executable = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
        if executable || place.extension().is_some_and(|extension| extension == "so") {
            programs.insert(file.to_owned());
        }
        files.insert(place.to_owned(), file.to_owned());
        Ok(())
    };
    for path in recipe
        .paths
        .iter()
        .chain([&PathBuf::from("/usr/bin/busybox")])
    {
        walk(path, &mut |file| add(file, file))?;
    }
    for (file, place) in &recipe.built {
        ensure!(
            file.exists(),
            "{} is missing: `cargo build -p lifeboat-tests`",
            file.display()
        );
        add(Path::new(place), file)?;
    }
    for library in libraries(&programs)? {
        walk(&library, &mut |file| {
            files.insert(file.to_owned(), file.to_owned());
            Ok(())
        })?;
    }
    Ok(files)
}

/// Calls `visit` for a path, what lies under it, and what its links lead to. PostgreSQL's compiler (with
/// all of LLVM behind it) stays out.
fn walk(path: &Path, visit: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name == "bitcode" || name.starts_with("llvmjit") || name == "man" {
        return Ok(());
    }
    let metadata = path
        .symlink_metadata()
        .with_context(|| format!("{} is missing: `cargo xtask setup`", path.display()))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            walk(&entry?.path(), visit)?;
        }
        return Ok(());
    }
    visit(path)?;
    if metadata.is_symlink() {
        let parent = path.parent().unwrap_or(Path::new("/"));
        // A link to nowhere (a manual page that is not installed) is copied as it is.
        if let Ok(parent) = parent.canonicalize()
            && let Ok(link) = fs::read_link(path)
            && parent.join(&link).exists()
        {
            walk(&parent.join(link), visit)?;
        }
    }
    Ok(())
}

/// The shared libraries that the programs load, by `ldd`.
fn libraries(programs: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    // ldd fails for scripts and static programs, which need nothing.
    let result = Command::new("ldd")
        .args(programs)
        .output()
        .context("cannot start `ldd` (package libc-bin)")?;
    let text = String::from_utf8_lossy(&result.stdout);
    Ok(text
        .lines()
        // A heading "/path/program:" is no library.
        .filter(|line| line.starts_with(char::is_whitespace))
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

fn key(recipe: &Recipe, files: &BTreeMap<PathBuf, PathBuf>) -> Result<String> {
    let mut text = format!(
        "{:?}{:?}{:?}",
        recipe.entry, recipe.user, recipe.directories
    );
    for (place, file) in files {
        let metadata = file.symlink_metadata()?;
        let (size, time, nanos) = (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
        text.push_str(&format!("{} {size} {time}.{nanos}\n", place.display()));
    }
    let sum = output_with_input(&mut Command::new("sha256sum"), text.as_bytes())?;
    Ok(sum.chars().take(16).collect())
}

/// Copies everything below one directory and packs it, so that the same content gives the same archive.
fn pack(recipe: &Recipe, files: &BTreeMap<PathBuf, PathBuf>, archive: &Path) -> Result<()> {
    let root = archive.with_extension("tree");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    let inside = |place: &Path| root.join(place.strip_prefix("/").unwrap_or(place));
    for dir in [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "etc",
        "tmp",
        "proc",
        "sys",
        "dev",
        "run",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    // As on the machine, so that a library's path works by either name.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{dir}"), root.join(dir))?;
    }
    for dir in recipe.directories {
        fs::create_dir_all(inside(Path::new(dir)))?;
    }
    for (place, file) in files {
        let to = inside(place);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        if to.symlink_metadata().is_ok() {
            continue;
        }
        if file.is_symlink() {
            symlink(fs::read_link(file)?, &to)?;
        } else {
            fs::copy(file, &to).with_context(|| format!("cannot copy {}", file.display()))?;
        }
    }
    for applet in [
        "sh", "cat", "chown", "head", "ls", "mkdir", "mv", "rm", "sed", "sleep",
    ] {
        let link = root.join("usr/bin").join(applet);
        if link.symlink_metadata().is_err() {
            symlink("busybox", link)?;
        }
    }
    let user = recipe.user;
    let extra = |line: &str| {
        if user == "nobody" {
            String::new()
        } else {
            line.to_owned()
        }
    };
    let passwd = extra(&format!("{user}:x:999:999::/:/bin/sh\n"));
    let group = extra(&format!("{user}:x:999:\n"));
    fs::write(
        root.join("etc/passwd"),
        format!("root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n{passwd}"),
    )?;
    fs::write(
        root.join("etc/group"),
        format!("root:x:0:\nnogroup:x:65534:\n{group}"),
    )?;
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files dns\n")?;
    if let Some(entry) = recipe.entry {
        fs::write(root.join("entry"), entry)?;
        fs::set_permissions(root.join("entry"), fs::Permissions::from_mode(0o755))?;
    }
    let partial = archive.with_extension("partial");
    output(
        Command::new("tar")
            .args([
                "--create",
                "--sort=name",
                "--mtime=@0",
                "--owner=0",
                "--group=0",
            ])
            .arg("--numeric-owner")
            .arg("--file")
            .arg(&partial)
            .arg("--directory")
            .arg(&root)
            .arg("."),
    )
    .with_context(|| format!("cannot pack the image {}", recipe.name))?;
    fs::remove_dir_all(&root)?;
    fs::rename(&partial, archive)?;
    Ok(())
}
