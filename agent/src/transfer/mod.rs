//! Sealed records over the wire: io_uring engine and its blocking twin, queues and rates.
