//! Builds on another machine, which does as it should or does not. That stock and castored can be such machines is tested
//! with the clients (`compat-tests`).

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::Output;
use nix_compat::hash::{Hash, NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::Signature;
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::wire::{ReadError, Reader, Writer};
use nix_compat::worker::handshake::{Progress, ServerHandshake, Trust};
use nix_compat::worker::stderr::{ActivityKind, Field, Message, ResultKind, Verbosity};
use nix_compat::worker::{BuildMode, BuildResult, BuildStatus, Features, Protocol, Request, Response};
use parking_lot::Mutex;

use crate::hooks::{hook, hook_lines};
use crate::rig::{Draft, Rig, all_outputs, soon};

/// A key of RFC 8032's first test.
const SECRET_KEY: &str = "here-1:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJ\
                          ZAc6DuFy89qmIyWvAhpo9wdRGg==";
/// Something in the form of a signature.
const SIGNATURE: &str = "there-1:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcH\
                         BwcHBwcHBwcHBwcHBwcHBwcHBw==";

/// Bytes of the last word of a NAR.
const NAR_END: usize = 16;

/// What the machine says of what it has built.
#[derive(Clone)]
struct Machine {
    store_dir: StoreDir,
    contents: Vec<u8>,
    /// The contents it sends.
    sent: Vec<u8>,
    references: Vec<StorePath>,
    signatures: BTreeSet<Signature>,
    /// It ends in the middle of the build, or of what it has built, or never ends it.
    leaves: bool,
    leaves_later: bool,
    hangs: bool,
    /// What it was asked to build, and whether its client has gone.
    asked: Arc<Mutex<Vec<Request>>>,
    gone: Arc<Mutex<Option<Instant>>>,
}

impl Machine {
    fn new(rig: &Rig, contents: &str) -> Self {
        let (contents, sent) = (contents.into(), contents.into());
        let (asked, gone) = (Arc::default(), Arc::default());
        let store_dir = rig.store.store_dir().clone();
        Self {
            store_dir,
            contents,
            sent,
            references: Vec::new(),
            signatures: BTreeSet::new(),
            leaves: false,
            leaves_later: false,
            hangs: false,
            asked,
            gone,
        }
    }

    /// Listens; gives the entry for the list of machines.
    fn start(&self, rig: &Rig, name: &str) -> String {
        let socket: PathBuf = rig.path(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let machine = self.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let machine = machine.clone();
                thread::spawn(move || {
                    machine.serve(stream);
                    *machine.gone.lock() = Some(Instant::now());
                });
            }
        });
        format!("unix://{}", socket.display())
    }

    fn serve(&self, mut stream: UnixStream) -> Option<()> {
        let mut received = Vec::new();
        let mut handshake = ServerHandshake::new(self.store_dir.clone(), "test", Trust::Trusted, Features::NONE);
        let protocol = loop {
            let mut writer = Writer::new();
            let (used, progress) = handshake.advance(&received, &mut writer).unwrap();
            received.drain(..used);
            stream.write_all(writer.as_bytes()).ok()?;
            match progress {
                Progress::Done(connected) => break connected.protocol,
                Progress::NeedMore => receive(&mut stream, &mut received)?,
            }
        };
        let mut writer = Writer::new();
        Message::Last.encode(&protocol, &mut writer);
        loop {
            stream.write_all(&writer.take()).ok()?;
            let request = loop {
                let mut reader = Reader::new(&received);
                match Request::decode(&mut reader, &protocol) {
                    Ok(request) => {
                        let used = reader.position();
                        received.drain(..used);
                        break request;
                    }
                    Err(ReadError::Incomplete { .. }) => receive(&mut stream, &mut received)?,
                    Err(error) => panic!("{error}"),
                }
            };
            self.answer(&request, &protocol, &mut writer);
            self.asked.lock().push(request.clone());
            if matches!(request, Request::NarFromPath(_)) && self.leaves_later {
                let all = writer.take();
                stream.write_all(&all[..all.len() - NAR_END]).ok()?;
                return None;
            }
            if matches!(request, Request::BuildDerivation { .. }) {
                if self.leaves {
                    return None;
                }
                if self.hangs {
                    loop {
                        receive(&mut stream, &mut received)?;
                    }
                }
            }
        }
    }

    fn answer(&self, request: &Request, protocol: &Protocol, writer: &mut Writer) {
        let mut say = |message: Message| message.encode(protocol, writer);
        if matches!(request, Request::BuildDerivation { .. }) {
            let (kind, text, fields) = (ActivityKind::Build, b"building".to_vec(), Vec::new());
            say(Message::StartActivity { id: 7, level: Verbosity::Info, kind, text, fields, parent: 0 });
            let fields = vec![Field::Text(b"far away".to_vec())];
            say(Message::Result { id: 7, kind: ResultKind::BuildLogLine, fields });
            let (kind, text, fields) = (ActivityKind::FileTransfer, b"downloading".to_vec(), Vec::new());
            say(Message::StartActivity { id: 8, level: Verbosity::Info, kind, text, fields, parent: 7 });
            let fields = [5, 9, 0, 0].map(Field::Int).to_vec();
            say(Message::Result { id: 8, kind: ResultKind::Progress, fields });
            say(Message::StopActivity(8));
            say(Message::StopActivity(7));
        }
        say(Message::Last);
        let response = match request {
            Request::QueryValidPaths { paths, .. } => Response::Paths(paths.clone()),
            Request::BuildDerivation { .. } => Response::BuildResult(BuildResult::new(BuildStatus::Built, "")),
            Request::QueryPathInfo(path) => Response::PathInfo(Some(self.info(path))),
            Request::NarFromPath(_) => Response::Nothing,
            other => panic!("{other:?}"),
        };
        response.encode(protocol, writer);
        if matches!(request, Request::NarFromPath(_)) {
            writer.raw(&nar(&self.sent));
        }
    }

    fn info(&self, path: &StorePath) -> PathInfo {
        let nar = nar(&self.contents);
        PathInfo {
            path: path.clone(),
            deriver: None,
            nar_hash: NarHash::from(sha256(&nar)),
            references: self.references.iter().cloned().collect(),
            registration_time: 1,
            nar_size: nar.len() as u64,
            ultimate: true,
            signatures: self.signatures.clone(),
            ca: None,
        }
    }
}

fn receive(stream: &mut UnixStream, received: &mut Vec<u8>) -> Option<()> {
    let mut buffer = [0; 4096];
    let length = stream.read(&mut buffer).ok().filter(|length| *length > 0)?;
    received.extend_from_slice(&buffer[..length]);
    Some(())
}

fn nar(contents: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = NarWriter::new(&mut bytes);
    writer.regular_header(false, contents.len() as u64).unwrap();
    writer.contents(contents).unwrap();
    writer.end_regular().unwrap();
    writer.finish().unwrap();
    bytes
}

/// A derivation that no builder here could build: its script would fail.
fn draft(rig: &Rig) -> Draft {
    rig.derivation("x", "exit 1")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_machine_builds_is_valid_here() {
    let Some(rig) = Rig::new() else { return };
    let machine = Machine::new(&rig, "built there");
    let builders = machine.start(&rig, "machine");
    let (drv, log) = rig.succeed(&draft(&rig), &[("builders", &builders), ("max-jobs", "0")]).await;
    let out = rig.output(&drv, "out");
    assert_eq!(rig.read(&out), "built there");
    let info = rig.store.path_info(&out).unwrap().unwrap();
    assert_eq!(info.deriver, Some(drv.clone()));
    assert!(!info.ultimate, "it was not built here");
    assert_eq!(log.lines(), ["far away"]);
    let display = rig.store.store_dir().display(&drv);
    assert_eq!(log.builds(), [format!("building '{display}' on '{builders}'")]);
    let named = log.messages().iter().any(|message| match message {
        Message::StartActivity { kind: ActivityKind::Build, fields, .. } => {
            fields.get(1) == Some(&Field::Text(builders.clone().into_bytes()))
        }
        _ => false,
    });
    assert!(named, "the activity does not name the machine");
    let download = log.messages().into_iter().find_map(|message| match message {
        Message::StartActivity { id, kind: ActivityKind::FileTransfer, text, parent, .. } if text == b"downloading" => {
            Some((id, parent))
        }
        _ => None,
    });
    let (download, parent) = download.expect("its download is shown");
    let far = |message: &Message| {
        let fields = [5, 9, 0, 0].map(Field::Int).to_vec();
        *message == Message::Result { id: download, kind: ResultKind::Progress, fields }
    };
    assert!(log.messages().iter().any(far));
    assert!(log.messages().contains(&Message::StopActivity(download)));
    let of_build = |message: &Message| matches!(message, Message::StartActivity { id, kind: ActivityKind::Build, .. } if *id == parent);
    assert!(log.messages().iter().any(of_build));
    let asked = machine.asked.lock();
    let sent = asked.iter().find_map(|request| match request {
        Request::BuildDerivation { derivation, .. } => Some(derivation.clone()),
        _ => None,
    });
    assert_eq!(sent.unwrap(), rig.store.derivation(&drv).unwrap().basic);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_what_it_claims_to_be_is_refused() {
    let Some(rig) = Rig::new() else { return };
    let honest = Machine::new(&rig, "contents");
    let unknown = StorePath::from_parts([5; 20], "unknown").unwrap();
    for (name, machine, text) in [
        ("other", Machine { sent: b"CONTENTS".to_vec(), ..honest.clone() }, "hash mismatch"),
        ("longer", Machine { sent: vec![b'x'; 1 << 20], ..honest.clone() }, "NAR ends early"),
        ("references", Machine { references: vec![unknown], ..honest.clone() }, "is not valid"),
        ("leaves", Machine { leaves: true, ..honest.clone() }, "broke off"),
    ] {
        let builders = machine.start(&rig, name);
        let (failed, _) = rig.fail(&draft(&rig), &[("builders", &builders), ("max-jobs", "0")]).await;
        assert!(failed.error.contains(text), "{name}: {}", failed.error);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fixed_output_must_have_its_hash_wherever_it_was_built() {
    let Some(rig) = Rig::new() else { return };
    let fixed = |contents: &str| {
        let ca = ContentAddress { method: Method::Flat, hash: Hash::Sha256(sha256(contents.as_bytes())) };
        let dir = rig.store.store_dir();
        let path = nix_compat::store_path::fixed_output_path(dir, "x", ca.method, &ca.hash).unwrap();
        let mut draft = draft(&rig);
        draft.outputs = [("out".parse().unwrap(), Output::Fixed { path, ca })].into();
        draft
    };
    let builders = Machine::new(&rig, "right").start(&rig, "machine");
    let settings = [("builders", builders.as_str()), ("max-jobs", "0")];
    let (failed, _) = rig.fail(&fixed("wrong"), &settings).await;
    assert_eq!(failed.status, BuildStatus::OutputRejected);
    assert!(failed.error.starts_with("hash mismatch in fixed-output derivation"), "{}", failed.error);
    let (drv, _) = rig.succeed(&fixed("right"), &settings).await;
    let info = rig.store.path_info(&rig.output(&drv, "out")).unwrap().unwrap();
    assert!(info.ca.is_some(), "it lost its content address");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_nobody_wants_any_more_ends_there() {
    let Some(rig) = Rig::new() else { return };
    let machine = Machine { hangs: true, ..Machine::new(&rig, "never") };
    let builders = machine.start(&rig, "machine");
    let drv = rig.add(&draft(&rig));
    let (_, client) = rig.client();
    let settings = rig.settings(&[("builders", &builders), ("max-jobs", "0")]);
    let scheduler = rig.scheduler.clone();
    let building = {
        let paths = vec![all_outputs(&drv)];
        tokio::spawn(async move { scheduler.realise(paths, BuildMode::Normal, settings, client).await })
    };
    soon("the build", || machine.asked.lock().iter().any(|r| matches!(r, Request::BuildDerivation { .. }))).await;
    assert_eq!(rig.scheduler.status()[0].machine.as_ref(), Some(&builders));
    let start = Instant::now();
    building.abort();
    soon("the end", || machine.gone.lock().is_some()).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(rig.scheduler.status().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_says_nothing_for_too_long_is_given_up() {
    let Some(rig) = Rig::new() else { return };
    let machine = Machine { hangs: true, ..Machine::new(&rig, "never") };
    let builders = machine.start(&rig, "machine");
    let settings = [("builders", builders.as_str()), ("max-jobs", "0"), ("max-silent-time", "1")];
    let (failed, _) = rig.fail(&draft(&rig), &settings).await;
    assert_eq!(failed.status, BuildStatus::TimedOut, "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_whose_machine_dies_is_done_elsewhere_once() {
    let Some(rig) = Rig::new() else { return };
    let dying = |contents: &str| Machine { leaves: true, ..Machine::new(&rig, contents) };
    let (first, second, third) = (dying("first"), dying("second"), Machine::new(&rig, "third"));
    let fast = |machine: &Machine, name, speed| format!("{} - - 1 {speed}", machine.start(&rig, name));
    let (one, two, three) = (fast(&first, "1", 9), fast(&second, "2", 5), fast(&third, "3", 1));
    let builds = |machine: &Machine| {
        machine.asked.lock().iter().filter(|request| matches!(request, Request::BuildDerivation { .. })).count()
    };

    // From one that dies to one that does not; everybody is told of both.
    let builders = format!("{one}; {three}");
    let (drv, log) = rig.succeed(&draft(&rig), &[("builders", &builders), ("max-jobs", "0")]).await;
    assert_eq!(rig.read(&rig.output(&drv, "out")), "third");
    assert_eq!((builds(&first), builds(&third)), (1, 1));
    assert_eq!(log.builds().len(), 2);
    assert!(log.notes().iter().any(|note| note.ends_with("broke off: unexpected end of file; trying elsewhere")));

    // It is left alone for a while, and what takes two machines down with it is tried on no third.
    let again = rig.derivation("y", "exit 1");
    let fourth = dying("fourth");
    let builders = format!("{one}; {two}; {}; {three}", fast(&fourth, "4", 3));
    let (failed, _) = rig.fail(&again, &[("builders", &builders), ("max-jobs", "0")]).await;
    assert!(failed.error.contains("broke off"), "{}", failed.error);
    assert_eq!([&first, &second, &fourth, &third].map(builds), [1, 1, 1, 1]);

    // Or from one that dies to here.
    let fifth = dying("fifth");
    let here = rig.derivation("z", "echo here > $out");
    let (drv, _) = rig.succeed(&here, &[("builders", &fast(&fifth, "5", 1))]).await;
    assert_eq!((builds(&fifth), rig.read(&rig.output(&drv, "out")).as_str()), (1, "here\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_dies_while_it_hands_its_work_over_has_lost_it() {
    let Some(rig) = Rig::new() else { return };
    let first = Machine { leaves_later: true, ..Machine::new(&rig, "first") };
    let second = Machine::new(&rig, "second");
    let builders = format!("{} - - 1 9; {} - - 1 1", first.start(&rig, "1"), second.start(&rig, "2"));
    let (drv, log) = rig.succeed(&draft(&rig), &[("builders", &builders), ("max-jobs", "0")]).await;
    assert_eq!(rig.read(&rig.output(&drv, "out")), "second");
    let told = |note: &String| note.contains("copying its outputs") && note.ends_with("trying elsewhere");
    assert!(log.notes().iter().any(told), "{:?}", log.notes());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_back_is_for_the_hook_and_keeps_its_own_signatures() {
    let Some(rig) = Rig::new() else { return };
    let theirs = Signature::parse(SIGNATURE).unwrap();
    let machine = Machine { signatures: [theirs.clone()].into(), ..Machine::new(&rig, "signed there") };
    let builders = machine.start(&rig, "machine");
    let (path, keys) = (hook(&rig, "hook", "cat $OUT_PATHS; echo; echo $DRV_PATH"), rig.path("key"));
    std::fs::write(&keys, SECRET_KEY).unwrap();
    let settings = [
        ("builders", builders.as_str()),
        ("max-jobs", "0"),
        ("post-build-hook", &path),
        ("secret-key-files", keys.to_str().unwrap()),
    ];
    let (drv, log) = rig.succeed(&draft(&rig), &settings).await;
    assert_eq!(hook_lines(&log), ["signed there".to_owned(), rig.store.store_dir().display(&drv)]);
    let info = rig.store.path_info(&rig.output(&drv, "out")).unwrap().unwrap();
    // As in stock: the keys are for what was built here.
    assert_eq!(info.signatures, [theirs].into());
}
