//! Framed streams: a payload cut into frames so that its end is known whatever it holds.
//!
//! A frame is its length as an integer and that many bytes without padding; length 0 ends the stream. Where frames are
//! cut carries no meaning.

use super::Invalid;

/// What [`FrameDecoder::decode`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The input is used up and the stream goes on.
    NeedMore,
    /// The next bytes of the payload; never empty.
    Data(&'a [u8]),
    /// The stream has ended. Input behind it was not touched.
    End,
}

/// Takes a framed stream apart without buffering any of it.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    state: State,
}

#[derive(Debug)]
enum State {
    Header { bytes: [u8; 8], filled: usize },
    Body { left: u32 },
    Ended,
}

impl Default for State {
    fn default() -> Self {
        State::Header { bytes: [0; 8], filled: 0 }
    }
}

impl FrameDecoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the end of the stream was seen.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// How many bytes may be received next without going past the end of the stream.
    pub fn wanted(&self) -> usize {
        match self.state {
            State::Header { filled, .. } => 8 - filled,
            State::Body { left } => left as usize,
            State::Ended => 0,
        }
    }

    /// Consumes from the front of `input` and returns the next piece. Like stock, refuses frames of 4 GiB and more.
    pub fn decode<'a>(&mut self, input: &mut &'a [u8]) -> Result<Frame<'a>, Invalid> {
        loop {
            match &mut self.state {
                State::Ended => return Ok(Frame::End),
                _ if input.is_empty() => return Ok(Frame::NeedMore),
                State::Header { bytes, filled } => {
                    let (taken, rest) = input.split_at(input.len().min(8 - *filled));
                    bytes[*filled..*filled + taken.len()].copy_from_slice(taken);
                    *filled += taken.len();
                    *input = rest;
                    if *filled == 8 {
                        let length = u64::from_le_bytes(*bytes);
                        self.state = match u32::try_from(length) {
                            Ok(0) => State::Ended,
                            Ok(left) => State::Body { left },
                            Err(_) => return Err(Invalid::IntegerTooLarge { value: length, bits: 32 }),
                        };
                    }
                }
                State::Body { left } => {
                    let (data, rest) = input.split_at(input.len().min(*left as usize));
                    *left -= u32::try_from(data.len()).unwrap_or(*left);
                    *input = rest;
                    if *left == 0 {
                        self.state = State::default();
                    }
                    return Ok(Frame::Data(data));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_the_end_is_left_alone() {
        let mut decoder = FrameDecoder::new();
        let mut input: &[u8] = b"\x02\0\0\0\0\0\0\0ab\0\0\0\0\0\0\0\0next";
        assert_eq!(decoder.decode(&mut input).unwrap(), Frame::Data(b"ab"));
        assert_eq!(decoder.decode(&mut input).unwrap(), Frame::End);
        assert_eq!(decoder.decode(&mut input).unwrap(), Frame::End);
        assert_eq!(input, b"next");
    }

    #[test]
    fn frames_of_four_gibibytes_are_refused() {
        let mut input: &[u8] = &(1_u64 << 32).to_le_bytes();
        assert!(matches!(FrameDecoder::new().decode(&mut input), Err(Invalid::IntegerTooLarge { bits: 32, .. })));
    }

    #[test]
    fn a_cut_off_header_wants_its_rest() {
        let mut decoder = FrameDecoder::new();
        let mut input: &[u8] = &[1, 0, 0];
        assert_eq!(decoder.decode(&mut input).unwrap(), Frame::NeedMore);
        assert_eq!(decoder.wanted(), 5);
    }
}
