//! How NARs are compressed in binary caches.

use std::io::{self, BufRead, Read};

use liblzma::stream::{CONCATENATED, Stream};
use nix_compat::narinfo::Compression;

/// Memory that a file of the LZMA family may ask for, in bytes; the strongest usual compression needs 65 MiB.
pub(crate) const MAX_LZMA_MEMORY: u64 = 512 << 20;
/// Bytes of a decoder's own input buffer.
const BUFFER: usize = 64 * 1024;

/// The decompressed contents of `source`; `None` for compressions of which no good library is known.
///
/// # Errors
/// When no decoder can be made.
pub fn decompressed<'a>(
    compression: Compression,
    source: impl BufRead + Send + 'a,
) -> io::Result<Option<Box<dyn Read + Send + 'a>>> {
    let lzma = |stream: Result<Stream, _>, source| -> io::Result<Option<Box<dyn Read + Send + 'a>>> {
        Ok(Some(Box::new(liblzma::bufread::XzDecoder::new_stream(source, stream.map_err(io::Error::other)?))))
    };
    Ok(match compression {
        Compression::None => Some(Box::new(source)),
        Compression::Bzip2 => Some(Box::new(bzip2::bufread::MultiBzDecoder::new(source))),
        Compression::Brotli => Some(Box::new(brotli_decompressor::Decompressor::new(source, BUFFER))),
        Compression::Gzip => Some(Box::new(flate2::bufread::MultiGzDecoder::new(source))),
        Compression::Lz4 => Some(Box::new(lz4_flex::frame::FrameDecoder::new(source))),
        Compression::Lzip => return lzma(Stream::new_lzip_decoder(MAX_LZMA_MEMORY, CONCATENATED), source),
        Compression::Lzma => return lzma(Stream::new_lzma_decoder(MAX_LZMA_MEMORY), source),
        Compression::Xz => return lzma(Stream::new_stream_decoder(MAX_LZMA_MEMORY, CONCATENATED), source),
        Compression::Zstd => Some(Box::new(zstd::stream::read::Decoder::with_buffer(source)?)),
        Compression::Compress | Compression::Grzip | Compression::Lrzip | Compression::Lzop => None,
    })
}
