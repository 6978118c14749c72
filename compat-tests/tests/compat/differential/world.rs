//! What is in both stores before anything is asked: the same paths, made in the same way, and roots that keep them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use compat_tests::nar::{Tree, hex, sha256};
use compat_tests::raw::{Question, Shape, shapes};
use compat_tests::wire::{Client, Request};
use compat_tests::{Call, Daemon, Release, Room, Who};

/// A directory that both daemons have under the same name, for links that clients make.
pub(super) const LINKS: &str = "/nix/links";
/// Directly below it are roots.
const ROOTS: &str = "/nix/var/nix/gcroots";
/// A path that is not content-addressed and that nobody's key has signed.
pub(super) const SIGNED: &str = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-signed";
/// A signature that parses and means nothing.
pub(super) const SIGNATURE: &str =
    "test-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==";

/// The paths that questions are about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct World {
    /// A directory.
    pub source: String,
    /// A text that refers to the directory.
    pub text: String,
    /// A file hashed flat.
    pub flat: String,
    /// [`SIGNED`], which refers to the directory and to itself.
    pub signed: String,
    /// Derivations by their names, with the text of each.
    derivations: BTreeMap<String, (String, String)>,
}

/// Everything that sessions build: `@` stands for the session's tag. Whose name begins with `ca` is fixed.
const EXPRESSION: &str = r#"
let
  make = name: script: more: derivation ({
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ];
  } // more);
  fixed = name: hash: make name "echo fixed > $out" {
    outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = hash; unique = name;
  };
  right = "@right@"; wrong = "@wrong@";
  of = tag: rec {
    plain = make "plain-${tag}" "echo ${tag} > $out; echo a line of the log" { };
    other = make "other-${tag}" "echo ${tag} > $out" { };
    multi = make "multi-${tag}" "mkdir $out; echo $out > $dev" { outputs = [ "out" "dev" ]; };
    user = make "user-${tag}" "read l < ${plain}; echo $l ${plain} > $out" { };
    failing = make "failing-${tag}" "echo ${tag}; exit 3" { };
    needs = make "needs-${tag}" "read l < ${failing}" { };
    nothing = make "nothing-${tag}" "true" { };
    random = make "random-${tag}" "cat /proc/sys/kernel/random/uuid > $out" { };
    slow = make "slow-${tag}" "sleep 60" { };
    basic = make "basic-${tag}" "echo ${tag} > $out" { };
    forbidden = make "forbidden-${tag}" "echo ${plain} > $out" { x = plain; allowedReferences = [ ]; };
    foreign = make "foreign-${tag}" "echo > $out" { system = "riscv64-linux"; };
    cafixed = fixed "cafixed-${tag}" right;
    cawrong = fixed "cawrong-${tag}" wrong;
    cabasic = fixed "cabasic-${tag}" right;
  };
in builtins.concatMap (tag: builtins.attrValues (of tag)) (builtins.fromJSON ''@tags@'')
"#;

impl World {
    /// Makes it in a room whose daemon runs.
    pub(super) fn make(room: &Room, daemon: &Daemon, release: &Release, tags: &[String]) -> Self {
        fs::create_dir(LINKS).unwrap();
        fs::set_permissions(LINKS, PermissionsExt::from_mode(0o1777)).unwrap();
        let mut client = Client::new(daemon.connect().unwrap()).unwrap();
        let mut add = |request: Request, shape: Vec<Shape>| {
            let reply = Question::new(request, shape).ask(&mut client);
            assert_eq!(reply.get("ending"), "done", "{reply:?}");
            reply.get("path").to_owned()
        };
        let tree = Tree::Directory(vec![
            (b"file".to_vec(), Tree::File(b"contents\n".to_vec())),
            (b"link".to_vec(), Tree::Link(b"file".to_vec())),
            (b"program".to_vec(), Tree::Program(b"#!/bin/sh\n".to_vec())),
        ]);
        let request = Request::numbered(7).string("source").string("fixed:r:sha256").word(0).word(0);
        let source = add(request.framed(&tree.archive()), shapes::added(37));
        let request = Request::numbered(7).string("flat").string("fixed:sha256").word(0).word(0);
        let flat = add(request.framed(b"flat\n"), shapes::added(37));
        let request = Request::numbered(8).string("text").string(&source).strings(&[&source]);
        let text = add(request, shapes::added(18));
        let archive = Tree::File(SIGNED.into()).archive();
        let request = Request::numbered(39).string(SIGNED).string(format!("{SIGNED}.drv"));
        let request = request.string(hex(&sha256(&archive))).strings(&[SIGNED, &source]).word(1_234_567);
        let request = request.word(archive.len() as u64).word(1).strings(&[SIGNATURE]).string("").word(0).word(1);
        add(request.framed(&archive), vec![]);
        drop(client);

        let right = hex(&sha256(b"fixed\n"));
        let expression = EXPRESSION
            .replace("@right@", &right)
            .replace("@wrong@", &hex(&sha256(b"other\n")))
            .replace("@tags@", &serde_json::to_string(tags).unwrap());
        let file = room.write("world.nix", expression).unwrap();
        let drvs = Call::nix(room, Who::Root, release, "nix-instantiate").arg(&file).quiet().ok().unwrap().lines();
        let mut derivations = BTreeMap::new();
        for path in drvs {
            let name = path.split_once('-').unwrap().1.strip_suffix(".drv").unwrap().to_owned();
            let text = fs::read_to_string(&path).unwrap();
            derivations.insert(name, (path, text));
        }
        let world = Self { source, text, flat, signed: SIGNED.to_owned(), derivations };
        fs::write(format!("{LINKS}/file"), "not a link").unwrap();
        for tag in tags {
            symlink(&world.flat, format!("{LINKS}/{tag}")).unwrap();
        }
        for path in world.paths() {
            symlink(&path, Path::new(ROOTS).join(path.rsplit('/').next().unwrap())).unwrap();
        }
        world
    }

    /// Everything that must outlive collections.
    fn paths(&self) -> Vec<String> {
        let own = [&self.source, &self.text, &self.flat, &self.signed].into_iter().cloned();
        own.chain(self.derivations.values().map(|(path, _)| path.clone())).collect()
    }

    /// A derivation's path.
    pub(super) fn drv(&self, name: &str, tag: &str) -> String {
        self.derivations[&format!("{name}-{tag}")].0.clone()
    }

    /// The path of a derivation's output, from its text.
    pub(super) fn output(&self, name: &str, tag: &str, output: &str) -> String {
        let text = &self.derivations[&format!("{name}-{tag}")].1;
        let (_, rest) = text.split_once(&format!("(\"{output}\",\"")).unwrap();
        rest.split('"').next().unwrap().to_owned()
    }
}
