//! A client that knows nothing of castored's codec: what it sends and understands is written out here, from the
//! description of the protocol. So an error that castored makes in both directions is seen all the same.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::common::Rig;

/// A daemon that says nothing for so long says nothing more.
const PATIENCE: Duration = Duration::from_secs(30);
/// The newest minor that a daemon announces.
pub(crate) const NEWEST: u64 = 38;
/// Longer than anything these tests expect; a length beyond it is the sign of a stream out of step.
const MAX_LENGTH: u64 = 256 << 20;

/// Bytes to be sent.
#[derive(Clone, Default)]
pub(crate) struct Msg(pub(crate) Vec<u8>);

/// A request, so far without arguments.
pub(crate) fn op(code: u64) -> Msg {
    Msg::default().word(code)
}

impl Msg {
    pub(crate) fn word(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    /// A string: length, bytes, zeros up to a multiple of eight.
    pub(crate) fn text(self, text: impl AsRef<[u8]>) -> Self {
        let text = text.as_ref();
        let padding = [0; 7];
        let padding = &padding[..(8 - text.len() % 8) % 8];
        self.word(text.len() as u64).raw(text).raw(padding)
    }

    /// A list or set of strings.
    pub(crate) fn texts<T: AsRef<[u8]>>(mut self, texts: impl IntoIterator<Item = T>) -> Self {
        let texts: Vec<T> = texts.into_iter().collect();
        self = self.word(texts.len() as u64);
        texts.into_iter().fold(self, Self::text)
    }

    /// The payload cut into frames of `size` bytes, without the end.
    pub(crate) fn frames(self, payload: impl AsRef<[u8]>, size: usize) -> Self {
        payload.as_ref().chunks(size).fold(self, |msg, frame| msg.word(frame.len() as u64).raw(frame))
    }

    /// The payload in frames, and their end.
    pub(crate) fn framed(self, payload: impl AsRef<[u8]>) -> Self {
        self.frames(payload, 32 * 1024).word(0)
    }
}

/// A message of the side channel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Said {
    Next(Vec<u8>),
    Read(u64),
    Write(Vec<u8>),
    Last,
    Error { text: String, status: Option<u64> },
    Start { id: u64, level: u64, kind: u64, parent: u64 },
    Stop(u64),
    Result { id: u64, kind: u64 },
}

pub(crate) struct Raw {
    stream: UnixStream,
    /// The minor in force: the lower of both.
    pub(crate) minor: u64,
    /// What the daemon announced.
    pub(crate) server_version: u64,
    pub(crate) server_features: Vec<String>,
    pub(crate) trust: Option<u64>,
    pub(crate) daemon_version: Option<String>,
}

impl Raw {
    /// A client that announces 1.`minor` and no features.
    pub(crate) fn new(rig: &Rig, minor: u64) -> Self {
        Self::shake_hands(rig, minor, &[], None)
    }

    pub(crate) fn with_features(rig: &Rig, features: &[&str]) -> Self {
        Self::shake_hands(rig, NEWEST, features, None)
    }

    /// The handshake in the order of the oldest clients, which wait for the daemon's version before they tell theirs.
    pub(crate) fn shake_hands(rig: &Rig, minor: u64, features: &[&str], cpu: Option<u64>) -> Self {
        let mut raw = Self {
            stream: Self::dial(rig),
            minor: 0,
            server_version: 0,
            server_features: Vec::new(),
            trust: None,
            daemon_version: None,
        };
        raw.send(&Msg::default().word(0x6e69_7863));
        assert_eq!(raw.word(), 0x6478_696f, "the daemon's magic number");
        raw.server_version = raw.word();
        assert_eq!(raw.server_version >> 8, 1, "the major version");
        raw.send(&Msg::default().word(1 << 8 | minor));
        raw.minor = minor.min(raw.server_version & 0xff);
        if raw.minor >= 38 {
            raw.send(&Msg::default().texts(features));
            raw.server_features = raw.texts();
        }
        let affinity = match cpu {
            Some(cpu) => Msg::default().word(1).word(cpu),
            None => Msg::default().word(0),
        };
        raw.send(&affinity);
        raw.send(&Msg::default().word(0)); // reserved space
        if raw.minor >= 33 {
            raw.daemon_version = Some(raw.text());
        }
        if raw.minor >= 35 {
            raw.trust = Some(raw.word());
        }
        raw.done();
        raw
    }

    /// A connection on which nothing has been said.
    pub(crate) fn dial(rig: &Rig) -> UnixStream {
        let stream = UnixStream::connect(&rig.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub(crate) fn send(&mut self, msg: &Msg) {
        self.stream.write_all(&msg.0).unwrap();
    }

    /// What the other end of a broken connection makes of it does not matter.
    pub(crate) fn send_if_open(&mut self, msg: &Msg) {
        let _ = self.stream.write_all(&msg.0);
    }

    pub(crate) fn bytes(&mut self, length: u64) -> Vec<u8> {
        assert!(length < MAX_LENGTH, "out of step: a length of {length:#x}");
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes(8).try_into().unwrap())
    }

    pub(crate) fn raw_text(&mut self) -> Vec<u8> {
        let length = self.word();
        let text = self.bytes(length);
        let padding = self.bytes((8 - length % 8) % 8);
        assert!(padding.iter().all(|&byte| byte == 0), "padding {padding:?}");
        text
    }

    pub(crate) fn text(&mut self) -> String {
        String::from_utf8(self.raw_text()).unwrap()
    }

    pub(crate) fn texts(&mut self) -> Vec<String> {
        let count = self.word();
        assert!(count < 1 << 20, "out of step: a count of {count:#x}");
        (0..count).map(|_| self.text()).collect()
    }

    /// This many strings, without a count.
    pub(crate) fn texts_n(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.text()).collect()
    }

    fn fields(&mut self) {
        for _ in 0..self.word() {
            match self.word() {
                0 => drop(self.word()),
                1 => drop(self.raw_text()),
                other => panic!("field type {other}"),
            }
        }
    }

    pub(crate) fn said(&mut self) -> Said {
        match self.word() {
            0x6f6c_6d67 => Said::Next(self.raw_text()),
            0x6461_7461 => Said::Read(self.word()),
            0x6461_7416 => Said::Write(self.raw_text()),
            0x616c_7473 => Said::Last,
            0x6378_7470 if self.minor < 26 => {
                Said::Error { text: String::from_utf8_lossy(&self.raw_text()).into(), status: Some(self.word()) }
            }
            0x6378_7470 => {
                assert_eq!(self.text(), "Error");
                assert!(self.word() <= 7, "level");
                self.raw_text();
                let text = String::from_utf8_lossy(&self.raw_text()).into();
                assert_eq!(self.word(), 0, "havePos");
                for _ in 0..self.word() {
                    assert_eq!(self.word(), 0, "havePos of a trace");
                    self.raw_text();
                }
                Said::Error { text, status: None }
            }
            0x5354_5254 => {
                let (id, level, kind) = (self.word(), self.word(), self.word());
                self.raw_text();
                self.fields();
                Said::Start { id, level, kind, parent: self.word() }
            }
            0x5354_4f50 => Said::Stop(self.word()),
            0x5253_4c54 => {
                let (id, kind) = (self.word(), self.word());
                self.fields();
                Said::Result { id, kind }
            }
            other => panic!("out of step: {other:#x} is no message"),
        }
    }

    /// Everything up to LAST; an error is returned.
    pub(crate) fn outcome(&mut self) -> Result<Vec<Said>, String> {
        let mut all = Vec::new();
        loop {
            match self.said() {
                Said::Last => return Ok(all),
                Said::Error { text, .. } => return Err(text),
                other => all.push(other),
            }
        }
    }

    /// The request succeeded; its response follows.
    pub(crate) fn done(&mut self) -> Vec<Said> {
        self.outcome().unwrap()
    }

    /// The request failed.
    pub(crate) fn refused(&mut self) -> String {
        match self.outcome() {
            Err(text) => {
                assert!(!text.is_empty(), "an error without a word");
                text
            }
            Ok(_) => panic!("the request was not refused"),
        }
    }

    /// Nothing comes for a while.
    pub(crate) fn silent(&mut self, what: &str) {
        self.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let read = self.stream.read(&mut [0]);
        let silent = matches!(&read, Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
        assert!(silent, "{what}: {read:?}");
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }

    /// The daemon has closed the connection and has nothing more to say.
    pub(crate) fn closed(&mut self) {
        match self.stream.read(&mut [0]) {
            Ok(0) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("not closed: {other:?}"),
        }
    }

    /// The same where the daemon has taken all that was sent: then nothing that it has said can be lost.
    pub(crate) fn closed_in_order(&mut self) {
        assert_eq!(self.stream.read(&mut [0]).unwrap(), 0);
    }

    /// Whatever else the daemon says before it closes.
    pub(crate) fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = self.stream.read_to_end(&mut bytes);
        bytes
    }

    /// Says that no more will be sent, and goes on listening.
    pub(crate) fn half_close(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    pub(crate) fn is_valid(&mut self, path: &str) -> bool {
        self.send(&op(1).text(path));
        assert_eq!(self.done(), []);
        match self.word() {
            0 => false,
            1 => true,
            other => panic!("out of step: {other:#x} is no boolean"),
        }
    }

    /// The connection goes on: the next request is understood, and so is its answer.
    pub(crate) fn goes_on(&mut self) {
        assert!(!self.is_valid("/nix/store/00000000000000000000000000000000-never"));
    }

    /// The answer to QueryPathInfo, or none.
    pub(crate) fn info(&mut self, path: &str) -> Option<Claim> {
        self.send(&op(26).text(path));
        self.done();
        match self.word() {
            0 => None,
            1 => Some(self.claim(path.to_owned())),
            other => panic!("out of step: {other:#x} is no boolean"),
        }
    }

    /// The fields of a path info behind the path.
    pub(crate) fn claim(&mut self, path: String) -> Claim {
        Claim {
            path,
            deriver: self.text(),
            nar_hash: self.text(),
            references: self.texts(),
            time: self.word(),
            nar_size: self.word(),
            ultimate: self.word(),
            signatures: self.texts(),
            ca: self.text(),
        }
    }

    /// AddToStoreNar by whatever transport this minor has.
    pub(crate) fn add(&mut self, claim: &Claim, nar: &[u8]) -> Result<(), String> {
        self.send(&claim.add());
        if self.minor >= 23 {
            self.send(&Msg::default().framed(nar));
            return self.outcome().map(drop);
        }
        if self.minor < 21 {
            self.send(&Msg::default().raw(nar));
            return self.outcome().map(drop);
        }
        let mut rest = nar;
        loop {
            match self.said() {
                Said::Read(wanted) => {
                    let (piece, more) = rest.split_at(rest.len().min(usize::try_from(wanted).unwrap()));
                    self.send(&Msg::default().text(piece));
                    rest = more;
                }
                Said::Last => return Ok(()),
                Said::Error { text, .. } => return Err(text),
                _ => {}
            }
        }
    }

    /// The NAR of a valid path, by NarFromPath.
    pub(crate) fn nar(&mut self, path: &str) -> Vec<u8> {
        let size = self.info(path).unwrap().nar_size;
        self.send(&op(38).text(path));
        self.done();
        self.bytes(size)
    }

    pub(crate) fn all_paths(&mut self) -> Vec<String> {
        self.send(&op(23));
        self.done();
        self.texts()
    }
}

/// What a client says of a path; all texts as they go over the wire.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Claim {
    pub(crate) path: String,
    pub(crate) deriver: String,
    pub(crate) nar_hash: String,
    pub(crate) references: Vec<String>,
    pub(crate) time: u64,
    pub(crate) nar_size: u64,
    pub(crate) ultimate: u64,
    pub(crate) signatures: Vec<String>,
    pub(crate) ca: String,
}

impl Claim {
    /// The path info in the layout of 1.16, with the path in front.
    pub(crate) fn fields(&self, msg: Msg) -> Msg {
        msg.text(&self.path)
            .text(&self.deriver)
            .text(&self.nar_hash)
            .texts(&self.references)
            .word(self.time)
            .word(self.nar_size)
            .word(self.ultimate)
            .texts(&self.signatures)
            .text(&self.ca)
    }

    /// AddToStoreNar without its payload: no repair, no check of signatures.
    pub(crate) fn add(&self) -> Msg {
        self.fields(op(39)).word(0).word(1)
    }
}
