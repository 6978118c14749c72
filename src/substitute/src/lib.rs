//! Other stores as sources of paths.
