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
mod ports;
mod sched;
mod scope;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The kernel offers the helpers that read its memory only under a licence it calls GPL-compatible; MIT,
// one of ours, is on its list by this name.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
