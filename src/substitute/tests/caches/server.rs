//! An HTTP server on the loopback interface that serves a directory, unless it is told to answer something else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// What to answer instead of the file: all of the response's bytes, for a path and the head of the request. With
/// nothing to answer the connection is kept and nothing happens.
type Fault = dyn Fn(&str, &str) -> Option<Vec<u8>> + Send + Sync;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self::with(dir, |_, _| None)
    }

    pub(crate) fn with(dir: PathBuf, fault: impl Fn(&str, &str) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        Self::start(dir, false, fault)
    }

    /// The same, but that nothing happens after what is answered instead of a file.
    pub(crate) fn stalling(
        dir: PathBuf,
        fault: impl Fn(&str, &str) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        Self::start(dir, true, fault)
    }

    fn start(
        dir: PathBuf,
        stalls: bool,
        fault: impl Fn(&str, &str) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        let fault: Arc<Fault> = Arc::new(fault);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let all = requests.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (dir, fault, all) = (dir.clone(), fault.clone(), all.clone());
                std::thread::spawn(move || {
                    loop {
                        let mut head = Vec::new();
                        let mut byte = [0];
                        while !head.ends_with(b"\r\n\r\n") {
                            match stream.read(&mut byte) {
                                Ok(1) => head.push(byte[0]),
                                _ => return,
                            }
                        }
                        let head = String::from_utf8(head).unwrap();
                        let path = head.split(' ').nth(1).unwrap().to_owned();
                        all.lock().unwrap().push(path.clone());
                        let wrong = fault(&path, &head);
                        let stalls = stalls && wrong.is_some();
                        let answer = wrong.unwrap_or_else(|| file(&dir, &path));
                        if stream.write_all(&answer).is_err() {
                            return;
                        }
                        if answer.is_empty() || stalls {
                            let _ = stream.read(&mut byte);
                        }
                        if String::from_utf8_lossy(&answer[..answer.len().min(200)]).contains("Connection: close") {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, requests }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How often something was asked for whose path ends like this.
    pub(crate) fn count(&self, end: &str) -> usize {
        self.requests.lock().unwrap().iter().filter(|path| path.ends_with(end)).count()
    }
}

fn file(dir: &std::path::Path, path: &str) -> Vec<u8> {
    match std::fs::read(dir.join(path.trim_start_matches('/'))) {
        Ok(body) => response("200 OK", "", &body),
        Err(_) => response("404 Not Found", "", b"nothing here"),
    }
}

pub(crate) fn response(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}
