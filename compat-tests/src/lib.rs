//! Drives stock nix clients against castored.
