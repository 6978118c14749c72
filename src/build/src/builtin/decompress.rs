//! Compressed files, recognised by their first bytes.

use std::io::{self, BufRead, Read};

/// Memory that an xz file may ask for, in bytes; the strongest usual compression needs 65 MiB.
const MAX_XZ_MEMORY: u64 = 512 << 20;

/// The uncompressed contents of what is gzip, xz, bzip2 or zstd, and anything else as it is. Files made by putting
/// compressed files one after the other are read to the end.
pub(super) fn decompressed<'a>(mut source: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = source.fill_buf()?;
    Ok(if start.starts_with(b"\x1f\x8b") {
        Box::new(flate2::bufread::MultiGzDecoder::new(source))
    } else if start.starts_with(b"\xfd7zXZ\0") {
        let stream = liblzma::stream::Stream::new_stream_decoder(MAX_XZ_MEMORY, liblzma::stream::CONCATENATED)?;
        Box::new(liblzma::bufread::XzDecoder::new_stream(source, stream))
    } else if start.starts_with(b"BZh") {
        Box::new(bzip2::bufread::MultiBzDecoder::new(source))
    } else if start.starts_with(b"\x28\xb5\x2f\xfd") {
        Box::new(zstd::stream::read::Decoder::with_buffer(source)?)
    } else {
        Box::new(source)
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn all_kinds() {
        let text = b"some text ".repeat(1000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip2.write_all(&text).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&text).unwrap();
        let all = [
            text.clone(),
            gzip.finish().unwrap(),
            bzip2.finish().unwrap(),
            xz.finish().unwrap(),
            zstd::stream::encode_all(&text[..], 1).unwrap(),
        ];
        for compressed in &all {
            let read = |bytes: &[u8]| {
                let mut out = Vec::new();
                decompressed(bytes).and_then(|mut reader| reader.read_to_end(&mut out)).map(|_| out)
            };
            assert_eq!(read(compressed).unwrap(), text);
            assert_eq!(read(&compressed.repeat(2)).unwrap().len(), 2 * text.len());
            if compressed.len() != text.len() {
                assert!(read(&compressed[..compressed.len() - 1]).is_err());
            }
        }
        assert!(decompressed(&b""[..]).unwrap().read_to_end(&mut Vec::new()).is_ok());
    }
}
