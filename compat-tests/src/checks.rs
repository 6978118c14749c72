//! The commands that every stock client must be able to run: twenty-two of them, each with its result looked at.

use std::path::Path;

use crate::error::{Error, Result};
use crate::{Call, Output, Release, Room, Who};

/// One check's outcome.
#[derive(Debug)]
pub struct Check {
    /// The command, as a reader would name it.
    pub name: &'static str,
    /// What went wrong, if anything.
    pub outcome: Result<()>,
}

/// A derivation that needs nothing but the sandbox's shell.
const GREETING: &str = "derivation { name = \"greeting-@version@-@who@\"; system = \"x86_64-linux\"; \
     builder = \"/bin/sh\"; args = [ \"-c\" \"echo hello @version@ > $out; echo a line of the log\" ]; }";

/// Runs all commands of one client in order; later ones use the results of earlier ones. A user whom the daemon does
/// not trust may not bring in an unsigned path: there, `--import` and `nix copy --from` must be refused.
pub fn run(room: &Room, release: &Release, who: Who) -> Vec<Check> {
    let mut all = Vec::new();
    let mut run = Runner { room, release, who, checks: &mut all };
    run.everything();
    all
}

struct Runner<'a> {
    room: &'a Room,
    release: &'a Release,
    who: Who,
    checks: &'a mut Vec<Check>,
}

impl Runner<'_> {
    fn store(&self, args: &[&str]) -> Call {
        Call::nix(self.room, self.who, self.release, "nix-store").args(args)
    }

    fn nix(&self, args: &[&str]) -> Call {
        Call::nix(self.room, self.who, self.release, "nix").args(args)
    }

    /// Records one check; a failed one answers the default, so that the following ones still run.
    fn check<T: Default>(&mut self, name: &'static str, test: impl FnOnce(&Self) -> Result<T>) -> T {
        let (value, outcome) = match test(self) {
            Ok(value) => (value, Ok(())),
            Err(e) => (T::default(), Err(e)),
        };
        self.checks.push(Check { name, outcome });
        value
    }

    fn everything(&mut self) {
        let version = self.release.version.clone();
        let tag = format!("{version}-{:?}", self.who).to_lowercase();
        let contents = format!("a file of {tag}\n");
        let trusted = self.who.is_trusted();

        let added = self.check("nix-store --add", |r| {
            let file = r.room.write(&format!("file-{tag}"), &contents)?;
            let path = r.store(&["--add"]).arg(&file).ok()?.text();
            expect_file(&path, &contents)?;
            Ok(path)
        });
        self.check("nix-store --query --hash", |r| {
            let hash = r.store(&["--query", "--hash", &added]).ok()?.text();
            let base16 = Call::nix(r.room, r.who, r.release, "nix-hash")
                .args(["--type", "sha256", "--to-base16", hash.trim_start_matches("sha256:")])
                .ok()?
                .text();
            expect_eq("the hash", &base16, &crate::nar::hex(&crate::nar::hash_path(Path::new(&added))?.0))
        });
        self.check("nix-store --query --references", |r| {
            expect_eq("references", &r.store(&["--query", "--references", &added]).ok()?.text(), "")
        });
        let expression = GREETING.replace("@version@", &version).replace("@who@", &tag);
        let file = format!("greeting-{tag}.nix");
        let drv = self.check("nix-instantiate", |r| {
            let file = r.room.write(&file, &expression)?;
            let drv = Call::nix(r.room, r.who, r.release, "nix-instantiate").arg(&file).ok()?.text();
            expect_contains(&std::fs::read_to_string(&drv).unwrap_or_default(), "Derive([(\"out\"")?;
            Ok(drv)
        });
        let out = self.check("nix-build", |r| {
            let out =
                Call::nix(r.room, r.who, r.release, "nix-build").arg("--no-out-link").arg(r.room.tmp(&file)).ok()?;
            if !r.release.is_2_3() {
                // The 2.3 client prints no build log when it is not on a terminal and the daemon is a newer one.
                expect_contains(&out.stderr, "a line of the log")?;
            }
            Ok(out.text())
        });
        self.check("cat result", |r| {
            let text = Call::new(r.room, r.who, "cat").arg(&out).ok()?.text();
            expect_eq("the built file", &text, &format!("hello {version}"))
        });
        self.check("nix-store --query --deriver", |r| {
            expect_eq("the deriver", &r.store(&["--query", "--deriver", &out]).ok()?.text(), &drv)
        });
        self.check("nix-store --read-log", |r| {
            expect_eq("the log", &r.store(&["--read-log", &out]).ok()?.text(), "a line of the log")
        });
        self.check("nix-store --query --requisites", |r| {
            expect_contains(&r.store(&["--query", "--requisites", &drv]).ok()?.text(), &drv)
        });
        self.check("nix path-info --json --all", |r| {
            let json = r.nix(&["path-info", "--json", "--all"]).ok()?.text();
            serde_json::from_str::<serde_json::Value>(&json).map_err(|e| Error::Wrong(format!("not JSON: {e}")))?;
            // Newer clients key by full path or base name; the name is in either.
            expect_contains(&json, out.trim_start_matches("/nix/store/"))
        });
        self.check("nix-store --verify --check-contents", |r| {
            let out = r.store(&["--verify", "--check-contents"]).ok()?;
            if out.all().contains("was modified") {
                return Err(Error::Wrong(format!("found modified paths:\n{}", out.all())));
            }
            Ok(())
        });
        self.check("nix-store --verify-path", |r| r.store(&["--verify-path", &out]).ok().map(drop));
        self.check("nix-store --dump", |r| {
            let archive = r.store(&["--dump", &out]).quiet().ok()?.stdout;
            let contents = crate::nar::Tree::File(format!("hello {version}\n").into_bytes());
            expect_eq("the archive", &crate::nar::hex(&archive), &crate::nar::hex(&contents.archive()))
        });
        self.check("nix-store --export | --import", |r| {
            let export = r.store(&["--export", &out]).quiet().ok()?.stdout;
            let import = r.store(&["--import"]).input(export);
            if !trusted {
                return expect_contains(&import.fails()?.stderr, "signature");
            }
            r.store(&["--delete", &out]).quiet().ok()?;
            expect_eq("the import", &import.ok()?.text(), &out)?;
            expect_file(&out, &format!("hello {version}\n"))
        });
        self.check("nix-store --optimise", |r| r.store(&["--optimise"]).ok().map(drop));
        let cache = format!("file://{}", self.room.tmp(&format!("cache-{tag}")).display());
        self.check("nix copy --to file://", |r| {
            r.nix(&["copy", "--no-check-sigs", "--to", &cache, &out]).ok()?;
            expect_file(&format!("{}/nix-cache-info", &cache["file://".len()..]), "StoreDir: /nix/store\n")
        });
        self.check("nix-store --delete", |r| {
            r.store(&["--delete", &out]).ok()?;
            if Path::new(&out).exists() {
                return Err(Error::Wrong(format!("{out} is still there")));
            }
            r.store(&["--check-validity", &out]).fails().map(drop)
        });
        self.check("nix copy --from file://", |r| {
            let copy = r.nix(&["copy", "--no-check-sigs", "--from", &cache, &out]);
            if trusted {
                copy.ok()?;
                return expect_file(&out, &format!("hello {version}\n"));
            }
            // The path is input-addressed and nobody signed it.
            expect_contains(&copy.fails()?.stderr, "signature")?;
            if Path::new(&out).exists() { Err(Error::Wrong(format!("{out} was registered"))) } else { Ok(()) }
        });
        self.check("nix store info", |r| {
            let args: &[&str] = match version.as_str() {
                "2.3.7" => &["ping-store"],
                "2.8.0" => &["store", "ping"],
                _ => &["store", "info"],
            };
            r.nix(args).ok().map(drop)
        });
        self.check("nix-store --gc --print-dead", |r| {
            expect_contains(&r.store(&["--gc", "--print-dead"]).ok()?.text(), &added)
        });
        self.check("nix-store --gc", |r| {
            r.store(&["--gc"]).ok()?;
            r.store(&["--check-validity", &added]).fails()?;
            if Path::new(&added).exists() { Err(Error::Wrong(format!("{added} is still there"))) } else { Ok(()) }
        });
        self.check("nix-store --gc --print-roots", |r| r.store(&["--gc", "--print-roots"]).ok().map(drop));
    }
}

/// The file at `path` must begin with `contents`.
fn expect_file(path: &str, contents: &str) -> Result<()> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.starts_with(contents) => Ok(()),
        Ok(text) => Err(Error::Wrong(format!("{path} holds {text:?}, not {contents:?}"))),
        Err(e) => Err(Error::Wrong(format!("{path}: {e}"))),
    }
}

/// `text` must contain `part`.
pub fn expect_contains(text: &str, part: &str) -> Result<()> {
    if !part.is_empty() && text.contains(part) {
        return Ok(());
    }
    Err(Error::Wrong(format!("expected {part:?} in:\n{text}")))
}

/// Two texts must be equal.
pub fn expect_eq(what: &str, found: &str, expected: &str) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Wrong(format!("{what}: {found:?}, expected {expected:?}"))) }
}

/// The output's exit code must be this one.
pub fn expect_code(output: &Output, code: i32) -> Result<()> {
    if output.code == code {
        return Ok(());
    }
    Err(Error::Wrong(format!("exit code {}, expected {code}:\n{}", output.code, output.all())))
}
