//! In which form blocks are written: quickly, as they come, or densely, when there is time.

/// How the blocks of a pack were made. Readers need not know: a block says itself how it is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// As imports write: zstd favours speed, 0.4 GB/s per core at nearly the ratio of the next levels.
    Quick,
    /// As optimising writes: 10 to 15 % smaller at 50 MB/s per core (files of /usr/share and /usr/lib, blocks of 256 KiB,
    /// level 9). Level 15 saves 3 to 4 % more and takes six times as long; 512 KiB save 3 % more, and each random read
    /// costs twice as much.
    Dense,
    /// Written quickly, and found to be hardly smaller in the dense form. Never written to.
    Fixed,
}

impl Form {
    /// Those in which blocks are written.
    pub(super) const WRITTEN: [Form; 2] = [Form::Quick, Form::Dense];

    /// The level of zstd.
    pub(super) fn level(self) -> i32 {
        match self {
            Form::Quick | Form::Fixed => 1,
            Form::Dense => 9,
        }
    }

    /// Raw bytes of the blocks within a zstd frame: a frame can be decompressed up to the end of each of them.
    ///
    /// At level 1 small ones cost nothing: files of /usr/share take .438 of their size with 16 KiB as with 128, and are
    /// decompressed in 133 us beside 114 for each 128 KiB. At level 9 each brings tables of its own, 188 us beside 104.
    pub(super) fn frame_block(self) -> u32 {
        match self {
            Form::Quick | Form::Fixed => 16 << 10,
            Form::Dense => 128 << 10,
        }
    }

    /// A block is closed when it has gathered this many raw bytes.
    pub(crate) fn block(self) -> usize {
        match self {
            Form::Quick | Form::Fixed => 128 << 10,
            Form::Dense => 256 << 10,
        }
    }

    /// The byte in the index; the quick form has none.
    pub(crate) fn encode(self) -> Option<u8> {
        match self {
            Form::Quick => None,
            Form::Dense => Some(1),
            Form::Fixed => Some(2),
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [1] => Some(Form::Dense),
            [2] => Some(Form::Fixed),
            _ => None,
        }
    }
}
