//! The store as a FUSE filesystem.
