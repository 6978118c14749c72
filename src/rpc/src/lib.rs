//! The store over gRPC: tvix.castore.v1, tvix.store.v1, reflection, health.
