//! What a derivation tells its builtin builder.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::Error;
use crate::environment::Environment;
use crate::sandbox::Raw;

/// A derivation's attributes as strings, from whichever of its two forms.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Attributes {
    /// Structured attributes. Lists and numbers are turned into strings as Nix turns them for the environment.
    Structured {
        /// The attributes.
        json: Map<String, Value>,
    },
    /// The builder's environment.
    Plain {
        /// Names and values.
        variables: BTreeMap<String, Raw>,
    },
}

impl From<Environment> for Attributes {
    fn from(environment: Environment) -> Self {
        let json = environment.files.iter().find(|(name, _)| name == ".attrs.json");
        if let Some(json) = json.and_then(|(_, text)| serde_json::from_slice(text).ok()) {
            return Self::Structured { json };
        }
        let text = |(name, value)| Some((String::from_utf8(name).ok()?, Raw::from(value)));
        // Nothing asks for a name that is not text.
        Self::Plain { variables: environment.variables.into_iter().filter_map(text).collect() }
    }
}

impl Attributes {
    /// An attribute's value, if the derivation has it.
    pub(super) fn find(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        match self {
            Self::Plain { variables } => variables.get(name).map(|value| value.as_bytes().into()),
            Self::Structured { json } => json.get(name).map(|value| to_text(value).into_bytes().into()),
        }
    }

    /// An attribute's value.
    pub(super) fn get(&self, name: &'static str) -> Result<Cow<'_, [u8]>, Error> {
        self.find(name).ok_or(Error::NoAttribute(name))
    }

    /// An attribute's value as text.
    pub(super) fn text(&self, name: &'static str) -> Result<String, Error> {
        String::from_utf8(self.get(name)?.into_owned()).map_err(|_| Error::NotText(name))
    }

    /// An attribute's value as a path.
    pub(super) fn path(&self, name: &'static str) -> Result<PathBuf, Error> {
        Ok(OsStr::from_bytes(&self.get(name)?).into())
    }
}

/// The string that Nix makes of a value for a variable of the environment.
fn to_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "1".into(),
        Value::Bool(false) | Value::Null => String::new(),
        Value::Number(number) => number.to_string(),
        Value::Array(items) => items.iter().map(to_text).collect::<Vec<_>>().join(" "),
        Value::Object(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&[u8], &[u8])], json: Option<&str>) -> Environment {
        Environment {
            variables: variables.iter().map(|(k, v)| (k.to_vec(), v.to_vec())).collect(),
            files: json.iter().map(|json| (".attrs.json".to_owned(), json.as_bytes().to_vec())).collect(),
            ..Environment::default()
        }
    }

    #[test]
    fn both_forms_and_over_the_wire() {
        let plain = Attributes::from(environment(&[(b"a", b"x y"), (b"path", b"/\xff"), (b"\xff", b"z")], None));
        let json = r#"{"a":["x",["y"]],"n":5,"t":true,"f":false,"path":"/p"}"#;
        let structured = Attributes::from(environment(&[(b"a", b"hidden")], Some(json)));
        for attributes in [&plain, &structured] {
            let wire = serde_json::to_string(attributes).unwrap();
            let back: Attributes = serde_json::from_str(&wire).unwrap();
            assert_eq!(&*back.get("a").unwrap(), b"x y");
            assert_eq!(back.path("path").unwrap(), attributes.path("path").unwrap());
            assert_eq!(back.get("none").unwrap_err().to_string(), "attribute 'none' missing");
        }
        assert_eq!(plain.path("path").unwrap().as_os_str().as_bytes(), b"/\xff");
        assert_eq!(["n", "t", "f"].map(|name| structured.get(name).unwrap().into_owned()), [&b"5"[..], b"1", b""]);
    }
}
