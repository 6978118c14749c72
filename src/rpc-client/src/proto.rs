//! What `build.rs` generates from `protos/`, and the descriptors that reflection serves.

/// `tvix.castore.v1`: the clients and servers of BlobService and DirectoryService. Their messages are in
/// [`castore::proto`].
pub mod castore {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    tonic::include_proto!("tvix.castore.v1");
}

/// `tvix.store.v1`: PathInfo, its parts, and the PathInfoService.
pub mod store {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    tonic::include_proto!("tvix.store.v1");
}

/// The encoded `FileDescriptorSet` of the `tvix` packages.
pub const TVIX_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("tvix");

/// The encoded `FileDescriptorSet` of the `snix` packages.
pub const SNIX_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("snix");
