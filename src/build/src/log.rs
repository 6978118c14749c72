//! A build's log: the file that is kept, and the lines that clients are shown.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bzip2::Compression;
use bzip2::write::BzEncoder;
use nix_compat::store_path::StorePath;

/// What one block of bzip2's smallest size holds. A log that is no longer is compressed when it ends, with blocks of that
/// size: with larger ones it would come out the same, but each build would need 7.6 MB while it runs.
const SHORT: usize = 100_000;
/// Lines longer than this are cut in two.
pub(crate) const MAX_LINE: usize = 64 * 1024;

/// The log kept under `<log>/drvs`, as every stock client looks for it.
///
/// It gets its name when it is complete, so that two builds of one derivation (a check beside it, or a new one while the
/// cancelled one dies) do not write over each other. Dropped before that, it is gone.
pub struct LogFile {
    sink: Sink,
    unfinished: Unfinished,
    path: PathBuf,
}

enum Sink {
    /// To be compressed, all of it.
    Short(Vec<u8>, BufWriter<File>),
    Compressed(BzEncoder<BufWriter<File>>),
    Plain(BufWriter<File>),
    /// A write failed.
    Broken,
}

fn broken() -> io::Error {
    io::Error::other("an earlier write to the log failed")
}

/// A file that is removed, unless it has been renamed.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl LogFile {
    /// Where the log of a derivation is kept: two characters of its hash make the directory.
    pub fn path(log_dir: &Path, drv: &StorePath, compress: bool) -> PathBuf {
        let (directory, rest) = drv.base_name().split_at(2);
        let mut path = log_dir.join("drvs").join(directory).join(rest);
        if compress {
            path.as_mut_os_string().push(".bz2");
        }
        path
    }

    /// Starts the log anew.
    pub fn create(log_dir: &Path, drv: &StorePath, compress: bool) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let path = Self::path(log_dir, drv, compress);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".unfinished-{}-{number}", std::process::id()));
        let file = BufWriter::new(File::create(&temporary)?);
        let sink = if compress { Sink::Short(Vec::new(), file) } else { Sink::Plain(file) };
        Ok(Self { sink, unfinished: Unfinished(temporary), path })
    }

    /// Appends to the log.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sink = match std::mem::replace(&mut self.sink, Sink::Broken) {
            Sink::Short(mut log, file) if log.len() + bytes.len() <= SHORT => {
                log.extend_from_slice(bytes);
                Sink::Short(log, file)
            }
            Sink::Short(log, file) => {
                let mut sink = BzEncoder::new(file, Compression::best());
                sink.write_all(&log)?;
                sink.write_all(bytes)?;
                Sink::Compressed(sink)
            }
            Sink::Compressed(mut sink) => {
                sink.write_all(bytes)?;
                Sink::Compressed(sink)
            }
            Sink::Plain(mut sink) => {
                sink.write_all(bytes)?;
                Sink::Plain(sink)
            }
            Sink::Broken => return Err(broken()),
        };
        Ok(())
    }

    /// Writes out what is buffered, ends the log and gives it its name.
    pub fn finish(self) -> io::Result<()> {
        match self.sink {
            Sink::Short(log, file) => {
                let mut sink = BzEncoder::new(file, Compression::fast());
                sink.write_all(&log)?;
                sink.finish()?.flush()?;
            }
            Sink::Compressed(sink) => sink.finish()?.flush()?,
            Sink::Plain(mut sink) => sink.flush()?,
            Sink::Broken => return Err(broken()),
        }
        fs::rename(&self.unfinished.0, &self.path)
    }
}

/// Cuts a builder's output into lines, as a terminal would show them: a carriage return begins the line again.
#[derive(Default)]
pub(crate) struct LineSplitter {
    line: Vec<u8>,
    position: usize,
}

impl LineSplitter {
    pub(crate) fn feed(&mut self, bytes: &[u8], each: &mut dyn FnMut(&[u8])) {
        for &byte in bytes {
            match byte {
                b'\n' => self.flush(each),
                b'\r' => self.position = 0,
                _ => {
                    if self.position == MAX_LINE {
                        self.flush(each);
                    }
                    match self.line.get_mut(self.position) {
                        Some(place) => *place = byte,
                        None => self.line.push(byte),
                    }
                    self.position += 1;
                }
            }
        }
    }

    /// The last line, if it had no end.
    pub(crate) fn finish(mut self, each: &mut dyn FnMut(&[u8])) {
        if !self.line.is_empty() {
            self.flush(each);
        }
    }

    fn flush(&mut self, each: &mut dyn FnMut(&[u8])) {
        each(&self.line);
        self.line.clear();
        self.position = 0;
    }
}

/// The last lines, for the message about a failure.
pub(crate) struct Tail {
    lines: VecDeque<Vec<u8>>,
    limit: usize,
}

/// More lines than this are never kept, whatever the client asks for.
const MAX_TAIL: usize = 10_000;

impl Tail {
    pub(crate) fn new(limit: usize) -> Self {
        Self { lines: VecDeque::new(), limit: limit.min(MAX_TAIL) }
    }

    pub(crate) fn push(&mut self, line: &[u8]) {
        if self.limit == 0 {
            return;
        }
        if self.lines.len() == self.limit {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_vec());
    }

    /// The lines, oldest first.
    pub(crate) fn into_lines(self) -> Vec<String> {
        self.lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut add = |line: &[u8]| lines.push(String::from_utf8_lossy(line).into_owned());
        let mut splitter = LineSplitter::default();
        for piece in pieces {
            splitter.feed(piece, &mut add);
        }
        splitter.finish(&mut add);
        lines
    }

    #[test]
    fn lines_as_a_terminal_shows_them() {
        assert_eq!(lines(&[b"a\nb", b"c\n\nd"]), ["a", "bc", "", "d"]);
        assert_eq!(lines(&[b"10%\r20%\r100%\n", b"x\r\n"]), ["100%", "x"]);
        assert_eq!(lines(&[&vec![b'x'; MAX_LINE + 5]]).iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE, 5]);
    }

    #[test]
    fn the_tail_is_bounded() {
        let mut tail = Tail::new(2);
        for line in ["1", "2", "3"] {
            tail.push(line.as_bytes());
        }
        assert_eq!(tail.into_lines(), ["2", "3"]);
    }

    #[test]
    fn logs_of_one_derivation_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let drv = StorePath::from_base_name("ck9x0f58gazaimyxgv1037hv5ziciq98-fail.drv").unwrap();
        let create = || LogFile::create(dir.path(), &drv, false).unwrap();
        let (mut first, mut second, mut third) = (create(), create(), create());
        first.write(b"first\n").unwrap();
        second.write(b"second\n").unwrap();
        first.write(b"more\n").unwrap();
        third.write(b"given up\n").unwrap();
        let path = LogFile::path(dir.path(), &drv, false);
        first.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "first\nmore\n");
        second.finish().unwrap();
        drop(third);
        assert_eq!(fs::read_to_string(&path).unwrap(), "second\n");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn the_log_file_is_where_stock_looks() {
        let dir = tempfile::tempdir().unwrap();
        let drv = StorePath::from_base_name("ck9x0f58gazaimyxgv1037hv5ziciq98-fail.drv").unwrap();
        for lines in [0, 1, SHORT / 6, SHORT / 6 + 1, SHORT] {
            let mut log = LogFile::create(dir.path(), &drv, true).unwrap();
            (0..lines).for_each(|_| log.write(b"hello\n").unwrap());
            log.finish().unwrap();
            let file = File::open(dir.path().join("drvs/ck/9x0f58gazaimyxgv1037hv5ziciq98-fail.drv.bz2")).unwrap();
            let mut text = String::new();
            bzip2::read::BzDecoder::new(file).read_to_string(&mut text).unwrap();
            assert!(text == "hello\n".repeat(lines), "{lines} lines");
        }
    }
}
