//! Answers requests while and after the data moves: forwarding of published ports.
