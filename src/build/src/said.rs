//! What a line of a builder's output is: log, or a message in the form of a line, `@nix {"action":…}`.
//!
//! `builtin:fetchurl` makes such messages, and others may: a builder can say which phase it is in, show its downloads and
//! leave a note. Everything else that the form knows is for the daemon alone to say, and is passed over.

use nix_compat::worker::stderr::{ActivityKind, Field, ResultKind, Verbosity};
use remote::Download;
use serde_json::{Map, Value};

/// What marks a message.
const MARK: &[u8] = b"@nix ";

/// What a line of a builder's output is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// A line of its log.
    Log,
    /// A phase begins.
    Phase(String),
    /// Something about a download, under a number of the builder's own.
    Download(Download),
    /// A message for whoever watches.
    Note(Verbosity, String),
    /// A message that a builder's word is not enough for, or that nobody knows.
    Nothing,
    /// One that makes no sense, as this text says; the line is shown as log too.
    Malformed(String),
}

impl Said {
    pub(crate) fn of(line: &[u8]) -> Self {
        let Some(text) = line.strip_prefix(MARK) else { return Self::Log };
        match serde_json::from_slice(text) {
            Ok(message) => Self::of_message(&message).unwrap_or_else(|reason| {
                Self::Malformed(format!(
                    "warning: Unable to handle a JSON message from the derivation builder: {reason}"
                ))
            }),
            Err(error) => Self::Malformed(format!("bad JSON log message from the derivation builder: {error}")),
        }
    }

    fn of_message(message: &Value) -> Result<Self, String> {
        let message = message.as_object().ok_or("it is no object")?;
        let number = |name: &str| {
            message.get(name).and_then(Value::as_u64).ok_or_else(|| format!("it has no {name} that is a number"))
        };
        let level = || Ok::<_, String>(Verbosity::from_code(number("level")?).unwrap_or(Verbosity::Vomit));
        Ok(match text(message, "action")?.as_str() {
            "setPhase" => Self::Phase(text(message, "phase")?),
            "msg" => Self::Note(level()?, text(message, "msg")?),
            "stop" => Self::Download(Download::Ended(number("id")?)),
            "start" => {
                let kind = number("type")?;
                match ActivityKind::from_code(kind) {
                    None => return Err(format!("unknown activity type {kind}")),
                    Some(ActivityKind::FileTransfer) => {
                        let (id, level, fields) = (number("id")?, level()?, fields(message)?);
                        Self::Download(Download::Started { id, level, text: text(message, "text")?, fields })
                    }
                    Some(_) => Self::Nothing,
                }
            }
            "result" => {
                let (id, kind) = (number("id")?, number("type")?);
                let fields = fields(message)?;
                match (ResultKind::from_code(kind), fields.as_slice()) {
                    (None, _) => return Err(format!("unknown result type {kind}")),
                    // Clients take for granted that what they are told has all its fields.
                    (
                        Some(ResultKind::Progress),
                        &[Field::Int(done), Field::Int(expected), Field::Int(running), Field::Int(failed)],
                    ) => Self::Download(Download::Progress(id, [done, expected, running, failed])),
                    (Some(_), _) => Self::Nothing,
                }
            }
            _ => Self::Nothing,
        })
    }
}

fn text(message: &Map<String, Value>, name: &str) -> Result<String, String> {
    let text = message.get(name).and_then(Value::as_str);
    text.map(str::to_owned).ok_or_else(|| format!("it has no {name} that is a string"))
}

fn fields(message: &Map<String, Value>) -> Result<Vec<Field>, String> {
    let Some(fields) = message.get("fields") else { return Ok(Vec::new()) };
    let field = |value: &Value| match (value.as_u64(), value.as_str()) {
        (Some(number), _) => Ok(Field::Int(number)),
        (_, Some(text)) => Ok(Field::Text(text.into())),
        _ => Err("it has a field that is neither a number nor a string".to_owned()),
    };
    fields.as_array().ok_or("its fields are no list")?.iter().map(field).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Said {
        Said::of(line.as_bytes())
    }

    #[test]
    fn what_a_builder_may_say() {
        assert_eq!(of(r#"@nix { "action": "setPhase", "phase": "x" }"#), Said::Phase("x".into()));
        assert_eq!(of(r#"@nix {"action":"msg","level":1,"msg":"x"}"#), Said::Note(Verbosity::Warn, "x".into()));
        assert_eq!(
            of(r#"@nix {"action":"start","id":7,"level":4,"type":101,"text":"t","fields":["u",2],"parent":0}"#),
            Said::Download(Download::Started {
                id: 7,
                level: Verbosity::Talkative,
                text: "t".into(),
                fields: vec![Field::Text(b"u".to_vec()), Field::Int(2)]
            })
        );
        let progress = r#"@nix {"action":"result","id":7,"type":105,"fields":[1,2,0,0]}"#;
        assert_eq!(of(progress), Said::Download(Download::Progress(7, [1, 2, 0, 0])));
        assert_eq!(of(r#"@nix {"action":"stop","id":7}"#), Said::Download(Download::Ended(7)));
    }

    #[test]
    fn what_it_may_not() {
        for line in [
            r#"@nix {"action":"start","id":7,"level":0,"type":105,"text":"a build"}"#,
            r#"@nix {"action":"result","id":7,"type":105,"fields":[1]}"#,
            r#"@nix {"action":"result","id":7,"type":105,"fields":["1",2,3,4]}"#,
            r#"@nix {"action":"result","id":7,"type":101,"fields":["a line"]}"#,
            r#"@nix {"action":"dance"}"#,
        ] {
            assert_eq!(of(line), Said::Nothing, "{line}");
        }
        for line in [
            "@nix is nice",
            "@nix 1",
            "@nix {}",
            r#"@nix {"action":1}"#,
            r#"@nix {"action":"setPhase"}"#,
            r#"@nix {"action":"stop","id":-1}"#,
            r#"@nix {"action":"start","id":1,"level":0,"type":99,"text":""}"#,
            r#"@nix {"action":"start","id":1,"level":0,"type":101,"text":"","fields":[[]]}"#,
            r#"@nix {"action":"result","id":1,"type":1}"#,
        ] {
            assert!(matches!(of(line), Said::Malformed(_)), "{line}");
        }
        for line in ["", "x", "@nixos {}", " @nix {}"] {
            assert_eq!(of(line), Said::Log, "{line}");
        }
    }
}
