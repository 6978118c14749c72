//! The settings a derivation makes about its own build: plain environment variables, or structured attributes.

use nix_compat::derivation::BasicDerivation;
use serde_json::{Map, Value};

/// A derivation's attributes, whichever way it has them.
#[derive(Debug)]
pub(crate) struct Attributes<'a> {
    drv: &'a BasicDerivation,
    structured: Option<Map<String, Value>>,
}

impl<'a> Attributes<'a> {
    /// Reads the attributes; fails when the structured ones are no JSON object.
    pub(crate) fn new(drv: &'a BasicDerivation) -> Result<Self, serde_json::Error> {
        let structured = drv.structured_attrs().map(serde_json::from_slice).transpose()?;
        Ok(Self { drv, structured })
    }

    /// The structured attributes, if that is the way.
    pub(crate) fn structured(&self) -> Option<&Map<String, Value>> {
        self.structured.as_ref()
    }

    /// Whether an attribute is set and true.
    pub(crate) fn flag(&self, name: &str) -> bool {
        match &self.structured {
            Some(json) => json.get(name) == Some(&Value::Bool(true)),
            None => self.drv.env(name) == Some(b"1"),
        }
    }

    /// A list of words.
    pub(crate) fn words(&self, name: &str) -> Option<Vec<String>> {
        match &self.structured {
            Some(json) => json.get(name).and_then(strings),
            None => self
                .drv
                .env(name)
                .map(|text| String::from_utf8_lossy(text).split_ascii_whitespace().map(str::to_owned).collect()),
        }
    }

    /// A list of words that constrains one output: with structured attributes each output has its own.
    pub(crate) fn output_check(&self, output: &str, name: &str) -> Option<Vec<String>> {
        match &self.structured {
            Some(json) => strings(json.get("outputChecks")?.get(output)?.get(name)?),
            None => self.words(name),
        }
    }
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

/// `.attrs.sh`: those attributes that a shell variable can hold.
pub(crate) fn to_shell(attributes: &Map<String, Value>) -> String {
    let mut text = String::new();
    for (name, value) in attributes {
        if !is_variable_name(name) {
            continue;
        }
        let declaration = match value {
            Value::Array(items) => {
                let items: Option<String> = items.iter().map(|v| Some(simple(v)? + " ")).collect();
                items.map(|items| format!("declare -a {name}=({items})\n"))
            }
            Value::Object(entries) => {
                let entries: Option<String> =
                    entries.iter().map(|(k, v)| Some(format!("[{}]={} ", quote(k), simple(v)?))).collect();
                entries.map(|entries| format!("declare -A {name}=({entries})\n"))
            }
            other => simple(other).map(|value| format!("declare {name}={value}\n")),
        };
        text.extend(declaration);
    }
    text
}

/// What fits one shell word; fractions do not, because their text would depend on who prints them.
fn simple(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(quote(text)),
        Value::Null | Value::Bool(false) => Some("''".into()),
        Value::Bool(true) => Some("1".into()),
        Value::Number(number) if number.is_i64() || number.is_u64() => Some(number.to_string()),
        _ => None,
    }
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn is_variable_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_shell_text_as_stock() {
        // `.attrs.sh` of Nix 2.34.8 for these attributes, the outputs left out.
        let json = r#"{"bar":{"a":1,"b":"z"},"builder":"/bin/sh","f":1.5,"foo":[1,2,"x y"],"i":3,"n":null,
                       "nested":[["a"]],"s":"it's","t":true,"not-a-name":1}"#;
        let expected = "declare -A bar=(['a']=1 ['b']='z' )\ndeclare builder='/bin/sh'\n\
                        declare -a foo=(1 2 'x y' )\ndeclare i=3\ndeclare n=''\ndeclare s='it'\\''s'\ndeclare t=1\n";
        assert_eq!(to_shell(&serde_json::from_str(json).unwrap()), expected);
    }
}
