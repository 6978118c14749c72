//! The client's side of the serve protocol.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use nix_compat::serve::{HandshakeError, NEWEST_MINOR, Protocol, Request, Response, read_answer, write_greeting};
use nix_compat::store_path::StoreDir;
use nix_compat::wire::{ReadError, Writer};

use crate::error::{ClientError, Result};
use crate::wire::{Limits, Sink, Stream, Wire};

/// A connection to a `nix-store --serve`.
#[derive(Debug)]
pub struct Connection<S = UnixStream> {
    wire: Wire<S>,
    protocol: Protocol,
}

impl<S: Stream> Connection<S> {
    /// Shakes hands over a stream.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn over(stream: S, store_dir: &StoreDir, limits: Limits) -> Result<Self> {
        let mut wire = Wire::new(stream, limits);
        let mut writer = Writer::new();
        write_greeting(NEWEST_MINOR, &mut writer);
        wire.send(writer.as_bytes())?;
        let mut refused = None;
        let answer = wire.decode(|reader| match read_answer(reader, NEWEST_MINOR, store_dir) {
            Ok(protocol) => Ok(Some(protocol)),
            Err(HandshakeError::Read(error)) => Err(error),
            Err(error) => {
                refused = Some(error.to_string());
                Ok::<_, ReadError>(None)
            }
        })?;
        let protocol = answer.ok_or_else(|| ClientError::Protocol(refused.unwrap_or_default()))?;
        Ok(Self { wire, protocol })
    }

    /// What both ends agreed on.
    pub fn protocol(&self) -> &Protocol {
        &self.protocol
    }

    /// How long to wait for the server from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.wire.limits = limits;
    }

    /// Sends a request with what follows it, and waits for the answer.
    ///
    /// # Errors
    /// [`ClientError`]; the server ends after any error of its own.
    pub fn call(
        &mut self,
        request: &Request,
        payload: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Response> {
        let mut writer = Writer::new();
        request.encode(&self.protocol, &mut writer);
        self.wire.send(writer.as_bytes())?;
        let mut sink = Sink::new(&mut self.wire);
        let written = payload(&mut sink);
        sink.finish(written)?;
        let protocol = &self.protocol;
        self.wire.decode(|reader| Response::decode(request, reader, protocol))
    }

    /// What follows a response, to its end and not further: more would be the next one.
    pub fn payload(&mut self) -> &mut dyn Read {
        &mut self.wire
    }
}
