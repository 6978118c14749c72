//! What several tests of downloads need.

use std::io;

use fetch::Sink;

/// Keeps what comes.
pub(crate) struct Memory(pub(crate) Vec<u8>);

impl Sink for Memory {
    fn begin(&mut self, offset: u64, _expected: u64) -> io::Result<()> {
        self.0.truncate(usize::try_from(offset).unwrap());
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        self.0.extend_from_slice(piece);
        Ok(())
    }

    fn can_restart(&self) -> bool {
        true
    }
}
