//! A real build: GNU hello from its source, with a compiler and all it needs in the store.

use std::fs;
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::toolchain::Toolchain;
use compat_tests::{Call, Result, Who};

use super::{Bench, Figure, Target, wrong};
use crate::sides::Side;

/// Adding the compiler, or the build, may take this long.
const LIMIT: Duration = Duration::from_secs(600);
/// What the builder does. The first round finds nothing in the caches; the median is of those that do.
const SCRIPT: &str = "export PATH=/usr/bin; tar xzf $src; cd hello-*; \
                      ./configure --quiet --prefix=$out --disable-nls --disable-dependency-tracking >/dev/null; \
                      make -s >/dev/null 2>&1; make -s install >/dev/null 2>&1; $out/bin/hello > $out/said";

pub(super) fn hello(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let toolchain = Toolchain::fetch()?;
    let bench = bench.clone();
    let seconds = side.inside(move |room| {
        let call = |name: &str| Call::nix(room, Who::Root, &bench.client, name).limit(LIMIT).quiet();
        let added = call("nix-store").arg("--add").args([&toolchain.root, &toolchain.hello]).ok()?.lines();
        let [root, source] = added.as_slice() else { return Err(wrong("not both were added")) };
        // From here on everything that the compiler consists of is read through the store.
        let paths: Vec<String> =
            ["bin", "lib", "lib64", "usr"].iter().map(|name| format!("/{name}={root}/{}", usr(name))).collect();
        let body = format!(
            "derivation {{ name = \"{}\"; system = \"x86_64-linux\"; builder = \"/bin/bash\"; args = [ \"-ec\" \
             \"{SCRIPT}\" ]; src = builtins.storePath \"{source}\"; }}",
            bench.tag
        );
        let drv = call("nix-instantiate").args(["-E", &body]).ok()?.text();
        let started = Instant::now();
        let build = call("nix-store").args(["--realise", &drv, "--option", "sandbox-paths", &paths.join(" ")]);
        let out = build.ok()?.text();
        let seconds = started.elapsed().as_secs_f64();
        let said = fs::read_to_string(format!("{out}/said")).doing("reading", &out)?;
        if said == "Hello, world!\n" { Ok(seconds) } else { Err(wrong(format!("hello says {said:?}"))) }
    })?;
    Ok(vec![Figure { name: "GNU hello from source".into(), unit: "s", value: seconds, target: Target::OfStock(1.05) }])
}

/// Where a directory of the root is in the compiler's tree, in which the others are links into `usr`.
fn usr(name: &str) -> String {
    if name == "usr" { name.into() } else { format!("usr/{name}") }
}
