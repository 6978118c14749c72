//! Encoding into a growing buffer.

use bytes::{Bytes, BytesMut};

/// Length of a string's body with its padding.
pub const fn padded(length: usize) -> usize {
    length.next_multiple_of(8)
}

/// Collects encoded items. Writing cannot fail.
#[derive(Debug, Default)]
pub struct Writer {
    buffer: BytesMut,
}

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty writer with room for `bytes` before it has to grow.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { buffer: BytesMut::with_capacity(bytes) }
    }

    /// What was written since the last [`take`](Self::take).
    pub fn as_bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// Length of [`as_bytes`](Self::as_bytes).
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether nothing was written since the last [`take`](Self::take).
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Hands out what was written and starts again with an empty buffer.
    pub fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }

    /// The same as [`take`](Self::take), for one who goes on writing in another way.
    pub fn into_buffer(self) -> BytesMut {
        self.buffer
    }

    /// An integer.
    pub fn u64(&mut self, value: u64) {
        self.buffer.extend_from_slice(&value.to_le_bytes());
    }

    /// A count or length.
    pub fn count(&mut self, count: usize) {
        self.u64(count as u64);
    }

    /// A boolean.
    pub fn bool(&mut self, value: bool) {
        self.u64(u64::from(value));
    }

    /// A string: length, bytes, padding.
    pub fn bytes(&mut self, body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        self.count(body.len());
        self.buffer.extend_from_slice(body);
        self.buffer.extend_from_slice(&[0; 8][..padded(body.len()) - body.len()]);
    }

    /// Bytes as they are: inside a frame, or a NAR.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// A list.
    pub fn list<I>(&mut self, elements: I, mut each: impl FnMut(&mut Self, I::Item))
    where
        I: IntoIterator<IntoIter: ExactSizeIterator>,
    {
        let elements = elements.into_iter();
        self.count(elements.len());
        for element in elements {
            each(self, element);
        }
    }

    /// One frame of a framed stream. An empty one would end the stream, so nothing is written for empty `data`.
    pub fn frame(&mut self, data: &[u8]) {
        if !data.is_empty() {
            self.count(data.len());
            self.raw(data);
        }
    }

    /// The end of a framed stream.
    pub fn end_frames(&mut self) {
        self.u64(0);
    }
}
