//! `nix.conf`: its grammar, and its settings with stock Nix's names and defaults.
