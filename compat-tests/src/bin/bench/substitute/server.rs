//! An HTTP/1.1 server for the files of a directory, on the loopback interface, until the program ends. It keeps connections,
//! and costs next to nothing.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use compat_tests::Result;
use compat_tests::error::Context;

/// Serves a directory.
pub(super) fn serve(dir: PathBuf) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").doing("listening on", "the loopback interface")?;
    let address = listener.local_addr().doing("asking for the address of", "a listener")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let dir = dir.clone();
            std::thread::spawn(move || answer(&stream, &dir));
        }
    });
    Ok(address)
}

/// A port that takes connections, and does nothing with them.
pub(super) fn dead() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").doing("listening on", "the loopback interface")?;
    let address = listener.local_addr().doing("asking for the address of", "a listener")?;
    std::thread::spawn(move || {
        // Kept open.
        let mut held = Vec::new();
        held.extend(listener.incoming().flatten());
    });
    Ok(address)
}

/// Answers the requests of a connection until it ends.
fn answer(stream: &TcpStream, dir: &Path) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut input, mut output) = (BufReader::new(stream), stream);
    let mut line = String::new();
    loop {
        line.clear();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or("/").to_owned());
        while line.trim_end() != "" {
            line.clear();
            if input.read_line(&mut line)? == 0 {
                return Ok(());
            }
        }
        match File::open(dir.join(path.trim_start_matches('/'))) {
            Ok(mut file) => {
                let length = file.metadata()?.len();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
                output.write_all(head.as_bytes())?;
                if method != "HEAD" {
                    io::copy(&mut file, &mut output)?;
                }
            }
            Err(_) => output.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?,
        }
    }
}
