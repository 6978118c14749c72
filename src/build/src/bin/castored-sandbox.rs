//! The sandbox helper as a program of its own.

fn main() {
    build::sandbox_main()
}
