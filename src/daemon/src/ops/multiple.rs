//! AddMultipleToStore: a closure in one stream.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use build::Gate;
use nix_compat::path_info::PathInfo;
use nix_compat::wire::{ReadError, Reader};
use nix_compat::worker::{Payload, Protocol, Response, read_path_info};
use store::{NewPath, Reading, SignaturePolicy, Store};

use super::add::refuse_trailing_bytes;
use crate::connection::Input;
use crate::context::Session;
use crate::error::OpError;
use crate::payload::{self, PayloadReader};

/// Paths registered in one commit.
const BATCH: usize = 256;
/// Paths that have been read and may still be under way to the disk and to their hashes, while the next one is read.
const UNDER_WAY: usize = 4;
/// The largest path info accepted; a path with 100,000 references has less.
const MAX_INFO: usize = 16 << 20;

pub(super) async fn add(
    session: &Session,
    input: &mut Input,
    dont_check_sigs: bool,
    payload: Payload,
) -> Result<Response, OpError> {
    let importer = Importer {
        store: session.store().clone(),
        temp_roots: session.temp_roots.clone(),
        protocol: session.protocol.clone(),
        keys: session.keys.clone(),
        check: session.settings.require_sigs && !(dont_check_sigs && session.is_trusted()),
        gate: session.gate.clone(),
        under_way: VecDeque::new(),
        batch: Vec::new(),
    };
    payload::receive(session, input, payload, move |reader| importer.run(reader)).await?;
    Ok(Response::Nothing)
}

struct Importer {
    store: Arc<Store>,
    temp_roots: Arc<store::TempRoots>,
    protocol: Protocol,
    keys: Arc<[nix_compat::signature::PublicKey]>,
    check: bool,
    /// What the running build may see that the client is part of. It gets to see what it sends.
    gate: Option<Arc<Gate>>,
    under_way: VecDeque<Reading>,
    batch: Vec<NewPath>,
}

impl Importer {
    fn run(mut self, reader: &mut PayloadReader) -> Result<(), OpError> {
        let mut stream = BufReader::with_capacity(256 * 1024, &mut *reader);
        let imported = self.import_all(&mut stream);
        // What was complete before something failed is kept, as it would be had it come alone.
        let registered = self.register();
        imported?;
        registered?;
        if !stream.buffer().is_empty() {
            return Err(store::Error::TrailingBytes.into());
        }
        drop(stream);
        refuse_trailing_bytes(reader)
    }

    fn import_all(&mut self, stream: &mut BufReader<&mut PayloadReader>) -> Result<(), OpError> {
        let count = decode(stream, |reader| reader.u64())?;
        for _ in 0..count {
            let protocol = self.protocol.clone();
            let mut info = decode(stream, |reader| read_path_info(reader, &protocol))?;
            info.ultimate = false;
            self.import(info, stream)?;
        }
        Ok(())
    }

    fn import(&mut self, info: PathInfo, stream: &mut BufReader<&mut PayloadReader>) -> Result<(), OpError> {
        self.temp_roots.add(&info.path);
        let mut nar = stream.take(info.nar_size);
        let mut read = self.batch.iter().map(|new| &new.info.path).chain(self.under_way.iter().map(Reading::path));
        let waiting = read.any(|path| *path == info.path);
        let may_know = self.gate.as_ref().is_none_or(|gate| gate.allows(&info.path));
        if waiting || (may_know && self.store.is_valid(&info.path)?) {
            let expected = info.nar_size;
            let skipped = io::copy(&mut nar, &mut io::sink()).map_err(broken)?;
            return if skipped == expected { Ok(()) } else { Err(broken(io::ErrorKind::UnexpectedEof.into())) };
        }
        let policy = if self.check { SignaturePolicy::Require(&self.keys) } else { SignaturePolicy::DontCheck };
        self.store.check_signatures(&info, policy)?;
        // A .drv is read when it is registered, and those it depends on must be valid by then.
        let is_derivation = info.path.is_derivation();
        self.under_way.push_back(self.store.read_with_info(info, &mut nar)?);
        if nar.limit() > 0 {
            return Err(store::Error::TrailingBytes.into());
        }
        if self.under_way.len() > UNDER_WAY {
            self.finish_one()?;
        }
        if is_derivation || self.batch.len() >= BATCH {
            self.register()?;
        }
        Ok(())
    }

    fn finish_one(&mut self) -> Result<(), OpError> {
        if let Some(reading) = self.under_way.pop_front() {
            // What comes after something wrong was only read ahead: stock would not have got to it.
            let finished = self.store.finish_reading(reading).inspect_err(|_| self.under_way.clear())?;
            self.batch.push(finished);
        }
        Ok(())
    }

    /// Registers what has been read, up to the first that is not what it is said to be.
    fn register(&mut self) -> Result<(), OpError> {
        let mut finished = Ok(());
        while finished.is_ok() && !self.under_way.is_empty() {
            finished = self.finish_one();
        }
        self.register_batch()?;
        finished
    }

    fn register_batch(&mut self) -> Result<(), OpError> {
        let batch = std::mem::take(&mut self.batch);
        let sent: Vec<_> = match &self.gate {
            Some(_) => batch.iter().map(|new| (new.info.path.clone(), new.info.nar_hash)).collect(),
            None => Vec::new(),
        };
        self.store.register(batch)?;
        if let Some(gate) = &self.gate {
            sent.iter().try_for_each(|(path, nar_hash)| gate.admit_sent(path, Some(nar_hash)))?;
        }
        Ok(())
    }
}

/// Decodes a value from the front of a stream.
fn decode<T>(
    stream: &mut impl BufRead,
    mut decode: impl FnMut(&mut Reader<'_>) -> Result<T, ReadError>,
) -> Result<T, OpError> {
    // Mostly it lies in the buffer already.
    let buffered = stream.fill_buf().map_err(broken)?;
    let mut reader = Reader::new(buffered);
    let mut needed = match decode(&mut reader) {
        Ok(value) => {
            let used = reader.position();
            stream.consume(used);
            return Ok(value);
        }
        Err(ReadError::Invalid(invalid)) => return Err(OpError::new(invalid.to_string())),
        Err(ReadError::Incomplete { needed }) => needed,
    };
    let mut bytes = Vec::new();
    loop {
        if needed > MAX_INFO {
            return Err(OpError::new(format!("a path info is larger than {MAX_INFO} bytes")));
        }
        let missing = (needed - bytes.len()) as u64;
        let got = stream.by_ref().take(missing).read_to_end(&mut bytes).map_err(broken)?;
        if (got as u64) < missing {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut reader = Reader::new(&bytes);
        match decode(&mut reader) {
            // Exactly what was needed was read, so nothing is left over.
            Ok(value) => return Ok(value),
            Err(ReadError::Invalid(invalid)) => return Err(OpError::new(invalid.to_string())),
            Err(ReadError::Incomplete { needed: more }) => needed = more,
        }
    }
}

fn broken(source: io::Error) -> OpError {
    OpError::new(format!("cannot receive the paths: {source}"))
}
