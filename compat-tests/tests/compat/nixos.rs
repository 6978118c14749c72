//! The files for NixOS and for systemd are at least well-formed.

use std::path::{Path, PathBuf};
use std::process::Command;

use compat_tests::machine;

fn nixos() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../nixos")
}

#[test]
fn nix_files_parse_with_stock_nix() {
    if let Some(reason) = machine::obstacle() {
        println!("SKIPPED: {reason}");
        return;
    }
    let machine = machine::prepare().unwrap();
    let state = tempfile::tempdir().unwrap();
    for name in ["module.nix", "package.nix"] {
        let mut parse = Command::new(machine.newest().command("nix-instantiate"));
        parse.env("NIX_STATE_DIR", state.path()).env("NIX_STORE_DIR", state.path().join("store"));
        let out = parse.arg("--parse").arg(nixos().join(name)).output().unwrap();
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(!out.stdout.is_empty());
    }
}

#[test]
fn units_verify() {
    let Ok(version) = Command::new("systemd-analyze").arg("--version").output() else {
        println!("systemd-analyze is not installed here: nothing to verify with");
        return;
    };
    let version = String::from_utf8_lossy(&version.stdout);
    let version: u32 = version.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap();
    // What is said of a key that this systemd is too old to know.
    let too_new = |line: &str| version < 254 && line.contains("Unknown key 'FileDescriptorStorePreserve'");
    let dir = tempfile::tempdir().unwrap();
    for name in ["castored.socket", "castored.service"] {
        let unit = std::fs::read_to_string(nixos().join("systemd").join(name)).unwrap();
        // The program is looked for at verification; any will do.
        std::fs::write(dir.path().join(name), unit.replace("/usr/local/bin/castored", "/bin/true")).unwrap();
    }
    for name in ["castored.socket", "castored.service"] {
        let out = Command::new("systemd-analyze").arg("verify").arg(dir.path().join(name)).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let about_ours: Vec<&str> = said.lines().filter(|l| l.contains("castored") && !too_new(l)).collect();
        assert!(about_ours.is_empty(), "{about_ours:#?}");
    }
}
