//! Building derivations: scheduling across all clients, and the sandbox.
