//! How each row is measured.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::load::{self, Connection, Offer};
use compat_tests::nar::Tree;
use compat_tests::wire::{Op, Request};
use compat_tests::{Result, memory};

use super::known::{Known, PATHS};
use super::wrong;
use crate::sides::Side;

/// Connections made, one after the other.
const CONNECTS: usize = 150;
/// Requests of a measurement that asks one at a time.
const SINGLE: usize = 6_000;
/// Requests on their way at once.
const IN_FLIGHT: usize = 64;
/// Clients at once.
const CLIENTS: usize = 4;
/// Paths added one after the other.
const ADDED: usize = 1_000;
/// Connections whose memory is measured.
const IDLE: usize = 500;
/// For everything to come to rest before memory is looked at.
const REST: Duration = Duration::from_millis(300);
/// Bytes received at a time.
const BUFFER: usize = 256 * 1024;

fn per_second(count: usize, started: Instant) -> f64 {
    count as f64 / started.elapsed().as_secs_f64()
}

/// A whole visit: connect, handshake, one question, close.
pub(super) fn connect(side: &Side, known: &Known, _: usize) -> Result<f64> {
    let started = Instant::now();
    for path in known.paths.iter().take(CONNECTS) {
        if !side.connect()?.is_valid(path)? {
            return Err(wrong("a known path is not valid"));
        }
    }
    Ok(per_second(CONNECTS, started))
}

/// Asks, waits for the whole answer, asks the next.
fn ask_each(side: &Side, queries: &[Vec<u8>], lengths: &[usize]) -> Result<()> {
    let connection = side.connect()?;
    converse(connection, queries, lengths, 1)
}

/// Sends the requests, so many on their way at once, and counts the replies by their lengths.
fn converse(mut connection: Connection, requests: &[Vec<u8>], lengths: &[usize], window: usize) -> Result<()> {
    let stream: &mut UnixStream = connection.output();
    let mut buffer = vec![0; BUFFER];
    let mut out: Vec<u8> = requests[..window.min(requests.len())].concat();
    let (mut sent, mut done, mut received) = (window.min(requests.len()), 0, 0);
    while done < requests.len() {
        if !out.is_empty() {
            stream.write_all(&out).doing("sending to", "the daemon")?;
            out.clear();
        }
        received += match stream.read(&mut buffer).doing("reading from", "the daemon")? {
            0 => return Err(wrong("the daemon closed the connection")),
            n => n,
        };
        while done < lengths.len() && received >= lengths[done] {
            received -= lengths[done];
            done += 1;
            if sent < requests.len() {
                out.extend_from_slice(&requests[sent]);
                sent += 1;
            }
        }
    }
    // Lengths were all that was looked at: what comes now tells whether they were those of the replies.
    if received == 0 && !connection.is_valid(&load::made_up_path("nobody", "has-this"))? {
        Ok(())
    } else {
        Err(wrong("the replies are not as long as they were"))
    }
}

/// QueryPathInfo, one at a time.
pub(super) fn one_at_a_time(side: &Side, known: &Known, round: usize) -> Result<f64> {
    let lengths = known.reply_lengths(side)?;
    let from = round * SINGLE % (PATHS - SINGLE);
    let started = Instant::now();
    ask_each(side, &known.queries[from..from + SINGLE], &lengths[from..from + SINGLE])?;
    Ok(per_second(SINGLE, started))
}

/// QueryPathInfo of all, many in flight.
pub(super) fn in_flight(side: &Side, known: &Known, _: usize) -> Result<f64> {
    let lengths = known.reply_lengths(side)?;
    let started = Instant::now();
    converse(side.connect()?, &known.queries, lengths, IN_FLIGHT)?;
    Ok(per_second(PATHS, started))
}

/// QueryPathInfo of all by several clients, each its share.
fn several(side: &Side, known: &Known, window: usize) -> Result<f64> {
    let lengths = known.reply_lengths(side)?;
    let share = PATHS / CLIENTS;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = known
            .queries
            .chunks(share)
            .zip(lengths.chunks(share))
            .map(|(queries, lengths)| scope.spawn(move || converse(side.connect()?, queries, lengths, window)))
            .collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| Err(wrong("a client panicked"))))
    })?;
    Ok(per_second(PATHS, started))
}

pub(super) fn four_connections(side: &Side, known: &Known, _: usize) -> Result<f64> {
    several(side, known, 1)
}

pub(super) fn four_in_flight(side: &Side, known: &Known, _: usize) -> Result<f64> {
    several(side, known, IN_FLIGHT)
}

/// One QueryValidPaths with all known paths.
pub(super) fn valid_paths(side: &Side, known: &Known, _: usize) -> Result<f64> {
    let mut request = Request::new(Op::IsValidPath);
    request.0[..8].copy_from_slice(&31_u64.to_le_bytes());
    request = request.word(PATHS as u64);
    for path in &known.paths {
        request = request.string(path);
    }
    let request = request.word(0).0;
    let mut connection = side.connect()?;
    let started = Instant::now();
    // Both ends have more to say than a socket holds, but a daemon reads the whole request before it answers.
    connection.call(&request)?;
    if connection.word()? != PATHS as u64 {
        return Err(wrong("not all known paths are valid"));
    }
    let each = 8 + known.paths[0].len().next_multiple_of(8) as u64;
    connection.skip(each * PATHS as u64)?;
    Ok(per_second(PATHS, started))
}

/// AddToStoreNar as stock's client does it: the next when the one before is answered.
pub(super) fn add_small(side: &Side, _: &Known, round: usize) -> Result<f64> {
    let requests: Vec<Vec<u8>> = (0..ADDED)
        .map(|n| {
            let seed = format!("added {round} {n}");
            let path = load::made_up_path(&seed, "a-small-path");
            let archive = Tree::File(format!("{seed}\n").into_bytes()).archive();
            let offer = Offer { path, references: Vec::new(), deriver: String::new(), signatures: Vec::new(), archive };
            offer.add_nar()
        })
        .collect();
    let mut connection = side.connect()?;
    let started = Instant::now();
    requests.iter().try_for_each(|request| connection.call(request))?;
    Ok(per_second(ADDED, started))
}

/// What a connection costs that has asked once and now says nothing, in KiB.
pub(super) fn idle_memory(side: &Side, known: &Known, _: usize) -> Result<f64> {
    std::thread::sleep(REST);
    let before = memory::pss_with_children(side.pid)?;
    let mut connections = Vec::with_capacity(IDLE);
    for path in known.paths.iter().take(IDLE) {
        let mut connection = side.connect()?;
        // Nobody knows the path yet; asked is asked.
        connection.is_valid(path)?;
        connections.push(connection);
    }
    std::thread::sleep(REST);
    let grown = memory::pss_with_children(side.pid)?.saturating_sub(before);
    Ok(grown as f64 / 1024.0 / IDLE as f64)
}
