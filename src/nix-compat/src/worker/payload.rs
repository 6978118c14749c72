//! What follows a request.

/// How data that belongs to a request is transported, after the request itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// There is none.
    None,
    /// A NAR follows directly; only its own grammar says where it ends. The client reads nothing before it is through:
    /// no message may be sent meanwhile.
    InlineNar,
    /// The server asks piece by piece with [`Message::Read`](super::stderr::Message::Read) and gets one string each
    /// time. Asking beyond the end of the data makes the client fail.
    StderrRead,
    /// A framed stream ([`FrameDecoder`](crate::wire::FrameDecoder)). It must be read to its end before
    /// [`Message::Last`](super::stderr::Message::Last) and before the next request, even when the request is refused.
    Framed,
}
