//! One decoder under libFuzzer; `FUZZ_TARGET` names it.

#![no_main]

#[path = "../../src/decoders.rs"]
mod decoders;

use std::sync::LazyLock;

static DECODER: LazyLock<decoders::Decoder> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let found = decoders::DECODERS.iter().find(|(known, _)| *known == name);
    let Some((_, decode)) = found else {
        panic!("FUZZ_TARGET names no decoder: {name:?}");
    };
    *decode
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| DECODER(bytes));
