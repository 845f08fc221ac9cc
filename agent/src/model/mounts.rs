//! Lines of a table of mounts (proc_pid_mountinfo(5)). Pure.

use std::path::PathBuf;

/// A mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// `major:minor` of its file system.
    pub device: &'a str,
    /// What of the file system it shows.
    pub root: String,
    /// Where.
    pub point: PathBuf,
    /// Type of the file system.
    pub file_system: &'a str,
    /// The device it lies on, where it lies on one.
    pub source: PathBuf,
}

/// Takes a line apart; none of what is no such line.
#[must_use]
pub fn parse(line: &str) -> Option<Mount<'_>> {
    let (mount, of_file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let mut of_file_system = of_file_system.split(' ');
    Some(Mount {
        device: fields.next()?,
        root: unescaped(fields.next()?),
        point: unescaped(fields.next()?).into(),
        file_system: of_file_system.next()?,
        source: unescaped(of_file_system.next().unwrap_or_default()).into(),
    })
}

/// Blanks and the like are written as three octal digits.
#[must_use]
pub fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match code {
            Some(code) => {
                plain.push(char::from(code));
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart_with_its_blanks() {
        let line = r"36 35 98:0 /a\134040b /mnt/two\040words rw,noatime shared:1 master:2 - ext4 /dev/x rw";
        let mount = Mount {
            device: "98:0",
            root: r"/a\040b".to_owned(),
            point: "/mnt/two words".into(),
            file_system: "ext4",
            source: "/dev/x".into(),
        };
        assert_eq!(parse(line), Some(mount));
        assert_eq!(parse("36 35 98:0 / /mnt rw"), None);
    }
}
