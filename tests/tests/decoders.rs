//! The kept corpus of the fuzzers goes through every decoder, as it is and changed at random: what once broke one
//! stays mended.

use std::env;
use std::fs;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::decoders::{DECODERS, Decoder};
use xtask::soak::Chance;

/// Changed seeds go through each decoder for so long.
const TIME: Duration = Duration::from_millis(700);
/// Repeats the changes of a run that printed this seed.
const SEED: &str = "LIFEBOAT_DECODERS_SEED";

/// The seeds of a decoder.
fn corpus(name: &str) -> Result<Vec<Vec<u8>>> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let seeds = seeds.join(name);
    let mut corpus = Vec::new();
    for seed in fs::read_dir(&seeds).with_context(|| seeds.display().to_string())? {
        corpus.push(fs::read(seed?.path())?);
    }
    ensure!(!corpus.is_empty(), "{} keeps no seed", seeds.display());
    corpus.sort();
    Ok(corpus)
}

#[test]
fn no_decoder_breaks_on_the_corpus() -> Result<()> {
    for (name, decode) in DECODERS {
        // Said before it is tried: a panic then tells which one it was.
        println!("{name}");
        for bytes in corpus(name)? {
            decode(&bytes);
            // Cut short anywhere, it must be refused or read as what it then is.
            for end in (0..bytes.len()).step_by(1 + bytes.len() / 64) {
                decode(&bytes[..end]);
            }
        }
    }
    Ok(())
}

#[test]
fn no_decoder_breaks_on_the_corpus_changed_at_random() -> Result<()> {
    let seed = env::var(SEED).ok().map(|seed| seed.parse()).transpose()?;
    let share = DECODERS
        .len()
        .div_ceil(thread::available_parallelism()?.get());
    thread::scope(|scope| {
        let shares = DECODERS.chunks(share);
        let shares: Vec<_> = shares
            .map(|share| scope.spawn(move || change_at_random(share, seed)))
            .collect();
        let mut ended = shares.into_iter().map(ScopedJoinHandle::join);
        ended.try_for_each(|end| end.unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

fn change_at_random(decoders: &[(&str, Decoder)], seed: Option<u64>) -> Result<()> {
    for (name, decode) in decoders {
        let seeds = corpus(name)?;
        let mut chance = Chance::new(name, seed);
        let (until, mut tried) = (Instant::now() + TIME, 0);
        while Instant::now() < until {
            decode(&changed(&seeds, &mut chance));
            tried += 1;
        }
        println!("{name}: {tried} inputs; repeat them with {SEED}");
    }
    Ok(())
}

/// A seed with some changes: bytes flipped, set to values at the edges, put in, taken out, or joined with another.
fn changed(seeds: &[Vec<u8>], chance: &mut Chance) -> Vec<u8> {
    let mut pick = |len: usize| usize::try_from(chance.below(len as u64)).unwrap_or(0);
    let mut bytes = seeds[pick(seeds.len())].clone();
    for _ in 0..=pick(4) {
        let at = pick(bytes.len() + 1);
        let length = pick(8).min(bytes.len() - at);
        match pick(6) {
            0 if length > 0 => bytes[at] ^= 1 << pick(8),
            1 => bytes[at..at + length].fill([0, 0x7f, 0x80, 0xff][pick(4)]),
            2 => drop(bytes.splice(at..at, (0..pick(8)).map(|byte| byte as u8 * 37))),
            3 => drop(bytes.drain(at..at + length)),
            4 => bytes.truncate(at),
            _ => {
                let other = &seeds[pick(seeds.len())];
                let from = pick(other.len() + 1);
                bytes.splice(at..at + length, other[from..].iter().copied());
                bytes.truncate(8192);
            }
        }
    }
    bytes
}
