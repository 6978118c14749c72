//! Processes: clients that go away, what belongs to a connection, the socket, and who may do what.

use std::future::pending;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix_compat::conf::Settings;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::StoreDir;
use nix_compat::worker::SubstitutableInfo;
use substitute::{Answer, Client, Contents, Outcome, Substituter, Wanted};

use crate::common::Rig;
use crate::objects::{add_to_store, base_name, claim, derivation, file_nar, path};
use crate::raw::{Msg, NEWEST, Raw, Said, op};

/// Longer than the daemon's looks after its clients are apart.
const LOOKS: Duration = Duration::from_millis(700);

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(20), "waited in vain for this: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The paths that connections hold.
fn held(rig: &Rig) -> Vec<String> {
    let roots = rig.store.find_roots().unwrap();
    roots.into_iter().filter(|root| root.link.starts_with(b"{temp:")).map(|root| root.path.to_string()).collect()
}

/// A source of paths that never answers; it counts those who wait for it.
#[derive(Clone, Default)]
struct Never(Arc<AtomicUsize>);

struct Waiting(Arc<AtomicUsize>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Never {
    fn wait<'a, T: Send + 'a>(&'a self) -> Answer<'a, T> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let waiting = Waiting(self.0.clone());
        Box::pin(async move {
            let _waiting = waiting;
            pending::<T>().await
        })
    }
}

impl Substituter for Never {
    fn substitute<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Outcome> {
        self.wait()
    }
    fn realise<'a>(&'a self, _: &'a Client, _: DrvOutput) -> Answer<'a, Outcome> {
        self.wait()
    }
    fn contents<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Contents> {
        self.wait()
    }
    fn info<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Option<SubstitutableInfo>> {
        self.wait()
    }
    fn mass_info<'a>(&'a self, _: &'a Client, _: Wanted) -> Answer<'a, Option<SubstitutableInfo>> {
        self.wait()
    }
    fn realisation<'a>(&'a self, _: &'a Client, _: DrvOutput) -> Answer<'a, Option<Realisation>> {
        self.wait()
    }
}

/// A client that has only finished writing still wants its answers; one that is gone stops what it asked for, and takes
/// along what it held. What happens to a builder then is `a_client_that_goes_away_takes_its_build_along` of
/// compat-tests and `a_build_lives_as_long_as_somebody_wants_it` of the build crate.
#[test]
fn trap_36_a_half_closed_socket_is_served_and_a_closed_one_is_not() {
    let never = Never::default();
    let settings = Settings { trusted_users: vec!["*".into()], ..Settings::default() };
    let rig = Rig::with_substituter(StoreDir::default(), settings, Box::new(never.clone()));
    let big = file_nar(vec![b'b'; 24 << 20]);
    let known = claim("known", &big);
    Raw::new(&rig, NEWEST).add(&known, &big).unwrap();
    for minor in [18, 21, NEWEST] {
        // Several answers, one of them larger than what buffers hold, to a client that takes its time.
        let mut client = Raw::new(&rig, minor);
        client.send(&op(11).text(&known.path).raw(op(16).text(&known.path).word(0).0).raw(op(1).text(&known.path).0));
        client.half_close();
        std::thread::sleep(LOOKS);
        client.done();
        assert_eq!(client.word(), 1);
        let exported: usize = client
            .done()
            .into_iter()
            .map(|said| if let Said::Write(data) = said { data.len() } else { panic!("{said:?}") })
            .sum();
        assert!(exported > big.len());
        assert_eq!(client.word(), 1);
        client.done();
        assert_eq!(client.word(), 1);
        client.closed();
    }
    wait_until("the clients have left", || rig.daemon.clients().is_empty());
    assert_eq!(held(&rig), [""; 0]);

    // Work that neither reads nor writes goes on for a half-closed client, and ends with one that is gone.
    let absent = path("absent");
    let mut client = Raw::new(&rig, NEWEST);
    client.send(&op(10).text(&absent));
    client.half_close();
    wait_until("the work has begun", || never.0.load(Ordering::SeqCst) == 1);
    std::thread::sleep(LOOKS);
    assert_eq!(never.0.load(Ordering::SeqCst), 1, "a half-close was taken for a hang-up");
    assert_eq!(held(&rig), [base_name(&absent)]);
    drop(client);
    wait_until("the work was given up", || never.0.load(Ordering::SeqCst) == 0);
    wait_until("the client has left", || rig.daemon.clients().is_empty());
    assert_eq!(held(&rig), [""; 0]);

    // An upload and a download of which the other end disappears.
    let half = &big[..big.len() / 2];
    for minor in [18, 21, NEWEST] {
        let claim = claim(&format!("half-{minor}"), &big);
        let mut client = Raw::new(&rig, minor);
        client.send(&claim.add());
        match minor {
            18 => client.send(&Msg(half.to_vec())),
            21 => {
                assert!(matches!(client.said(), Said::Read(_)));
                client.send(&Msg::default().word(1000).raw("nix"));
            }
            _ => client.send(&Msg::default().frames(half, 1 << 16)),
        }
        wait_until("the upload is held", || held(&rig) == [base_name(&claim.path)]);
        let mut reading = Raw::new(&rig, minor);
        reading.send(&op(11).text(path("read")));
        reading.done();
        reading.send(&op(16).text(&known.path).word(0));
        drop((client, reading));
        wait_until("the clients have left", || rig.daemon.clients().is_empty());
        assert_eq!(held(&rig), [""; 0]);
        // One that only finishes writing in the middle is told.
        let mut client = Raw::new(&rig, minor);
        client.send(&claim.add());
        if minor == NEWEST {
            client.send(&Msg::default().frames(half, 1 << 16));
        }
        client.half_close();
        client.read_to_end();
        wait_until("the client has left", || rig.daemon.clients().is_empty());
    }
    assert_eq!(Raw::new(&rig, NEWEST).all_paths(), [known.path]);
}

/// Temporary roots belong to a connection, not to the process of the daemon: they go with their connection, and no
/// other takes them along.
#[test]
fn trap_37_temporary_roots_go_with_their_connection() {
    let rig = Rig::new(true);
    let archive = file_nar("held");
    let names = ["first", "second", "both"];
    let paths = names.map(path);
    let mut adding = Raw::new(&rig, NEWEST);
    for name in names {
        adding.add(&claim(name, &archive), &archive).unwrap();
    }
    let mut clients: Vec<Raw> = (0..2).map(|_| Raw::new(&rig, NEWEST)).collect();
    for (client, path) in clients.iter_mut().zip(&paths) {
        for path in [path, &paths[2], &path.replace("first", "not-even-valid")] {
            client.send(&op(11).text(path));
            client.done();
            assert_eq!(client.word(), 1);
        }
    }
    drop(adding);
    wait_until("who added has left", || rig.daemon.clients().len() == 2);
    let mut collecting = Raw::new(&rig, NEWEST);
    let mut collect = |expected: &[&str]| {
        collecting.send(&op(20).word(2).word(0).word(0).word(u64::MAX).word(0).word(0).word(0));
        collecting.done();
        collecting.texts();
        collecting.word();
        assert_eq!(collecting.word(), 0);
        let mut expected: Vec<String> = expected.iter().map(|name| path(name)).collect();
        expected.sort();
        assert_eq!(collecting.all_paths(), expected);
    };
    collect(&names);
    drop(clients.remove(0));
    wait_until("one has left", || rig.daemon.clients().len() == 2);
    collect(&["second", "both"]);
    // What an operation adds is held by its connection too, whatever the transport.
    let mut client = clients.remove(0);
    client.send(&add_to_store("text", "text:sha256", &[], b"held"));
    client.done();
    let text = client.text();
    client.claim(text.clone());
    let drv = derivation(&mut client, "held", &["out"], false);
    let mut other = Raw::new(&rig, 21);
    other.add(&claim("asked", &archive), &archive).unwrap();
    let many = claim("many", &archive).fields(Msg::default().word(1)).raw(&archive);
    other.send(&op(44).word(0).word(1).framed(&many.0));
    other.done();
    let mut expected: Vec<String> = ["second", "both", "asked", "many"].map(path).into();
    expected.extend([text, drv.path]);
    for path in &expected {
        assert!(held(&rig).iter().any(|held| held == base_name(path)), "{path} is not held");
    }
    drop((client, other));
    wait_until("both have left", || rig.daemon.clients().len() == 1);
    assert_eq!(held(&rig), [""; 0]);
    let mut collecting = Raw::new(&rig, NEWEST);
    collecting.send(&op(20).word(2).word(0).word(0).word(u64::MAX).word(0).word(0).word(0));
    collecting.done();
    collecting.texts();
    collecting.word();
    assert_eq!(collecting.word(), 0);
    assert_eq!(collecting.all_paths(), [""; 0]);
}

/// Every user may connect whatever the daemon's umask is; and systemd may have opened the socket already, as
/// descriptor 3.
#[test]
fn trap_38_the_socket_is_open_to_all_and_may_come_from_systemd() {
    const PART: &str = "CASTORED_TRAP_38";
    match std::env::var(PART).as_deref() {
        Ok("umask") => {
            let rig = Rig::new(true);
            assert!(rig.socket.ends_with("var/nix/daemon-socket/socket"), "{}", rig.socket.display());
            assert_eq!(std::fs::metadata(&rig.socket).unwrap().permissions().mode() & 0o777, 0o666);
            Raw::new(&rig, NEWEST).goes_on();
        }
        Ok("systemd") => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (_, socket) = keeper::given().unwrap().remove(0);
                let listener = daemon::adopt(socket).unwrap();
                let (client, _) = listener.accept().await.unwrap();
                client.writable().await.unwrap();
                assert_eq!(client.try_write(b"served").unwrap(), 6);
            });
        }
        _ => {
            let part = |part: &str, script: &str, stdin: Stdio| {
                let mut shell = Command::new("sh");
                shell.args(["-c", script]).arg(std::env::current_exe().unwrap());
                shell.env(PART, part).stdin(stdin).stdout(Stdio::null());
                shell.spawn().unwrap()
            };
            let this = "\"$0\" --exact processes::trap_38_the_socket_is_open_to_all_and_may_come_from_systemd";
            let mut child = part("umask", &format!("umask 077; exec {this}"), Stdio::null());
            assert!(child.wait().unwrap().success());

            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("socket");
            let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
            let script = format!("LISTEN_FDS=1 LISTEN_PID=$$ exec {this} 3<&0 0</dev/null");
            let mut child = part("systemd", &script, listener.into());
            let mut client = UnixStream::connect(&socket).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut served = [0; 6];
            std::io::Read::read_exact(&mut client, &mut served).unwrap();
            assert_eq!(&served, b"served");
            assert!(child.wait().unwrap().success());
            // Without that, there is none.
            assert!(keeper::given().unwrap().is_empty());
        }
    }
}

/// That root is trusted is no law but the default of a list: where the lists leave root out, root is refused, without a
/// byte.
#[test]
fn trap_39_the_lists_alone_say_who_is_trusted_and_allowed() {
    assert_eq!(Settings::default().trusted_users, ["root"]);
    assert_eq!(Settings::default().allowed_users, ["*"]);
    let me = nix::unistd::Uid::current();
    let me = nix::unistd::User::from_uid(me).unwrap().map_or_else(|| me.to_string(), |user| user.name);
    let with = |trusted: &[&str], allowed: &[&str]| {
        let list = |users: &[&str]| users.iter().map(|&user| user.to_owned()).collect();
        let settings = Settings { trusted_users: list(trusted), allowed_users: list(allowed), ..Settings::default() };
        Rig::with(StoreDir::default(), settings)
    };
    const TRUSTED: Option<u64> = Some(1);
    const NOT_TRUSTED: Option<u64> = Some(2);
    for (trusted, allowed, expected) in [
        (vec![me.as_str()], vec![], TRUSTED),
        (vec!["*"], vec![], TRUSTED),
        (vec!["somebody-else"], vec!["*"], NOT_TRUSTED),
        (vec![], vec![me.as_str()], NOT_TRUSTED),
        (vec!["somebody-else", "@no-such-group"], vec!["somebody-else"], None),
        (vec![], vec![], None),
    ] {
        let rig = with(&trusted, &allowed);
        if expected.is_some() {
            assert_eq!(Raw::new(&rig, NEWEST).trust, expected, "{trusted:?} {allowed:?}");
            assert_eq!(Raw::new(&rig, 34).trust, None);
            continue;
        }
        let mut stream = Raw::dial(&rig);
        let mut answer = Vec::new();
        // What was sent may be lost with the connection; nothing comes back.
        let _ = std::io::Write::write_all(&mut stream, &Msg::default().word(0x6e69_7863).0);
        let _ = std::io::Read::read_to_end(&mut stream, &mut answer);
        assert_eq!(answer, b"");
    }
}

/// Lix speaks 1.35 on this socket and will for ever; its own protocol lives on other sockets, and is off by default.
#[test]
fn trap_40_lix_clients_are_served_at_1_35() {
    let rig = Rig::new(true);
    let mut lix = Raw::new(&rig, 35);
    assert_eq!((lix.minor, lix.trust), (35, Some(1)));
    assert!(lix.daemon_version.as_ref().is_some_and(|version| version.starts_with("2.")));
    assert_eq!(lix.server_features, [""; 0]);
    let archive = file_nar("lix");
    let claim = claim("lix", &archive);
    lix.add(&claim, &archive).unwrap();
    assert_eq!(lix.nar(&claim.path), archive);
    let many = claim.fields(Msg::default().word(1)).raw(&archive);
    lix.send(&op(44).word(0).word(1).framed(&many.0));
    lix.done();
    lix.send(&add_to_store("lix", "fixed:r:sha256", &[], &archive));
    lix.done();
    let added = lix.text();
    assert_eq!(lix.claim(added.clone()).nar_size, archive.len() as u64);
    let drv = derivation(&mut lix, "built", &["out"], true);
    lix.send(&op(46).texts([format!("{}!out", drv.path)]).word(0));
    lix.done();
    assert_eq!((lix.word(), lix.text()), (1, format!("{}!out", drv.path)));
    assert_eq!((lix.word(), lix.text()), (2, String::new()));
    // No times of processors in 1.35; the outputs by hash, as JSON.
    for _ in 0..4 {
        lix.word();
    }
    assert_eq!((lix.word(), lix.text()), (1, format!("sha256:{}!out", drv.hash_modulo)));
    assert!(lix.text().contains(base_name(&drv.outputs["out"])));
    lix.send(&op(18).text(path("nothing")));
    lix.refused();
    lix.goes_on();
}
