//! Where the bytes of a file lie.

/// A piece of a file on its device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it is in the file.
    pub logical: u64,
    /// Where it is on the device.
    pub physical: u64,
    /// Length.
    pub length: u64,
    /// Reserved only: it reads as zeros, whatever the device has there.
    pub unwritten: bool,
    /// Other files lie there too: what is written to this one goes elsewhere.
    pub shared: bool,
}
