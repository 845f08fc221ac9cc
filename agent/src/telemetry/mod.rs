//! Kernel maps and /proc to samples.
