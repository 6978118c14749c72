//! Compiles `protos/castore.proto` without `protoc`. The services in it are generated where they are served: in `rpc`.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let protos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../protos");
    println!("cargo::rerun-if-changed={}", protos.join("castore.proto").display());

    let files = protox::compile(["castore.proto"], [&protos])?;
    let mut config = prost_build::Config::new();
    // Fields decode to slices of the buffer they came in.
    config.bytes(["."]);
    config.compile_fds(files)?;
    Ok(())
}
