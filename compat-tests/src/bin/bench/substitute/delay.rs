//! A far server: what goes to it and what comes back takes a while, and a connection costs a round trip before anything can be
//! said. Bytes are passed on as they are, so connections live as long as both ends want.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::Result;
use compat_tests::error::Context;

/// Bytes passed on at once.
const PIECE: usize = 64 * 1024;
/// Pieces that may be under way in one direction of a connection.
const PIECES: usize = 256;

/// The address at which the server at `to` is so far away.
pub(super) fn far(to: SocketAddr, each_way: Duration) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").doing("listening on", "the loopback interface")?;
    let address = listener.local_addr().doing("asking for the address of", "a listener")?;
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            thread::spawn(move || connect(&near, to, each_way));
        }
    });
    Ok(address)
}

fn connect(near: &TcpStream, to: SocketAddr, each_way: Duration) -> io::Result<()> {
    let there = TcpStream::connect(to)?;
    for stream in [near, &there] {
        stream.set_nodelay(true)?;
    }
    // The kernel has connected the client already: what a handshake takes is added to what is said first.
    let begun = Instant::now() + 2 * each_way;
    let (near_in, there_out) = (near.try_clone()?, there.try_clone()?);
    thread::spawn(move || pass(near_in, there_out, each_way, begun));
    pass(there, near.try_clone()?, each_way, begun);
    Ok(())
}

/// Passes on what comes, in one direction, so much later.
fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration, not_before: Instant) {
    let (send, receive) = mpsc::sync_channel::<(Instant, Vec<u8>)>(PIECES);
    thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let due = Instant::now().max(not_before) + delay;
            if send.send((due, buffer[..length].to_vec())).is_err() {
                break;
            }
        }
    });
    for (due, piece) in receive {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
