//! What a request asks for besides a target: RFC 9110's ranges, validators and encodings.

use std::ops::Range;

use hyper::header::{self, HeaderMap, HeaderName};

/// Whether the client has what `etag` names already: `If-None-Match`.
pub(crate) fn is_known(headers: &HeaderMap, etag: &str) -> bool {
    let weak = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    values(headers, &header::IF_NONE_MATCH).any(|tag| tag.trim() == "*" || weak(tag) == etag)
}

/// Whether the client takes zstd: `Accept-Encoding` names it, and not with a weight of nothing.
pub(crate) fn takes_zstd(headers: &HeaderMap) -> bool {
    values(headers, &header::ACCEPT_ENCODING).any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("zstd"));
        named && !parts.any(|part| part.strip_prefix("q=").is_some_and(|q| q.parse::<f32>().is_ok_and(|q| q <= 0.0)))
    })
}

/// Which part of a body is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it. Also for what we need not understand: several ranges, other units.
    Whole,
    /// These bytes, at least one.
    Bytes(Range<u64>),
    /// What is not there.
    Unsatisfiable,
}

/// The part that is wanted of a body of `size` bytes: `Range`, unless `If-Range` names something else than `etag`.
pub(crate) fn part(headers: &HeaderMap, etag: &str, size: u64) -> Part {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(range) = text(header::RANGE) else { return Part::Whole };
    if headers.contains_key(header::IF_RANGE) && text(header::IF_RANGE).map(str::trim) != Some(etag) {
        return Part::Whole;
    }
    parse_range(range, size).unwrap_or(Part::Whole)
}

fn parse_range(text: &str, size: u64) -> Option<Part> {
    let (from, to) = text.strip_prefix("bytes=")?.trim().split_once('-')?;
    let number = |text: &str| -> Option<Option<u64>> {
        match text {
            "" => Some(None),
            text if text.bytes().all(|byte| byte.is_ascii_digit()) => Some(Some(text.parse().unwrap_or(u64::MAX))),
            _ => None,
        }
    };
    let range = match (number(from)?, number(to)?) {
        (None, None) => return None,
        (None, Some(last)) => size.saturating_sub(last)..size,
        (Some(from), None) => from..size,
        (Some(from), Some(to)) if from <= to => from..to.saturating_add(1).min(size),
        (Some(_), Some(_)) => return None,
    };
    Some(if range.is_empty() { Part::Unsatisfiable } else { Part::Bytes(range) })
}

/// The comma-separated values of all headers of that name.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn ranges() {
        let whole = Part::Whole;
        for (text, expected) in [
            ("bytes=0-", Part::Bytes(0..10)),
            ("bytes=3-4", Part::Bytes(3..5)),
            ("bytes=3-99", Part::Bytes(3..10)),
            ("bytes=9-9", Part::Bytes(9..10)),
            ("bytes=-4", Part::Bytes(6..10)),
            ("bytes=-99", Part::Bytes(0..10)),
            ("bytes=0-18446744073709551615", Part::Bytes(0..10)),
            ("bytes=10-", Part::Unsatisfiable),
            ("bytes=99999999999999999999-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=4-3", whole.clone()),
            ("bytes=-", whole.clone()),
            ("bytes=+1-2", whole.clone()),
            ("bytes=0-1,3-4", whole.clone()),
            ("lines=0-1", whole),
        ] {
            assert_eq!(part(&headers(header::RANGE, text), "\"x\"", 10), expected, "{text}");
        }
    }

    #[test]
    fn a_range_of_something_else_is_not_wanted() {
        let mut headers = headers(header::RANGE, "bytes=1-2");
        for (tag, expected) in [("\"x\"", Part::Bytes(1..3)), ("\"y\"", Part::Whole), ("W/\"x\"", Part::Whole)] {
            headers.insert(header::IF_RANGE, tag.parse().unwrap());
            assert_eq!(part(&headers, "\"x\"", 10), expected, "{tag}");
        }
    }

    #[test]
    fn validators_and_encodings() {
        for (text, known) in [("\"x\"", true), ("\"a\", W/\"x\"", true), ("*", true), ("\"a\"", false), ("x", false)] {
            assert_eq!(is_known(&headers(header::IF_NONE_MATCH, text), "\"x\""), known, "{text}");
        }
        for (text, takes) in [
            ("zstd", true),
            ("gzip, ZSTD;q=0.5", true),
            ("zstd;q=0", false),
            ("zstd; q=0.0, gzip", false),
            ("gzip", false),
            ("*", false),
        ] {
            assert_eq!(takes_zstd(&headers(header::ACCEPT_ENCODING, text)), takes, "{text}");
        }
    }
}
