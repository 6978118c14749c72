//! The passwords of a netrc file.

/// A user's name and password.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Login {
    pub(crate) user: String,
    pub(crate) password: String,
}

/// The login that a netrc file has for a host: the first entry with its name, else the default entry.
///
/// Words are separated by white space and may stand in double quotes, where a backslash takes the next character as it
/// is. Macros are passed over.
pub(crate) fn login(netrc: &str, host: &str) -> Option<Login> {
    let mut words = Words(netrc);
    let mut found: Option<Login> = None;
    while let Some(word) = words.next() {
        match word.as_str() {
            "machine" | "default" if found.is_some() => break,
            "machine" => found = words.next()?.eq_ignore_ascii_case(host).then(Login::default),
            "default" => found = Some(Login::default()),
            "macdef" => words.skip_macro(),
            "login" | "password" | "account" => {
                let value = words.next().unwrap_or_default();
                match (&mut found, word.as_str()) {
                    (Some(login), "login") => login.user = value,
                    (Some(login), "password") => login.password = value,
                    _ => {}
                }
            }
            _ => {}
        }
    }
    found
}

struct Words<'a>(&'a str);

impl Words<'_> {
    /// A macro goes to the next empty line.
    fn skip_macro(&mut self) {
        self.0 = self.0.find("\n\n").map_or("", |end| &self.0[end..]);
    }
}

impl Iterator for Words<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        self.0 = self.0.trim_start();
        while self.0.starts_with('#') {
            self.0 = self.0.find('\n').map_or("", |end| &self.0[end..]).trim_start();
        }
        if !self.0.starts_with('"') {
            let end = self.0.find(char::is_whitespace).unwrap_or(self.0.len());
            let (word, rest) = self.0.split_at(end);
            self.0 = rest;
            return (!word.is_empty()).then(|| word.to_owned());
        }
        let mut word = String::new();
        let mut characters = self.0.char_indices().skip(1);
        while let Some((_, character)) = characters.next() {
            match character {
                '"' => break,
                '\\' => word.extend(characters.next().map(|(_, character)| character)),
                other => word.push(other),
            }
        }
        self.0 = characters.next().map_or("", |(rest, _)| &self.0[rest..]);
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_of_hosts() {
        let netrc = "# a comment\nmachine one login me password secret\nmacdef init\nmachine two password no\n\n\
                     machine two\n  account x\n  password \"with \\\"blanks\\\"\" login \"a b\"\n\
                     default login anonymous password guest";
        let of = |host| login(netrc, host).map(|login| (login.user, login.password));
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(of("one"), pair("me", "secret"));
        assert_eq!(of("ONE"), pair("me", "secret"));
        assert_eq!(of("two"), pair("a b", "with \"blanks\""));
        assert_eq!(of("three"), pair("anonymous", "guest"));
        assert_eq!(login("machine one login me", "other"), None);
        for broken in ["", "machine", "machine one login", "machine one password \"x", "\"", "#", "macdef"] {
            let _ = login(broken, "one");
        }
    }
}
