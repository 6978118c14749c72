//! Sessions of stock clients with a stock 2.34.8 daemon, recorded on the socket between them.
//!
//! Each is taken apart completely and every request, message and response is encoded again: the bytes must be those of
//! stock. The sessions are in `data/`, as the bytes the client sent and the bytes the server sent, beside a file
//! `store-dir` that names the store directory: what `castored daemon --record DIR` writes. Set
//! `WORKER_PROTOCOL_RECORDINGS` to such a directory to have its sessions checked instead.

use std::fs;
use std::path::{Path, PathBuf};

use nix_compat::nar::{NarEvent, NarReader};
use nix_compat::store_path::StoreDir;
use nix_compat::wire::{Frame, FrameDecoder, ReadError, Reader, Writer};
use nix_compat::worker::handshake::{ClientHandshake, Progress, ServerHandshake, Trust};
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{Features, Operation, Payload, Protocol, Request, Response, read_path_info};

/// What is left of a session.
struct Session<'a> {
    client: &'a [u8],
    server: &'a [u8],
    protocol: Protocol,
}

/// What became of a request.
#[derive(Debug, PartialEq)]
enum Outcome {
    Answered(Response),
    Failed(Vec<u8>),
}

/// Takes a value from the front of `stream` and checks that it encodes to what was there.
fn take<T: std::fmt::Debug>(
    stream: &mut &[u8],
    decode: impl FnOnce(&mut Reader<'_>) -> Result<T, ReadError>,
    encode: impl FnOnce(&T, &mut Writer),
) -> T {
    let mut reader = Reader::new(stream);
    let value = decode(&mut reader).unwrap();
    let (taken, rest) = stream.split_at(reader.position());
    let mut writer = Writer::new();
    encode(&value, &mut writer);
    assert_eq!(writer.as_bytes(), taken, "{value:?}");
    *stream = rest;
    value
}

/// Takes a NAR from the front of `stream`.
fn take_nar(stream: &mut &[u8]) {
    let mut reader = NarReader::new(&mut *stream);
    while reader.next().unwrap() != NarEvent::End {}
}

impl<'a> Session<'a> {
    /// Goes through the handshake with both of our sides.
    fn start(store_dir: StoreDir, client: &'a [u8], server: &'a [u8]) -> Self {
        let as_server = |version: &str, trust| {
            let mut said = Writer::new();
            let mut ours = ServerHandshake::new(store_dir.clone(), version, trust, Features::ALL);
            let (used, Progress::Done(connected)) = ours.advance(client, &mut said).unwrap() else {
                panic!("the client's handshake is cut off");
            };
            (used, connected, said)
        };
        let (used_of_client, connected, _) = as_server("", Trust::Unknown);
        let mut said = Writer::new();
        let mut ours = ClientHandshake::new(store_dir.clone(), connected.client_minor, Features::ALL, &mut said);
        let (used_of_server, Progress::Done(welcome)) = ours.advance(server, &mut said).unwrap() else {
            panic!("the server's handshake is cut off");
        };
        if !connected.protocol.since(38) {
            let (_, _, said) = as_server(welcome.server_version.as_deref().unwrap_or_default(), welcome.trust);
            assert!(server.starts_with(said.as_bytes()), "the server's side of the handshake differs");
        }
        assert_eq!(welcome.protocol, connected.protocol);
        let rest = (&client[used_of_client..], &server[used_of_server..]);
        let mut session = Self { client: rest.0, server: rest.1, protocol: connected.protocol };
        assert_eq!(session.take_messages(), None, "the client was refused");
        session
    }

    /// Takes messages up to the one that ends a request, and returns the error if it is one.
    fn take_messages(&mut self) -> Option<Vec<u8>> {
        loop {
            let protocol = &self.protocol;
            let decode = |reader: &mut Reader<'_>| Message::decode(reader, protocol);
            match take(&mut self.server, decode, |message, writer| message.encode(protocol, writer)) {
                Message::Last => return None,
                Message::Error(error) => return Some(error.message),
                Message::Read(wanted) => {
                    let limit = usize::try_from(wanted).unwrap();
                    let answer = |reader: &mut Reader<'_>| Ok(reader.bytes(limit)?.to_vec());
                    take(&mut self.client, answer, |bytes, writer| writer.bytes(bytes));
                }
                _ => {}
            }
        }
    }

    /// Takes what follows `request` on the client's side.
    fn take_payload(&mut self, request: &Request) {
        match request.payload(&self.protocol) {
            Payload::None | Payload::StderrRead => {}
            Payload::InlineNar => take_nar(&mut self.client),
            Payload::Framed => {
                let (mut decoder, mut payload) = (FrameDecoder::new(), Vec::new());
                while let Frame::Data(data) = decoder.decode(&mut self.client).unwrap() {
                    payload.extend_from_slice(data);
                }
                assert!(decoder.has_ended());
                if matches!(request, Request::AddMultipleToStore { .. }) {
                    self.check_items(&payload);
                }
            }
        }
    }

    /// Checks the payload of AddMultipleToStore.
    fn check_items(&self, mut payload: &[u8]) {
        let count = take(&mut payload, |reader| reader.u64(), |count, writer| writer.u64(*count));
        for _ in 0..count {
            let mut reader = Reader::new(payload);
            let info = read_path_info(&mut reader, &self.protocol).unwrap();
            let mut nar = reader.remaining();
            take_nar(&mut nar);
            assert_eq!(reader.remaining().len() - nar.len(), usize::try_from(info.nar_size).unwrap());
            payload = nar;
        }
        assert!(payload.is_empty());
    }

    /// Takes requests and what they led to until the client has no more.
    fn finish(mut self) -> Vec<(Request, Outcome)> {
        let mut seen = Vec::new();
        while !self.client.is_empty() {
            let protocol = self.protocol.clone();
            let decode = |reader: &mut Reader<'_>| Request::decode(reader, &protocol);
            let request = take(&mut self.client, decode, |request, writer| request.encode(&protocol, writer));
            self.take_payload(&request);
            let outcome = match self.take_messages() {
                Some(error) => Outcome::Failed(error),
                None => {
                    let decode = |reader: &mut Reader<'_>| Response::decode(&request, reader, &protocol);
                    let response =
                        take(&mut self.server, decode, |response, writer| response.encode(&protocol, writer));
                    if matches!(request, Request::NarFromPath(_)) {
                        take_nar(&mut self.server);
                    }
                    Outcome::Answered(response)
                }
            };
            seen.push((request, outcome));
        }
        assert!(self.server.is_empty(), "the server said more than was asked");
        seen
    }
}

/// Takes a recorded session apart.
fn replay(client_file: &Path) -> Vec<(Request, Outcome)> {
    let (client, server) = (fs::read(client_file).unwrap(), fs::read(client_file.with_extension("server")).unwrap());
    let store_dir = fs::read_to_string(client_file.with_file_name("store-dir")).unwrap();
    Session::start(StoreDir::new(store_dir.trim_end()).unwrap(), &client, &server).finish()
}

fn recorded(name: &str) -> Vec<(Request, Outcome)> {
    let file = format!("tests/worker_protocol/data/{name}.client");
    replay(&Path::new(env!("CARGO_MANIFEST_DIR")).join(file))
}

fn operations(session: &[(Request, Outcome)]) -> Vec<u64> {
    session.iter().map(|(request, _)| request.operation().code()).collect()
}

#[test]
fn every_recording_is_understood_completely() {
    let directory = match std::env::var_os("WORKER_PROTOCOL_RECORDINGS") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/worker_protocol/data"),
    };
    let mut recordings = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_some_and(|extension| extension == "client") {
            println!("{}", file.display());
            println!("  {:?}", operations(&replay(&file)));
            recordings += 1;
        }
    }
    assert!(recordings > 0, "no recordings");
}

#[test]
fn nix_2_3_7_builds_with_plain_requests() {
    let session = recorded("2.3.7-build");
    assert!(operations(&session).starts_with(&[19, 8, 40, 26, 9]));
    assert_eq!(session[4].1, Outcome::Answered(Response::One));
}

#[test]
fn nix_2_34_8_builds_with_results() {
    let session = recorded("2.34.8-build-with-results");
    let (_, outcome) =
        session.iter().find(|(request, _)| request.operation() == Operation::BuildPathsWithResults).unwrap();
    let Outcome::Answered(Response::KeyedBuildResults(results)) = outcome else { panic!("{outcome:?}") };
    assert!(results[0].1.status.is_success());
    assert_eq!(results[0].1.built_outputs.len(), 1);
}

#[test]
fn a_failing_build_is_an_error_in_both_forms() {
    for name in ["2.3.7-failing-build", "2.34.8-failing-build"] {
        let session = recorded(name);
        let (_, outcome) = session.iter().find(|(request, _)| request.operation() == Operation::BuildPaths).unwrap();
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    }
}
