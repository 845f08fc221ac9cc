//! The demo's chain with a smaller load: signal, relations, verdict, pairing, move, twins, proof.

#[test]
fn a_host_goes_bad_its_containers_and_data_leave_and_it_is_proven() -> anyhow::Result<()> {
    if !xtask::process::is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    xtask::demo::run(2)
}
