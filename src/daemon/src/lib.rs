//! The nix-daemon side: sockets, sessions, and the operations of the worker protocol.
