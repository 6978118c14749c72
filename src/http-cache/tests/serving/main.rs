//! A server on loopback, asked byte by byte.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod answers;
mod connections;
mod pages;
mod pushes;
mod rig;
