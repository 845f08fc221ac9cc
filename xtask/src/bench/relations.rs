//! Recall and precision of the relations, kind by kind, kept in docs/relations-accuracy.md.

use std::fs;

use anyhow::{Context, Result};

use crate::topology::{self, has, table};
use crate::workspace;

const HEAD: &str = "# Relations: recall and precision\n\nWritten by `cargo xtask bench relations`. Every kind has a server and a client of \
its own, real containers with a program that talks in exactly one way; the answer is `lifeboat relations --json`. Recall is the \
share of true edges that were found, precision the share of found edges that are true: child, parent, transport, port, and \
whether it was observed or inferred. The figures column says whether bytes and connections are right.\n\n";

const FOOT: &str = "\n## Not seen, or not in this table\n\n\
* Unix sockets that live for less than two looks, five seconds apart: the kernel shows no such connection being made.\n\
* UDP whose both addresses are translated, and a connected UDP client that is never answered by a server that does not ask who sent.\n\
* Two containers in one pod, rootless Podman, and containerd without Docker: not measured yet.\n";

pub(super) fn measure() -> Result<String> {
    let mut outcomes = topology::plain()?;
    outcomes.extend(topology::podman()?);
    let mut foot = FOOT.to_owned();
    if has("dockerd") {
        outcomes.extend(topology::docker(true)?);
        outcomes.extend(topology::docker(false)?);
    } else {
        foot.push_str("* Docker: it is not on the machine that this was measured on.\n");
    }
    let table = table(&outcomes);
    let path = workspace::root().join("docs/relations-accuracy.md");
    fs::write(&path, format!("{HEAD}{table}{foot}"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(format!("## Relations\n\n{table}"))
}
