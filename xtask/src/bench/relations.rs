//! Recall and precision of the relations, kind by kind, kept in docs/relations-accuracy.md.

use std::fs;

use anyhow::{Context, Result};

use crate::topology::{self, table};
use crate::workspace;

const HEAD: &str = "# Relations: recall and precision\n\nWritten by `cargo xtask bench relations`. Every kind has a server and a client of \
its own, real containers with a program that talks in exactly one way; the answer is `lifeboat relations --json`. Recall is the \
share of true edges that were found, precision the share of found edges that are true: child, parent, transport, port, and \
whether it was observed or inferred. The figures column says whether bytes and connections are right.\n\n";

const FOOT: &str = "\n## Not seen, or not in this table\n\n\
* Unix sockets that live for less than two looks, five seconds apart: the kernel shows no such connection being made.\n\
* UDP whose both addresses are translated where no runtime tells of a published port, and a connected UDP client that is never \
answered by a server that does not ask who sent.\n\
* Pods: Docker and plain cgroups have none. Podman's pod has no parent cgroup here (`--share-parent=false`): cgroup2 on a hybrid \
machine lacks the controllers that Podman would hand down. Under containerd the pod is a network namespace that two containers \
with the label `io.kubernetes.pod.uid` join, as the CRI does it.\n\
* Docker without its userland proxy has no published port on the host's loopback.\n\
* containerd and plain cgroups publish no ports themselves: their networks and published ports are those of the CNI plugins \
`bridge` and `portmap`.\n";

pub(super) fn measure() -> Result<String> {
    let mut outcomes = topology::plain()?;
    outcomes.extend(topology::podman()?);
    outcomes.extend(topology::rootless()?);
    outcomes.extend(topology::docker(true)?);
    outcomes.extend(topology::docker(false)?);
    outcomes.extend(topology::containerd()?);
    let table = table(&outcomes);
    let path = workspace::root().join("docs/relations-accuracy.md");
    fs::write(&path, format!("{HEAD}{table}{FOOT}"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(format!("## Relations\n\n{table}"))
}
