//! Wires the rooms into the two roles: agent and duplicator.
