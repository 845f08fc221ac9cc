//! Container runtimes through the Docker-compatible API, joined with cgroups.
