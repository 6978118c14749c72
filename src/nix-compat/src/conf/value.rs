//! How values are written.

use std::collections::{BTreeMap, BTreeSet};

/// A type of setting.
pub(super) trait Value: Sized {
    /// What a legal value is, for the error about another.
    const EXPECTED: &'static str;

    /// Reads a value.
    fn parse(text: &str) -> Option<Self>;

    /// The text that [`parse`](Self::parse) makes this value of.
    fn render(&self) -> String;

    /// Adds what `extra-<name>` gives. `None` if values of this type cannot be added to, `Some(false)` if `text` is no
    /// legal value.
    fn add(&mut self, _text: &str) -> Option<bool> {
        None
    }
}

impl Value for bool {
    const EXPECTED: &'static str = "'true' or 'false'";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "true" | "yes" | "1" => Some(true),
            "false" | "no" | "0" => Some(false),
            _ => None,
        }
    }

    fn render(&self) -> String {
        self.to_string()
    }
}

/// A number, with `K`, `M`, `G` or `T` behind it times a power of 1024.
impl Value for u64 {
    const EXPECTED: &'static str = "a number";

    fn parse(text: &str) -> Option<Self> {
        let (digits, power) = match text.as_bytes().last()?.to_ascii_uppercase() {
            b'K' => (&text[..text.len() - 1], 1),
            b'M' => (&text[..text.len() - 1], 2),
            b'G' => (&text[..text.len() - 1], 3),
            b'T' => (&text[..text.len() - 1], 4),
            _ => (text, 0),
        };
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        digits.parse::<Self>().ok()?.checked_mul(1 << (10 * power))
    }

    fn render(&self) -> String {
        self.to_string()
    }
}

/// Reads a number of bytes as settings have them: digits, and perhaps `K`, `M`, `G` or `T`, which are powers of 1024.
pub fn bytes(text: &str) -> Option<u64> {
    u64::parse(text)
}

/// What is not set is none; it cannot be unset.
impl Value for Option<u64> {
    const EXPECTED: &'static str = u64::EXPECTED;

    fn parse(text: &str) -> Option<Self> {
        u64::parse(text).map(Some)
    }

    fn render(&self) -> String {
        self.map(|number| number.render()).unwrap_or_default()
    }
}

impl Value for String {
    const EXPECTED: &'static str = "a text";

    fn parse(text: &str) -> Option<Self> {
        Some(text.to_owned())
    }

    fn render(&self) -> String {
        self.clone()
    }
}

/// Empty means none.
impl Value for Option<String> {
    const EXPECTED: &'static str = "a text";

    fn parse(text: &str) -> Option<Self> {
        Some(Some(text).filter(|text| !text.is_empty()).map(str::to_owned))
    }

    fn render(&self) -> String {
        self.clone().unwrap_or_default()
    }
}

/// Words, in order.
impl Value for Vec<String> {
    const EXPECTED: &'static str = "a list of words";

    fn parse(text: &str) -> Option<Self> {
        Some(text.split_whitespace().map(str::to_owned).collect())
    }

    fn render(&self) -> String {
        self.join(" ")
    }

    fn add(&mut self, text: &str) -> Option<bool> {
        self.extend(text.split_whitespace().map(str::to_owned));
        Some(true)
    }
}

/// Words whose order does not matter.
impl Value for BTreeSet<String> {
    const EXPECTED: &'static str = "a list of words";

    fn parse(text: &str) -> Option<Self> {
        Some(text.split_whitespace().map(str::to_owned).collect())
    }

    fn render(&self) -> String {
        self.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
    }

    fn add(&mut self, text: &str) -> Option<bool> {
        self.extend(text.split_whitespace().map(str::to_owned));
        Some(true)
    }
}

/// Whether builds are isolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// All of them.
    On,
    /// None.
    Off,
    /// All but fixed-output derivations and those with `__noChroot`.
    Relaxed,
}

impl Value for Sandbox {
    const EXPECTED: &'static str = "'true', 'false' or 'relaxed'";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "true" => Some(Self::On),
            "false" => Some(Self::Off),
            "relaxed" => Some(Self::Relaxed),
            _ => None,
        }
    }

    fn render(&self) -> String {
        match self {
            Self::On => "true",
            Self::Off => "false",
            Self::Relaxed => "relaxed",
        }
        .to_owned()
    }
}

/// Something of the machine's that builds may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxPath {
    /// Where it is on the machine.
    pub source: String,
    /// Whether it may be missing there.
    pub optional: bool,
}

/// `target=source`, `path` for the same on both sides, and a `?` at the end of what may be missing; keyed by target.
impl Value for BTreeMap<String, SandboxPath> {
    const EXPECTED: &'static str = "a list of paths";

    fn parse(text: &str) -> Option<Self> {
        let mut paths = Self::new();
        paths.add(text);
        Some(paths)
    }

    fn render(&self) -> String {
        let word = |(target, path): (&String, &SandboxPath)| {
            format!("{target}={}{}", path.source, if path.optional { "?" } else { "" })
        };
        self.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    fn add(&mut self, text: &str) -> Option<bool> {
        for word in text.split_whitespace() {
            let (path, optional) = word.strip_suffix('?').map_or((word, false), |path| (path, true));
            let (target, source) = path.split_once('=').unwrap_or((path, path));
            self.insert(target.to_owned(), SandboxPath { source: source.to_owned(), optional });
        }
        Some(true)
    }
}
