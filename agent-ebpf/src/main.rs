//! The kernel programs, one module a family.
//!
//! Invariants: aggregate in maps; the ring buffer carries rare facts only; every failed insert is
//! counted in `LOSSES`. Kernel fields are read at the offsets in `LAYOUT`, which the agent takes from
//! the running kernel's BTF and the verifier checks again for every typed load.
#![no_std]
#![no_main]
// For the atomic instructions; the BPF linker's toolchain is unstable Rust anyway.
#![feature(asm_experimental_arch)]

mod block;
mod kernel;
mod ports;
mod sched;
mod scope;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The helpers that read kernel memory are for GPL-compatible programs; the workspace's licence
// (MIT OR Apache-2.0) is, in the kernel's word for it, "Dual MIT/GPL" compatible only when said so.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
