//! Downloads through a plain HTTP proxy, which is asked for whole URLs (RFC 9112, 3.2.2) as squid and others expect it.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use common::fetch;

/// A proxy that knows what every server would say, and tells the heads of the requests.
fn proxy() -> (SocketAddr, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            let request = String::from_utf8(request).unwrap();
            // As squid does it for ports that are not those of TLS.
            let answer = if request.starts_with("CONNECT") {
                "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            } else {
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
            };
            tell.send(request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    (address, told)
}

#[test]
fn a_proxy_is_asked_for_the_whole_url() {
    let (proxy, told) = proxy();
    // Without a scheme it is one for HTTP, as curl has it.
    for text in [format!("http://{proxy}"), proxy.to_string(), format!("http://me:se%20cret@{proxy}/")] {
        assert_eq!(fetch("http://far.invalid:81/x?y", &[("http_proxy", &text)]).unwrap(), b"hello");
        let head = told.recv().unwrap().to_ascii_lowercase();
        assert!(head.starts_with("get http://far.invalid:81/x?y http/1.1\r\n"), "{head}");
        assert!(head.contains("\r\nhost: far.invalid:81\r\n"), "{head}");
        let password = data_encoding::BASE64.encode(b"me:se cret").to_ascii_lowercase();
        let wanted = text.contains('@').then(|| format!("\r\nproxy-authorization: basic {password}\r\n"));
        assert_eq!(head.contains("proxy-authorization"), wanted.is_some(), "{head}");
        assert!(wanted.is_none_or(|wanted| head.contains(&wanted)), "{head}");
    }
}
