//! The programs of the senses for kernels before Linux 5.12, which lack the atomic instructions that return
//! what was there; all else is the same source.
//!
//! Invariants: as in the other object.
#![no_std]
#![no_main]
// For the atomic instructions; the BPF linker's toolchain is unstable Rust anyway.
#![feature(asm_experimental_arch)]
#![allow(
    dead_code,
    reason = "the modules below are shared with the objects that use the rest"
)]

mod attribution;
mod births;
mod block;
mod datagrams;
mod kernel;
mod kinds;
mod object;
mod open;
mod ports;
mod sched;
mod scope;
