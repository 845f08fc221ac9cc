//! Kernel maps and /proc to samples.
//!
//! Invariants: starting never fails for a missing kernel feature: it is disabled with a named reason;
//! nothing on the host is changed to observe it; nothing outside the scope is reported.

pub mod btf;
pub mod kernel;
pub mod layout;
pub mod scope;
