//! Sources behind servers that others wrote: nginx with a proxy before it that breaks off and alters, and OpenSSH.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use compat_tests::checks::expect_contains;
use compat_tests::room::USER;
use compat_tests::servers::Servers;
use compat_tests::subject::{SOCKET, default_conf};
use compat_tests::{Daemon, Who};

use crate::castored_setup;
use crate::substitute::{Published, Stock};

/// What a proxy does with the answer for a file with a NAR, the first and the second time and so on.
type Fault = fn(number: usize, answer: &mut Vec<u8>);

/// A proxy before `server`, with faults.
fn proxy(server: SocketAddr, fault: Fault) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let nars: &'static AtomicUsize = Box::leak(Box::default());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                    head.push(byte[0]);
                }
                let head = String::from_utf8_lossy(&head).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
                let Ok(mut there) = TcpStream::connect(server) else { return };
                let mut answer = Vec::new();
                if there.write_all(head.as_bytes()).and_then(|()| there.read_to_end(&mut answer)).is_err() {
                    return;
                }
                if head.split(' ').nth(1).is_some_and(|path| path.contains("/nar/")) {
                    fault(nars.fetch_add(1, Ordering::SeqCst), &mut answer);
                }
                // A client that has had enough is gone.
                let _ = stream.write_all(&answer);
            });
        }
    });
    address
}

fn body(answer: &[u8]) -> usize {
    answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4
}

#[test]
fn nginx_is_a_cache() {
    let Some(s) = castored_setup("servers-nginx") else { return };
    let servers = Servers::fetch().unwrap();
    let daemon = s.start();
    let p = Published::new(&s, "nginx", "");
    let nginx = servers.nginx(&s.room, &p.dir).unwrap();
    let realise = |address: SocketAddr| {
        let call = s.nix(Who::Root, "nix-store").args(["-r", &p.outer, "--option", "substituters"]);
        call.arg(format!("http://{address}")).args(["--option", "trusted-public-keys", &p.key])
    };
    realise(nginx.address).ok().unwrap();
    p.check();
    p.forget(&s);
    // Breaks off in the middle of a file: it goes on from there, which nginx gives in parts.
    let breaks: Fault = |number, answer| {
        let body = body(answer);
        match number {
            0 => answer.truncate(body + 50),
            _ => assert!(answer.starts_with(b"HTTP/1.1 20")),
        }
    };
    realise(proxy(nginx.address, breaks)).ok().unwrap();
    p.check();
    p.forget(&s);
    // What was altered never becomes valid.
    let alters: Fault = |_, answer| {
        let body = body(answer);
        answer[body + 50] ^= 1;
    };
    let said = realise(proxy(nginx.address, alters)).fails().unwrap();
    expect_contains(&said.all(), "cannot fetch").unwrap();
    assert!(!Path::new(&p.outer).exists() && !Path::new(&p.inner).exists());
    drop(nginx);
    daemon.stop().unwrap();
}

#[test]
fn nginx_is_asked_over_one_connection_of_http2() {
    let Some(s) = castored_setup("servers-http2") else { return };
    let servers = Servers::fetch().unwrap();
    let daemon = s.start();
    let p = Published::new(&s, "http2", "");
    let nginx = servers.nginx_with_tls(&s.room, &p.dir).unwrap();
    let url = format!("https://{}", nginx.server.address);
    let realise = |http2: &str| {
        let call = s.nix(Who::Root, "nix-store").args(["-r", &p.outer, "--option", "substituters", &url]);
        let call = call.args(["--option", "trusted-public-keys", &p.key, "--option", "http2", http2]);
        call.args(["--option", "ssl-cert-file"]).arg(&nginx.certificate)
    };
    let asked = || -> Vec<(String, String)> {
        let text = std::fs::read_to_string(&nginx.requests).unwrap();
        let words = |line: &str| {
            let mut words = line.split(' ').map(str::to_owned);
            (words.next().unwrap(), words.next().unwrap())
        };
        text.lines().map(words).collect()
    };
    realise("true").ok().unwrap();
    p.check();
    p.forget(&s);
    let first = asked();
    // The cache itself, two narinfos, two NARs.
    assert!(first.len() >= 5, "{first:?}");
    assert!(
        first.iter().all(|(connection, protocol)| *connection == first[0].0 && protocol == "HTTP/2.0"),
        "{first:?}"
    );
    realise("false").ok().unwrap();
    p.check();
    let all = asked();
    assert!(
        all.len() > first.len() && all[first.len()..].iter().all(|(_, protocol)| protocol == "HTTP/1.1"),
        "{all:?}"
    );
    drop(nginx);
    daemon.stop().unwrap();
}

#[test]
fn openssh_leads_to_stock_stores() {
    let Some(s) = castored_setup("servers-ssh") else { return };
    let servers = Servers::fetch().unwrap();
    let mut command = s.subject.command(&s.room, &default_conf()).unwrap();
    command.env("PATH", format!("{}:/usr/bin:/bin", servers.bin.display()));
    let daemon = Daemon::spawn(command, &s.room, Path::new(SOCKET)).unwrap();
    let p = Published::new(&s, "ssh", "");
    let stock = Stock::new(&s, "2.34.8", &p);
    let chown = std::process::Command::new("chown").args(["-R", USER.name]).arg(&stock.dir).status().unwrap();
    assert!(chown.success());
    let ssh = servers.sshd(&s.room, USER).unwrap();
    for (scheme, program) in [("ssh-ng", "nix-daemon"), ("ssh", "nix-store")] {
        let place = format!("{scheme}://{}@{}", USER.name, ssh.server.address);
        let url = |host_key: &str| {
            format!(
                "{place}?remote-program={}&ssh-key={}&base64-ssh-public-host-key={host_key}",
                stock.script(program, "").display(),
                ssh.key.display()
            )
        };
        let realise = |host_key: &str| {
            let call = s.nix(Who::Root, "nix-store").args(["-r", &p.outer, "--option", "substituters"]);
            call.arg(url(host_key)).args(["--option", "trusted-public-keys", &p.key])
        };
        let said = realise(&ssh.host_key).ok().unwrap_or_else(|error| panic!("{scheme}: {error}\n{}", daemon.log()));
        expect_contains(&said.all(), &format!("copying path '{}' from '{place}'", p.outer)).unwrap();
        p.check();
        p.forget(&s);
        // A server with another key is not the one that was meant.
        let other = "c3NoLWVkMjU1MTkgQUFBQUMzTnphQzFsWkRJMU5URTVBQUFBSU5zbGNwTDRyYjFBY0VOb0dZSUw3VXBPRk1KS0x6ak1hdnFhaFdDRnNjT0Q=";
        realise(other).fails().unwrap();
        assert!(!Path::new(&p.outer).exists());
    }
    drop(ssh);
    daemon.stop().unwrap();
}
