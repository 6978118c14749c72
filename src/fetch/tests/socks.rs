//! Downloads through a SOCKS proxy.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod common;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use common::fetch;

/// Answers every connection with the same words.
fn server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello").unwrap();
        }
    });
    address
}

/// A proxy for SOCKS 5 (RFC 1928, RFC 1929) that connects everybody to `target`, wherever they want to go, and tells
/// where that was, and who they said they are.
fn proxy(target: SocketAddr, reply: u8) -> (SocketAddr, Receiver<(String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = channel();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let tell = tell.clone();
            // A client may go away at any moment.
            thread::spawn(move || serve(stream, target, reply, &tell).ok());
        }
    });
    (address, told)
}

fn serve(mut stream: TcpStream, target: SocketAddr, reply: u8, tell: &Sender<(String, String)>) -> io::Result<()> {
    let bytes = |stream: &mut TcpStream, length: usize| {
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).map(|()| bytes)
    };
    let text = |stream: &mut TcpStream| {
        let length = bytes(stream, 1)?[0].into();
        bytes(stream, length).map(|bytes| String::from_utf8(bytes).unwrap())
    };
    let greeting = bytes(&mut stream, 2)?;
    let methods = bytes(&mut stream, greeting[1].into())?;
    let by_password = methods.contains(&2);
    stream.write_all(&[5, if by_password { 2 } else { 0 }])?;
    let mut user = String::new();
    if by_password {
        bytes(&mut stream, 1)?;
        user = format!("{}:{}", text(&mut stream)?, text(&mut stream)?);
        stream.write_all(&[1, 0])?;
    }
    let request = bytes(&mut stream, 4)?;
    let host = match request[3] {
        1 => bytes(&mut stream, 4)?.iter().map(u8::to_string).collect::<Vec<_>>().join("."),
        3 => text(&mut stream)?,
        other => panic!("address type {other}"),
    };
    let port = bytes(&mut stream, 2)?;
    tell.send((format!("{host}:{}", u16::from_be_bytes([port[0], port[1]])), user)).unwrap();
    stream.write_all(&[5, reply, 0, 1, 0, 0, 0, 0, 0, 0])?;
    if reply != 0 {
        return Ok(());
    }
    let mut there = TcpStream::connect(target)?;
    let (mut back, mut from) = (stream.try_clone()?, there.try_clone()?);
    thread::spawn(move || io::copy(&mut from, &mut back).and_then(|_| back.shutdown(std::net::Shutdown::Both)).ok());
    io::copy(&mut stream, &mut there).map(drop)
}

#[test]
fn a_proxy_is_asked_for_the_host() {
    let server = server();
    let (proxy, told) = proxy(server, 0);
    // The proxy looks the name up, which nobody else could.
    let by_name = format!("socks5h://{proxy}");
    assert_eq!(fetch("http://far.invalid:81/x", &[("ALL_PROXY", &by_name)]).unwrap(), b"hello");
    assert_eq!(told.recv().unwrap(), ("far.invalid:81".to_owned(), String::new()));

    // Or it gets an address.
    let by_address = format!("socks5://{proxy}");
    assert_eq!(fetch(&format!("http://{server}/x"), &[("http_proxy", &by_address)]).unwrap(), b"hello");
    assert_eq!(told.recv().unwrap(), (server.to_string(), String::new()));
    assert!(fetch("http://far.invalid/x", &[("all_proxy", &by_address)]).is_err());

    let by_password = format!("socks5h://me:se%20cret@{proxy}");
    assert_eq!(fetch("http://far.invalid/x", &[("all_proxy", &by_password)]).unwrap(), b"hello");
    assert_eq!(told.recv().unwrap(), ("far.invalid:80".to_owned(), "me:se cret".to_owned()));

    // Who is excepted is asked without it.
    let excepted = [("all_proxy", by_address.as_str()), ("no_proxy", "127.0.0.1")];
    assert_eq!(fetch(&format!("http://{server}/x"), &excepted).unwrap(), b"hello");
    assert!(told.try_recv().is_err());
}

#[test]
fn a_proxy_that_refuses_is_an_error() {
    let (proxy, _told) = proxy(server(), 2);
    let error = fetch("http://far.invalid/x", &[("ALL_PROXY", &format!("socks5h://{proxy}"))]).unwrap_err();
    let told = "unable to download 'http://far.invalid/x': client error (Connect): error connecting to socks proxy: SOCKS error: \
                connection not allowed";
    assert_eq!(error, told);
}
