//! Pages.

use nix_compat::nar::NarWriter;

use crate::rig::Rig;

#[test]
fn the_home_page_says_how_to_use_the_cache() {
    let rig = Rig::new();
    let answer = rig.get("/");
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/html; charset=utf-8"));
    assert!(answer.header("content-security-policy").contains("default-src 'none'"));
    let page = answer.text();
    assert!(page.contains("extra-substituters = http://cache.test:80\n"), "{page}");
    let key = rig.signer.public_keys()[0].to_string();
    assert!(page.contains(&format!("extra-trusted-public-keys = {key}\n")), "{page}");
    assert!(!page.contains("<script"));
}

#[test]
fn a_path_has_a_page_and_is_found_however_it_is_named() {
    let rig = Rig::new();
    let inner = rig.add("inner", &[], 10);
    let outer = rig.add("outer?x=1", &[&inner.path], 5000);
    let at = format!("/{}", outer.path.base_name().replace('?', "%3f"));
    let page = rig.get(&at).text();
    for part in [
        &format!("<code>/nix/store/{}</code>", outer.path),
        "run <small>9 bytes, executable</small>",
        "data <small>4.9 KiB</small>",
        "link → bin/run",
        &format!("<a href=\"/{0}\">{0}</a>", inner.path),
        "in 2 paths",
        &format!("nix copy --from http://cache.test:80 /nix/store/{}", outer.path),
        &format!("href=\"{}\"", rig.nar_url(&outer)),
    ] {
        assert!(page.contains(part), "{part}\n{page}");
    }
    assert!(rig.get(&format!("/{}", inner.path)).text().contains(&format!("<a href=\"{at}\">")));
    let hash = outer.path.hash_part();
    for typed in [
        hash.to_owned(),
        outer.path.base_name().replace('?', "%3F"),
        format!("%2Fnix%2Fstore%2F{}%2Fbin%2Frun", outer.path.base_name().replace('?', "%3F")),
        format!("+{hash}+"),
    ] {
        let answer = rig.get(&format!("/find?path={typed}"));
        assert_eq!((answer.status, answer.header("location")), (303, at.as_str()), "{typed}");
    }
    for typed in ["", "x", &format!("{hash}-other"), &"é".repeat(40)] {
        assert_eq!(rig.get(&format!("/find?path={typed}")).status, 404, "{typed}");
    }
}

#[test]
fn names_can_hold_anything_and_large_trees_are_cut_short() {
    let rig = Rig::new();
    let mut nar = NarWriter::new(Vec::new());
    nar.enter_directory().unwrap();
    let mut names: Vec<Vec<u8>> = (0..3000).map(|n| format!("f{n:05}").into_bytes()).collect();
    names.extend([b"<script>alert(1)</script>"[..].to_owned(), b"\"'&".to_vec(), b"\xff\x80".to_vec()]);
    names.extend(["\u{202e}gpj".as_bytes().to_vec(), b"\x1b[31m".to_vec()]);
    names.iter_mut().filter(|name| name.contains(&b'/')).for_each(|name| name.retain(|&byte| byte != b'/'));
    names.sort();
    for name in &names {
        nar.entry(name).unwrap();
        nar.symlink(b"</ul><img src=x>").unwrap();
    }
    nar.leave_directory().unwrap();
    let added = rig.add_nar("odd", &[], nar.finish().unwrap());
    let page = rig.get(&format!("/{}", added.path)).text();
    for bad in ["<script", "<img", "\u{202e}", "\u{1b}"] {
        assert!(!page.contains(bad), "{bad:?}");
    }
    assert!(page.contains("&lt;script&gt;alert(1)&lt;script&gt;") && page.contains("&quot;&#39;&amp;"));
    assert!(page.contains("Only the first 2000 are shown"));
    assert_eq!(page.matches("<ul>").count(), page.matches("</ul>").count());
    // JSON has no way to say it.
    let listing = rig.get(&format!("/{}.ls", added.path.hash_part()));
    assert_eq!(listing.status, 500);
}

#[test]
fn a_host_that_is_none_is_not_repeated() {
    let rig = Rig::new();
    let mut connection = rig.connect();
    use std::io::Write as _;
    connection.stream.write_all(b"GET / HTTP/1.1\r\nHost: <x>\r\n\r\n").unwrap();
    let answer = connection.receive(false).unwrap();
    assert!(answer.status == 400 || answer.text().contains("http://THIS-MACHINE"), "{answer:?}");
}
