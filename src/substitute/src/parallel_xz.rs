//! Large files in xz, decompressed by several threads at once where they consist of blocks, as `parallel-compression = true`
//! and `xz -T` write them. Of a file in one block nothing is gained, and nothing lost.

use std::io::{self, BufRead, Read};
use std::sync::atomic::{AtomicUsize, Ordering};

use liblzma::bufread::XzDecoder;
use liblzma::stream::MtStreamBuilder;

use crate::compression::MAX_LZMA_MEMORY;

/// Archives of fewer bytes have few blocks, if any: usual ones have 24 MiB.
const WORTH_IT: u64 = 64 << 20;
/// Threads of one decoder.
const THREADS: usize = 4;
/// Memory that a decoder may use for blocks on their way, in bytes; a thread has a block of 24 MiB and its compressed form.
const BLOCKS_MEMORY: u64 = 192 << 20;
/// Decoders of several threads at once, in all of the daemon: others have one thread.
const DECODERS: usize = 2;
/// Between members of a file there may be zeros, four at a time.
const PADDING: usize = 4;

static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// One of [`DECODERS`].
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let more = |running| (running < DECODERS).then_some(running + 1);
        RUNNING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok().then(|| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The members of a file, one after the other.
struct Members<R> {
    /// None after an error.
    decoder: Option<XzDecoder<R>>,
    threads: u32,
    _place: Place,
}

/// The decompressed contents of `source`, of so many bytes; gives `source` back if that is not worth several threads now.
///
/// # Errors
/// When no decoder can be made.
pub(crate) fn decompressed<'a, R: BufRead + Send + 'a>(
    source: R,
    size: u64,
) -> io::Result<Result<Box<dyn Read + Send + 'a>, R>> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS));
    if size < WORTH_IT || threads == 1 {
        return Ok(Err(source));
    }
    let Some(place) = Place::take() else { return Ok(Err(source)) };
    let threads = u32::try_from(threads).unwrap_or(1);
    let decoder = Some(decoder(source, threads)?);
    Ok(Ok(Box::new(Members { decoder, threads, _place: place })))
}

fn decoder<R: BufRead>(source: R, threads: u32) -> io::Result<XzDecoder<R>> {
    let mut builder = MtStreamBuilder::new();
    builder.threads(threads).memlimit_threading(BLOCKS_MEMORY).memlimit_stop(MAX_LZMA_MEMORY);
    Ok(XzDecoder::new_stream(source, builder.decoder().map_err(io::Error::other)?))
}

/// Whether another member follows.
fn more(source: &mut impl BufRead) -> io::Result<bool> {
    let mut zeros = 0;
    loop {
        let bytes = source.fill_buf()?;
        let (ended, padding) = (bytes.is_empty(), bytes.iter().take_while(|byte| **byte == 0).count());
        let member = padding < bytes.len();
        source.consume(padding);
        zeros = (zeros + padding) % PADDING;
        if ended || member {
            return if zeros == 0 { Ok(member) } else { Err(io::Error::other("wrong padding after a stream of xz")) };
        }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let current = self.decoder.as_mut().ok_or_else(|| io::Error::other("a stream of xz is broken"))?;
            let count = current.read(buf)?;
            if count > 0 || buf.is_empty() {
                return Ok(count);
            }
            if !more(current.get_mut())? {
                return Ok(0);
            }
            if let Some(ended) = self.decoder.take() {
                self.decoder = Some(decoder(ended.into_inner(), self.threads)?);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 60) as u8
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    fn in_blocks(bytes: &[u8]) -> Vec<u8> {
        let stream = MtStreamBuilder::new().threads(2).preset(0).block_size(1 << 20).encoder().unwrap();
        let mut out = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn read(file: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        match decompressed(file, WORTH_IT)? {
            Ok(mut decoder) => decoder.read_to_end(&mut out)?,
            Err(_) => panic!("there are too many decoders"),
        };
        Ok(out)
    }

    #[test]
    fn blocks_and_members_and_padding() {
        if std::thread::available_parallelism().map_or(1, usize::from) == 1 {
            return;
        }
        let contents = noise(5_000_000);
        let file = in_blocks(&contents);
        assert_eq!(read(&file).unwrap(), contents);
        let one = liblzma::encode_all(&b"one block"[..], 1).unwrap();
        let many = [&file[..], &[0; 8], &one, &[0; 4]].concat();
        assert_eq!(read(&many).unwrap(), [&contents[..], b"one block"].concat());
        for broken in [&file[..file.len() - 1], &[&file[..], &[0; 3]].concat(), &[&file[..], b"more"].concat()] {
            read(broken).unwrap_err();
        }
        let mut changed = file.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        read(&changed).unwrap_err();
        // All at once have no more than their number of places.
        let held: Vec<Place> = std::iter::from_fn(Place::take).collect();
        assert_eq!(held.len(), DECODERS);
        assert!(decompressed(&file[..], WORTH_IT).unwrap().is_err());
        drop(held);
        assert!(decompressed(&file[..], WORTH_IT - 1).unwrap().is_err());
    }
}
