//! The settings a derivation makes about its own build: plain environment variables, or structured attributes.

use std::collections::BTreeMap;

use nix_compat::derivation::BasicDerivation;
use serde_json::{Map, Value};

/// A derivation's attributes, whichever way it has them.
#[derive(Debug)]
pub(crate) struct Attributes<'a> {
    drv: &'a BasicDerivation,
    structured: Option<Map<String, Value>>,
}

/// Attributes that cannot be obeyed. None is ever passed over: what it asks for may be somebody's protection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttributeError {
    #[error("odd number of tokens in 'exportReferencesGraph': '{0}' has no path")]
    UnpairedGraph(String),
    #[error("invalid file name '{0}' in 'exportReferencesGraph'")]
    GraphFileName(String),
    #[error("the structured attributes are no JSON object: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the attribute '{name}' must be {wanted}")]
    Type { name: String, wanted: &'static str },
}

/// What is demanded of one output.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct OutputChecks {
    /// Largest size of its NAR, in bytes.
    pub(crate) max_size: Option<u64>,
    /// Largest sum of the NAR sizes of its closure.
    pub(crate) max_closure_size: Option<u64>,
    /// The reference an output may always have to itself; only plain attributes leave it out of the closure.
    pub(crate) ignore_itself: bool,
    pub(crate) allowed_references: Option<Vec<String>>,
    pub(crate) allowed_requisites: Option<Vec<String>>,
    pub(crate) disallowed_references: Option<Vec<String>>,
    pub(crate) disallowed_requisites: Option<Vec<String>>,
}

const STRINGS: &str = "a list of strings";
const OBJECT: &str = "an object";
const BOOLEAN: &str = "a boolean";
const SIZE: &str = "a size in bytes";

fn wrong(name: &str, wanted: &'static str) -> AttributeError {
    AttributeError::Type { name: name.to_owned(), wanted }
}

impl<'a> Attributes<'a> {
    /// Reads the attributes, and fails when there is one among them that a build would have to pass over.
    pub(crate) fn new(drv: &'a BasicDerivation) -> Result<Self, AttributeError> {
        let structured = drv.structured_attrs().map(serde_json::from_slice).transpose()?;
        let attributes = Self { drv, structured };
        attributes.check()?;
        Ok(attributes)
    }

    fn check(&self) -> Result<(), AttributeError> {
        self.exported_graphs()?;
        let Some(json) = &self.structured else { return Ok(()) };
        for name in ["requiredSystemFeatures", "impureEnvVars"] {
            if json.get(name).is_some_and(|value| strings(value).is_none()) {
                return Err(wrong(name, STRINGS));
            }
        }
        if json.get("__noChroot").is_some_and(|value| !value.is_boolean()) {
            return Err(wrong("__noChroot", BOOLEAN));
        }
        for output in self.drv.outputs.keys() {
            self.output_checks(output.as_str())?;
            self.discards_references(output.as_str())?;
        }
        Ok(())
    }

    /// The structured attributes, if that is the way.
    pub(crate) fn structured(&self) -> Option<&Map<String, Value>> {
        self.structured.as_ref()
    }

    /// Whether the derivation requires a system feature.
    pub(crate) fn requires_feature(&self, feature: &str) -> bool {
        self.words("requiredSystemFeatures").unwrap_or_default().iter().any(|required| required == feature)
    }

    /// Whether an attribute is set and true.
    pub(crate) fn flag(&self, name: &str) -> bool {
        match &self.structured {
            Some(json) => json.get(name) == Some(&Value::Bool(true)),
            None => self.drv.env(name) == Some(b"1"),
        }
    }

    /// The same, where what is not set is `default`.
    pub(crate) fn flag_or(&self, name: &str, default: bool) -> bool {
        let is_set = match &self.structured {
            Some(json) => json.get(name).is_some_and(Value::is_boolean),
            None => self.drv.env(name).is_some(),
        };
        if is_set { self.flag(name) } else { default }
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

    /// Which closures the builder wants to be told: by file or attribute name, the paths they begin with.
    pub(crate) fn exported_graphs(&self) -> Result<BTreeMap<String, Vec<String>>, AttributeError> {
        const NAME: &str = "exportReferencesGraph";
        let Some(json) = &self.structured else {
            let words = self.words(NAME).unwrap_or_default();
            let mut graphs = BTreeMap::new();
            for pair in words.chunks(2) {
                let [file, path] = pair else { return Err(AttributeError::UnpairedGraph(pair.concat())) };
                if !is_graph_file_name(file) {
                    return Err(AttributeError::GraphFileName(file.clone()));
                }
                graphs.insert(file.clone(), vec![path.clone()]);
            }
            return Ok(graphs);
        };
        let Some(graphs) = json.get(NAME) else { return Ok(BTreeMap::new()) };
        let graphs = graphs.as_object().ok_or_else(|| wrong(NAME, OBJECT))?;
        let each = |(name, value): (&String, &Value)| {
            let mut paths = Vec::new();
            // Lists within lists are what `closureInfo` and the like come down to.
            let mut todo = vec![value];
            while let Some(value) = todo.pop() {
                match value {
                    Value::String(path) => paths.push(path.clone()),
                    Value::Array(items) => todo.extend(items),
                    _ => return Err(wrong(&format!("{NAME}.{name}"), STRINGS)),
                }
            }
            Ok((name.clone(), paths))
        };
        graphs.iter().map(each).collect()
    }

    /// What is demanded of an output: with structured attributes each has its own demands.
    pub(crate) fn output_checks(&self, output: &str) -> Result<OutputChecks, AttributeError> {
        let Some(json) = &self.structured else {
            return Ok(OutputChecks {
                max_size: None,
                max_closure_size: None,
                ignore_itself: true,
                allowed_references: self.words("allowedReferences"),
                allowed_requisites: self.words("allowedRequisites"),
                disallowed_references: self.words("disallowedReferences"),
                disallowed_requisites: self.words("disallowedRequisites"),
            });
        };
        let Some(checks) = entry(json, "outputChecks", output)? else { return Ok(OutputChecks::default()) };
        let full_name = |name: &str| format!("outputChecks.{output}.{name}");
        let checks = checks.as_object().ok_or_else(|| wrong(&format!("outputChecks.{output}"), OBJECT))?;
        let size = |name: &str| {
            let size = |value: &Value| value.as_u64().ok_or_else(|| wrong(&full_name(name), SIZE));
            checks.get(name).map(size).transpose()
        };
        let list = |name: &str| {
            let list = |value: &Value| strings(value).ok_or_else(|| wrong(&full_name(name), STRINGS));
            checks.get(name).map(list).transpose()
        };
        Ok(OutputChecks {
            max_size: size("maxSize")?,
            max_closure_size: size("maxClosureSize")?,
            ignore_itself: false,
            allowed_references: list("allowedReferences")?,
            allowed_requisites: list("allowedRequisites")?,
            disallowed_references: list("disallowedReferences")?,
            disallowed_requisites: list("disallowedRequisites")?,
        })
    }

    /// Whether an output is to be registered without references, whatever is in it. Only structured attributes can ask
    /// for this.
    pub(crate) fn discards_references(&self, output: &str) -> Result<bool, AttributeError> {
        const NAME: &str = "unsafeDiscardReferences";
        let Some(json) = &self.structured else { return Ok(false) };
        let Some(value) = entry(json, NAME, output)? else { return Ok(false) };
        value.as_bool().ok_or_else(|| wrong(&format!("{NAME}.{output}"), BOOLEAN))
    }
}

/// What an attribute that is an object says of one output.
fn entry<'a>(json: &'a Map<String, Value>, name: &str, output: &str) -> Result<Option<&'a Value>, AttributeError> {
    let Some(object) = json.get(name) else { return Ok(None) };
    Ok(object.as_object().ok_or_else(|| wrong(name, OBJECT))?.get(output))
}

/// What stock takes for the name of a file that it writes into the build directory.
fn is_graph_file_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
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
    use std::collections::{BTreeMap, BTreeSet};

    use nix_compat::derivation::{Output, OutputName};

    use super::*;

    fn drv(name: &str, value: &str) -> BasicDerivation {
        BasicDerivation {
            name: "x".into(),
            outputs: BTreeMap::from([(OutputName::default(), Output::Deferred)]),
            input_srcs: BTreeSet::new(),
            platform: Vec::new(),
            builder: Vec::new(),
            args: Vec::new(),
            env: BTreeMap::from([(name.into(), value.into())]),
        }
    }

    #[test]
    fn nothing_is_passed_over() {
        for (name, value) in [
            ("exportReferencesGraph", "graph /nix/store/x graph"),
            ("exportReferencesGraph", "../graph /nix/store/x"),
            ("__json", r#"{"exportReferencesGraph":{"graph":[1]}}"#),
            ("__json", r#"{"exportReferencesGraph":"graph"}"#),
            ("__json", r#"{"outputChecks":{"out":{"allowedReferences":"x"}}}"#),
            ("__json", r#"{"outputChecks":{"out":{"disallowedRequisites":[1]}}}"#),
            ("__json", r#"{"outputChecks":{"out":{"maxSize":"1M"}}}"#),
            ("__json", r#"{"outputChecks":{"out":[]}}"#),
            ("__json", r#"{"outputChecks":[]}"#),
            ("__json", r#"{"unsafeDiscardReferences":true}"#),
            ("__json", r#"{"unsafeDiscardReferences":{"out":"yes"}}"#),
            ("__json", r#"{"requiredSystemFeatures":"kvm"}"#),
            ("__json", r#"{"__noChroot":1}"#),
            ("__json", "[]"),
        ] {
            assert!(Attributes::new(&drv(name, value)).is_err(), "{name} = {value}");
        }
        for (name, value) in [
            ("exportReferencesGraph", " "),
            ("exportReferencesGraph", "graph /nix/store/x"),
            ("__json", r#"{"exportReferencesGraph":{"graph":["/nix/store/x"]}}"#),
            ("unsafeDiscardReferences", "1"),
            ("__json", r#"{"exportReferencesGraph":{},"outputChecks":{"out":{}}}"#),
        ] {
            Attributes::new(&drv(name, value)).unwrap();
        }
    }

    #[test]
    fn demands_on_outputs() {
        let drv = drv(
            "__json",
            r#"{"outputChecks":{"out":{"maxSize":5,"allowedReferences":["out"]}},
                                    "unsafeDiscardReferences":{"out":true}}"#,
        );
        let attributes = Attributes::new(&drv).unwrap();
        let expected =
            OutputChecks { max_size: Some(5), allowed_references: Some(vec!["out".into()]), ..OutputChecks::default() };
        assert_eq!(attributes.output_checks("out").unwrap(), expected);
        assert_eq!(attributes.output_checks("dev").unwrap(), OutputChecks::default());
        assert!(attributes.discards_references("out").unwrap());
        assert!(!attributes.discards_references("dev").unwrap());
    }

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
