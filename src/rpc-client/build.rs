//! Generates the gRPC services from `protos/`, with a Rust protobuf compiler so that no `protoc` is needed.
//!
//! The messages of `tvix.castore.v1` come from the castore crate. Code is made for the `tvix.*` names only: the
//! `snix.*` packages are the same on the wire, and are only described here, for server reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const PROTOS: &str = "../../protos";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTOS}");
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);

    let tvix = protox::compile(["castore.proto", "store.proto"], [PROTOS])?;
    let snix = protox::compile(["snix/castore.proto", "snix/store.proto"], [PROTOS])?;
    fs::write(out_dir.join("tvix.bin"), tvix.encode_to_vec())?;
    fs::write(out_dir.join("snix.bin"), snix.encode_to_vec())?;

    tonic_prost_build::configure()
        .extern_path(".tvix.castore.v1", "::castore::proto")
        // Fields decode to slices of the message's buffer, as they do in castore.
        .bytes(".")
        .out_dir(&out_dir)
        .compile_fds(tvix)?;
    Ok(())
}
