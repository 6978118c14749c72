//! Nix's data formats and worker protocol: pure, without I/O.
