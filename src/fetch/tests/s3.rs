//! Signed requests, for a server that computes the signature itself, as the documentation of AWS Signature Version 4 has it.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;

use data_encoding::HEXLOWER;
use fetch::{Client, Download, DownloadError, DownloadOptions, Retry, S3Bucket, Sink, Trouble};
use nix_compat::conf::Settings;
use sha2::{Digest, Sha256};

const SECRET: &str = "wJalrXUtnFEMI/K7MDENG";
/// Bytes of every object; the first answer breaks off in the middle.
const OBJECT: &[u8] = b"0123456789";

struct Memory(Vec<u8>);

impl Sink for Memory {
    fn begin(&mut self, offset: u64, _expected: u64) -> io::Result<()> {
        assert_eq!(offset, self.0.len() as u64);
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        self.0.extend_from_slice(piece);
        Ok(())
    }

    fn can_restart(&self) -> bool {
        false
    }
}

/// RFC 2104.
fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut block = [0; 64];
    block[..key.len()].copy_from_slice(key);
    let padded = |with: u8| block.map(|byte| byte ^ with);
    let inner = Sha256::new().chain_update(padded(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize().to_vec()
}

/// Whether a request's query has the signature that the secret gives.
fn is_signed(target: &str, host: &str) -> bool {
    let Some((path, query)) = target.split_once('?') else { return false };
    let value = |name: &str| {
        query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default().to_owned()
    };
    let mut pairs: Vec<&str> = query.split('&').filter(|pair| !pair.starts_with("X-Amz-Signature=")).collect();
    pairs.sort_unstable();
    let canonical = format!("GET\n{path}\n{}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD", pairs.join("&"));
    let (date, credential) = (value("X-Amz-Date"), value("X-Amz-Credential"));
    let scope = credential.replace("%2F", "/");
    let scope = scope.split_once('/').unwrap().1;
    let hash = HEXLOWER.encode(&Sha256::digest(canonical));
    let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{hash}");
    let key = scope.split('/').fold(format!("AWS4{SECRET}").into_bytes(), |key, part| hmac(&key, part));
    scope.ends_with("/eu-west-1/s3/aws4_request") && HEXLOWER.encode(&hmac(&key, &text)) == value("X-Amz-Signature")
}

/// Gives the object to those who sign, half of it at first. Tells what it was asked for.
fn server() -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let all = asked.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (mut head, mut byte) = (Vec::new(), [0]);
            while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).unwrap();
            let target = head.split(' ').nth(1).unwrap();
            all.lock().unwrap().push(target.to_owned());
            let range = head.lines().find_map(|line| line.strip_prefix("range: bytes=")?.strip_suffix('-'));
            let from: usize = range.map_or(0, |from| from.parse().unwrap());
            let head = if !is_signed(target, &address.to_string()) {
                "403 Forbidden\r\nContent-Length: 0\r\n".to_owned()
            } else if from == 0 {
                "200 OK\r\nAccept-Ranges: bytes\r\nContent-Length: 10\r\n".to_owned()
            } else {
                let left = OBJECT.len() - from;
                format!("206 Partial Content\r\nContent-Range: bytes {from}-9/10\r\nContent-Length: {left}\r\n")
            };
            let body = match head.as_bytes()[0] {
                b'4' => &[],
                _ if from == 0 => &OBJECT[..5],
                _ => &OBJECT[from..],
            };
            let head = format!("HTTP/1.1 {head}Connection: close\r\n\r\n");
            let _ = stream.write_all(&[head.as_bytes(), body].concat());
        }
    });
    (address, asked)
}

/// Fetches an object with this secret.
fn fetch(address: SocketAddr, object: &str, secret: Option<&str>) -> Result<Vec<u8>, DownloadError> {
    let endpoint = format!("http://{address}");
    let bucket = S3Bucket::parse("cache/some dir", &|name| match name {
        "endpoint" => Some(endpoint.clone()),
        "region" => Some("eu-west-1".to_owned()),
        _ => None,
    });
    let bucket = bucket.unwrap();
    let key = bucket.with_key(&|name| match name {
        "AWS_ACCESS_KEY_ID" => Some("AKIDEXAMPLE".to_owned()),
        "AWS_SECRET_ACCESS_KEY" => secret.map(str::to_owned),
        "AWS_SESSION_TOKEN" => Some("a token/with+signs=".to_owned()),
        _ => None,
    });
    let download = Download::gather(&DownloadOptions::new(&Settings::default()), &|_| None);
    let client = Client::new(Arc::new(download)).signing(key);
    let mut memory = Memory(Vec::new());
    client.fetch(&bucket.base().join(object).unwrap(), &mut memory, Retry::Always)?;
    Ok(memory.0)
}

#[test]
fn a_server_that_verifies_signatures_takes_ours() {
    let (address, asked) = server();
    // Broken off after half of it: what follows is asked for with a signature, too.
    for object in ["./nix-cache-info", "./realisations/sha256:0!out+x.doi"] {
        assert_eq!(fetch(address, object, Some(SECRET)).unwrap(), OBJECT, "{object}");
    }
    assert_eq!(asked.lock().unwrap().len(), 4);
    assert!(asked.lock().unwrap()[0].starts_with("/cache/some%20dir/nix-cache-info?"), "{asked:?}");
}

#[test]
fn another_key_or_none_gets_nothing_and_no_signature_is_told() {
    let (address, _) = server();
    for secret in [Some("another"), None] {
        let error = fetch(address, "./nix-cache-info", secret).unwrap_err();
        assert!(matches!(error.cause, Trouble::Status { status: 403, .. }), "{error}");
        assert!(!error.to_string().contains("X-Amz"), "{error}");
    }
}
