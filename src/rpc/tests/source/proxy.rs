//! A relay in front of a server, which counts bytes and breaks.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    /// Bytes that came from the server.
    bytes: AtomicU64,
    connections: AtomicU64,
    /// Connections are cut when so many bytes came.
    limit: AtomicU64,
    /// Whether there are no more connections after that.
    for_good: AtomicBool,
    broken: AtomicBool,
}

impl Proxy {
    pub fn before(server: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = Arc::new(State {
            bytes: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            for_good: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        });
        let proxy = Proxy { address: listener.local_addr().unwrap(), state: state.clone() };
        let server = server.to_owned();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if state.broken.load(Ordering::SeqCst) && state.for_good.load(Ordering::SeqCst) {
                    continue;
                }
                state.connections.fetch_add(1, Ordering::SeqCst);
                let server = TcpStream::connect(&server).unwrap();
                for stream in [&client, &server] {
                    stream.set_nodelay(true).unwrap();
                }
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || relay(from, to, None));
                let state = state.clone();
                std::thread::spawn(move || relay(server, client, Some(&state)));
            }
        });
        proxy
    }

    pub fn url(&self) -> String {
        format!("grpc+http://{}", self.address)
    }

    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Lets everything through again.
    pub fn heal(&self) {
        self.state.limit.store(u64::MAX, Ordering::SeqCst);
        self.state.for_good.store(false, Ordering::SeqCst);
    }

    /// Breaks all connections after so many bytes: once, or for good.
    pub fn break_after(&self, bytes: u64, for_good: bool) {
        self.state.limit.store(bytes, Ordering::SeqCst);
        self.state.for_good.store(for_good, Ordering::SeqCst);
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, state: Option<&State>) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if let Some(state) = state {
            let bytes = state.bytes.fetch_add(length as u64, Ordering::SeqCst);
            if bytes > state.limit.load(Ordering::SeqCst)
                && (!state.broken.swap(true, Ordering::SeqCst) || state.for_good.load(Ordering::SeqCst))
            {
                break;
            }
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}
