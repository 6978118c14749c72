//! Stores reached over ssh: stock's `nix-store --serve` in front of the daemon (`ssh://`), and the daemon itself called as
//! `nix-daemon --stdio` (`ssh-ng://`). In place of ssh stands a script that runs the command on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use compat_tests::checks::expect_contains;
use compat_tests::ssh::{HOST, stand_in};
use compat_tests::{Call, Release, Who};

use crate::{Setup, derivation, setup};

/// The far machine: what the script finds there, and a near store of the client's own.
struct Far<'a> {
    setup: &'a Setup,
    release: &'a Release,
    path: String,
    near: PathBuf,
}

impl<'a> Far<'a> {
    fn new(setup: &'a Setup, release: &'a Release) -> Self {
        let path = stand_in(&setup.room, &setup.subject, release).unwrap();
        let near = setup.room.tmp(&format!("near-{}", release.version));
        Self { setup, release, path, near }
    }

    /// A client's command, whose own store is the near one.
    fn call(&self, who: Who, command: &str) -> Call {
        let near = format!("local?root={}", self.near.display());
        Call::nix(&self.setup.room, who, self.release, command).env("PATH", &self.path).env("NIX_REMOTE", near)
    }

    /// Adds a file to the near store and answers its path.
    fn add(&self, name: &str) -> String {
        let file = self.setup.room.write(name, format!("{name} of {}\n", self.release.version)).unwrap();
        self.call(Who::Root, "nix-store").arg("--add").arg(file).ok().unwrap().text()
    }

    /// Where the near store keeps a path.
    fn near(&self, path: &str) -> PathBuf {
        self.near.join(path.trim_start_matches('/'))
    }

    /// Takes a path from the near store.
    fn forget(&self, path: &str) {
        self.call(Who::Root, "nix-store").args(["--delete", path]).ok().unwrap();
        assert!(!self.near(path).exists());
    }

    /// `nix copy` there and back.
    fn copies(&self, scheme: &str) {
        let url = format!("{scheme}://{HOST}");
        let path = self.add(&format!("copied-by-{scheme}"));
        assert!(!Path::new(&path).exists());
        self.call(Who::Root, "nix").args(["copy", "--no-check-sigs", "--to", &url, &path]).ok().unwrap();
        let contents = fs::read_to_string(&path).unwrap();
        assert_eq!(contents, format!("copied-by-{scheme} of {}\n", self.release.version));
        self.forget(&path);
        self.call(Who::Root, "nix").args(["copy", "--no-check-sigs", "--from", &url, &path]).ok().unwrap();
        assert_eq!(fs::read_to_string(self.near(&path)).unwrap(), contents);
    }

    /// `nix-copy-closure` there and back, of a path that refers to another.
    fn closures(&self) {
        let path = self.add("closure");
        self.call(Who::Root, "nix-copy-closure").args(["--to", HOST, &path]).ok().unwrap();
        assert!(Path::new(&path).exists());
        self.forget(&path);
        self.call(Who::Root, "nix-copy-closure").args(["--from", HOST, &path]).ok().unwrap();
        assert!(self.near(&path).exists());
    }

    /// A derivation that lies there is built there.
    fn builds(&self, scheme: &str) {
        let name = format!("built-by-{}-{}", scheme, self.release.version);
        let expression = derivation(&name, &format!("echo {name} > $out"), "");
        let drv = Call::nix(&self.setup.room, Who::Root, self.release, "nix-instantiate")
            .args(["-E", &expression])
            .ok()
            .unwrap()
            .text();
        let url = format!("{scheme}://{HOST}");
        let out = self.call(Who::Root, "nix-store").args(["--store", &url, "-r", &drv]).ok().unwrap().text();
        assert_eq!(fs::read_to_string(out).unwrap(), format!("{name}\n"));
    }

    /// Whoever the daemon does not trust may bring only what proves itself.
    fn is_not_trusted(&self, scheme: &str) {
        let url = format!("{scheme}://{HOST}");
        let name = format!("unsigned-{scheme}-{}", self.release.version);
        let expression = derivation(&name, &format!("echo {name} > $out"), "");
        let room = &self.setup.room;
        let build = Call::nix(room, Who::Root, self.release, "nix-build").args(["--no-out-link", "-E", &expression]);
        let out = build.ok().unwrap().text();
        let cache = format!("file://{}", room.tmp(&format!("cache-{name}")).display());
        let copy = |args: &[&str]| Call::nix(room, Who::Root, self.release, "nix").args(args);
        copy(&["copy", "--no-check-sigs", "--to", &cache, &out]).ok().unwrap();
        Call::nix(room, Who::Root, self.release, "nix-store").args(["--delete", &out]).ok().unwrap();
        let refused = Call::nix(room, Who::User, self.release, "nix")
            .env("PATH", &self.path)
            .args(["copy", "--no-check-sigs", "--from", &cache, "--to", &url, &out])
            .fails()
            .unwrap();
        expect_contains(&refused.stderr, "signature").unwrap();
        assert!(!Path::new(&out).exists());
    }
}

fn remote(version: &str, test: impl Fn(&Far)) {
    let Some(s) = setup(&format!("remote-{version}")) else { return };
    let daemon = s.start();
    test(&Far::new(&s, s.machine.release(version).unwrap()));
    daemon.stop().unwrap();
}

/// All that a release with the newer command line can do.
fn everything(far: &Far) {
    for scheme in ["ssh", "ssh-ng"] {
        far.copies(scheme);
        far.is_not_trusted(scheme);
    }
    // A client of ssh:// wants to read the derivation itself, which that protocol does not let it.
    far.builds("ssh-ng");
    far.closures();
}

#[test]
fn nix_2_3_7_copies_closures() {
    remote("2.3.7", |far| {
        far.closures();
        far.copies("ssh");
        far.copies("ssh-ng");
    });
}

#[test]
fn nix_2_8_0_over_ssh() {
    remote("2.8.0", everything);
}

#[test]
fn nix_2_26_3_over_ssh() {
    remote("2.26.3", everything);
}

#[test]
fn nix_2_34_8_over_ssh() {
    remote("2.34.8", everything);
}
