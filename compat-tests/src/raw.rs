//! Requests of any kind at any minor, and their replies read into a structure that two daemons can be compared by.
//!
//! What a reply looks like is told by [`Shape`]s; what came is a [`Reply`], a table of named fields. How it came
//! (which log lines and activities, in what pieces) is left out.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::time::Duration;

use crate::call::without_escapes;
use crate::error::{Error, Result};
use crate::nar;
use crate::wire::{Client, Message, Refusal, Request};

/// No reply that is compared takes longer than this, unless it never comes.
const PATIENCE: Duration = Duration::from_secs(15);
/// The deepest archive read.
const MAX_DEPTH: usize = 64;

/// A part of a reply, with the name of its field.
#[derive(Debug, Clone)]
pub enum Shape {
    /// An integer.
    Word(&'static str),
    /// An integer that differs from run to run: only whether it is zero is kept.
    Some(&'static str),
    /// A string.
    Text(&'static str),
    /// The words of an error: only whether there are any is compared.
    Words(&'static str),
    /// A list of strings.
    Texts(&'static str),
    /// A list of pairs of strings; the order does not count.
    Pairs(&'static str),
    /// A list of groups.
    Each(&'static str, Vec<Shape>),
    /// 0, or 1 and a group.
    Optional(&'static str, Vec<Shape>),
    /// 0, or 1 and an integer; a measurement, nothing of which is kept.
    Measured(&'static str),
    /// An archive as it is.
    Nar(&'static str),
}

/// What to send, and what a good answer would look like.
#[derive(Debug, Clone)]
pub struct Question {
    /// The request's bytes, with a payload that follows them.
    pub request: Request,
    /// A payload that is given as it is asked for.
    pub on_demand: Vec<u8>,
    /// Whether nothing more comes after the request: the stream ends there.
    pub ends: bool,
    /// The answer.
    pub shape: Vec<Shape>,
}

/// How a request ended, and all fields of the reply by their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// Everything that can be compared.
    pub fields: BTreeMap<String, String>,
    /// The text of an error, or of failed builds, without terminal escapes.
    pub text: String,
    /// The lines of the log, for the reader.
    pub log: Vec<String>,
}

/// The field that tells how a request ended: one of the following.
pub const ENDING: &str = "ending";
/// The answer came.
pub const DONE: &str = "done";
/// An error came.
pub const REFUSED: &str = "refused";
/// The daemon closed the connection without a word.
pub const CLOSED: &str = "closed";
/// The daemon says nothing.
pub const SILENT: &str = "silent";

impl Question {
    /// A request without a payload on demand.
    pub fn new(request: Request, shape: Vec<Shape>) -> Self {
        Self { request, on_demand: Vec::new(), ends: false, shape }
    }

    /// Sends it and reads the reply.
    pub fn ask(&self, client: &mut Client) -> Reply {
        let mut reply = Reply::default();
        let ending = match client.set_patience(PATIENCE).and_then(|()| self.converse(client, &mut reply)) {
            Ok(true) => DONE.to_owned(),
            Ok(false) => REFUSED.to_owned(),
            Err(Error::Io { source, .. }) => match source.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => SILENT.to_owned(),
                _ => CLOSED.to_owned(),
            },
            Err(error) => error.to_string(),
        };
        reply.set(ENDING, ending);
        reply
    }

    /// Whether an answer came; else it was an error.
    fn converse(&self, client: &mut Client, reply: &mut Reply) -> Result<bool> {
        // A daemon that has given up closes its end while we write; what it said before can still be read.
        let _ = client.send(&self.request.0);
        if self.ends {
            client.shut_down_sending()?;
        }
        let mut on_demand = &self.on_demand[..];
        let mut written = Vec::new();
        loop {
            match client.message()? {
                Message::Last => break,
                Message::Error(refusal) => {
                    reply.refuse(refusal);
                    return Ok(false);
                }
                Message::Next(line) => reply.log.push(String::from_utf8_lossy(&line).into_owned()),
                Message::Read(wanted) => {
                    let (piece, rest) =
                        on_demand.split_at(on_demand.len().min(usize::try_from(wanted).unwrap_or(usize::MAX)));
                    let mut string = Vec::new();
                    nar::put(&mut string, piece);
                    let _ = client.send(&string);
                    on_demand = rest;
                }
                Message::Write(piece) => written.extend(piece),
                Message::Activity => {}
            }
        }
        if !self.on_demand.is_empty() {
            reply.set("payload left", on_demand.len());
        }
        if !written.is_empty() {
            reply.set("written", digest(&written));
        }
        reply.read("", &self.shape, client)?;
        Ok(true)
    }
}

impl Reply {
    /// A field, empty if there is none.
    pub fn get(&self, field: &str) -> &str {
        self.fields.get(field).map_or("", String::as_str)
    }

    /// Sets a field.
    pub fn set(&mut self, field: impl Into<String>, value: impl ToString) {
        self.fields.insert(field.into(), value.to_string());
    }

    /// Takes over the fields of another reply, below a name.
    pub fn adopt(&mut self, name: &str, other: Self) {
        self.fields.extend(other.fields.into_iter().map(|(field, value)| (format!("{name}.{field}"), value)));
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.text = without_escapes(&String::from_utf8_lossy(&refusal.text));
        if let Some(status) = refusal.status {
            self.set("error.status", status);
        }
        if let Some(structure) = refusal.structure {
            self.set("error.kind", structure.kind);
            self.set("error.level", structure.level);
            self.set("error.name", structure.name);
            self.set("error.havePos", structure.have_pos);
        }
    }

    fn read(&mut self, prefix: &str, shapes: &[Shape], client: &mut Client) -> Result<()> {
        for shape in shapes {
            let name = |field: &str| format!("{prefix}{field}");
            match shape {
                Shape::Word(field) => self.set(name(field), client.word()?),
                Shape::Some(field) => self.set(name(field), if client.word()? == 0 { "0" } else { "some" }),
                Shape::Text(field) => self.set(name(field), String::from_utf8_lossy(&client.string()?)),
                Shape::Words(field) => {
                    let words = without_escapes(&String::from_utf8_lossy(&client.string()?));
                    self.set(name(field), if words.is_empty() { "" } else { "some" });
                    self.text.push_str(&words);
                }
                Shape::Texts(field) => self.set(name(field), client.strings()?.join("\n")),
                Shape::Pairs(field) => {
                    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                    let mut pairs = Vec::new();
                    for _ in 0..client.word()? {
                        pairs.push(format!("{} {}", text(client.string()?), text(client.string()?)));
                    }
                    pairs.sort();
                    self.set(name(field), pairs.join("\n"));
                }
                Shape::Each(field, group) => {
                    let count = client.word()?;
                    self.set(format!("{prefix}{field}.count"), count);
                    for n in 0..count {
                        self.read(&format!("{prefix}{field}[{n}]."), group, client)?;
                    }
                }
                Shape::Optional(field, group) => {
                    let tag = client.word()?;
                    self.set(name(field), tag);
                    if tag == 1 {
                        self.read(&format!("{prefix}{field}."), group, client)?;
                    }
                }
                Shape::Measured(field) => match client.word()? {
                    0 => {}
                    1 => client.word().map(drop)?,
                    tag => self.set(name(field), format!("tag {tag}")),
                },
                Shape::Nar(field) => {
                    let mut archive = Vec::new();
                    token(client, &mut archive)?;
                    node(client, &mut archive, 0)?;
                    self.set(name(field), digest(&archive));
                }
            }
        }
        Ok(())
    }
}

/// Names bytes that are too many to be shown.
fn digest(bytes: &[u8]) -> String {
    format!("{} bytes, sha256 {}", bytes.len(), nar::hex(&nar::sha256(bytes)))
}

/// One string of an archive; what was read is added to `archive`.
fn token(client: &mut Client, archive: &mut Vec<u8>) -> Result<Vec<u8>> {
    let string = client.string()?;
    nar::put(archive, &string);
    Ok(string)
}

/// An archive's node from its opening parenthesis to the closing one: just enough of the grammar to find its end.
fn node(client: &mut Client, archive: &mut Vec<u8>, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::Protocol(format!("an archive deeper than {MAX_DEPTH} directories")));
    }
    token(client, archive)?;
    loop {
        match &token(client, archive)?[..] {
            b")" => return Ok(()),
            b"node" => node(client, archive, depth + 1)?,
            b"entry" => {
                token(client, archive)?;
                // Until the entry's own closing parenthesis.
                loop {
                    match &token(client, archive)?[..] {
                        b"name" => token(client, archive).map(drop)?,
                        b"node" => node(client, archive, depth + 1)?,
                        b")" => break,
                        other => return Err(unexpected(other)),
                    }
                }
            }
            b"type" | b"executable" | b"contents" | b"target" => token(client, archive).map(drop)?,
            other => return Err(unexpected(other)),
        }
    }
}

fn unexpected(token: &[u8]) -> Error {
    Error::Protocol(format!("{:?} in an archive", String::from_utf8_lossy(&token[..token.len().min(64)])))
}

/// The shapes of the replies that depend on the minor.
pub mod shapes {
    use super::Shape::{self, Each, Measured, Some, Text, Texts, Word, Words};

    /// What is known about a path, without the path.
    pub fn info() -> Vec<Shape> {
        let known = [Text("deriver"), Text("narHash"), Texts("references"), Some("registrationTime"), Word("narSize")];
        known.into_iter().chain([Word("ultimate"), Texts("signatures"), Text("ca")]).collect()
    }

    /// The reply to AddToStore.
    pub fn added(minor: u64) -> Vec<Shape> {
        let path = [Text("path")].into_iter();
        if minor >= 25 { path.chain(info()).collect() } else { path.collect() }
    }

    /// The result of a build.
    pub fn build_result(minor: u64) -> Vec<Shape> {
        let mut shape = vec![Word("status"), Words("errorMsg")];
        if minor >= 29 {
            shape.extend([Word("timesBuilt"), Word("isNonDeterministic"), Some("startTime"), Some("stopTime")]);
        }
        if minor >= 37 {
            shape.extend([Measured("cpuUser"), Measured("cpuSystem")]);
        }
        if minor >= 28 {
            shape.push(Each("builtOutputs", vec![Text("id"), Text("realisation")]));
        }
        shape
    }

    /// Results of builds, each with what was asked for.
    pub fn build_results(minor: u64) -> Vec<Shape> {
        vec![Each("results", [Text("path")].into_iter().chain(build_result(minor)).collect())]
    }
}

/// Where contents lie by their digest: `kind` is what the fingerprint begins with, such as `source`.
pub fn store_path(kind: &str, digest: [u8; 32], name: &str) -> String {
    let fingerprint = format!("{kind}:sha256:{}:/nix/store:{name}", nar::hex(&digest));
    let mut folded = [0; 20];
    for (i, byte) in nar::sha256(fingerprint.as_bytes()).into_iter().enumerate() {
        folded[i % 20] ^= byte;
    }
    format!("/nix/store/{}-{name}", nix32(&folded))
}

/// Nix's base 32: bits from the end, five at a time.
pub fn nix32(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    let bit = |n: usize| bytes.get(n / 8).map_or(0, |byte| usize::from(byte >> (n % 8) & 1));
    let digits = (bytes.len() * 8).div_ceil(5);
    let digit = |n: usize| (0..5).fold(0, |value, i| value | bit(n * 5 + i) << i);
    (0..digits).rev().map(|n| char::from(DIGITS[digit(n)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_32_is_nixs() {
        // `nix-hash --type sha256 --to-base32` of the digest of nothing.
        let nothing = nar::sha256(b"");
        assert_eq!(nix32(&nothing), "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73");
    }
}
