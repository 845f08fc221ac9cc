//! The local HTTP API on the agent's unix socket, which the command line and the metrics page use.
