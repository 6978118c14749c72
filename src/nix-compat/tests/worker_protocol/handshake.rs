//! Handshakes: the bytes, and both sides with each other.

use nix_compat::store_path::StoreDir;
use nix_compat::wire::Writer;
use nix_compat::worker::handshake::{
    ClientHandshake, Connected, HandshakeError, Progress, ServerHandshake, Trust, Welcome,
};
use nix_compat::worker::{Features, NEWEST_MINOR, OLDEST_MINOR};

use crate::support::{N, S, bytes};

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;

fn server() -> ServerHandshake {
    ServerHandshake::new(StoreDir::default(), "2.34.8", Trust::Trusted, Features::ALL)
}

/// Gives a server everything at once.
fn serve(input: &[u8]) -> Result<(Progress<Connected>, Vec<u8>), HandshakeError> {
    let mut output = Writer::new();
    let (used, progress) = server().advance(input, &mut output)?;
    assert!(used <= input.len());
    Ok((progress, output.as_bytes().to_vec()))
}

#[test]
fn nix_2_3_7_gets_no_version_text_and_may_send_an_affinity() {
    let input = bytes(&[N(CLIENT_MAGIC), N(0x115), N(1), N(3), N(0)]);
    let (progress, output) = serve(&input).unwrap();
    assert_eq!(output, bytes(&[N(SERVER_MAGIC), N(0x126)]));
    let Progress::Done(connected) = progress else { panic!("not done") };
    assert_eq!(connected.protocol.minor, 21);
    assert_eq!(connected.protocol.features, Features::NONE);
}

#[test]
fn nix_2_8_gets_the_version_text_but_no_trust() {
    let (_, output) = serve(&bytes(&[N(CLIENT_MAGIC), N(0x122), N(0), N(0)])).unwrap();
    assert_eq!(output, bytes(&[N(SERVER_MAGIC), N(0x126), S("2.34.8")]));
}

#[test]
fn nix_2_34_exchanges_features_before_the_obsolete_words() {
    let mut server = server();
    let mut output = Writer::new();
    let first = bytes(&[N(CLIENT_MAGIC), N(0x126)]);
    assert_eq!(server.advance(&first, &mut output).unwrap(), (16, Progress::NeedMore));
    assert_eq!(*output.take(), bytes(&[N(SERVER_MAGIC), N(0x126)]));

    let features = bytes(&[N(2), S("disable-set-options"), S("realisation-with-path-not-hash")]);
    assert_eq!(server.advance(&features, &mut output).unwrap(), (features.len(), Progress::NeedMore));
    let ours = [N(2), S("realisation-with-path-not-hash"), S("delete-dead-specific-referrers")];
    assert_eq!(*output.take(), bytes(&ours));

    let (used, progress) = server.advance(&bytes(&[N(0), N(0)]), &mut output).unwrap();
    assert_eq!(used, 16);
    assert_eq!(*output.take(), bytes(&[S("2.34.8"), N(1)]));
    let Progress::Done(connected) = progress else { panic!("not done") };
    assert_eq!(connected.protocol.features, Features::REALISATION_WITH_PATH);
}

#[test]
fn a_newer_client_is_spoken_to_at_our_version() {
    let (progress, _) = serve(&bytes(&[N(CLIENT_MAGIC), N(0x100 + 250), N(0), N(0), N(0)])).unwrap();
    let Progress::Done(connected) = progress else { panic!("not done") };
    assert_eq!((connected.protocol.minor, connected.client_minor), (NEWEST_MINOR, 250));
}

#[test]
fn strangers_are_refused() {
    assert!(matches!(serve(b"GET / HTTP/1.1\r\n").unwrap_err(), HandshakeError::Magic(_)));
    let version = |word| serve(&bytes(&[N(CLIENT_MAGIC), N(word)])).unwrap_err();
    assert!(matches!(version(0x111), HandshakeError::TooOld(17)));
    assert!(matches!(version(0x212), HandshakeError::Major { major: 2, minor: 18 }));
    assert!(matches!(version(1 << 40), HandshakeError::Invalid(_)));
    let many_features = serve(&bytes(&[N(CLIENT_MAGIC), N(0x126), N(1 << 40)])).unwrap_err();
    assert!(matches!(many_features, HandshakeError::Invalid(_)));
}

/// Lets both sides talk, `piece` bytes at a time, until neither has anything to say.
fn shake_hands(
    client: &mut (ClientHandshake, Writer),
    server: &mut ServerHandshake,
    piece: usize,
) -> (Welcome, Connected) {
    let (client, to_server) = client;
    let mut to_client = Writer::new();
    let (mut at_server, mut at_client) = (to_server.take().to_vec(), Vec::new());
    let (mut welcome, mut connected) = (None, None);
    for _ in 0..10_000 {
        let part = at_server.len().min(piece);
        // Bytes not used stay; the next try sees more of them.
        for length in part..=at_server.len() {
            if connected.is_some() {
                break;
            }
            let (used, progress) = server.advance(&at_server[..length], &mut to_client).unwrap();
            at_server.drain(..used);
            if let Progress::Done(done) = progress {
                connected = Some(done);
            }
            if used > 0 {
                break;
            }
        }
        at_client.extend_from_slice(&to_client.take());
        if welcome.is_none() {
            let (used, progress) = client.advance(&at_client, to_server).unwrap();
            at_client.drain(..used);
            if let Progress::Done(done) = progress {
                welcome = Some(done);
            }
        }
        at_server.extend_from_slice(&to_server.take());
        if let (Some(welcome), Some(connected)) = (&welcome, &connected) {
            assert!(at_server.is_empty() && at_client.is_empty(), "bytes left over");
            return (welcome.clone(), connected.clone());
        }
    }
    panic!("the handshake does not end");
}

#[test]
fn both_sides_agree_at_every_version() {
    for minor in OLDEST_MINOR..=NEWEST_MINOR {
        for features in [Features::NONE, Features::DELETE_REFERRERS, Features::ALL] {
            for piece in [1, 8, 13, 1000] {
                let mut output = Writer::new();
                let client = ClientHandshake::new(StoreDir::default(), minor, features, &mut output);
                let (welcome, connected) = shake_hands(&mut (client, output), &mut server(), piece);
                assert_eq!(welcome.protocol, connected.protocol);
                assert_eq!(welcome.protocol.minor, minor);
                assert_eq!(welcome.protocol.features, if minor >= 38 { features } else { Features::NONE });
                assert_eq!(welcome.server_version.as_deref(), (minor >= 33).then_some("2.34.8"));
                assert_eq!(welcome.trust, if minor >= 35 { Trust::Trusted } else { Trust::Unknown });
            }
        }
    }
}
