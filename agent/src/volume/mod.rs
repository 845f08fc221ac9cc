//! Directory trees: scanning, change detection, and rebuilding them on the target.
