//! The worker protocol's byte layer and its requests; the serve protocol.

use nix_compat::serve;
use nix_compat::store_path::StoreDir;
use nix_compat::wire::{Frame, FrameDecoder, Invalid, ReadError, Reader, Writer};
use nix_compat::worker::{Features, NEWEST_MINOR, OLDEST_MINOR, Protocol, Request};

/// How much longer than the input an announced message may be to be tried with so much more.
const MAX_EXTENSION: usize = 4096;

/// A request. The first byte chooses the minor version, the second the features at the one that has any.
pub fn request(input: &[u8]) {
    let [minor, features, message @ ..] = input else { return };
    let minor = OLDEST_MINOR + u16::from(*minor) % (NEWEST_MINOR - OLDEST_MINOR + 1);
    let choices = [Features::NONE, Features::REALISATION_WITH_PATH, Features::DELETE_REFERRERS, Features::ALL];
    let features = if minor == NEWEST_MINOR { choices[usize::from(features % 4)] } else { Features::NONE };
    let protocol = Protocol { minor, features, store_dir: StoreDir::default() };
    let decode = |message: &[u8]| {
        let mut reader = Reader::new(message);
        let decoded = Request::decode(&mut reader, &protocol);
        (decoded, reader.position())
    };

    let (decoded, position) = decode(message);
    match decoded {
        Ok(request) => {
            let message = &message[..position];
            let (alone, all) = decode(message);
            assert_eq!(alone.unwrap(), request, "what follows a message changes it");
            assert_eq!(all, position);
            for length in [0, position / 2, position.saturating_sub(8), position - 1] {
                match decode(&message[..length]).0 {
                    Err(ReadError::Incomplete { needed }) => assert!(length < needed && needed <= position),
                    other => panic!("{length} of {position} bytes gave {other:?}"),
                }
            }
            assert_eq!(received_slowly(message, decode), request);

            let mut writer = Writer::new();
            request.encode(&protocol, &mut writer);
            let (again, length) = decode(writer.as_bytes());
            assert_eq!(again.unwrap(), request, "it is not what was written");
            assert_eq!(length, writer.len());
            let _ = request.payload(&protocol);
        }
        Err(ReadError::Incomplete { needed }) => {
            assert!(needed > message.len());
            if needed <= message.len() + MAX_EXTENSION {
                let mut longer = message.to_vec();
                longer.resize(needed - 1, 0);
                assert!(decode(&longer).0.is_err(), "fewer bytes than needed are enough");
            }
        }
        Err(ReadError::Invalid(invalid)) => {
            let _ = invalid.to_string();
            let mut longer = message.to_vec();
            longer.extend([0; 16]);
            assert!(matches!(decode(&longer).0, Err(ReadError::Invalid(_))), "an invalid message became valid");
        }
    }
}

/// Receives as little as is asked for each time.
fn received_slowly(message: &[u8], decode: impl Fn(&[u8]) -> (Result<Request, ReadError>, usize)) -> Request {
    let mut received = 0;
    loop {
        match decode(&message[..received]).0 {
            Ok(request) => return request,
            Err(ReadError::Incomplete { needed }) => {
                assert!(needed > received && needed <= message.len());
                received = needed;
            }
            Err(ReadError::Invalid(invalid)) => panic!("a part of a valid message is invalid: {invalid}"),
        }
    }
}

/// How a framed stream went.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    payload: Vec<u8>,
    used: usize,
    /// Whether the stream ended, went on beyond the input, or was refused.
    end: Result<bool, String>,
}

/// A framed stream. The first byte says in what pieces it arrives.
pub fn frames(input: &[u8]) {
    let [piece, stream @ ..] = input else { return };
    let whole = unframe(stream, stream.len().max(1));
    assert_eq!(whole, unframe(stream, usize::from(*piece) + 1));
    assert_eq!(whole, unframe(stream, 1));
    assert_eq!(whole, by_definition(stream));

    let mut writer = Writer::new();
    for piece in whole.payload.chunks(usize::from(*piece) + 1) {
        writer.frame(piece);
    }
    writer.end_frames();
    let end = writer.len();
    writer.raw(stream);
    let again = unframe(writer.as_bytes(), 7);
    assert_eq!(again, Outcome { payload: whole.payload, used: end, end: Ok(true) });
}

fn unframe(stream: &[u8], piece: usize) -> Outcome {
    let (mut decoder, mut payload, mut used) = (FrameDecoder::new(), Vec::new(), 0);
    for part in stream.chunks(piece) {
        let mut rest = part;
        loop {
            let (before, wanted) = (rest.len(), decoder.wanted());
            let frame = decoder.decode(&mut rest);
            let taken = before - rest.len();
            used += taken;
            match frame {
                Ok(Frame::Data(data)) => {
                    assert!(!data.is_empty());
                    payload.extend_from_slice(data);
                }
                Ok(Frame::NeedMore) => {
                    assert!(rest.is_empty() && !decoder.has_ended() && decoder.wanted() > 0);
                    assert!(taken < wanted || taken == before);
                    break;
                }
                Ok(Frame::End) => {
                    assert!(decoder.has_ended() && decoder.wanted() == 0);
                    return Outcome { payload, used, end: Ok(true) };
                }
                Err(invalid) => return Outcome { payload, used, end: Err(invalid.to_string()) },
            }
        }
    }
    Outcome { payload, used, end: Ok(decoder.has_ended()) }
}

/// The same from the whole stream, as its definition reads.
fn by_definition(stream: &[u8]) -> Outcome {
    let (mut payload, mut used) = (Vec::new(), 0);
    let end = loop {
        let Some((header, rest)) = stream[used..].split_first_chunk::<8>() else {
            used = stream.len();
            break Ok(false);
        };
        used += header.len();
        match u64::from_le_bytes(*header) {
            0 => break Ok(true),
            length @ 0x1_0000_0000.. => {
                break Err(Invalid::IntegerTooLarge { value: length, bits: 32 }.to_string());
            }
            length => {
                let data = &rest[..rest.len().min(length as usize)];
                payload.extend_from_slice(data);
                used += data.len();
            }
        }
    };
    Outcome { payload, used, end }
}

/// A message of the serve protocol. The first byte chooses the minor version, the second what the message is: a request,
/// or the answer to one of some requests.
pub fn serve(input: &[u8]) {
    let [minor, kind, message @ ..] = input else { return };
    let minor = serve::OLDEST_MINOR + u16::from(*minor) % (serve::NEWEST_MINOR - serve::OLDEST_MINOR + 1);
    let protocol = serve::Protocol { minor, store_dir: StoreDir::default() };
    let paths = Default::default();
    let request = match kind % 4 {
        0 => {
            return comes_back(message, |r| serve::Request::decode(r, &protocol), |m, w| m.encode(&protocol, w));
        }
        1 => serve::Request::QueryPathInfos(paths),
        2 => serve::Request::QueryClosure { include_outputs: true, paths },
        _ => {
            return comes_back(
                message,
                |r| serve::read_build_result(r, &protocol),
                |m, w| serve::write_build_result(m, &protocol, w),
            );
        }
    };
    comes_back(message, |r| serve::Response::decode(&request, r, &protocol), |m, w| m.encode(&protocol, w));
}

/// What is read takes no more than its own bytes, needs all of them, and reads the same when it is written again.
fn comes_back<T: PartialEq + std::fmt::Debug>(
    message: &[u8],
    decode: impl Fn(&mut Reader<'_>) -> Result<T, ReadError>,
    encode: impl Fn(&T, &mut Writer),
) {
    let mut reader = Reader::new(message);
    let value = match decode(&mut reader) {
        Ok(value) => value,
        Err(ReadError::Incomplete { needed }) => return assert!(needed > message.len()),
        Err(ReadError::Invalid(invalid)) => return drop(invalid.to_string()),
    };
    let end = reader.position();
    assert_eq!(decode(&mut Reader::new(&message[..end])).unwrap(), value);
    for length in [0, end / 2, end - 1] {
        match decode(&mut Reader::new(&message[..length])) {
            Err(ReadError::Incomplete { needed }) => assert!(length < needed && needed <= end),
            other => panic!("{length} of {end} bytes gave {other:?}"),
        }
    }
    let mut writer = Writer::new();
    encode(&value, &mut writer);
    let mut reader = Reader::new(writer.as_bytes());
    assert_eq!(decode(&mut reader).unwrap(), value);
    assert_eq!(reader.position(), writer.len());
}
