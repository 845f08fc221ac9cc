//! Logs of the daemons: lines on standard error, for whatever supervises them.

use tracing_subscriber::EnvFilter;

/// Starts logging; `LIFEBOAT_LOG` chooses what (as `RUST_LOG` would), `info` if it says nothing.
/// Calling it again changes nothing.
pub fn start() {
    let filter = EnvFilter::try_from_env("LIFEBOAT_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,fuser=error"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}
