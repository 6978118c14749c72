//! `compat-tests/demo`: the main job, from a fresh machine to a built program, with an unmodified Nix client.
//!
//! Every command is shown before its output. Any wrong result ends the demo with an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use compat_tests::apt::{self, PrivateApt};
use compat_tests::checks::{expect_contains, expect_eq};
use compat_tests::error::Context;
use compat_tests::grpc::Server;
use compat_tests::machine::{self, CACHE, Machine};
use compat_tests::subject::{Daemon, GRPC_VARIABLE, SOCKET, default_conf};
use compat_tests::{Call, Error, Output, Result, Room, Subject, Who, nar, tree};
use data_encoding::BASE64;
use serde_json::json;

/// The tree that is added must have at least this many bytes.
const TREE_BYTES: u64 = 500_000_000;

/// The Debian release whose source package of GNU hello is built.
const HELLO_SUITE: &str = "bookworm";

fn main() -> ExitCode {
    if let Some(reason) = machine::obstacle() {
        eprintln!("the demo cannot run here: {reason}");
        return ExitCode::FAILURE;
    }
    match demo() {
        Ok(()) => {
            println!("\nThe demo is over; everything it showed was checked.");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("\nthe demo failed: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Announces a part.
fn part(title: &str) {
    println!("\n=== {title}");
}

fn demo() -> Result<()> {
    part("Setting up");
    let machine = machine::prepare()?;
    apt::install(&["gcc", "libc6-dev", "make"])?;
    let sources = hello_sources()?;
    let subject = Subject::from_environment()?;
    let room = Room::enter("demo")?;
    println!("castored:   {}", subject.binary().display());
    println!("client:     nix {}, as Debian ships it, run by an unprivileged user", machine.newest().version);
    println!("/nix:       private to this demo (a mount namespace of its own), gone afterwards");

    let grpc = machine::free_address()?.to_string();
    let mut command = subject.command(&room, &build_conf())?;
    command.env(GRPC_VARIABLE, &grpc);
    let daemon = Daemon::spawn(command, &room, Path::new(SOCKET))?;
    println!("daemon:     pid {}, socket {SOCKET}, gRPC {grpc}", daemon.pid());
    let d = Demo { machine, room, stock: subject.is_stock() };
    d.nix("nix").args(["store", "info"]).ok()?;
    d.say("ls", &["-ld", "/nix/store"])?;

    let tree = d.add_and_read_back()?;
    let hello = d.build_hello(&sources)?;
    d.queries(&hello)?;
    if d.stock {
        println!("\n(a stock daemon has neither digests, gRPC nor statistics to show)");
    } else {
        let digest = d.attributes(&hello)?;
        look_inside(&grpc, &d, &hello, &digest)?;
        d.sizes(&subject)?;
    }

    part("Stopping");
    let started = Instant::now();
    daemon.stop()?;
    println!("SIGTERM; the daemon ended by itself after {:?}", started.elapsed());
    println!("added {tree}");
    println!("built {hello}");
    Ok(())
}

/// GNU hello's source package, fetched once through the machine's Debian mirror.
fn hello_sources() -> Result<PathBuf> {
    let sources = Path::new(CACHE).join("hello-source");
    let tarball = |dir: &Path| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
        entries
            .into_iter()
            .find(|p| p.to_string_lossy().contains(".orig.tar.") && !p.to_string_lossy().ends_with(".asc"))
    };
    if let Some(found) = tarball(&sources) {
        return Ok(found);
    }
    println!("fetching the Debian source package of GNU hello");
    let (work, new) = (Path::new(CACHE).join(".apt/hello"), Path::new(CACHE).join(".new-hello-source"));
    PrivateApt::new(&work, "deb-src", HELLO_SUITE)?.download_source("hello", &new)?;
    fs::rename(&new, &sources).doing("moving into place", &sources)?;
    fs::remove_dir_all(&work).doing("removing", &work)?;
    tarball(&sources).ok_or_else(|| Error::Wrong("the source package of hello has no .orig.tar".into()))
}

/// The daemon's nix.conf: the machine's own compiler is let into the sandbox by an administrator's decision.
fn build_conf() -> String {
    let paths =
        ["/bin", "/lib", "/lib64", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/share", "/usr/include"];
    let paths: Vec<&str> = paths.into_iter().chain(["/etc/alternatives"]).filter(|p| Path::new(p).exists()).collect();
    let conf: String =
        default_conf().lines().filter(|l| !l.starts_with("sandbox-paths")).map(|l| format!("{l}\n")).collect();
    format!("{conf}sandbox-paths = {}\n", paths.join(" "))
}

/// The parts of the demo that run clients.
struct Demo {
    machine: &'static Machine,
    room: Room,
    stock: bool,
}

impl Demo {
    /// A stock client command, run by the unprivileged user.
    fn nix(&self, name: &str) -> Call {
        Call::nix(&self.room, Who::User, self.machine.newest(), name).limit(Duration::from_secs(600))
    }

    /// An ordinary command, run by the same user.
    fn say(&self, program: &str, args: &[&str]) -> Result<Output> {
        Call::new(&self.room, Who::User, program).args(args).limit(Duration::from_secs(600)).ok()
    }

    /// Adds a large tree and compares it byte for byte with what the mount shows.
    fn add_and_read_back(&self) -> Result<String> {
        part("Adding a real tree of more than 500 MB, and reading it back through the mount");
        let tree = tree::from_usr(&self.room.tmp("usr"), TREE_BYTES)?;
        self.say("du", &["-sh", "--apparent-size", &tree])?;
        let started = Instant::now();
        let path = self.nix("nix-store").args(["--add", &tree]).ok()?.text();
        println!("    ({:.1?})", started.elapsed());
        self.say("ls", &[&path])?;
        let started = Instant::now();
        self.say("diff", &["-r", "--no-dereference", &tree, &path])?;
        println!("    (no difference; {:.1?})", started.elapsed());
        let hash = self.nix("nix-store").args(["--query", "--hash", &path]).ok()?.text();
        let base16 =
            self.nix("nix-hash").args(["--type", "sha256", "--to-base16"]).arg(hash.trim_start_matches("sha256:"));
        let (own, size) = nar::hash_path(Path::new(&path))?;
        expect_eq("the archive's hash", &nar::hex(&own), &base16.ok()?.text())?;
        println!("    (the same as the SHA-256 of the archive made from the mount: {size} bytes)");
        if size < TREE_BYTES {
            return Err(Error::Wrong(format!("the tree has only {size} bytes")));
        }
        Ok(path)
    }

    /// Builds GNU hello in four steps, each a derivation of its own.
    fn build_hello(&self, tarball: &Path) -> Result<String> {
        part("Building GNU hello from its Debian source: unpack, configure, make, install");
        let file = self.room.write("hello.nix", HELLO.replace("@tarball@", &tarball.display().to_string()))?;
        let file = file.display().to_string();
        Call::new(&self.room, Who::User, "cat").arg(&file).lines(usize::MAX).ok()?;
        let started = Instant::now();
        let build = self.nix("nix").args(["build", "--print-build-logs", "--print-out-paths", "--out-link", "result"]);
        let built = build.args(["--impure", "--file", &file]).ok()?;
        println!("    ({:.1?})", started.elapsed());
        let out = built.text();
        let program = format!("{out}/bin/hello");
        let said = self.say(&program, &[])?.text();
        expect_eq("hello's greeting", &said, "Hello, world!")?;
        self.say("result/bin/hello", &["--greeting=built by castored"])?;
        Ok(out)
    }

    /// What the store knows about the result.
    fn queries(&self, hello: &str) -> Result<()> {
        part("Asking about it");
        let store = |args: &[&str]| self.nix("nix-store").arg("--query").args(args).ok().map(|o| o.text());
        let drv = store(&["--deriver", hello])?;
        expect_contains(&drv, "-hello-install.drv")?;
        let inputs = store(&["--references", &drv])?;
        expect_contains(&inputs, "-hello-make.drv")?;
        let all = store(&["--requisites", &drv])?;
        for step in ["unpack", "configure", "make", "install"] {
            expect_contains(&all, &format!("-hello-{step}.drv"))?;
        }
        expect_contains(&store(&["--referrers", inputs.lines().next().unwrap_or_default()])?, ".drv")?;
        expect_contains(&store(&["--roots", hello])?, "result")?;
        expect_contains(&store(&["--tree", &drv])?, "-hello-unpack.drv")?;
        store(&["--requisites", hello])?;
        let log = self.nix("nix").args(["log", hello]).ok()?.text();
        expect_contains(&log, "install")
    }

    /// The digests that the mount shows as attributes; answers the program's, in base 64.
    fn attributes(&self, hello: &str) -> Result<String> {
        part("The castore's digests, as extended attributes");
        let program = format!("{hello}/bin/hello");
        let shown = self.say("getfattr", &["-d", "--absolute-names", &program])?.text();
        let directory = self.say("getfattr", &["-d", "--absolute-names", hello])?.text();
        expect_contains(&directory, "user.tvix.castore.directory.digest=\"b3:")?;
        let sum = self.say("b3sum", &["--no-names", &program])?.text();
        let bytes = data_encoding::HEXLOWER.decode(sum.as_bytes()).map_err(|e| Error::Wrong(format!("b3sum: {e}")))?;
        let digest = BASE64.encode(&bytes);
        expect_contains(&shown, &format!("user.tvix.castore.blob.digest=\"b3:{digest}\""))?;
        println!("    (b3sum agrees: {digest} is {sum} in base 64)");
        Ok(digest)
    }

    /// The store's size on disk beside what it holds.
    fn sizes(&self, subject: &Subject) -> Result<()> {
        part("What it takes on disk");
        let json = self.nix("nix").args(["path-info", "--all", "--json"]).quiet().ok()?.text();
        let infos: serde_json::Value = serde_json::from_str(&json).map_err(|e| Error::Wrong(e.to_string()))?;
        let each: Vec<&serde_json::Value> = match &infos {
            serde_json::Value::Array(list) => list.iter().collect(),
            serde_json::Value::Object(map) => map.values().collect(),
            _ => Vec::new(),
        };
        let nars: u64 = each.iter().filter_map(|i| i["narSize"].as_u64()).sum();
        Call::new(&self.room, Who::Root, subject.binary()).arg("stats").ok()?;
        // What is really allocated, journals and all; the mount itself is not part of it.
        let du = Call::new(&self.room, Who::Root, "du").args(["-s", "--block-size=1", "/nix/var/nix"]).ok()?.text();
        let disk: u64 = du.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or_default();
        let percent = disk as f64 * 100.0 / nars as f64;
        println!("    {} paths, {nars} bytes as archives, {disk} bytes on disk: {percent:.1} %", each.len());
        if disk == 0 || disk >= nars {
            return Err(Error::Wrong("the store takes more room than its archives".into()));
        }
        Ok(())
    }
}

/// The same blob over gRPC, by a client that knows only what reflection tells it.
fn look_inside(address: &str, d: &Demo, hello: &str, digest: &str) -> Result<()> {
    part("Looking inside over gRPC, by reflection alone");
    let server = Server::connect(address)?;
    println!("> list services");
    for service in server.services()? {
        println!("    {service}");
    }
    println!("> tvix.castore.v1.BlobService/Read {{ \"digest\": \"{digest}\" }}");
    let chunks = server.call("tvix.castore.v1.BlobService", "Read", &[json!({ "digest": digest })])?;
    let mut bytes = Vec::new();
    for chunk in &chunks {
        let data = chunk["data"].as_str().unwrap_or_default();
        bytes.extend(BASE64.decode(data.as_bytes()).map_err(|e| Error::Wrong(e.to_string()))?);
    }
    let program = Path::new(hello).join("bin/hello");
    let through_mount = fs::read(&program).doing("reading", &program)?;
    if bytes != through_mount {
        return Err(Error::Wrong(format!("Read answered {} bytes, not those of {}", bytes.len(), program.display())));
    }
    println!("    {} bytes in {} messages: those of {}", bytes.len(), chunks.len(), program.display());
    println!("> tvix.castore.v1.BlobService/Put {{ \"data\": \"{}\" }}", BASE64.encode(b"x86_64-linux"));
    let put =
        server.call("tvix.castore.v1.BlobService", "Put", &[json!({ "data": BASE64.encode(b"x86_64-linux") })])?;
    let answered = put.first().and_then(|m| m["digest"].as_str()).unwrap_or_default().to_owned();
    println!("    {answered}");
    expect_eq("the digest of x86_64-linux", &answered, "KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=")?;
    let valid = d.nix("nix-store").args(["--query", "--hash", hello]).quiet().ok()?.text();
    expect_contains(&valid, "sha256:")
}

/// Four derivations, each taking the one before it as its input. The tarball is itself a path of the store.
const HELLO: &str = r#"let
  step = name: script: previous: derivation {
    name = "hello-${name}";
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-euc" "export PATH=/usr/bin:/bin; ${script}" ];
    inherit previous;
  };
  tarball = builtins.path { path = @tarball@; name = "hello.tar"; };

  unpack = step "unpack" "mkdir $out; tar -xf $previous -C $out --strip-components=1" tarball;
  configure = step "configure"
    "cp -r $previous $out; chmod -R u+w $out; cd $out; ./configure --prefix=/usr --disable-nls --disable-dependency-tracking" unpack;
  make = step "make"
    "cp -r $previous $out; chmod -R u+w $out; cd $out; find . -exec touch -d @1 {} +; make MAKEINFO=true" configure;
  install = step "install"
    "cp -r $previous tree; chmod -R u+w tree; cd tree; find . -exec touch -d @1 {} +; make MAKEINFO=true install-exec prefix=$out" make;
in install
"#;
