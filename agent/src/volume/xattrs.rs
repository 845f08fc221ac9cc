//! Extended attributes of entries: reading them all, and making a target's set equal to the source's.

use super::tree::Xattr;
use nix::errno::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::LazyLock;
use xattr::FileExt;

/// Something that carries attributes: an open file, or a path that is not followed.
pub trait Carrier {
    /// Names of all attributes.
    fn list(&self) -> io::Result<Vec<OsString>>;
    /// Value of one; none when it is gone.
    fn value(&self, name: &OsStr) -> io::Result<Option<Vec<u8>>>;
    /// Sets one.
    fn set(&self, name: &OsStr, value: &[u8]) -> io::Result<()>;
    /// Removes one.
    fn remove(&self, name: &OsStr) -> io::Result<()>;
}

impl Carrier for File {
    fn list(&self) -> io::Result<Vec<OsString>> {
        Ok(self.list_xattr()?.collect())
    }
    fn value(&self, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
        self.get_xattr(name)
    }
    fn set(&self, name: &OsStr, value: &[u8]) -> io::Result<()> {
        self.set_xattr(name, value)
    }
    fn remove(&self, name: &OsStr) -> io::Result<()> {
        self.remove_xattr(name)
    }
}

impl Carrier for Path {
    fn list(&self) -> io::Result<Vec<OsString>> {
        Ok(xattr::list(self)?.collect())
    }
    fn value(&self, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
        xattr::get(self, name)
    }
    fn set(&self, name: &OsStr, value: &[u8]) -> io::Result<()> {
        xattr::set(self, name, value)
    }
    fn remove(&self, name: &OsStr) -> io::Result<()> {
        xattr::remove(self, name)
    }
}

fn unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32)
}

/// How XFS keeps POSIX ACLs: to root it lists them twice, by these names and by those that they have everywhere
/// (`xfs_xattr_put_listent` in fs/xfs/xfs_xattr.c).
const XFS_ACLS: [&str; 2] = ["trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"];

const SELINUX: &str = "security.selinux";

/// Whether this host's kernel labels every file by its own policy.
static LABELS: LazyLock<bool> = LazyLock::new(|| Path::new("/sys/fs/selinux/enforce").exists());

/// Whether an attribute is not the volume's, but its host's: of one that labels every file by itself, or of one that does not.
fn is_of_host(name: &OsStr, labels: bool) -> bool {
    XFS_ACLS.iter().any(|acl| name == *acl) || labels && name == SELINUX
}

fn names<C: Carrier + ?Sized>(carrier: &C) -> io::Result<Vec<OsString>> {
    let mut names = carrier.list()?;
    names.retain(|name| !is_of_host(name, *LABELS));
    Ok(names)
}

/// Every attribute of `carrier`, sorted by name; none where the file system has no attributes.
///
/// # Errors
/// The I/O error of the first call that failed.
pub fn read<C: Carrier + ?Sized>(carrier: &C) -> io::Result<Vec<Xattr>> {
    let names = match names(carrier) {
        Ok(names) => names,
        Err(error) if unsupported(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut xattrs = Vec::with_capacity(names.len());
    for name in names {
        // Removed between list and get: then it is simply not there.
        if let Some(value) = carrier.value(&name)? {
            xattrs.push(Xattr {
                name: name.into_vec().into(),
                value: value.into(),
            });
        }
    }
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(xattrs)
}

/// Makes the attributes of `carrier` equal to `wanted`.
///
/// Labels that the host's own policy gives stay as they are.
///
/// # Errors
/// The name that could not be set or removed, with the I/O error.
pub fn write<C: Carrier + ?Sized>(
    carrier: &C,
    wanted: &[Xattr],
) -> Result<(), (OsString, io::Error)> {
    let present = match names(carrier) {
        Ok(names) => names,
        Err(error) if unsupported(&error) && wanted.is_empty() => return Ok(()),
        Err(error) => return Err((OsString::from("(list)"), error)),
    };
    for name in present {
        if !wanted.iter().any(|xattr| *xattr.name == *name.as_bytes()) {
            carrier
                .remove(&name)
                .map_err(|error| (name.clone(), error))?;
        }
    }
    for xattr in wanted {
        let name = OsStr::from_bytes(&xattr.name);
        if is_of_host(name, *LABELS) {
            continue;
        }
        carrier
            .set(name, &xattr.value)
            .map_err(|error| (name.to_owned(), error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_the_volumes_own_only_where_the_host_gives_none_itself() {
        let is_of_host = |name: &str, labels| is_of_host(OsStr::new(name), labels);
        assert!(is_of_host(SELINUX, true) && !is_of_host(SELINUX, false));
        assert!(!is_of_host("security.capability", true) && !is_of_host("user.selinux", true));
        assert!(is_of_host(XFS_ACLS[0], false));
    }
}
