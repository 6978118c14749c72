//! Compiles `protos/castore.proto` without `protoc`. The services in it are generated in `rpc-client`.

use std::error::Error;

/// From the package's directory, where build scripts run: a path that is compiled in would be that of another checkout
/// with the same target directory.
const PROTOS: &str = "../../protos";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTOS}/castore.proto");

    let files = protox::compile(["castore.proto"], [PROTOS])?;
    let mut config = prost_build::Config::new();
    // Fields decode to slices of the buffer they came in.
    config.bytes(["."]);
    config.compile_fds(files)?;
    Ok(())
}
