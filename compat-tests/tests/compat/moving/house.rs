//! A stock store in a room, with something of everything in it, and an inventory of what a client says of a store.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use compat_tests::nar::hash_path;
use compat_tests::{Call, Release, Who};
use serde_json::Value;

use crate::{Setup, derivation};

/// A stock store at `/nix` in a room.
pub(super) struct House<'a> {
    s: &'a Setup,
    release: &'a Release,
}

/// Some of what is in it.
pub(super) struct Furniture {
    /// A source tree.
    pub(super) tree: String,
    /// Built from it, and in a profile.
    pub(super) out: String,
    /// A path without a root.
    pub(super) loose: String,
}

/// What is said of every path, by its name, and all roots.
#[derive(Debug, PartialEq)]
pub(super) struct Inventory {
    paths: BTreeMap<String, BTreeMap<&'static str, String>>,
    roots: Vec<String>,
}

impl<'a> House<'a> {
    pub(super) fn new(s: &'a Setup, version: &str) -> Self {
        Self { s, release: s.machine.release(version).unwrap() }
    }

    /// A command of this house's release, run as root on its own store.
    pub(super) fn stock(&self, name: &str) -> Call {
        self.nix(name, "local")
    }

    /// The same on another store.
    pub(super) fn nix(&self, name: &str, store: &str) -> Call {
        self.nix_of(self.release, name, store)
    }

    pub(super) fn nix_of(&self, release: &Release, name: &str, store: &str) -> Call {
        let call = Call::nix(&self.s.room, Who::Root, release, name).env("NIX_REMOTE", store);
        let call = call.env("NIX_LIBEXEC_DIR", release.prefix.join("libexec"));
        // Builds by root itself, without a sandbox: it is the store that matters.
        call.args(["--option", "build-users-group", "", "--option", "sandbox", "false", "--option", "substituters", ""])
    }

    /// castored itself.
    pub(super) fn castored(&self, arguments: &[&str]) -> Call {
        let binary = self.s.subject.copy_into(&self.s.room).unwrap();
        Call::new(&self.s.room, Who::Root, binary).args(arguments)
    }

    pub(super) fn adopt(&self, arguments: &[&str]) -> Call {
        self.castored(&["adopt"]).args(arguments)
    }

    /// Fills it: a tree with every kind of file, derivations with their outputs and logs, signatures, roots of each
    /// kind, equal files that are links.
    pub(super) fn furnish(&self) -> Furniture {
        let room = &self.s.room;
        let tree = room.tmp("furniture");
        fs::create_dir_all(tree.join("below/empty")).unwrap();
        fs::write(tree.join("plain"), "a plain text\n").unwrap();
        fs::write(tree.join("below/same"), "a plain text\n").unwrap();
        fs::write(tree.join("program"), "#!/bin/sh\necho it runs\n").unwrap();
        fs::set_permissions(tree.join("program"), PermissionsExt::from_mode(0o755)).unwrap();
        fs::write(
            tree.join("large"),
            (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect::<Vec<_>>(),
        )
        .unwrap();
        symlink("below/nowhere", tree.join("link")).unwrap();
        let tree = self.stock("nix-store").arg("--add").arg(&tree).ok().unwrap().text();
        let loose = room.write("loose", "nobody refers to this\n").unwrap();
        let loose = self.stock("nix-store").arg("--add").arg(loose).ok().unwrap().text();
        let inner = derivation("inner", &format!("echo logged; echo {tree} > $out"), "src = builtins.storePath tree;");
        // No sandbox and so no busybox: programs are the machine's.
        let outer = derivation(
            "outer",
            "PATH=/usr/bin:/bin; mkdir $out $dev; echo ${inner} > $out/inner; echo $out > $out/itself; echo $out > $dev/out",
            "outputs = [ \"out\" \"dev\" ];",
        );
        let expression = format!("let tree = {tree}; inner = {inner}; in {outer}");
        let result = room.tmp("result");
        let built = self.stock("nix-build").arg("-o").arg(&result).args(["-E", &expression]);
        let out = built.ok().unwrap().lines().remove(0);
        let profile = "/nix/var/nix/profiles/furnished";
        self.stock("nix-env").args(["-p", profile, "--set", &out]).ok().unwrap();
        self.sign(&out);
        self.stock("nix-store").arg("--optimise").ok().unwrap();
        Furniture { tree, out, loose }
    }

    fn sign(&self, path: &str) {
        let (secret, public) = (self.s.room.tmp("secret"), self.s.room.tmp("public"));
        let generate = self.stock("nix-store").args(["--generate-binary-cache-key", "house-1"]);
        generate.arg(&secret).arg(&public).ok().unwrap();
        let command: &[&str] = if self.release.is_2_3() { &["sign-paths"] } else { &["store", "sign"] };
        self.stock("nix").args(command).arg("--key-file").arg(&secret).args(["-r", path]).ok().unwrap();
    }

    /// One path more. Answers it.
    pub(super) fn add_later(&self) -> String {
        let file = self.s.room.write("later", "added between two runs\n").unwrap();
        self.stock("nix-store").arg("--add").arg(file).ok().unwrap().text()
    }

    pub(super) fn add_many(&self, count: usize) {
        let dirs: Vec<String> = (0..count)
            .map(|n| {
                let dir = self.s.room.tmp(&format!("many-{n}"));
                fs::create_dir_all(&dir).unwrap();
                for file in 0..10 {
                    fs::write(dir.join(file.to_string()), format!("{n} {file}\n").repeat(2_000)).unwrap();
                }
                dir.display().to_string()
            })
            .collect();
        self.stock("nix-store").arg("--add").args(dirs).ok().unwrap();
    }

    /// Builds a derivation whose output's path follows from its contents. Answers both.
    pub(super) fn build_addressed(&self) -> (String, String) {
        let features = ["--option", "experimental-features", "nix-command ca-derivations"];
        let more = "__contentAddressed = true; outputHashMode = \"recursive\"; outputHashAlgo = \"sha256\";";
        let expression = derivation("addressed", "echo addressed > $out", more);
        let instantiated = self.stock("nix-instantiate").args(features).args(["-E", &expression]).ok().unwrap().text();
        let built = self.stock("nix-build").args(features).args(["--no-out-link", "-E", &expression]).ok().unwrap();
        (instantiated, built.text())
    }

    /// What is known of the output of such a derivation.
    pub(super) fn realisation(&self, drv: &str, store: &str) -> String {
        let installable = if self.release.version == "2.8.0" { drv.to_owned() } else { format!("{drv}^*") };
        let features = ["--extra-experimental-features", "ca-derivations"];
        let info =
            self.nix("nix", store).args(features).args(["realisation", "info", "--json", &installable]).ok().unwrap();
        info.text()
    }

    /// What this house's client says of the paths of a store, and of its roots.
    pub(super) fn inventory(&self, store: &str) -> Inventory {
        let json = self.nix("nix", store).args(["path-info", "--json", "--all"]).quiet().ok().unwrap().text();
        let mut paths = BTreeMap::new();
        let infos: Vec<(String, Value)> = match serde_json::from_str(&json).unwrap() {
            Value::Array(infos) => {
                infos.into_iter().map(|info| (info["path"].as_str().unwrap().to_owned(), info)).collect()
            }
            Value::Object(infos) => infos.into_iter().collect(),
            other => panic!("{other}"),
        };
        for (path, mut info) in infos {
            // Since 2.34 the names stand without the directory.
            let path = if path.starts_with('/') { path } else { format!("/nix/store/{path}") };
            // Not of the path: where it was asked.
            if let Some(info) = info.as_object_mut() {
                info.remove("storeDir");
                info.remove("version");
            }
            for list in ["references", "signatures"] {
                if let Some(list) = info.get_mut(list).and_then(Value::as_array_mut) {
                    list.sort_by_key(Value::to_string);
                }
            }
            let query = |what: &str| {
                let mut lines = self.nix("nix-store", store).args(["-q", what, &path]).quiet().ok().unwrap().lines();
                // Processes come and go, and stock does not look for those that run from a store it does not serve.
                lines.retain(|line| !line.contains("/proc/"));
                lines.sort();
                lines.join("\n")
            };
            let log = self.nix("nix-store", store).args(["--read-log", &path]).quiet().run().unwrap();
            let mut said = BTreeMap::from([
                ("info", info.to_string()),
                ("referrers", query("--referrers")),
                ("deriver", query("--deriver")),
                ("roots", query("--roots")),
                ("log", format!("{} {}", log.code, log.text())),
            ]);
            if path.ends_with(".drv") {
                said.insert("outputs", query("--outputs"));
            }
            paths.insert(path, said);
        }
        let roots = self.nix("nix-store", store).args(["--gc", "--print-roots"]).quiet().ok().unwrap();
        let mut roots: Vec<String> =
            roots.lines().into_iter().filter(|line| !line.contains("/proc/") && !line.starts_with('{')).collect();
        roots.sort();
        Inventory { paths, roots }
    }

    /// Reads every path through the store directory.
    pub(super) fn assert_contents(&self, inventory: &Inventory) {
        for (path, said) in &inventory.paths {
            let info: Value = serde_json::from_str(&said["info"]).unwrap();
            let (hash, size) = hash_path(Path::new(path)).unwrap();
            assert_eq!(info["narSize"], size, "{path}");
            let shown = info["narHash"].as_str().unwrap();
            let raw = compat_tests::nar::hex(&hash);
            let base64 = data_encoding::BASE64.encode(&hash);
            assert!(
                shown.contains(&raw) || shown.contains(&base64) || shown.contains(&nix32(&hash)),
                "{path}: {shown}"
            );
        }
    }

    /// The modes and times of stock's files.
    pub(super) fn assert_modes(&self, dir: &Path) {
        let mut waiting: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|path| !path.ends_with(".links")).collect();
        assert!(waiting.len() > 3);
        while let Some(path) = waiting.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            assert_eq!((meta.mtime(), meta.uid(), meta.gid()), (1, 0, 0), "{}", path.display());
            let mode = meta.mode() & 0o7777;
            if meta.is_dir() {
                assert_eq!(mode, 0o555, "{}", path.display());
                waiting.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            } else if meta.is_file() {
                let expected = if path.ends_with("program") { 0o555 } else { 0o444 };
                assert_eq!(mode, expected, "{}", path.display());
            }
        }
    }

    /// The loose path goes, what has roots stays.
    pub(super) fn assert_garbage_is_collected(&self) {
        let before = self.inventory("local");
        self.stock("nix-store").arg("--gc").ok().unwrap();
        let after = self.inventory("local");
        let gone: Vec<_> = before.paths().into_iter().filter(|path| !after.paths().contains(path)).collect();
        assert!(gone.iter().any(|path| path.ends_with("-loose")), "{gone:?}");
        assert!(
            gone.iter().all(|path| !path.contains("-outer") || path.ends_with(".drv") || path.ends_with("-dev")),
            "{gone:?}"
        );
        assert!(after.paths().iter().any(|path| path.ends_with("-outer")));
    }

    /// Removes all of `/nix` in the room.
    pub(super) fn empty_nix(&self) {
        while nix::mount::umount2("/nix/store", nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        for entry in fs::read_dir("/nix").unwrap() {
            let status = std::process::Command::new("rm").arg("-rf").arg(entry.unwrap().path()).status().unwrap();
            assert!(status.success());
        }
    }
}

fn nix32(hash: &[u8; 32]) -> String {
    nix_compat::hash::Hash::Sha256(*hash).to_nix32()
}

impl Inventory {
    pub(super) fn paths(&self) -> Vec<String> {
        self.paths.keys().cloned().collect()
    }

    /// A later inventory of the same store, which has everything this one has.
    pub(super) fn with(self, later: Self) -> Self {
        for (path, said) in &self.paths {
            assert_eq!(Some(said), later.paths.get(path), "{path} has changed");
        }
        later
    }

    pub(super) fn assert_equal(&self, other: &Self) {
        self.assert_equal_but_for_roots(other);
        for (path, said) in &self.paths {
            assert_eq!(said["roots"], other.paths[path]["roots"], "roots of {path}");
        }
        assert_eq!(self.roots, other.roots);
    }

    /// Of a store below another root, whose links have other names.
    pub(super) fn assert_equal_but_for_roots(&self, other: &Self) {
        assert_eq!(self.paths(), other.paths());
        for (path, said) in &self.paths {
            for (what, text) in said.iter().filter(|(what, _)| **what != "roots") {
                assert_eq!(text, &other.paths[path][what], "{what} of {path}");
            }
        }
    }
}
