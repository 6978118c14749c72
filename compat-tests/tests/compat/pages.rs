//! The pages of the binary cache, in a browser.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::time::Duration;

use compat_tests::browser::Browser;
use compat_tests::{Call, Who};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::builds::wait_until;
use crate::http_cache::free_address;
use crate::{castored_setup, derivation};

/// The width of a small telephone's window, in pixels.
const WIDTH: u32 = 400;

/// The first line of the answer to a request for this URL.
fn status(url: &str) -> String {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "GET /{path} HTTP/1.0\r\nHost: {host}\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

fn strings(value: &Value) -> BTreeSet<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// That the page is no wider than its window, that nobody has complained, and that its links lead somewhere. All links.
fn check(browser: &mut Browser) -> BTreeSet<String> {
    let at = browser.evaluate("location.href").unwrap();
    let mut widths = || {
        let found = browser.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]");
        found.unwrap().as_array().unwrap().iter().map(|width| width.as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(widths(), [u64::from(WIDTH); 2], "the width of {at}");
    let text = browser.evaluate("document.querySelector('h1').getClientRects().length").unwrap();
    assert!(text.as_u64().unwrap() > 0, "nothing is drawn on {at}");
    assert_eq!(browser.complaints().unwrap(), Vec::<String>::new(), "{at}");
    let links = strings(&browser.evaluate("[...document.links].map(link => link.href)").unwrap());
    for link in &links {
        assert!(status(link).contains(" 200 "), "the link to {link} on {at}: {}", status(link));
    }
    links
}

#[test]
fn a_browser_finds_everything_about_a_path() {
    let Some(s) = castored_setup("pages") else { return };
    let daemon = s.start();
    let inner = derivation("inner", "echo a line of the log; echo inner > $out", "");
    let long = "a-name-that-is-much-longer-than-a-narrow-window-is-wide-and-has-no-place-to-break-".repeat(2);
    let tree = s.room.tmp("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::write(tree.join("bin/run"), vec![b'x'; 5000]).unwrap();
    symlink("bin/run", tree.join("link")).unwrap();
    fs::write(tree.join(&long), "").unwrap();
    let tree = s.nix(Who::Root, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let more = format!("inner = {inner}; tree = builtins.storePath {tree};");
    let outer = derivation("outer", "echo $inner $tree > $out", &more);
    let outer = s.build(&outer).ok().unwrap().text();
    let text = fs::read_to_string(&outer).unwrap();
    let inner = text.split_whitespace().next().unwrap().to_owned();
    daemon.stop().unwrap();

    let address = free_address().to_string();
    let program = s.subject.copy_into(&s.room).unwrap();
    let mut serving = Call::new(&s.room, Who::Root, &program).args(["serve", "--listen", &address]).spawn().unwrap();
    assert!(wait_until(Duration::from_secs(20), || TcpStream::connect(&address).is_ok()), "it does not answer");
    let mut browser = Browser::start(&s.room.tmp("browser"), WIDTH).unwrap();
    let url = |path: &str| format!("http://{address}/{}", path.trim_start_matches("/nix/store/"));

    // From the cache's own page, by what somebody types.
    assert_eq!(browser.go(&format!("http://{address}/")).unwrap(), 200);
    check(&mut browser);
    let typed =
        format!("document.querySelector('#path').value = '{tree}/bin'; document.querySelector('button').click()");
    assert_eq!(browser.follow(&typed).unwrap(), 200);
    assert_eq!(browser.evaluate("location.href").unwrap(), url(&tree).as_str());
    let links = check(&mut browser);
    let shown = browser.evaluate("document.body.innerText").unwrap();
    let shown = shown.as_str().unwrap();
    let fetch = format!("nix copy --from http://{address} {tree}");
    for part in [&tree, "run 4.9 KiB", "link → bin/run", &long, "NAR size", "With all it refers to", &fetch] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
    // The path and its derivation.
    assert!(shown.contains("Referred to by 2") && links.contains(&url(&outer)), "{shown}\n{links:?}");

    // To who refers to it, and from there to what that refers to.
    let click = |path: &str| format!("[...document.links].find(link => link.href == '{}').click()", url(path));
    assert_eq!(browser.follow(&click(&outer)).unwrap(), 200);
    let links = check(&mut browser);
    let shown = browser.evaluate("document.body.innerText").unwrap();
    let shown = shown.as_str().unwrap();
    assert!(shown.contains("Refers to 2") && shown.contains("in 3 paths") && shown.contains("Built by"), "{shown}");
    assert!([&inner, &tree].iter().all(|path| links.contains(&url(path))), "{links:?}");
    assert_eq!(browser.follow(&click(&inner)).unwrap(), 200);
    check(&mut browser);

    // The measure finds what is too wide, and the console what is wrong.
    let wide = "document.body.insertAdjacentHTML('beforeend', '<p style=\"min-width: 500px\">wide</p>'); \
                document.documentElement.scrollWidth";
    assert!(browser.evaluate(wide).unwrap().as_u64().unwrap() >= 500);
    assert_eq!(browser.go(&url("/nix/store/nothing")).unwrap(), 404);
    assert!(!browser.complaints().unwrap().is_empty(), "a page that is not there is told of");
    drop(browser);
    kill(Pid::from_raw(i32::try_from(serving.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(serving.wait().unwrap().success());
}
