//! Where things are: the checkout, its build directory and what is built there.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

static RELEASE: AtomicBool = AtomicBool::new(false);

/// From now on, binaries are those of the release build: figures are taken with it.
pub fn use_release() {
    RELEASE.store(true, Ordering::Relaxed);
}

/// Root of the checkout this task runner was built from.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// Cargo's build directory. Labs and images live below it, so that removing it removes everything.
#[must_use]
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Path of a binary of this workspace as `cargo build` leaves it.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let profile = if RELEASE.load(Ordering::Relaxed) {
        "release"
    } else {
        "debug"
    };
    target().join(profile).join(name)
}
