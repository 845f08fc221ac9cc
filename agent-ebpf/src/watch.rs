//! The kernel programs that run only on demand, in an object of their own: they cost nothing while nobody
//! asks for them.
//!
//! Invariants: as in the object of the senses.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(
    dead_code,
    reason = "the modules below are shared with the object of the senses, which uses the rest"
)]

mod dirty;
mod kernel;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
