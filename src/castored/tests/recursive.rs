//! Builds that use the store while they run: a daemon in this process, real builds, and this test as what runs in them.
//!
//! Works as root and as an ordinary user; without FUSE the tests say so and pass.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test, a panic is the report")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use build::{BuildConfig, Scheduler};
use daemon::{Daemon, Door, Extras, Locations};
use nix_compat::conf::Settings;
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::derivation::{BasicDerivation, Derivation, Output, OutputName};
use nix_compat::hash::{Algorithm, Hash, NarHash, sha256};
use nix_compat::nar::NarWriter;
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::wire::Writer;
use nix_compat::worker::handshake::Trust;
use nix_compat::worker::{
    AddToStore, AddToStoreNar, BuildMode, BuildResult, BuildStatus, CollectGarbage, DerivedPath, GcAction, GcTargets,
    MethodText, OutputsSpec, Request, Response, write_path_info,
};
use remote::{ClientError, Connection};
use store::{AddOptions, Config, Store};
use substitute::NoSubstituter;

const BUSYBOX: &str = "/usr/bin/busybox";
/// The newest protocol version.
const MINOR: u16 = 38;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Names the castored that is the sandbox helper, where the one that was built cannot be reached.
const HELPER_VARIABLE: &str = "CASTORED_TEST_HELPER";

fn helper() -> PathBuf {
    std::env::var_os(HELPER_VARIABLE).map_or_else(|| env!("CARGO_BIN_EXE_castored").into(), PathBuf::from)
}

struct Rig {
    runtime: Option<tokio::runtime::Runtime>,
    store: Arc<Store>,
    main: PathBuf,
    state: PathBuf,
    mount: Option<mount::Mount>,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// A daemon with one place for builds; `None`, after saying why, where there cannot be one.
    fn new(sandbox: bool) -> Option<Self> {
        Self::with(sandbox, "recursive-nix ca-derivations")
    }

    /// The same with these experimental features.
    fn with(sandbox: bool, features: &str) -> Option<Self> {
        if !Path::new(BUSYBOX).exists() {
            println!("SKIPPED: needs a static busybox");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("recursive").tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let locations = Locations::below(dir.path()).unwrap();
        let mountpoint = PathBuf::from(locations.store_dir.as_str());
        std::fs::create_dir_all(&mountpoint).unwrap();
        std::fs::create_dir_all(&locations.state_dir).unwrap();
        let store = Store::open(Config::new(locations.store_dir.clone(), &locations.state_dir)).unwrap();
        let mount = match mount::Mount::new(store.clone(), &mountpoint, mount::Options::default()) {
            Ok(mount) => mount,
            Err(error) => {
                println!("SKIPPED: cannot mount: {error}");
                return None;
            }
        };
        let mut settings = Settings { trusted_users: vec!["*".into()], ..Settings::default() };
        for (name, value) in [
            ("max-jobs", "1"),
            ("build-users-group", ""),
            ("sandbox", if sandbox { "true" } else { "false" }),
            ("sandbox-paths", "/usr/bin/busybox=/usr/bin/busybox /bin/sh=/usr/bin/busybox"),
            ("experimental-features", features),
            ("extra-system-features", if features.is_empty() { "recursive-nix" } else { "" }),
        ] {
            assert!(settings.set(name, value).unwrap());
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let helper = helper();
        let (main, state) = (locations.socket.clone(), locations.state_dir.clone());
        {
            let _inside = runtime.enter();
            let config = BuildConfig::new(&state, locations.log_dir.clone(), mountpoint, helper, 1);
            let scheduler = Scheduler::new(store.clone(), config, Box::new(NoSubstituter));
            let daemon = Daemon::new(store.clone(), scheduler, settings, locations, Extras::default()).unwrap();
            let listener = daemon::bind(&main).unwrap();
            runtime.spawn(async move { daemon.run(listener, Door::Main, std::future::pending()).await });
        }
        Some(Self { runtime: Some(runtime), store, main, state, mount: Some(mount), _dir: dir })
    }

    fn dir(&self) -> &StoreDir {
        self.store.store_dir()
    }

    fn show(&self, path: &StorePath) -> String {
        self.dir().display(path)
    }

    fn connect(&self, socket: &Path) -> Connection {
        let mut client = Connection::open_as(socket, self.dir(), MINOR).unwrap();
        client.set_limits(remote::Limits { silence: Some(PATIENCE), ..remote::Limits::default() });
        client
    }

    /// Adds a text to the store, as somebody whom no build knows.
    fn add(&self, name: &str, text: &str) -> StorePath {
        let options = AddOptions {
            name: name.into(),
            method: Method::Text,
            algorithm: Algorithm::Sha256,
            references: BTreeSet::new(),
        };
        self.store.add(&options, &mut text.as_bytes()).unwrap().path
    }

    fn derivation(&self, name: &str, script: &str, sources: &[&StorePath], recursive: bool) -> Derivation {
        let mut env = BTreeMap::from([(b"out".to_vec(), Vec::new()), (b"PATH".to_vec(), b"/none".to_vec())]);
        if recursive {
            env.insert(b"requiredSystemFeatures".to_vec(), b"recursive-nix".to_vec());
        }
        let script = format!("b={BUSYBOX}; {script}");
        let mut derivation = Derivation {
            basic: BasicDerivation {
                name: name.into(),
                outputs: BTreeMap::from([(OutputName::default(), Output::Deferred)]),
                input_srcs: sources.iter().map(|&path| path.clone()).collect(),
                platform: format!("{}-linux", std::env::consts::ARCH).into_bytes(),
                builder: b"/bin/sh".to_vec(),
                args: vec![b"-e".to_vec(), b"-c".to_vec(), script.into_bytes()],
                env,
            },
            input_drvs: BTreeMap::new(),
        };
        derivation.fill_outputs(self.dir(), &mut |_| None).unwrap();
        derivation
    }

    /// The request that adds a derivation.
    fn to_add(&self, derivation: &Derivation) -> Request {
        Request::AddTextToStore {
            name: format!("{}.drv", derivation.basic.name),
            text: derivation.to_aterm(self.dir()),
            references: derivation.references(),
        }
    }

    /// Starts a build for an ordinary client, on a thread of its own.
    fn start(&self, derivation: &Derivation) -> (StorePath, JoinHandle<BuildResult>) {
        let mut client = self.connect(&self.main);
        let drv = added(client.call(&self.to_add(derivation), nothing));
        let wanted = drv.clone();
        (drv, std::thread::spawn(move || build(&mut client, &wanted).unwrap()))
    }

    /// The build directory of the one build that is running with a socket.
    fn build_dir(&self) -> PathBuf {
        let builds = self.state.join("castored/builds");
        soon("the socket", || {
            let dirs = std::fs::read_dir(&builds).ok()?.flatten().map(|entry| entry.path().join("build"));
            // What the builder wrote says that it runs.
            dirs.into_iter().find(|dir| dir.join(".nix-socket").exists() && dir.join("ready").exists())
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_timeout(PATIENCE);
        self.mount.take().unwrap().unmount().unwrap();
    }
}

fn soon<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn nothing(_: &mut dyn Write) -> io::Result<()> {
    Ok(())
}

fn added(response: Result<Response, ClientError>) -> StorePath {
    match response.unwrap() {
        Response::Path(Some(path)) => path,
        Response::AddedPath(info) => info.path,
        other => panic!("{other:?}"),
    }
}

fn all_outputs(drv: &StorePath) -> DerivedPath {
    DerivedPath::Built { drv: drv.clone(), outputs: OutputsSpec::All }
}

fn build(client: &mut Connection, drv: &StorePath) -> Result<BuildResult, ClientError> {
    let request = Request::BuildPathsWithResults { paths: vec![all_outputs(drv)], mode: BuildMode::Normal };
    let Response::KeyedBuildResults(mut results) = client.call(&request, nothing)? else { panic!() };
    Ok(results.remove(0).1)
}

fn out(result: &BuildResult) -> StorePath {
    assert!(result.status.is_success(), "{result:?}");
    result.built_outputs[&OutputName::default()].path.clone()
}

fn nar(contents: &[u8]) -> Vec<u8> {
    let mut nar = NarWriter::new(Vec::new());
    nar.regular_header(false, contents.len() as u64).unwrap();
    nar.contents(contents).unwrap();
    nar.end_regular().unwrap();
    nar.finish().unwrap()
}

fn text_info(dir: &StoreDir, name: &str, text: &str, references: &[&StorePath]) -> PathInfo {
    let references: BTreeSet<StorePath> = references.iter().map(|&path| path.clone()).collect();
    let nar = nar(text.as_bytes());
    let ca = ContentAddress { method: Method::Text, hash: Hash::Sha256(sha256(text.as_bytes())) };
    let path = nix_compat::store_path::content_address_path(dir, name, &ca, &references, false).unwrap();
    PathInfo {
        path,
        deriver: None,
        nar_hash: NarHash::from(sha256(&nar)),
        references,
        registration_time: 0,
        nar_size: nar.len() as u64,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: Some(ca),
    }
}

/// Says that it runs, and waits until the test says `go`.
const WAIT: &str = "echo $NIX_REMOTE > remote; : > ready; while [ ! -e go ]; do $b sleep 0.05; done; ";

#[test]
fn a_build_knows_its_inputs_and_what_it_adds_and_nothing_else() {
    for sandbox in [true, false] {
        let Some(rig) = Rig::new(sandbox) else { return };
        let input = rig.add("input", "an input");
        let secret = rig.add("secret", "a secret");
        let other = rig.add("other", "another");
        let added_text = "added while it runs";
        let later = rig.store.store_dir().display(&text_info(rig.dir(), "later", added_text, &[]).path);
        let script = format!(
            "{WAIT} read -r line < {later} || :; echo $line > $out; echo {later} {} {} >> $out; \
             (echo x > {later}) 2>/dev/null && echo 'written to' >> $out || :",
            rig.show(&secret),
            rig.show(&input)
        );
        let (drv, building) = rig.start(&rig.derivation("outer", &script, &[&input], true));
        let dir = rig.build_dir();
        let inside = if sandbox { "/build".to_owned() } else { dir.display().to_string() };
        let remote = std::fs::read_to_string(dir.join("remote")).unwrap();
        assert_eq!(remote.trim(), format!("unix://{inside}/.nix-socket"));
        let socket = dir.join(".nix-socket");
        let mut client = rig.connect(&socket);
        assert_eq!(client.trust(), Trust::NotTrusted);
        let mut ask = |request: &Request| client.call(request, nothing);
        let refused = |response: Result<Response, ClientError>, part: &str| match response {
            Err(ClientError::Refused(text)) => assert!(text.contains(part), "{text}"),
            other => panic!("not refused, with '{part}': {other:?}"),
        };

        // What it may see, and what not.
        assert_eq!(ask(&Request::IsValidPath(input.clone())).unwrap(), Response::Bool(true));
        assert_eq!(ask(&Request::IsValidPath(secret.clone())).unwrap(), Response::Bool(false));
        assert_eq!(ask(&Request::IsValidPath(drv.clone())).unwrap(), Response::Bool(false));
        assert_eq!(ask(&Request::QueryAllValidPaths).unwrap(), Response::Paths([input.clone()].into()));
        let both = [input.clone(), secret.clone()];
        assert_eq!(
            ask(&Request::QueryValidPaths { paths: both.clone().into(), substitute: true }).unwrap(),
            Response::Paths([input.clone()].into())
        );
        assert_eq!(ask(&Request::QueryPathInfo(secret.clone())).unwrap(), Response::PathInfo(None));
        let Response::PathInfo(Some(info)) = ask(&Request::QueryPathInfo(input.clone())).unwrap() else { panic!() };
        assert_eq!((info.registration_time, info.ultimate, info.deriver), (0, false, None));
        refused(ask(&Request::QueryPathHash(secret.clone())), "is not valid");
        refused(ask(&Request::QueryReferences(secret.clone())), "is not valid");
        refused(ask(&Request::QueryDeriver(secret.clone())), "is not valid");
        refused(ask(&Request::NarFromPath(secret.clone())), "cannot dump unknown path");
        refused(ask(&Request::ExportPath(secret.clone())), "cannot dump unknown path");
        refused(ask(&Request::EnsurePath(secret.clone())), "cannot substitute unknown path");
        refused(ask(&Request::QueryDerivationOutputMap(drv.clone())), "cannot query output map for unknown path");
        assert_eq!(ask(&Request::QueryReferrers(input.clone())).unwrap(), Response::Paths(BTreeSet::new()));
        assert_eq!(ask(&Request::QueryValidDerivers(input.clone())).unwrap(), Response::Paths(BTreeSet::new()));
        let hash_part = |path: &StorePath| Request::QueryPathFromHashPart(path.base_name()[..32].to_owned());
        assert_eq!(ask(&hash_part(&secret)).unwrap(), Response::Path(None));
        assert_eq!(ask(&hash_part(&input)).unwrap(), Response::Path(Some(input.clone())));
        for path in [DerivedPath::Opaque(secret.clone()), all_outputs(&drv)] {
            let paths = vec![path.clone()];
            refused(
                ask(&Request::BuildPaths { paths: paths.clone(), mode: BuildMode::Normal }),
                "in recursive Nix because path is unknown",
            );
            let Response::Missing(missing) = ask(&Request::QueryMissing(paths)).unwrap() else { panic!() };
            assert_eq!(missing.unknown, BTreeSet::from([path.base().clone()]));
            assert!(missing.will_build.is_empty());
        }
        let paths = vec![DerivedPath::Opaque(input.clone())];
        refused(ask(&Request::BuildPaths { paths: paths.clone(), mode: BuildMode::Check }), "unsupported build mode");
        assert_eq!(ask(&Request::BuildPaths { paths, mode: BuildMode::Normal }).unwrap(), Response::One);
        assert_eq!(ask(&Request::EnsurePath(input.clone())).unwrap(), Response::One);

        // What concerns the store as a whole.
        assert_eq!(ask(&Request::FindRoots).unwrap(), Response::Roots(Vec::new()));
        let collect = |ignore_liveness| {
            Request::CollectGarbage(CollectGarbage {
                action: GcAction::DeleteDead,
                targets: GcTargets::WholeStore,
                ignore_liveness,
                max_freed: u64::MAX,
            })
        };
        let collected = Response::Collected { paths: BTreeSet::new(), bytes_freed: 0 };
        assert_eq!(ask(&collect(false)).unwrap(), collected);
        assert!(rig.store.is_valid(&other).unwrap(), "collected for a build");
        refused(ask(&collect(true)), "ignore liveness");
        assert_eq!(ask(&Request::OptimiseStore).unwrap(), Response::One);
        let verify = Request::VerifyStore { check_contents: true, repair: false };
        assert_eq!(ask(&verify).unwrap(), Response::Bool(false));
        let sign = Request::AddSignatures { path: input.clone(), signatures: BTreeSet::new() };
        refused(ask(&sign), "operation 'addSignatures' is not supported");
        refused(ask(&Request::AddPermRoot { path: input.clone(), link: b"/tmp/x".into() }), "not privileged");
        let link = dir.join("link");
        assert_eq!(ask(&Request::AddIndirectRoot(link.into_os_string().into_encoded_bytes())).unwrap(), Response::One);
        assert!(std::fs::read_dir(rig.state.join("gcroots/auto")).map_or(0, Iterator::count) == 0, "a root was made");
        // With the feature of newer ones, realisations have other names.
        let mut older = Connection::open_as(&socket, rig.dir(), MINOR - 1).unwrap();
        let realisation = |number: u8, path: &StorePath| {
            Realisation::new(DrvOutput::Modulo { hash: [number; 32], output: OutputName::default() }, path.clone())
        };
        refused(older.call(&Request::RegisterDrvOutput(realisation(1, &input)), nothing), "registerDrvOutput");
        for (number, path, known) in [(2, &secret, false), (3, &input, true)] {
            let realisation = realisation(number, path);
            rig.store.register_realisation(&realisation, store::SignaturePolicy::DontCheck).unwrap();
            let response = older.call(&Request::QueryRealisation(realisation.id.clone()), nothing).unwrap();
            assert_eq!(response, Response::Realisation(known.then_some(realisation)));
        }

        // What it has no right to add: what refers to a secret, and what it only knows the name of.
        let reference = [secret.clone()].into();
        let pointing = Request::AddTextToStore { name: "pointing".into(), text: Vec::new(), references: reference };
        refused(ask(&pointing), "is not valid");
        let mut sneaky = rig.derivation("sneaky", &format!("$b cat {} > $out", rig.show(&secret)), &[&secret], false);
        let unsaid = Request::AddTextToStore {
            name: "sneaky.drv".into(),
            text: sneaky.to_aterm(rig.dir()),
            references: BTreeSet::new(),
        };
        refused(ask(&unsaid), &format!("path '{}' is not valid", rig.show(&secret)));
        sneaky.basic.input_srcs.clear();
        sneaky.basic.outputs.insert(OutputName::default(), Output::Deferred);
        sneaky.basic.env.insert(b"out".to_vec(), Vec::new());
        sneaky.fill_outputs(rig.dir(), &mut |_| None).unwrap();
        let sneaky = added(ask(&rig.to_add(&sneaky)));
        let mut claimed = text_info(rig.dir(), "secret", "a secret", &[]);
        assert_eq!(claimed.path, secret);
        let guess = nar(b"a guess!");
        for nar_hash in [NarHash::from(sha256(&guess)), claimed.nar_hash] {
            claimed.nar_hash = nar_hash;
            let add = AddToStoreNar { info: claimed.clone(), repair: false, dont_check_sigs: true };
            let response = client.call(&Request::AddToStoreNar(add), |out| out.write_all(&guess));
            assert!(matches!(response, Err(ClientError::Refused(_))), "{response:?}");
            assert_eq!(client.call(&Request::IsValidPath(secret.clone()), nothing).unwrap(), Response::Bool(false));
        }
        // Who has the contents may have the path.
        let add = AddToStoreNar {
            info: text_info(rig.dir(), "other", "another", &[]),
            repair: false,
            dont_check_sigs: false,
        };
        client.call(&Request::AddToStoreNar(add), |out| out.write_all(&nar(b"another"))).unwrap();
        assert_eq!(client.call(&Request::IsValidPath(other.clone()), nothing).unwrap(), Response::Bool(true));
        let mut bytes = vec![0; nar(b"another").len()];
        client.call(&Request::NarFromPath(other.clone()), nothing).unwrap();
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, nar(b"another"));

        // Several at once, the second of which refers to the first, unless one is only known by name.
        let first = text_info(rig.dir(), "first", "the first", &[]);
        let second = text_info(rig.dir(), "second", "the second", &[&first.path]);
        let several = |client: &mut Connection, paths: &[(&PathInfo, &str)]| {
            let mut stream = Writer::new();
            stream.u64(paths.len() as u64);
            for (info, text) in paths {
                write_path_info(info, client.protocol(), &mut stream);
                stream.raw(&nar(text.as_bytes()));
            }
            let request = Request::AddMultipleToStore { repair: false, dont_check_sigs: false };
            client.call(&request, |out| out.write_all(stream.as_bytes()))
        };
        let response = several(&mut client, &[(&first, "the first"), (&claimed, "a guess!"), (&second, "the second")]);
        assert!(matches!(response, Err(ClientError::Refused(_))), "{response:?}");
        assert_eq!(client.call(&Request::IsValidPath(secret.clone()), nothing).unwrap(), Response::Bool(false));
        several(&mut client, &[(&first, "the first"), (&second, "the second")]).unwrap();

        // And in every other way.
        let tree = AddToStore {
            name: "tree".into(),
            method: MethodText::new(Method::Nar, Algorithm::Sha256),
            references: [input.clone()].into(),
            repair: false,
        };
        let tree = added(client.call(&Request::AddToStore(tree), |out| out.write_all(&nar(b"a tree"))));
        let old =
            Request::AddToStoreOld { name: "old".into(), method: MethodText::new(Method::Nar, Algorithm::Sha256) };
        let old =
            added(Connection::open_as(&socket, rig.dir(), 21).unwrap().call(&old, |out| out.write_all(&nar(b"old"))));
        let text =
            Request::AddTextToStore { name: "later".into(), text: added_text.into(), references: BTreeSet::new() };
        let later = added(client.call(&text, nothing));
        let known: BTreeSet<StorePath> =
            [&sneaky, &input, &other, &first.path, &second.path, &tree, &old, &later].into_iter().cloned().collect();
        assert_eq!(client.call(&Request::QueryAllValidPaths, nothing).unwrap(), Response::Paths(known));

        // Nothing of it is garbage while the build runs, although nothing roots it.
        let outside = rig.connect(&rig.main).call(&collect(false), nothing).unwrap();
        let Response::Collected { paths, .. } = outside else { panic!() };
        assert!(!paths.contains(rig.show(&later).as_bytes()) && rig.store.is_valid(&tree).unwrap());

        std::fs::write(dir.join("go"), "").unwrap();
        let result = building.join().unwrap();
        let out = out(&result);
        let text = std::fs::read_to_string(rig.show(&out)).unwrap();
        assert_eq!(
            text,
            format!("{added_text}\n{} {} {}\n", rig.show(&later), rig.show(&secret), rig.show(&input)),
            "sandbox = {sandbox}"
        );
        let references = rig.store.path_info(&out).unwrap().unwrap().references;
        assert_eq!(references, BTreeSet::from([input, later]), "what it named and could see");
        // The socket, and those who talk through it, are gone with the builder.
        assert!(Connection::open_as(&socket, rig.dir(), MINOR).is_err());
        let response = client.call(&Request::QueryAllValidPaths, nothing);
        assert!(matches!(response, Err(ClientError::Broken(_))), "{response:?}");
    }
}

#[test]
fn what_it_has_built_takes_its_own_place() {
    for sandbox in [true, false] {
        let Some(rig) = Rig::new(sandbox) else { return };
        let (_, building) =
            rig.start(&rig.derivation("outer", &format!("{WAIT} $b cat $($b cat go) > $out"), &[], true));
        let dir = rig.build_dir();
        let mut inner = rig.connect(&dir.join(".nix-socket"));

        // There is one place, and the outer build has it.
        let first = rig.derivation("first", "echo first > $out", &[], false);
        let drv = added(inner.call(&rig.to_add(&first), nothing));
        let first = out(&build(&mut inner, &drv).unwrap());
        assert_eq!(inner.call(&Request::IsValidPath(first.clone()), nothing).unwrap(), Response::Bool(true));

        // Somebody else's goal, who was here first and waits for the machine's only place.
        let shared = rig.derivation("shared", "echo shared > $out", &[&first], false);
        let (drv, elsewhere) = rig.start(&shared);
        std::thread::sleep(Duration::from_millis(300));
        assert!(!elsewhere.is_finished(), "there were two places");
        assert_eq!(added(inner.call(&rig.to_add(&shared), nothing)), drv);
        let shared = out(&build(&mut inner, &drv).unwrap());
        assert_eq!(out(&elsewhere.join().unwrap()), shared);

        // A derivation sent along, which must be addressed by its contents.
        let mut sent = rig.derivation("sent", "echo sent > $out", &[&shared], false).basic;
        let request = |derivation: &BasicDerivation| Request::BuildDerivation {
            drv_path: StorePath::from_parts([7; 20], "sent.drv").unwrap(),
            derivation: derivation.clone(),
            mode: BuildMode::Normal,
        };
        let refused = inner.call(&request(&sent), nothing);
        assert!(matches!(&refused, Err(ClientError::Refused(text)) if text.contains("input-addressed")), "{refused:?}");
        let floating = Output::Floating { method: Method::Nar, algo: Algorithm::Sha256 };
        sent.outputs.insert(OutputName::default(), floating);
        let output = nix_compat::derivation::output_placeholder(&OutputName::default());
        sent.env.insert(b"out".to_vec(), output.into_bytes());
        let Response::BuildResult(result) = inner.call(&request(&sent), nothing).unwrap() else { panic!() };
        let floating = out(&result);
        assert_eq!(inner.call(&Request::IsValidPath(floating.clone()), nothing).unwrap(), Response::Bool(true));
        let hidden = rig.add("hidden", "hidden");
        sent.input_srcs.insert(hidden);
        let refused = inner.call(&request(&sent), nothing);
        assert!(matches!(&refused, Err(ClientError::Refused(text)) if text.contains("is unknown")), "{refused:?}");

        let all = [&first, &shared, &floating].map(|path| rig.show(path)).join(" ");
        std::fs::write(dir.join("go.new"), all).unwrap();
        std::fs::rename(dir.join("go.new"), dir.join("go")).unwrap();
        let result = building.join().unwrap();
        let text = std::fs::read_to_string(rig.show(&out(&result))).unwrap();
        assert_eq!(text, "first\nshared\nsent\n", "sandbox = {sandbox}");
    }
}

#[test]
fn a_failure_inside_is_told_and_a_build_cannot_wait_for_itself() {
    let Some(rig) = Rig::new(true) else { return };
    let outer = rig.derivation("outer", &format!("{WAIT} echo done > $out"), &[], true);
    let (drv, building) = rig.start(&outer);
    let dir = rig.build_dir();
    let mut inner = rig.connect(&dir.join(".nix-socket"));
    let failing = added(inner.call(&rig.to_add(&rig.derivation("failing", "exit 3", &[], false)), nothing));
    let result = build(&mut inner, &failing).unwrap();
    assert_eq!(result.status, BuildStatus::PermanentFailure);

    // It may well know its own derivation.
    assert_eq!(added(inner.call(&rig.to_add(&outer), nothing)), drv);
    let result = build(&mut inner, &drv).unwrap();
    assert!(result.error.contains("within a build that it needs itself"), "{result:?}");
    // The same by way of another.
    let mut around = rig.derivation("around", "echo > $out", &[], false);
    around.input_drvs.insert(drv, BTreeSet::from([OutputName::default()]).into());
    around.basic.outputs.insert(OutputName::default(), Output::Deferred);
    around.basic.env.insert(b"out".to_vec(), Vec::new());
    around.fill_outputs(rig.dir(), &mut |input| rig.store.hash_modulo(input).ok()).unwrap();
    let around = added(inner.call(&rig.to_add(&around), nothing));
    let result = build(&mut inner, &around).unwrap();
    assert!(result.error.contains("within a build that it needs itself"), "{result:?}");

    std::fs::write(dir.join("go"), "").unwrap();
    out(&building.join().unwrap());
}

#[test]
fn builds_inside_builds_inside_builds() {
    let Some(rig) = Rig::new(true) else { return };
    let waiting = |name: &str| rig.derivation(name, &format!("{WAIT} echo {name} > $out"), &[], true);
    let (_, building) = rig.start(&waiting("outer"));
    let outer = rig.build_dir();
    let mut client = rig.connect(&outer.join(".nix-socket"));
    let middle_drv = added(client.call(&rig.to_add(&waiting("middle")), nothing));
    std::fs::remove_file(outer.join("ready")).unwrap();
    let middle = std::thread::spawn(move || build(&mut client, &middle_drv).unwrap());
    let middle_dir = rig.build_dir();
    assert_ne!(middle_dir, outer);
    let mut client = rig.connect(&middle_dir.join(".nix-socket"));
    assert_eq!(client.call(&Request::QueryAllValidPaths, nothing).unwrap(), Response::Paths(BTreeSet::new()));
    let innermost = rig.derivation("innermost", "echo > $out", &[], false);
    let drv = added(client.call(&rig.to_add(&innermost), nothing));
    out(&build(&mut client, &drv).unwrap());
    for (dir, build) in [(middle_dir, middle), (outer, building)] {
        std::fs::write(dir.join("go"), "").unwrap();
        out(&build.join().unwrap());
    }
}

#[test]
fn sessions_end_with_a_build_that_nobody_wants() {
    let Some(rig) = Rig::new(true) else { return };
    let mut outside = rig.connect(&rig.main);
    let drv = added(outside.call(&rig.to_add(&rig.derivation("outer", WAIT, &[], true)), nothing));
    let stream = std::os::unix::net::UnixStream::connect(&rig.main).unwrap();
    let ours = stream.try_clone().unwrap();
    let mut client = Connection::over(stream, rig.dir(), MINOR, remote::Limits::default()).unwrap();
    let building = std::thread::spawn(move || build(&mut client, &drv));
    let dir = rig.build_dir();
    let mut inner = rig.connect(&dir.join(".nix-socket"));
    let endless = rig.derivation("endless", "while :; do $b sleep 1; done", &[], false);
    let endless = added(inner.call(&rig.to_add(&endless), nothing));
    let waiting = std::thread::spawn(move || build(&mut inner, &endless));
    let builds = rig.state.join("castored/builds");
    soon("the inner build", || (std::fs::read_dir(&builds).unwrap().count() == 2).then_some(()));
    ours.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(building.join().unwrap().is_err());
    assert!(matches!(waiting.join().unwrap(), Err(ClientError::Broken(_))));
    soon("the end of both builds", || (std::fs::read_dir(&builds).unwrap().count() == 0).then_some(()));
}

#[test]
fn only_who_asks_and_may_gets_a_socket() {
    let Some(rig) = Rig::new(true) else { return };
    let derivation = rig.derivation("plain", "echo ${NIX_REMOTE-none} > $out; [ ! -e .nix-socket ]", &[], false);
    let (_, building) = rig.start(&derivation);
    let out = out(&building.join().unwrap());
    assert_eq!(std::fs::read_to_string(rig.show(&out)).unwrap(), "none\n");
    // Though the settings claim the system feature.
    let Some(rig) = Rig::with(true, "") else { return };
    let (_, building) = rig.start(&rig.derivation("asking", "echo > $out", &[], true));
    let result = building.join().unwrap();
    assert!(result.error.contains("experimental Nix feature 'recursive-nix' is disabled"), "{result:?}");
}

/// All of the above once more, where the tests are run by root: the daemon of an ordinary user shows things to its builds
/// in another way.
#[test]
fn all_of_it_as_an_ordinary_user() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: this is one already");
        return;
    }
    let dir = tempfile::Builder::new().prefix("recursive-user").tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (test, helper) = (dir.path().join("test"), dir.path().join("castored"));
    std::fs::copy(std::env::current_exe().unwrap(), &test).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_castored"), &helper).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"])
        .arg(&test)
        .args(["--nocapture", "--skip", "all_of_it_as_an_ordinary_user"])
        .current_dir(dir.path())
        .env(HELPER_VARIABLE, &helper)
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print!("{text}");
    assert!(output.status.success(), "{text}");
}
