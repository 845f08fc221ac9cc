//! Small files of procfs and sysfs.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A file's text without surrounding white space.
pub fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// A file's one number.
pub fn number<T: FromStr>(path: &Path) -> Option<T> {
    text(path)?.parse().ok()
}

/// The number behind `key` in lines of `key value`.
pub fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

/// Numbers of the CPUs that are online (Linux, Documentation/admin-guide/cputopology.rst).
pub fn online_cpus(root: &Path) -> Vec<usize> {
    let list = text(&root.join("sys/devices/system/cpu/online")).unwrap_or_default();
    list.split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse().ok()?..=last.parse().ok()?)
        })
        .flatten()
        .collect()
}

/// Entries of a directory by name; none of an absent one.
pub fn entries(path: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    entries
}

/// Last component of a path.
pub fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Why nothing could be read from `path`; `otherwise` is what its absence means.
pub fn why(path: &Path, otherwise: &str) -> String {
    let path_shown = path.display();
    match fs::File::open(path).map_err(|error| error.kind()) {
        Ok(_) => format!("nothing to be read in {path_shown}: {otherwise}"),
        Err(ErrorKind::NotFound) => format!("no {path_shown}: {otherwise}"),
        Err(ErrorKind::PermissionDenied) => format!("no permission to read {path_shown}"),
        Err(kind) => format!("{path_shown}: {kind}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_cpus_are_spelt_out() {
        let root = tempfile::tempdir().expect("a directory");
        assert!(online_cpus(root.path()).is_empty());
        let directory = root.path().join("sys/devices/system/cpu");
        fs::create_dir_all(&directory).expect("made");
        fs::write(directory.join("online"), "0-2,5,7-8\n").expect("written");
        assert_eq!(online_cpus(root.path()), [0, 1, 2, 5, 7, 8]);
    }
}
