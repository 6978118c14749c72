//! Stock clients that run in a build and use the store from there.

use std::fs;

use compat_tests::checks::expect_contains;
use compat_tests::subject::default_conf;
use compat_tests::{Call, Who};

use crate::{derivation, setup};

/// With one place for builds, which the outer one has.
fn conf(prefix: &str) -> String {
    default_conf()
        .replace("sandbox-paths = ", &format!("sandbox-paths = {prefix} "))
        .replace("max-jobs = 2", "max-jobs = 1")
        .replace("experimental-features = ", "experimental-features = recursive-nix ")
}

fn builds_with_a_client_inside(version: &str) {
    let Some(s) = setup(&format!("recursive-{version}")) else { return };
    let release = s.machine.release(version).unwrap();
    let prefix = release.prefix.display().to_string();
    let daemon = s.subject.start_with(&s.room, &conf(&prefix)).unwrap();
    let source = s.room.write("source", "the source\n").unwrap();
    let secret = s.room.write("secret", "a secret\n").unwrap();
    let secret = s.nix(Who::User, "nix-store").arg("--add").arg(&secret).ok().unwrap().text();
    let inner = "derivation { name = \"inner\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; \
                 args = [ \"-c\" \"read l < $src; echo inner $l > $out\" ]; src = builtins.toFile \"text\" \"text\\n\"; }";
    let script = format!(
        "
        set -e
        nix=\"{prefix}/bin/nix --extra-experimental-features nix-command\"
        export HOME=$PWD NIX_CONF_DIR=$PWD
        [ $NIX_REMOTE = unix:///build/.nix-socket ]
        $nix path-info $src
        if $nix path-info {secret}; then echo knows the secret; exit 1; fi
        if $nix store dump-path {secret} > dumped; then echo has the secret; exit 1; fi
        if $nix build --no-link {secret}; then echo builds the secret; exit 1; fi
        if [ -e {secret} ]; then echo sees the secret; exit 1; fi
        echo added > file
        added=$($nix store add-path ./file)
        read line < $added
        [ $line = added ]
        built=$($nix build --impure --no-link --print-out-paths --expr '{inner}')
        read line < $built
        [ \"$line\" = \"inner text\" ]
        mkdir $out
        $nix path-info --all | cut -c 45- | sort > $out/all
        ln -s $added $out/added
        ln -s $built $out/built
        ln -s {secret} $out/secret
        if $nix store gc; then :; fi
        [ -e $added ]"
    );
    let more = format!("requiredSystemFeatures = [ \"recursive-nix\" ]; src = {};", source.display());
    let out = s.build(&derivation("outer", &script, &more)).ok().unwrap().text();
    assert_eq!(fs::read_to_string(format!("{out}/added")).unwrap(), "added\n");
    assert_eq!(fs::read_to_string(format!("{out}/built")).unwrap(), "inner text\n");
    let mut references = s.nix(Who::User, "nix-store").args(["-q", "--references", &out]).ok().unwrap().lines();
    references.sort();
    let target = |name: &str| fs::read_link(format!("{out}/{name}")).unwrap().display().to_string();
    let mut expected = [target("added"), target("built")];
    expected.sort();
    assert_eq!(references, expected, "what it has added and built, and not what it only knew the name of");
    let all = fs::read_to_string(format!("{out}/all")).unwrap();
    assert_eq!(all.lines().collect::<Vec<_>>(), ["file", "inner", "inner.drv", "source", "text"]);
    // Without the feature it is as in stock: nothing here can build it.
    daemon.stop().unwrap();
    let daemon = s.subject.start_with(&s.room, &conf(&prefix).replace("recursive-nix ", "")).unwrap();
    let more = "requiredSystemFeatures = [ \"recursive-nix\" ];";
    let refused = s.build(&derivation("refused", "echo > $out", more)).fails().unwrap();
    expect_contains(&refused.stderr, "recursive-nix").unwrap();
    Call::nix(&s.room, Who::User, release, "nix-store").args(["--check-validity", &out]).ok().unwrap();
    daemon.stop().unwrap();
}

#[test]
fn a_build_uses_the_store_with_nix_2_26() {
    builds_with_a_client_inside("2.26.3");
}

#[test]
fn a_build_uses_the_store_with_nix_2_34() {
    builds_with_a_client_inside("2.34.8");
}
