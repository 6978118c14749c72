//! Properties of every message at every version.

use nix_compat::wire::{Frame, FrameDecoder, ReadError, Reader, Writer};
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{Features, Operation, Protocol, Request, Response};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

use crate::expressible::{expressible, expressible_message, expressible_response};
use crate::strategies::{message, request, response, store_path};
use crate::support::{all_protocols, protocol};

/// How many values of each kind are tried at each version.
const SAMPLES: u32 = 8;

/// Draws a value, reproducibly.
pub(crate) fn sample<T: std::fmt::Debug>(runner: &mut TestRunner, strategy: &impl Strategy<Value = T>) -> T {
    strategy.new_tree(runner).unwrap().current()
}

/// Checks that `decode` finds exactly the message in `encoded`: the same value, not a byte further, and never with less.
pub(crate) fn check<T: std::fmt::Debug + PartialEq>(
    value: &T,
    encoded: &[u8],
    decode: impl Fn(&mut Reader<'_>) -> Result<T, ReadError>,
) {
    let mut followed = encoded.to_vec();
    followed.extend([0xa5; 16]);
    let mut reader = Reader::new(&followed);
    assert_eq!(&decode(&mut reader).unwrap(), value);
    assert_eq!(reader.position(), encoded.len(), "not all, or more than, {value:?} was read");

    for length in 0..encoded.len() {
        match decode(&mut Reader::new(&encoded[..length])) {
            Err(ReadError::Incomplete { needed }) => {
                assert!(length < needed && needed <= encoded.len(), "{needed} wanted of {length}/{}", encoded.len());
            }
            other => panic!("{length} of {} bytes of {value:?} gave {other:?}", encoded.len()),
        }
    }
}

/// Runs `test` with everything a client can ask at every version.
fn for_all_requests(mut test: impl FnMut(&mut TestRunner, Request, &Protocol)) {
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRunner::deterministic().rng().clone());
    for protocol in all_protocols() {
        for &operation in Operation::ALL {
            for _ in 0..SAMPLES {
                let request = expressible(sample(&mut runner, &request(operation)), &protocol);
                assert_eq!(request.operation(), operation);
                test(&mut runner, request, &protocol);
            }
        }
    }
}

#[test]
fn requests_come_back_from_their_encoding() {
    for_all_requests(|_, request, protocol| {
        let mut writer = Writer::new();
        request.encode(protocol, &mut writer);
        check(&request, writer.as_bytes(), |reader| Request::decode(reader, protocol));
    });
}

#[test]
fn responses_come_back_from_their_encoding() {
    for_all_requests(|runner, request, protocol| {
        let response = expressible_response(sample(runner, &response(&request)), protocol);
        let mut writer = Writer::new();
        response.encode(protocol, &mut writer);
        check(&response, writer.as_bytes(), |reader| Response::decode(&request, reader, protocol));
    });
}

#[test]
fn messages_come_back_from_their_encoding() {
    let mut runner = TestRunner::deterministic();
    for protocol in all_protocols() {
        for _ in 0..20 * SAMPLES {
            let message = sample(&mut runner, &message());
            let mut writer = Writer::new();
            message.encode(&protocol, &mut writer);
            match expressible_message(message, &protocol) {
                Some(message) => check(&message, writer.as_bytes(), |reader| Message::decode(reader, &protocol)),
                None => assert!(writer.is_empty()),
            }
        }
    }
}

/// Overwrites one to three bytes.
fn damage(runner: &mut TestRunner, encoded: &[u8]) -> Vec<u8> {
    let mut damaged = encoded.to_vec();
    if !damaged.is_empty() {
        let places = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
        for (at, byte) in sample(runner, &places) {
            let at = at.index(damaged.len());
            damaged[at] = byte;
        }
    }
    damaged
}

#[test]
fn damaged_requests_are_errors_and_never_panics() {
    for_all_requests(|runner, request, protocol| {
        let mut writer = Writer::new();
        request.encode(protocol, &mut writer);
        let damaged = damage(runner, writer.as_bytes());
        let mut reader = Reader::new(&damaged);
        let _ = Request::decode(&mut reader, protocol);
        assert!(reader.position() <= damaged.len());
    });
}

#[test]
fn damaged_responses_are_errors_and_never_panics() {
    for_all_requests(|runner, request, protocol| {
        let mut writer = Writer::new();
        sample(runner, &response(&request)).encode(protocol, &mut writer);
        let damaged = damage(runner, writer.as_bytes());
        let mut reader = Reader::new(&damaged);
        let _ = Response::decode(&request, &mut reader, protocol);
        assert!(reader.position() <= damaged.len());
    });
}

#[test]
fn damaged_messages_are_errors_and_never_panics() {
    let mut runner = TestRunner::deterministic();
    for protocol in all_protocols() {
        for _ in 0..20 * SAMPLES {
            let mut writer = Writer::new();
            sample(&mut runner, &message()).encode(&protocol, &mut writer);
            let damaged = damage(&mut runner, writer.as_bytes());
            let mut reader = Reader::new(&damaged);
            let _ = Message::decode(&mut reader, &protocol);
            assert!(reader.position() <= damaged.len());
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(
        operation in prop::sample::select(Operation::ALL),
        words in prop::collection::vec(prop_oneof![0..40_u64, any::<u64>()], 0..40),
        tail in prop::collection::vec(any::<u8>(), 0..8),
        minor in 18..=38_u16,
    ) {
        let protocol = protocol(minor, if minor == 38 { Features::ALL } else { Features::NONE });
        let mut bytes = operation.code().to_le_bytes().to_vec();
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(tail);
        let _ = Request::decode(&mut Reader::new(&bytes), &protocol);
        let _ = Message::decode(&mut Reader::new(&bytes), &protocol);
        let _ = nix_compat::worker::read_path_info(&mut Reader::new(&bytes), &protocol);
    }

    #[test]
    fn frames_give_the_payload_back_however_they_are_cut(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..10),
        received in 1..70_usize,
        behind in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let mut writer = Writer::new();
        pieces.iter().for_each(|piece| writer.frame(piece));
        writer.end_frames();
        let end = writer.len();
        writer.raw(&behind);

        let (mut decoder, mut payload, mut used) = (FrameDecoder::new(), Vec::new(), 0);
        'stream: for part in writer.as_bytes().chunks(received) {
            let mut input = part;
            loop {
                let before = input.len();
                prop_assert!(decoder.has_ended() || decoder.wanted() <= end - used);
                let frame = decoder.decode(&mut input).unwrap();
                used += before - input.len();
                match frame {
                    Frame::Data(data) => payload.extend_from_slice(data),
                    Frame::NeedMore => break,
                    Frame::End => break 'stream,
                }
            }
        }
        prop_assert!(decoder.has_ended());
        prop_assert_eq!(used, end);
        prop_assert_eq!(payload, pieces.concat());
    }
}

/// Receives a message as slowly as `needed` allows and counts the attempts.
fn attempts(encoded: &[u8], protocol: &Protocol) -> u32 {
    let (mut received, mut attempts) = (0, 0);
    loop {
        attempts += 1;
        match Request::decode(&mut Reader::new(&encoded[..received]), protocol) {
            Ok(_) => return attempts,
            Err(ReadError::Incomplete { needed }) => received = needed,
            Err(ReadError::Invalid(invalid)) => panic!("{invalid}"),
        }
    }
}

#[test]
fn long_lists_need_few_attempts() {
    let mut runner = TestRunner::deterministic();
    let protocol = protocol(38, Features::NONE);
    let paths = sample(&mut runner, &prop::collection::btree_set(store_path(), 20_000));
    let mut writer = Writer::new();
    Request::QuerySubstitutablePaths(paths).encode(&protocol, &mut writer);
    let attempts = attempts(writer.as_bytes(), &protocol);
    assert!(attempts < 150, "{attempts} attempts");
}
