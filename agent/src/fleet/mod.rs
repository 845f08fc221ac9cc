//! Registry, allocation, identities, tokens and the mutual-TLS control channel.
