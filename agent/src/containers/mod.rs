//! Container runtimes through the Docker-compatible API and containerd's state, joined with cgroups.
//!
//! Purpose: find the containers of this host, hold and release them, and make twins of them.
//! Invariants: nothing is pulled from a registry; a runtime that is not there is a named problem and
//! never a failure of discovery; what a twin could not take over is listed, never dropped.
//! Non-goals: building images, and moving what runs without the Docker-compatible API: containerd's tasks
//! are shown by name, all other cgroups by their paths.

mod cgroups;
mod client;
mod containerd;
pub mod create;
mod devices;
mod discover;
mod fence;
mod follow;
mod images;
pub mod inspect;
mod layers;
pub mod ops;
mod ready;
mod resources;
mod twin;

pub use cgroups::{FreezeError, Scope, freeze, thaw};
pub use client::{Engine, Runtime, RuntimeError, Version};
pub use devices::name_devices;
pub use discover::{Discovery, Runtimes};
pub use fence::{Fence, FenceError, Means};
pub use images::{ImageError, LoadedImage};
pub use inspect::REGISTRATION_LABEL;
pub use ops::{Event, PauseError};
pub use ready::{How, NotReady, Readiness, ReadyRules};
pub use resources::ResourceError;
pub use twin::{Twin, TwinError, TwinSpec};
