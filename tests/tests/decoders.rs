//! The kept corpus of the fuzzers goes through every decoder: what once broke one stays mended.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::decoders::DECODERS;

#[test]
fn no_decoder_breaks_on_the_corpus() -> Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, decode) in DECODERS {
        let seeds = corpus.join(name);
        let mut count = 0;
        for seed in fs::read_dir(&seeds).with_context(|| seeds.display().to_string())? {
            let seed = seed?.path();
            // Named before it is tried: a panic then tells which one it was.
            println!("{}", seed.display());
            let bytes = fs::read(&seed)?;
            decode(&bytes);
            // Cut short anywhere, it must be refused or read as what it then is.
            for end in (0..bytes.len()).step_by(1 + bytes.len() / 64) {
                decode(&bytes[..end]);
            }
            count += 1;
        }
        ensure!(count > 0, "{} keeps no seed", seeds.display());
    }
    Ok(())
}
