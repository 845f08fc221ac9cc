//! Extended attributes of entries: reading them all, and making a target's set equal to the source's.

use super::tree::Xattr;
use nix::errno::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
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

/// Names that are not the volume's own: the label of SELinux, which the policy of each host gives, and how XFS keeps POSIX
/// ACLs: to root it lists them twice, by these names and by those that they have everywhere (`xfs_xattr_put_listent` in
/// fs/xfs/xfs_xattr.c).
const OF_HOST: [&str; 3] = [LABEL, "trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"];
const LABEL: &str = "security.selinux";

fn is_of_host(name: &OsStr) -> bool {
    OF_HOST.iter().any(|of_host| name == *of_host)
}

fn names<C: Carrier + ?Sized>(carrier: &C) -> io::Result<Vec<OsString>> {
    let mut names = carrier.list()?;
    names.retain(|name| !is_of_host(name));
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
/// A label that the host's policy gave stays: the kernel forbids removing it.
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
        if is_of_host(name) {
            continue;
        }
        carrier
            .set(name, &xattr.value)
            .map_err(|error| (name.to_owned(), error))?;
    }
    Ok(())
}

/// Gives a file that is made anew the label that another of the same host has.
///
/// # Errors
/// It cannot be read or set.
pub fn copy_label(from: &File, to: &File) -> io::Result<()> {
    match from.get_xattr(LABEL) {
        Ok(Some(label)) => to.set_xattr(LABEL, &label),
        Ok(None) => Ok(()),
        Err(error) if unsupported(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_their_hosts_and_are_neither_told_nor_set_nor_removed() {
        let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
        let dir = tempfile::tempdir_in(target).unwrap();
        let make = |name| File::create_new(dir.path().join(name)).unwrap();
        let (labelled, other) = (make("labelled"), make("other"));
        if let Err(error) = labelled.set_xattr(LABEL, b"a:b:c:s0") {
            println!("no label can be set here ({error}): not tested");
            return;
        }
        labelled.set_xattr("user.of", b"volume").unwrap();
        let own = Xattr {
            name: (*b"user.of").into(),
            value: (*b"volume").into(),
        };
        assert_eq!(read(&labelled).unwrap(), std::slice::from_ref(&own));
        write(&labelled, &[]).unwrap();
        assert_eq!(read(&labelled).unwrap(), []);
        assert_eq!(labelled.get_xattr(LABEL).unwrap().unwrap(), b"a:b:c:s0");
        let label = Xattr {
            name: LABEL.as_bytes().into(),
            value: (*b"x:y:z:s0").into(),
        };
        write(&other, &[label, own.clone()]).unwrap();
        assert_eq!(read(&other).unwrap(), [own]);
        assert_eq!(other.get_xattr(LABEL).unwrap(), None);
        copy_label(&labelled, &other).unwrap();
        assert_eq!(other.get_xattr(LABEL).unwrap().unwrap(), b"a:b:c:s0");
    }
}
