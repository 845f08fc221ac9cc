//! Helpers shared by the end-to-end tests.

pub mod boxes;
pub mod decoders;
pub mod disk;
pub mod dockers;
pub mod guest;
pub mod scope;
pub mod shop;
pub mod stage;
