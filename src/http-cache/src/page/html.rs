//! What all pages have in common.

use std::fmt::{self, Write as _};

const STYLE: &str = include_str!("style.css");

/// Text as HTML shows it. Characters that would be invisible, or turn the direction of what follows, are shown by their
/// number.
pub(crate) struct Text<'a>(pub(crate) &'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                '\n' => f.write_char('\n')?,
                hidden if hidden.is_control() || turns(hidden) => write!(f, "{}", hidden.escape_unicode())?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

fn turns(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Bytes that are mostly text, cut off after so many characters.
pub(crate) fn lossy(bytes: &[u8], most: usize) -> String {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.replace('\n', "\\n"),
        Err(_) => bytes.escape_ascii().to_string(),
    };
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A number of bytes, in the largest unit of which there is at least one.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut amount = bytes as f64 / 1024.0;
    let mut unit = 0;
    while amount >= 1024.0 && unit + 1 < UNITS.len() {
        amount /= 1024.0;
        unit += 1;
    }
    format!("{amount:.1} {}", UNITS[unit])
}

/// A whole page; `body` is HTML.
pub(crate) fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{}</title>\n<style>\n{STYLE}</style>\n\
         <header><a href=\"/\">binary cache</a></header>\n<main>\n<h1>{0}</h1>\n{body}\n</main>\n</html>\n",
        Text(title)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_for_markup_and_nothing_is_hidden() {
        let shown = Text("<a href=\"x\" o='y'>&\u{202e}\u{7}é").to_string();
        assert_eq!(shown, "&lt;a href=&quot;x&quot; o=&#39;y&#39;&gt;&amp;\\u{202e}\\u{7}é");
        assert_eq!(lossy(b"a\xff\n", 9), "a\\xff\\n");
        assert_eq!(lossy("aé\nbc".as_bytes(), 4), "aé\\n…");
    }

    #[test]
    fn sizes() {
        for (bytes, shown) in [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB")] {
            assert_eq!(size(bytes), shown);
        }
        assert_eq!(size(u64::MAX), "16384.0 PiB");
    }
}
