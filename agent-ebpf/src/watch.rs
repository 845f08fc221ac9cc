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
mod object;
