# Sourced by the commands beside it: what must be there before anything of ours can be compiled.
if ! command -v cargo >/dev/null && [ -x "${HOME:-/root}/.cargo/bin/cargo" ]; then
    PATH=${HOME:-/root}/.cargo/bin:$PATH
fi
if ! command -v cargo >/dev/null; then
    echo "Rust is needed: there is no cargo in PATH" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "Root is needed: for mount namespaces, FUSE, and a daemon with build users" >&2
    exit 1
fi
if ! command -v cc >/dev/null; then
    echo "installing a C compiler (zstd and the linker need it)"
    apt-get -qq update && apt-get -qq -y install build-essential >/dev/null
fi
