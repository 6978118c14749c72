//! Pages for people: one file of HTML each, without scripts, and nothing in it that could be taken for markup.

mod html;
mod tree;

use nix_compat::store_path::{HASH_PART_LEN, StorePath};
use store::Entry;

use crate::cache::Served;
use crate::limits::{MAX_CLOSURE, MAX_SHOWN_PATHS};
use html::{Text, page, size};

/// Where something that was looked for is.
pub(crate) enum Found {
    /// A valid path.
    At(StorePath),
    /// Not here.
    Nowhere,
}

/// What this cache is, and how to use it.
pub(crate) fn home(served: &Served, host: &str) -> String {
    let url = url(host);
    let keys = served.signer.public_keys();
    let mut settings = format!("extra-substituters = {url}\n");
    let mut trust = String::from(
        "<p>What is served has the signatures it came with, if any: name their keys in <code>trusted-public-keys</code>.",
    );
    if !keys.is_empty() {
        let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
        settings += &format!("extra-trusted-public-keys = {}\n", keys.join(" "));
        trust = String::from("<p>Everything is signed by what stands there.");
    }
    let store_dir = served.store.store_dir().as_str();
    page(
        "A Nix binary cache",
        &format!(
            "<p>This serves the store paths in <code>{}</code> of one machine.\n\
             <form action=\"/find\"><label for=\"path\">A store path, or its hash</label>\
             <div><input id=\"path\" name=\"path\" required autocomplete=\"off\" spellcheck=\"false\" \
             placeholder=\"{0}/…\"><button>Show</button></div></form>\n\
             <h2>Use it</h2>\n<p>In <code>nix.conf</code>:<pre>{}</pre>\n{trust}\n\
             <p>Or for one path: <pre>nix copy --from {} {0}/…</pre>",
            Text(store_dir),
            Text(&settings),
            Text(&url),
        ),
    )
}

/// A path that somebody has typed: whole or below it, its base name, or its hash part.
pub(crate) fn find(served: &Served, text: &str) -> store::Result<Found> {
    let below = text.strip_prefix(served.store.store_dir().as_str()).map_or(text, |rest| rest.trim_start_matches('/'));
    let name = below.split('/').next().unwrap_or_default();
    let hash_part = name.get(..HASH_PART_LEN).and_then(|hash| nix_compat::nixbase32::decode(hash).ok());
    let Some(digest) = hash_part.and_then(|digest| digest.try_into().ok()) else { return Ok(Found::Nowhere) };
    let found = served.entry(&digest)?.map(|entry| entry.info.path.clone());
    let found = found.filter(|path| name.len() == HASH_PART_LEN || path.base_name() == name);
    Ok(found.map_or(Found::Nowhere, Found::At))
}

/// All about a valid path.
pub(crate) fn of(served: &Served, path: &StorePath, host: &str) -> Result<Option<String>, store::view::ViewError> {
    let storage = |error: store::Error| store::view::ViewError::Storage(Box::new(error));
    let Some(entry) = served.entry_of(path).map_err(storage)? else { return Ok(None) };
    let store_dir = served.store.store_dir();
    let mut info = entry.info.clone();
    served.signer.sign(store_dir, &mut info);
    let full = store_dir.display(path);
    let mut body = format!("<p class=\"path\"><code>{}</code>\n<dl>\n", Text(&full));
    let mut fact = |name: &str, value: &str| body += &format!("<div><dt>{name}<dd>{value}</div>\n");
    fact("NAR size", &size(info.nar_size));
    fact("With all it refers to", &closure(served, &entry).map_err(storage)?);
    fact("NAR hash", &format!("<code>{}</code>", info.nar_hash));
    if let Some(deriver) = &info.deriver {
        fact("Built by", &format!("{}, <a href=\"/log{}\">log</a>", link(deriver), href(deriver)));
    }
    if let Some(ca) = &info.ca {
        fact("Content address", &format!("<code>{}</code>", Text(&ca.to_string())));
    }
    let signatures = info.signatures.iter().map(|signature| format!("<code>{}</code>", Text(&signature.to_string())));
    body += "</dl>\n<h2>Fetch it</h2>\n";
    body += &format!("<pre>nix copy --from {} {}</pre>\n", Text(&url(host)), Text(&full));
    let hash = path.hash_part();
    body += &format!(
        "<p>Or by hand: <a href=\"/{hash}.narinfo\">narinfo</a>, <a href=\"/{}\">NAR</a>, \
         <a href=\"/{hash}.ls\">listing</a>.\n<h2>Contents</h2>\n",
        crate::target::nar_url(path, &info.nar_hash)
    );
    tree::write(&served.store, &entry.node, &mut body)?;
    let referrers = served.store.referrers(path).map_err(storage)?;
    list(&mut body, "Refers to", info.references.iter().map(link));
    list(&mut body, "Referred to by", referrers.iter().map(link));
    list(&mut body, "Signatures", signatures);
    Ok(Some(page(path.name(), &body)))
}

/// The size of a path's closure, in words.
fn closure(served: &Served, entry: &Entry) -> store::Result<String> {
    let mut seen = std::collections::HashSet::from([entry.info.path.clone()]);
    let mut todo: Vec<StorePath> = vec![entry.info.path.clone()];
    let (mut bytes, mut count) = (0u64, 0usize);
    while let Some(path) = todo.pop() {
        let Some(entry) = served.store.shared_entry(&path)? else { continue };
        (bytes, count) = (bytes.saturating_add(entry.info.nar_size), count + 1);
        if count > MAX_CLOSURE {
            return Ok(format!("more than {MAX_CLOSURE} paths"));
        }
        todo.extend(entry.info.references.iter().filter(|path| seen.insert((*path).clone())).cloned());
    }
    Ok(format!("{}, in {count} {}", size(bytes), if count == 1 { "path" } else { "paths" }))
}

/// Where a path's page is.
pub(crate) fn href(path: &StorePath) -> String {
    // Of what base names may have, only `?` means anything in a URL.
    format!("/{}", path.base_name().replace('?', "%3f"))
}

fn link(path: &StorePath) -> String {
    format!("<a href=\"{}\">{}</a>", href(path), Text(path.base_name()))
}

/// A list with a heading; nothing where there is nothing to list.
fn list(body: &mut String, heading: &str, items: impl ExactSizeIterator<Item = String>) {
    let count = items.len();
    if count == 0 {
        return;
    }
    *body += &format!("<h2>{heading} <small>{count}</small></h2>\n<ul>\n");
    items.take(MAX_SHOWN_PATHS).for_each(|item| *body += &format!("<li>{item}\n"));
    if count > MAX_SHOWN_PATHS {
        *body += &format!("<li>and {} more\n", count - MAX_SHOWN_PATHS);
    }
    *body += "</ul>\n";
}

/// This cache, as whoever asks has reached it.
fn url(host: &str) -> String {
    let usual = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']');
    let host = if !host.is_empty() && host.bytes().all(usual) { host } else { "THIS-MACHINE" };
    format!("http://{host}")
}
