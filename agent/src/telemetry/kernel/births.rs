//! Reading which cgroups were made.

use super::Kernel;
use aya::maps::RingBuf;
use lifeboat_ebpf::{BORN_PATH, Born};

impl Kernel {
    /// Cgroups made since the last call: id and path below the scope, with a leading slash. Those whose path
    /// was too long are left out.
    pub fn born(&mut self) -> Vec<(u64, String)> {
        let level = self.scope_level;
        let map = self.ebpf.as_mut().and_then(|ebpf| ebpf.map_mut("BORN"));
        let Some(mut ring) = map.and_then(|map| RingBuf::try_from(map).ok()) else {
            return Vec::new();
        };
        let mut born = Vec::new();
        while let Some(item) = ring.next() {
            if item.len() < size_of::<Born>() {
                continue;
            }
            // SAFETY: the program wrote a whole Born, any bytes of which are a value; the ring aligns to 8 but
            // unaligned reading needs no such promise.
            let one = unsafe { item.as_ptr().cast::<Born>().read_unaligned() };
            if let Some(path) = below(&one.path, level) {
                born.push((one.id, path));
            }
        }
        born
    }
}

/// A path from the root as one below its ancestor at a level; none for that ancestor, and for a path that was
/// cut off.
fn below(path: &[u8; BORN_PATH], level: u32) -> Option<String> {
    let length = path.iter().position(|&byte| byte == 0)?;
    if length + 1 == BORN_PATH {
        return None;
    }
    let path = std::str::from_utf8(&path[..length]).ok()?;
    let parts = path.strip_prefix('/')?.split('/').skip(level as usize);
    let below: String = parts.map(|part| format!("/{part}")).collect();
    (!below.is_empty()).then_some(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> [u8; BORN_PATH] {
        let mut path = [0; BORN_PATH];
        path[..text.len()].copy_from_slice(text.as_bytes());
        path
    }

    #[test]
    fn paths_are_those_below_the_scope_and_a_cut_one_is_none() {
        assert_eq!(below(&path("/a/b/c"), 0).as_deref(), Some("/a/b/c"));
        assert_eq!(below(&path("/a/b/c"), 2).as_deref(), Some("/c"));
        assert_eq!(below(&path("/a/b"), 2), None);
        assert_eq!(below(&path(""), 0), None);
        let long = format!("/{}", "x".repeat(BORN_PATH - 2));
        assert_eq!(below(&path(&long), 0), None);
    }
}
