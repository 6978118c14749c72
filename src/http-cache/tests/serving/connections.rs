//! What clients can hold, and for how long.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http_cache::Limits;

use crate::rig::Rig;

#[test]
fn a_connection_is_kept_and_requests_may_be_sent_ahead() {
    let rig = Rig::new();
    let added = rig.add("here", &[], 2 << 20);
    let url = rig.nar_url(&added);
    let mut connection = rig.connect();
    for path in ["/nix-cache-info", &url, "/x", "/nix-cache-info"] {
        connection.send("GET", path, &[]);
    }
    let statuses: Vec<u16> = (0..4).map(|_| connection.receive(false).unwrap().status).collect();
    assert_eq!(statuses, [200, 200, 404, 200]);
}

#[test]
fn who_says_nothing_is_cut_off() {
    let rig = Rig::with(Limits { request_time: Duration::from_millis(300), ..Limits::default() });
    // Before the first request, within one, and after one.
    assert!(rig.connect().is_closed());
    let mut within = rig.connect();
    within.stream.write_all(b"GET / HTTP/1.1\r\nHost:").unwrap();
    assert!(within.is_closed());
    let mut after = rig.connect();
    assert_eq!(after.ask("GET", "/nix-cache-info", &[]).status, 200);
    assert!(after.is_closed());
}

#[test]
fn who_does_not_read_is_cut_off_and_others_go_on() {
    let limits = Limits { write_time: Duration::from_millis(500), max_renderings: 1, ..Limits::default() };
    let rig = Rig::with(limits);
    // More than sockets and buffers hold.
    let added = rig.add("large", &[], 64 << 20);
    let url = rig.nar_url(&added);
    let mut deaf = rig.connect();
    deaf.send("GET", &url, &[]);
    deaf.stream.read_exact(&mut [0; 100]).unwrap();
    // There is one place, and it comes free.
    let began = Instant::now();
    let heard = rig.get(&url);
    assert!(heard.whole && heard.body == added.nar);
    assert!(began.elapsed() >= Duration::from_millis(100), "the place was free at once");
    assert!(deaf.is_closed());
}

#[test]
fn who_reads_next_to_nothing_is_cut_off_as_well() {
    let limits = Limits { write_time: Duration::from_secs(1), max_renderings: 1, ..Limits::default() };
    let rig = Rig::with(limits);
    let added = rig.add("large", &[], 64 << 20);
    let url = rig.nar_url(&added);
    let mut trickle = rig.connect();
    trickle.send("GET", &url, &[]);
    trickle.stream.read_exact(&mut [0; 100]).unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let end = end.clone();
        move || {
            // A thousand bytes each 50 ms: within the time of a write 20,000, and never nothing.
            while !end.load(Ordering::SeqCst) && trickle.stream.read(&mut [0; 1000]).is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
            trickle
        }
    });
    assert!(rig.get(&url).whole);
    end.store(true, Ordering::SeqCst);
    assert!(reader.join().unwrap().is_cut_before(added.nar.len()));
}

#[test]
fn who_reads_slowly_is_not_cut_off() {
    let rig = Rig::with(Limits { write_time: Duration::from_millis(1500), ..Limits::default() });
    let added = rig.add("large", &[], 24 << 20);
    let url = rig.nar_url(&added);
    let mut slow = rig.connect();
    slow.send("GET", &url, &[]);
    let began = Instant::now();
    let (mut got, mut piece) = (0, vec![0; 1 << 20]);
    while got < added.nar.len() {
        let n = slow.stream.read(&mut piece).unwrap();
        assert!(n > 0, "cut off after {got} bytes");
        got += n;
        std::thread::sleep(Duration::from_millis(80));
    }
    assert!(began.elapsed() > Duration::from_millis(1500), "it was not slow");
}

#[test]
fn more_connections_than_there_is_room_for_wait() {
    let rig = Rig::with(Limits { max_connections: 2, ..Limits::default() });
    let mut open = [rig.connect(), rig.connect()];
    open.iter_mut().for_each(|connection| assert_eq!(connection.ask("GET", "/nix-cache-info", &[]).status, 200));
    let mut third = rig.connect();
    third.send("GET", "/nix-cache-info", &[]);
    third.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(third.stream.read(&mut [0]).is_err());
    third.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    drop(open);
    assert_eq!(third.receive(false).unwrap().status, 200);
}

#[test]
fn what_is_too_long_is_refused() {
    let rig = Rig::new();
    let refused = |path: &str, headers: &[&str]| {
        let mut connection = rig.connect();
        connection.send("GET", path, headers);
        // What was sent beyond the limit and not read takes the answer with it, as TCP has it.
        connection.receive(false).is_none_or(|answer| answer.status == 431)
    };
    assert!(refused("/", &[&format!("X: {}", "x".repeat(100 << 10))]));
    assert!(refused("/", &["X: y"; 100]));
    assert!(refused(&format!("/{}", "x".repeat(60 << 10)), &[]));
    assert_eq!(rig.get(&format!("/{}", "x".repeat(10 << 10))).status, 404);
    assert_eq!(rig.get_with("/", &["X: y"; 50]).status, 200);
}

#[test]
fn the_end_waits_for_no_one_for_long() {
    let mut rig = Rig::new();
    let added = rig.add("large", &[], 64 << 20);
    let url = rig.nar_url(&added);
    let mut idle = rig.connect();
    assert_eq!(idle.ask("GET", "/nix-cache-info", &[]).status, 200);
    let mut busy = rig.connect();
    busy.send("GET", &url, &[]);
    busy.stream.read_exact(&mut [0; 100]).unwrap();
    let began = Instant::now();
    rig.stop();
    assert!(idle.is_closed());
    std::thread::sleep(Duration::from_millis(1500));
    let cut = busy.is_cut_before(added.nar.len());
    assert!(cut, "the whole NAR came");
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(std::net::TcpStream::connect(rig.address).is_err());
}
