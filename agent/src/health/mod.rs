//! Degradation policy and verdict. Pure.
