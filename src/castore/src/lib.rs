//! Content-addressed storage: blobs, Merkle directories, and the local engine of packs and an index.
