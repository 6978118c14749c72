//! Which proxy a request goes through, by the variables that curl knows.

use url::Url;

/// The proxy for a URL, if there is one.
pub(crate) fn proxy_for<'a>(url: &Url, variables: &'a [(String, String)]) -> Option<&'a str> {
    let find = |names: &[&str]| {
        names.iter().find_map(|name| variables.iter().find(|(known, _)| known == name)).map(|(_, value)| value.as_str())
    };
    if find(&["no_proxy", "NO_PROXY"]).is_some_and(|list| is_excepted(url, list)) {
        return None;
    }
    let own: &[&str] = if url.scheme() == "https" { &["https_proxy", "HTTPS_PROXY"] } else { &["http_proxy"] };
    find(own).or_else(|| find(&["all_proxy", "ALL_PROXY"])).filter(|proxy| !proxy.is_empty())
}

/// Whether a list of hosts and domains, separated by commas or blanks, has the host of a URL in it.
fn is_excepted(url: &Url, list: &str) -> bool {
    let Some(host) = url.host_str() else { return false };
    let host = host.trim_matches(['[', ']']).trim_end_matches('.').to_ascii_lowercase();
    list.split([',', ' ']).map(|entry| entry.trim().trim_matches(['.', '[', ']']).to_ascii_lowercase()).any(|entry| {
        let below = || host.strip_suffix(entry.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        entry == "*" || (!entry.is_empty() && below())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_variable() {
        let all = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let [http, https] = ["http://a.example.org/x", "https://a.example.org/x"].map(|url| Url::parse(url).unwrap());
        let both = all(&[("http_proxy", "http://one"), ("https_proxy", "http://two"), ("all_proxy", "http://three")]);
        assert_eq!(proxy_for(&http, &both), Some("http://one"));
        assert_eq!(proxy_for(&https, &both), Some("http://two"));
        assert_eq!(proxy_for(&http, &all(&[("all_proxy", "http://three")])), Some("http://three"));
        assert_eq!(proxy_for(&https, &all(&[("http_proxy", "http://one")])), None);
        for (list, excepted) in [
            ("*", true),
            ("example.org", true),
            ("other, .EXAMPLE.org", true),
            ("a.example.org b", true),
            ("ample.org", false),
            ("", false),
            (",", false),
            ("b.a.example.org", false),
        ] {
            let mut variables = both.clone();
            variables.push(("no_proxy".to_owned(), list.to_owned()));
            assert_eq!(proxy_for(&http, &variables).is_none(), excepted, "{list}");
        }
    }
}
