//! Plain data that the kernel programs and the agent share.
//!
//! Invariants: every type is `#[repr(C)]`, has no padding that is read, and means the same on both sides.
//! Non-goals: behaviour; it lives in the programs and in the agent's `telemetry` room.
#![no_std]
