//! The castored binary.
fn main() {}
