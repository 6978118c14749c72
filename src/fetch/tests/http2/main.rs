//! Downloads and uploads in TLS, from and to servers that speak HTTP/2 and HTTP/1.1.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

#[path = "../common/mod.rs"]
mod common;
mod server;

use std::io::{self, Write as _};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{client, get};
use fetch::{Client, Retry, Sink, Upload};
use server::{LARGE, Server, large};
use url::Url;

/// Requests at the same time.
const AT_ONCE: usize = 32;

fn client_of(server: &Server, more: &[(&str, &str)]) -> Client {
    client(&[&[("ssl-cert-file", server.certificate.as_str())], more].concat(), &[])
}

/// Has many ask at once, and then again.
fn ask(client: &Client, server: &Server) {
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                for _ in 0..3 {
                    assert_eq!(get(client, &server.url("/small")).unwrap(), b"hello");
                }
            });
        }
    });
}

#[test]
fn all_requests_to_a_server_share_one_connection() {
    let server = Server::start(&["h2", "http/1.1"]);
    let client = client_of(&server, &[]);
    ask(&client, &server);
    assert_eq!(get(&client, &server.url("/large")).unwrap(), large());
    assert_eq!(server.connections(), 1);
    assert_eq!(server.versions(), [("HTTP/2.0".to_owned(), AT_ONCE * 3 + 1)]);
}

#[test]
fn the_setting_and_the_server_have_to_want_it() {
    for (offered, http2) in [(&["h2", "http/1.1"][..], "false"), (&["http/1.1"], "true"), (&[], "true")] {
        let server = Server::start(offered);
        let client = client_of(&server, &[("http2", http2)]);
        ask(&client, &server);
        // A connection that is being made while another becomes free is one too many.
        assert!((2..=2 * AT_ONCE).contains(&server.connections()), "{}", server.connections());
        assert_eq!(server.versions(), [("HTTP/1.1".to_owned(), AT_ONCE * 3)]);
    }
}

#[test]
fn who_shows_another_certificate_is_asked_once() {
    let (server, other) = (Server::start(&["h2"]), Server::start(&["h2"]));
    let client = client_of(&other, &[("download-attempts", "3")]);
    let error = get(&client, &server.url("/small")).unwrap_err();
    assert!(error.contains("invalid peer certificate"), "{error}");
    assert_eq!(server.connections(), 1);
}

/// Takes nothing until it is told to.
struct Waiting(Receiver<()>, usize);

impl Sink for Waiting {
    fn begin(&mut self, _: u64, _: u64) -> io::Result<()> {
        self.0.recv().map_err(io::Error::other)
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        self.1 += piece.len();
        Ok(())
    }

    fn can_restart(&self) -> bool {
        false
    }
}

#[test]
fn who_takes_nothing_holds_up_no_other() {
    let server = Server::start(&["h2"]);
    let client = client_of(&server, &[]);
    std::thread::scope(|scope| {
        let mut tell = Vec::new();
        for _ in 0..AT_ONCE {
            let (go, wait) = channel();
            let (client, url) = (&client, Url::parse(&server.url("/large")).unwrap());
            let waiting = scope.spawn(move || {
                let mut sink = Waiting(wait, 0);
                client.fetch(&url, &mut sink, Retry::Always).unwrap();
                sink.1
            });
            tell.push((go, waiting));
        }
        // Until all have as much as comes without being asked for.
        let start = Instant::now();
        while server.asked() < AT_ONCE && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(get(&client, &server.url("/large")).unwrap(), large());
        for (go, waiting) in tell {
            go.send(()).unwrap();
            assert_eq!(waiting.join().unwrap(), LARGE);
        }
    });
    assert_eq!(server.connections(), 1);
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let server = Server::start(&["h2"]);
    let client = client_of(&server, &[("stalled-download-timeout", "1")]);
    let start = Instant::now();
    for path in ["/silent", "/half"] {
        let error = get(&client, &server.url(path)).unwrap_err();
        assert!(error.ends_with("nothing came or went for 1 s"), "{path}: {error}");
    }
    assert!(start.elapsed() >= Duration::from_secs(2));
}

#[test]
fn files_arrive_whole_however_slowly_they_are_taken() {
    let server = Server::start(&["h2"]);
    // Less than what the server needs for all of it, which is more than lies in buffers on the way.
    let client = client_of(&server, &[("stalled-download-timeout", "2")]);
    let contents = large().repeat(3);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&contents).unwrap();
    for path in ["/put", "/put-slowly"] {
        let start = Instant::now();
        let url = Url::parse(&server.url(path)).unwrap();
        client.put(&url, &Upload::File(&file), "text/plain").unwrap();
        assert!(server.taken() == Some((contents.len() as u64, contents.clone())), "{path}");
        assert!(path == "/put" || start.elapsed() > Duration::from_secs(2), "{:?}", start.elapsed());
    }
    let url = Url::parse(&server.url("/put")).unwrap();
    client.put(&url, &Upload::Text("short"), "text/plain").unwrap();
    assert_eq!(server.taken(), Some((5, b"short".to_vec())));
    // Nobody takes it.
    let url = Url::parse(&server.url("/silent")).unwrap();
    let error = client.put(&url, &Upload::File(&file), "text/plain").unwrap_err().to_string();
    assert!(error.ends_with("nothing came or went for 2 s"), "{error}");
    // Nor this, which is said before all of it is sent.
    let url = Url::parse(&server.url("/refuse")).unwrap();
    let error = client.put(&url, &Upload::File(&file), "text/plain").unwrap_err().to_string();
    assert!(error.contains("HTTP error 403"), "{error}");
}
