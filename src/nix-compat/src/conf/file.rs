//! The grammar: lines of `name = value`, `include path` and `!include path`; `#` begins a comment anywhere.

use super::Error;

/// How deep files may include each other.
pub const MAX_INCLUDE_DEPTH: usize = 16;
/// How many inclusions there may be in all. Without this limit a few small files that include each other several times
/// would be read more often than there is time for.
pub const MAX_INCLUSIONS: usize = 1000;

/// Gives the text of the file to include, `None` if there is no such file; the flag says that this is no error.
type Include<'a> = &'a mut dyn FnMut(&str, bool) -> Result<Option<String>, String>;

/// Reads `text`, which stands at `origin`, into names and values, those of included files in their place.
///
/// `include` is given the path of a file to include, relative ones already put behind the including file's directory,
/// and whether it may be missing (`!include`). The reason it gives for a failure becomes part of the error.
pub fn parse(text: &str, origin: &str, include: Include<'_>) -> Result<Vec<(String, String)>, Error> {
    let mut parsed = Parsed::default();
    parse_into(&mut parsed, text, origin, include, 0)?;
    Ok(parsed.settings)
}

/// What was read so far.
#[derive(Default)]
struct Parsed {
    settings: Vec<(String, String)>,
    inclusions: usize,
}

fn parse_into(parsed: &mut Parsed, text: &str, origin: &str, include: Include<'_>, depth: usize) -> Result<(), Error> {
    for line in text.split('\n') {
        let line = line.split('#').next().unwrap_or(line);
        let words: Vec<&str> = line.split([' ', '\t', '\n', '\r']).filter(|word| !word.is_empty()).collect();
        match words[..] {
            [] => {}
            [keyword @ ("include" | "!include"), path] => {
                if depth >= MAX_INCLUDE_DEPTH {
                    return Err(Error::IncludeDepth(origin.to_owned()));
                }
                if parsed.inclusions >= MAX_INCLUSIONS {
                    return Err(Error::Inclusions(origin.to_owned()));
                }
                parsed.inclusions += 1;
                let path = beside(origin, path);
                let optional = keyword == "!include";
                let failed = |reason| Error::Include { path: path.clone(), origin: origin.to_owned(), reason };
                match include(&path, optional).map_err(failed)? {
                    Some(text) => parse_into(parsed, &text, &path, include, depth + 1)?,
                    None if optional => {}
                    None => return Err(failed("there is no such file".to_owned())),
                }
            }
            [name, "=", ref value @ ..] => parsed.settings.push((name.to_owned(), value.join(" "))),
            _ => return Err(Error::Line { line: line.trim().to_owned(), origin: origin.to_owned() }),
        }
    }
    Ok(())
}

/// `path` as seen from the directory of `origin`.
fn beside(origin: &str, path: &str) -> String {
    match origin.rsplit_once('/') {
        Some((directory, _)) if !path.starts_with('/') => format!("{directory}/{path}"),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(text: &str) -> Result<Vec<(String, String)>, Error> {
        parse(text, "/etc/nix/nix.conf", &mut |path, _| Err(format!("unexpected inclusion of {path}")))
    }

    fn pairs(wanted: &[(&str, &str)]) -> Vec<(String, String)> {
        wanted.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn lines() {
        let text = "# all\n\n a =  1  2 # rest\r\nb =\nc = x = y\n\td\t=\tz";
        assert_eq!(alone(text), Ok(pairs(&[("a", "1 2"), ("b", ""), ("c", "x = y"), ("d", "z")])));
        for wrong in ["a", "a=b", "a b = c", "include", "include a b"] {
            assert!(matches!(alone(wrong), Err(Error::Line { line, .. }) if line == wrong), "{wrong}");
        }
    }

    #[test]
    fn inclusions() {
        let mut include = |path: &str, optional: bool| match (path, optional) {
            ("/etc/nix/sub/more.conf", false) => Ok(Some("b = 2\n!include more/gone".to_owned())),
            ("/etc/nix/sub/more/gone", true) | ("/gone", false) => Ok(None),
            (other, _) => Err(format!("unexpected {other}")),
        };
        let text = "a = 1\ninclude sub/more.conf\nc = 3";
        let parsed = parse(text, "/etc/nix/nix.conf", &mut include);
        assert_eq!(parsed, Ok(pairs(&[("a", "1"), ("b", "2"), ("c", "3")])));
        assert!(matches!(parse("include /gone", "x", &mut include), Err(Error::Include { .. })));
    }

    #[test]
    fn a_file_that_includes_itself_is_an_error() {
        let parsed = parse("include x", "/x", &mut |_, _| Ok(Some("include x".to_owned())));
        assert_eq!(parsed, Err(Error::IncludeDepth("/x".into())));
    }

    #[test]
    fn few_files_that_include_each_other_often_are_an_error() {
        // Ten files, each of which includes the next ten times: ten thousand million inclusions.
        let mut include = |path: &str, _: bool| {
            let number: u32 = path.trim_start_matches('/').parse().unwrap();
            Ok(Some(if number < 10 { format!("include /{}\n", number + 1).repeat(10) } else { "a = 1".to_owned() }))
        };
        assert_eq!(parse("include /1", "/0", &mut include), Err(Error::Inclusions("/9".into())));
    }
}
