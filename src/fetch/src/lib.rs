//! Files from HTTP servers, for whoever needs them: the builtin builders and the substituters; and files to them.
//!
//! Everything here blocks. What the daemon knows and a builder could not read (passwords, certificates) is plain data,
//! [`Download`]; a [`Client`] downloads as it says, piece by piece into a [`Sink`].

mod client;
mod download;
mod error;
mod first;
mod netrc;
mod network;
mod proxy;
mod s3;
mod transport;

pub use client::{Client, Retry, Sink, Upload, copy_file, without_password};
pub use download::{Download, DownloadOptions};
pub use error::{DownloadError, Trouble, UploadError};
pub use network::NetworkError;
pub use s3::{S3Bucket, S3Error, SignedBucket};
