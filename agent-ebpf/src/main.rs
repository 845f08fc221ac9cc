//! The kernel programs, one module a family.
//!
//! Invariants: aggregate in maps; the ring buffer carries rare facts only; every failed insert is
//! counted in `LOSSES`. Kernel fields are read at the offsets in `LAYOUT`, which the agent takes from
//! the running kernel's BTF and the verifier checks again for every typed load.
#![no_std]
#![no_main]
// For the atomic instructions; the BPF linker's toolchain is unstable Rust anyway.
#![feature(asm_experimental_arch)]

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
