//! Whole sessions: a daemon in this process, and clients of several protocol versions on its socket.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::Rig;
use daemon::{Extras, Recorder};
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{BasicDerivation, Output, OutputName};
use nix_compat::hash::{Algorithm, Hash, NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::wire::Writer;
use nix_compat::worker::handshake::Trust;
use nix_compat::worker::{
    AddToStore, AddToStoreNar, BuildMode, MethodText, Protocol, Request, Response, write_path_info,
};
use remote::ClientError;

fn nar(contents: &[u8]) -> Vec<u8> {
    let mut nar = NarWriter::new(Vec::new());
    nar.regular_header(false, contents.len() as u64).unwrap();
    nar.contents(contents).unwrap();
    nar.end_regular().unwrap();
    nar.finish().unwrap()
}

fn info(name: &str, nar: &[u8]) -> PathInfo {
    PathInfo {
        path: StorePath::from_parts(sha256(name.as_bytes())[..20].try_into().unwrap(), name).unwrap(),
        deriver: None,
        nar_hash: NarHash::from(sha256(nar)),
        references: BTreeSet::new(),
        registration_time: 0,
        nar_size: nar.len() as u64,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

fn nothing(_: &mut dyn Write) -> io::Result<()> {
    Ok(())
}

fn add_nar(info: PathInfo) -> Request {
    Request::AddToStoreNar(AddToStoreNar { info, repair: false, dont_check_sigs: true })
}

#[test]
fn a_recording_has_every_byte_of_both_directions() {
    let rig = Rig::with_extras(true, |dir| {
        let recorder = Recorder::new(&dir.join("recordings"), &StoreDir::default()).unwrap();
        Extras { recorder: Some(recorder), ..Extras::default() }
    });
    let dir = rig.dir().join("recordings");
    let mut stream = UnixStream::connect(&rig.socket).unwrap();
    // A client of 1.21 that asks for all valid paths and finishes.
    let sent: Vec<u8> = [0x6e69_7863_u64, 0x115, 0, 0, 23].iter().flat_map(|word| word.to_le_bytes()).collect();
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    let find = |ending: &str| {
        let entries = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        let [file] = &entries.filter(|path| path.extension().is_some_and(|e| e == ending)).collect::<Vec<_>>()[..]
        else {
            panic!("one recording of the {ending}")
        };
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::read(file).unwrap()
    };
    assert_eq!(find("client"), sent);
    assert_eq!(find("server"), received);
    assert_eq!(received.len(), 40, "greeting, two ends of messages, an empty list");
    assert_eq!(std::fs::read_to_string(dir.join("store-dir")).unwrap(), "/nix/store");
}

#[test]
fn trust_can_be_forced_either_way() {
    for (listed, forced, told) in
        [(true, daemon::Trust::Untrusted, Trust::NotTrusted), (false, daemon::Trust::Trusted, Trust::Trusted)]
    {
        let rig = Rig::with_extras(listed, |_| Extras { forced_trust: Some(forced), ..Extras::default() });
        assert_eq!(rig.connect(38).trust(), told);
    }
}

#[test]
fn a_nar_arrives_through_every_transport() {
    let rig = Rig::new(true);
    // Larger than a piece, so that the streaming path is taken as well.
    for (minor, size) in [(18, 10), (18, 3_000_000), (21, 10), (21, 3_000_000), (38, 10), (38, 3_000_000)] {
        let bytes = nar(&vec![u8::try_from(minor).unwrap(); size]);
        let info = info(&format!("nar-{minor}-{size}"), &bytes);
        let mut client = rig.connect(minor);
        client.call(&add_nar(info.clone()), |out| out.write_all(&bytes)).unwrap();
        assert_eq!(client.call(&Request::IsValidPath(info.path.clone()), nothing).unwrap(), Response::Bool(true));
        let mut out = vec![0; bytes.len()];
        client.call(&Request::NarFromPath(info.path.clone()), nothing).unwrap();
        client.read_exact(&mut out).unwrap();
        assert!(out == bytes);
        // Sent again although it is there: the connection stays in step.
        client.call(&add_nar(info.clone()), |out| out.write_all(&bytes)).unwrap();
        assert_eq!(client.call(&Request::IsValidPath(info.path), nothing).unwrap(), Response::Bool(true));
    }
}

#[test]
fn contents_added_by_old_and_new_clients_get_the_same_paths() {
    let rig = Rig::new(true);
    for (method, algorithm) in
        [(Method::Nar, Algorithm::Sha256), (Method::Nar, Algorithm::Sha1), (Method::Flat, Algorithm::Sha256)]
    {
        let method_text = MethodText::new(method, algorithm);
        let old = Request::AddToStoreOld { name: "file".into(), method: method_text.clone() };
        let Response::Path(Some(old)) = rig.connect(21).call(&old, |out| out.write_all(&nar(b"text"))).unwrap() else {
            panic!()
        };
        let new = AddToStore { name: "file".into(), method: method_text, references: BTreeSet::new(), repair: false };
        let dump = if method == Method::Nar { nar(b"text") } else { b"text".to_vec() };
        let new = rig.connect(38).call(&Request::AddToStore(new), |out| out.write_all(&dump)).unwrap();
        let Response::AddedPath(new) = new else { panic!() };
        assert_eq!(old, new.path);
    }
}

#[test]
fn after_a_refusal_the_frames_are_drained_and_the_connection_goes_on() {
    let rig = Rig::new(true);
    let mut client = rig.connect(38);
    let bytes = nar(&vec![7; 1_000_000]);
    let good = info("drained", &bytes);
    let refusals = [
        add_nar(PathInfo { nar_hash: NarHash::from([1; 32]), ..good.clone() }),
        add_nar(PathInfo { nar_size: 8, ..good.clone() }),
        Request::AddToStore(AddToStore {
            name: "no/name".into(),
            method: MethodText::new(Method::Nar, Algorithm::Sha256),
            references: BTreeSet::new(),
            repair: false,
        }),
        Request::AddToStore(AddToStore {
            name: "text".into(),
            method: MethodText::new(Method::Text, Algorithm::Sha1),
            references: BTreeSet::new(),
            repair: false,
        }),
    ];
    for request in refusals {
        let refused = client.call(&request, |out| out.write_all(&bytes));
        assert!(matches!(refused, Err(ClientError::Refused(_))), "{request:?} {refused:?}");
    }
    let refused = client.call(&add_nar(good.clone()), |out| {
        out.write_all(&bytes)?;
        out.write_all(b"trailing")
    });
    assert!(matches!(refused, Err(ClientError::Refused(_))), "{refused:?}");
    let add = Request::AddToStore(AddToStore {
        name: "surplus".into(),
        method: MethodText::new(Method::Nar, Algorithm::Sha256),
        references: BTreeSet::new(),
        repair: false,
    });
    let refused = client.call(&add, |out| {
        out.write_all(&bytes)?;
        out.write_all(b"trailing")
    });
    assert!(matches!(refused, Err(ClientError::Refused(_))), "{refused:?}");
    assert_eq!(client.call(&Request::QueryAllValidPaths, nothing).unwrap(), Response::Paths(BTreeSet::new()));
    client.call(&add_nar(good), |out| out.write_all(&bytes)).unwrap();
}

#[test]
fn an_error_inside_an_inline_nar_ends_the_connection() {
    let rig = Rig::new(true);
    let mut client = rig.connect(21);
    let request =
        Request::AddToStoreOld { name: "broken".into(), method: MethodText::new(Method::Nar, Algorithm::Sha256) };
    let mut bytes = nar(b"some contents");
    // The closing parenthesis.
    let at = bytes.len() - 8;
    bytes[at] ^= 0xff;
    assert!(client.call(&request, |out| out.write_all(&bytes)).is_err());
    // What follows the damage must not be taken for a request.
    assert!(client.call(&Request::QueryAllValidPaths, nothing).is_err());
    assert!(rig.store.all_valid_paths().unwrap().is_empty());
}

#[test]
fn many_paths_in_one_stream() {
    let rig = Rig::new(true);
    let mut client = rig.connect(38);
    let protocol = Protocol { minor: 38, features: Default::default(), store_dir: StoreDir::default() };
    let nars: Vec<Vec<u8>> = (0..300u16).map(|n| nar(&n.to_le_bytes())).collect();
    let infos: Vec<PathInfo> = nars.iter().enumerate().map(|(n, nar)| info(&format!("many-{n}"), nar)).collect();
    // One of them is valid already; its NAR has to be skipped.
    client.call(&add_nar(infos[3].clone()), |out| out.write_all(&nars[3])).unwrap();
    let stream = |out: &mut dyn Write| {
        let mut writer = Writer::new();
        writer.u64(infos.len() as u64);
        for (info, nar) in infos.iter().zip(&nars) {
            write_path_info(info, &protocol, &mut writer);
            writer.raw(nar);
        }
        out.write_all(writer.as_bytes())
    };
    client.call(&Request::AddMultipleToStore { repair: false, dont_check_sigs: true }, stream).unwrap();
    let Response::Paths(valid) = client.call(&Request::QueryAllValidPaths, nothing).unwrap() else { panic!() };
    assert_eq!(valid, infos.into_iter().map(|info| info.path).collect());
}

#[test]
fn an_untrusted_client_proves_what_it_adds() {
    let rig = Rig::new(false);
    let mut client = rig.connect(38);
    assert_eq!(client.trust(), Trust::NotTrusted);
    let bytes = nar(b"claim");
    let refused = client.call(&add_nar(info("claim", &bytes)), |out| out.write_all(&bytes));
    assert!(matches!(&refused, Err(ClientError::Refused(text)) if text.contains("lacks a signature")), "{refused:?}");
    let request = Request::VerifyStore { check_contents: false, repair: true };
    assert!(matches!(client.call(&request, nothing), Err(ClientError::Refused(_))));
    assert!(rig.store.all_valid_paths().unwrap().is_empty());
}

#[test]
fn an_untrusted_derivation_cannot_claim_an_output_path() {
    let rig = Rig::new(false);
    let coveted = StorePath::from_parts([9; 20], "bash").unwrap();
    let ca = ContentAddress { method: Method::Flat, hash: Hash::of(Algorithm::Sha256, b"evil") };
    let out = OutputName::default();
    let derivation = BasicDerivation {
        name: "bash".into(),
        outputs: BTreeMap::from([(out, Output::Fixed { path: coveted.clone(), ca })]),
        input_srcs: BTreeSet::new(),
        platform: b"x86_64-linux".to_vec(),
        builder: b"/bin/sh".to_vec(),
        args: vec![b"-c".to_vec(), b"printf evil > $out".to_vec()],
        env: BTreeMap::from([(b"out".to_vec(), StoreDir::default().display(&coveted).into_bytes())]),
    };
    let request = Request::BuildDerivation {
        drv_path: StorePath::from_parts([8; 20], "bash.drv").unwrap(),
        derivation,
        mode: BuildMode::Normal,
    };
    let mut client = rig.connect(38);
    assert!(matches!(client.call(&request, nothing), Err(ClientError::Refused(_))));
    assert!(rig.store.all_valid_paths().unwrap().is_empty());
}

#[test]
fn clients_that_stall_in_the_middle_of_a_payload_stop_nobody() {
    let rig = Rig::new(true);
    let bytes = nar(&vec![1; 2_000_000]);
    let stalled: Vec<_> = (0..300)
        .map(|n| {
            let mut client = rig.connect(38);
            let request = add_nar(info(&format!("stalled-{n}"), &bytes));
            // Cut off by an error of the payload's own: what was sent by then stays unfinished.
            let cut = client.call(&request, |out| {
                out.write_all(&bytes[..600_000])?;
                Err(io::ErrorKind::Interrupted.into())
            });
            assert!(matches!(cut, Err(ClientError::Payload(_))));
            client
        })
        .collect();
    let started = Instant::now();
    let mut client = rig.connect(38);
    let good = nar(b"not held up");
    client.call(&add_nar(info("good", &good)), |out| out.write_all(&good)).unwrap();
    assert!(
        matches!(client.call(&Request::QueryAllValidPaths, nothing).unwrap(), Response::Paths(paths) if paths.len() == 1)
    );
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    drop(stalled);
}
