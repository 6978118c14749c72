//! The file format: an ATerm without any white space.
//!
//! `Derive([outputs],[input derivations],[input sources],"platform","builder",[arguments],[environment])`. Only
//! backslash, quote, newline, carriage return and tab are escaped in strings; all other bytes stand as they are.

use std::collections::{BTreeMap, BTreeSet};

use super::{BasicDerivation, Derivation, Error, InputOutputs, MAX_DYNAMIC_DEPTH, Output, OutputName};
use crate::store_path::{StoreDir, StorePath};

impl Derivation {
    /// Reads a `.drv` file's contents. `name` is the file's name without `.drv`, for it is not in the contents.
    ///
    /// Strict: lists that stock Nix writes sorted must be sorted and unique, store paths canonical. That output paths
    /// are the right ones is for [`verify_outputs`](Self::verify_outputs) to say.
    pub fn parse(dir: &StoreDir, name: &str, contents: &[u8]) -> Result<Self, Error> {
        let mut parser = Parser { contents, offset: 0, dir, name };
        let derivation = parser.derivation()?;
        match parser.rest() {
            [] => Ok(derivation),
            _ => Err(parser.syntax("its end")),
        }
    }

    /// Writes what [`parse`](Self::parse) reads.
    pub fn to_aterm(&self, dir: &StoreDir) -> Vec<u8> {
        let inputs = self.input_drvs.iter().map(|(path, outputs)| (dir.display(path), outputs));
        write(&self.basic, dir, inputs, self.is_dynamic(), false)
    }
}

/// The version of the form for dynamic derivations, the only one that has a version.
const DYNAMIC: &str = "xp-dyn-drv";

/// Writes the ATerm with `inputs` for its input derivations; they must be in order. `masked` blanks out the paths of its
/// own outputs.
pub(super) fn write<'a, P: AsRef<str>>(
    basic: &BasicDerivation,
    dir: &StoreDir,
    inputs: impl IntoIterator<Item = (P, &'a InputOutputs)>,
    dynamic: bool,
    masked: bool,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(4096);
    if dynamic {
        out.extend_from_slice(b"DrvWithVersion(");
        string(&mut out, DYNAMIC.as_bytes());
        out.push(b',');
    } else {
        out.extend_from_slice(b"Derive(");
    }
    list(&mut out, &basic.outputs, |out, (name, output)| {
        let (path, algorithm, hash) = output.to_fields(dir);
        let path = if masked { "" } else { &path };
        tuple(out, [name.as_str(), path, &algorithm, &hash].map(str::as_bytes));
    });
    out.push(b',');
    list(&mut out, inputs, |out, (input, wanted)| {
        out.push(b'(');
        string(out, input.as_ref().as_bytes());
        out.push(b',');
        input_outputs(out, wanted);
        out.push(b')');
    });
    out.push(b',');
    list(&mut out, &basic.input_srcs, |out, path| string(out, dir.display(path).as_bytes()));
    out.push(b',');
    string(&mut out, &basic.platform);
    out.push(b',');
    string(&mut out, &basic.builder);
    out.push(b',');
    list(&mut out, &basic.args, |out, arg| string(out, arg));
    out.push(b',');
    list(&mut out, &basic.env, |out, (name, value)| {
        let is_output = || std::str::from_utf8(name).is_ok_and(|name| basic.outputs.contains_key(name));
        tuple(out, [name, if masked && is_output() { b"" } else { value.as_slice() }]);
    });
    out.push(b')');
    out
}

/// A list of outputs, or, with outputs of outputs, a pair of lists.
fn input_outputs(out: &mut Vec<u8>, wanted: &InputOutputs) {
    let names = |out: &mut Vec<u8>| list(out, &wanted.outputs, |out, name| string(out, name.as_str().as_bytes()));
    if wanted.dynamic.is_empty() {
        return names(out);
    }
    out.push(b'(');
    names(out);
    out.push(b',');
    list(out, &wanted.dynamic, |out, (name, wanted)| {
        out.push(b'(');
        string(out, name.as_str().as_bytes());
        out.push(b',');
        input_outputs(out, wanted);
        out.push(b')');
    });
    out.push(b')');
}

fn list<I: IntoIterator>(out: &mut Vec<u8>, items: I, mut item: impl FnMut(&mut Vec<u8>, I::Item)) {
    out.push(b'[');
    for (i, each) in items.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        item(out, each);
    }
    out.push(b']');
}

fn tuple<const N: usize>(out: &mut Vec<u8>, strings: [&[u8]; N]) {
    for (i, each) in strings.into_iter().enumerate() {
        out.push(if i == 0 { b'(' } else { b',' });
        string(out, each);
    }
    out.push(b')');
}

fn string(out: &mut Vec<u8>, mut bytes: &[u8]) {
    out.push(b'"');
    while let Some(at) = bytes.iter().position(|byte| matches!(byte, b'\\' | b'"' | b'\n' | b'\r' | b'\t')) {
        out.extend_from_slice(&bytes[..at]);
        let letter = match bytes[at] {
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            other => other,
        };
        out.extend_from_slice(&[b'\\', letter]);
        bytes = &bytes[at + 1..];
    }
    out.extend_from_slice(bytes);
    out.push(b'"');
}

struct Parser<'a> {
    contents: &'a [u8],
    offset: usize,
    dir: &'a StoreDir,
    name: &'a str,
}

impl<'a> Parser<'a> {
    fn derivation(&mut self) -> Result<Derivation, Error> {
        let dynamic = self.rest().starts_with(b"DrvWithVersion(");
        if dynamic {
            self.expect(b"DrvWithVersion(", "a derivation")?;
            let version = self.text("version")?;
            if version != DYNAMIC {
                return Err(Error::UnsupportedVersion { name: self.name.to_owned(), version });
            }
            self.comma()?;
        } else {
            self.expect(b"Derive(", "a derivation")?;
        }
        let outputs = self.map("outputs", Self::output)?;
        if outputs.is_empty() {
            return Err(Error::NoOutputs(self.name.to_owned()));
        }
        self.comma()?;
        let input_drvs = self.map("input derivations", |parser| parser.input_drv(dynamic))?;
        self.comma()?;
        let input_srcs = self.set("input sources", Self::path)?;
        self.comma()?;
        let platform = self.string()?;
        self.comma()?;
        let builder = self.string()?;
        self.comma()?;
        let mut args = Vec::new();
        self.list(|parser| {
            args.push(parser.string()?);
            Ok(())
        })?;
        self.comma()?;
        let env = self.map("environment variables", Self::variable)?;
        self.close()?;
        let name = self.name.to_owned();
        let basic = BasicDerivation { name, outputs, input_srcs, platform, builder, args, env };
        let derivation = Derivation { basic, input_drvs };
        // Stock writes the versioned form only where it has to.
        if dynamic && !derivation.is_dynamic() {
            return Err(self.syntax("an output of an output before it"));
        }
        Ok(derivation)
    }

    fn output(&mut self) -> Result<(OutputName, Output), Error> {
        self.open()?;
        let name = self.output_name()?;
        self.comma()?;
        let path = self.text("output path")?;
        self.comma()?;
        let algorithm = self.text("hash algorithm")?;
        self.comma()?;
        let hash = self.text("hash")?;
        self.close()?;
        let output = Output::from_fields(self.dir, &path, &algorithm, &hash)?;
        if let Some(parsed) = output.path() {
            self.check_canonical(&path, parsed)?;
        }
        Ok((name, output))
    }

    fn input_drv(&mut self, dynamic: bool) -> Result<(StorePath, InputOutputs), Error> {
        self.open()?;
        let path = self.path()?;
        if !path.is_derivation() {
            return Err(Error::NotADerivation(path));
        }
        self.comma()?;
        let wanted = self.input_outputs(if dynamic { MAX_DYNAMIC_DEPTH } else { 0 })?;
        self.close()?;
        if wanted.outputs.is_empty() && wanted.dynamic.is_empty() {
            return Err(Error::NoWantedOutputs { name: self.name.to_owned(), input: path });
        }
        Ok((path, wanted))
    }

    fn output_name(&mut self) -> Result<OutputName, Error> {
        OutputName::new(&self.text("output name")?)
    }

    fn input_outputs(&mut self, depth: usize) -> Result<InputOutputs, Error> {
        let nested = depth > 0 && self.rest().starts_with(b"(");
        if nested {
            self.open()?;
        }
        let outputs = self.set("outputs of an input derivation", Self::output_name)?;
        let mut dynamic = BTreeMap::new();
        if nested {
            self.comma()?;
            dynamic = self.map("outputs of outputs of an input derivation", |parser| {
                parser.open()?;
                let name = parser.output_name()?;
                parser.comma()?;
                let wanted = parser.input_outputs(depth - 1)?;
                parser.close()?;
                Ok((name, wanted))
            })?;
            self.close()?;
        }
        Ok(InputOutputs { outputs, dynamic })
    }

    fn variable(&mut self) -> Result<(Vec<u8>, Vec<u8>), Error> {
        self.open()?;
        let name = self.string()?;
        self.comma()?;
        let value = self.string()?;
        self.close()?;
        Ok((name, value))
    }

    fn path(&mut self) -> Result<StorePath, Error> {
        let text = self.text("store path")?;
        let path = self.dir.parse(&text)?;
        self.check_canonical(&text, &path)?;
        Ok(path)
    }

    fn check_canonical(&self, text: &str, path: &StorePath) -> Result<(), Error> {
        if text == self.dir.display(path) { Ok(()) } else { Err(self.syntax("a canonical store path before it")) }
    }

    fn map<K: Ord, V>(
        &mut self,
        what: &'static str,
        mut entry: impl FnMut(&mut Self) -> Result<(K, V), Error>,
    ) -> Result<BTreeMap<K, V>, Error> {
        let mut map = BTreeMap::new();
        self.list(|parser| {
            let (key, value) = entry(parser)?;
            if map.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(Error::Order { name: parser.name.to_owned(), what });
            }
            map.insert(key, value);
            Ok(())
        })?;
        Ok(map)
    }

    fn set<T: Ord>(
        &mut self,
        what: &'static str,
        mut item: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<BTreeSet<T>, Error> {
        let map = self.map(what, |parser| Ok((item(parser)?, ())))?;
        Ok(map.into_keys().collect())
    }

    fn list(&mut self, mut item: impl FnMut(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        self.expect(b"[", "'['")?;
        if self.rest().starts_with(b"]") {
            return self.expect(b"]", "']'");
        }
        loop {
            item(self)?;
            match self.rest() {
                [b',', ..] => self.offset += 1,
                _ => return self.expect(b"]", "',' or ']'"),
            }
        }
    }

    fn text(&mut self, what: &'static str) -> Result<String, Error> {
        String::from_utf8(self.string()?).map_err(|_| Error::NotText { name: self.name.to_owned(), what })
    }

    fn string(&mut self) -> Result<Vec<u8>, Error> {
        self.expect(b"\"", "a string")?;
        let mut bytes = Vec::new();
        loop {
            let rest = self.rest();
            let at = rest.iter().position(|byte| matches!(byte, b'"' | b'\\'));
            let at = at.ok_or_else(|| self.syntax("a string's end"))?;
            bytes.extend_from_slice(&rest[..at]);
            self.offset += at + 1;
            if rest[at] == b'"' {
                return Ok(bytes);
            }
            let escaped = *rest.get(at + 1).ok_or_else(|| self.syntax("an escaped character"))?;
            self.offset += 1;
            bytes.push(match escaped {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                other => other,
            });
        }
    }

    fn rest(&self) -> &'a [u8] {
        &self.contents[self.offset..]
    }

    fn open(&mut self) -> Result<(), Error> {
        self.expect(b"(", "'('")
    }

    fn comma(&mut self) -> Result<(), Error> {
        self.expect(b",", "','")
    }

    fn close(&mut self) -> Result<(), Error> {
        self.expect(b")", "')'")
    }

    fn expect(&mut self, token: &[u8], what: &'static str) -> Result<(), Error> {
        if !self.rest().starts_with(token) {
            return Err(self.syntax(what));
        }
        self.offset += token.len();
        Ok(())
    }

    fn syntax(&self, expected: &'static str) -> Error {
        Error::Syntax { name: self.name.to_owned(), expected, offset: self.offset }
    }
}
