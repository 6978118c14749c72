# castored built from this checkout: `callPackage ./nixos/package.nix { }`.
{ lib, rustPlatform, fuse3 }:

let
  manifest = lib.importTOML ../Cargo.toml;
in
rustPlatform.buildRustPackage {
  pname = "castored";
  inherit (manifest.workspace.package) version;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../clippy.toml
      ../rustfmt.toml
      ../src
      ../protos
      ../compat-tests
      ../nixos/systemd
      ../LICENSE-MIT
      ../LICENSE-APACHE
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;
  cargoBuildFlags = [ "--package" "castored" ];

  # The tests of whole clients need root, FUSE and Debian packages: compat-tests/run is for them.
  cargoTestFlags = [ "--workspace" "--exclude" "compat-tests" ];
  nativeCheckInputs = [ fuse3 ];

  # Called by this name it takes stock's arguments, so it can stand in for `nix-daemon` anywhere.
  postInstall = ''
    ln -s castored $out/bin/nix-daemon
    install -Dm644 -t $out/lib/systemd/system nixos/systemd/castored.socket nixos/systemd/castored.service
    substituteInPlace $out/lib/systemd/system/castored.service --replace-fail /usr/local/bin $out/bin
  '';

  meta = {
    description = "Drop-in replacement for nix-daemon over a content-addressed, deduplicated store";
    license = with lib.licenses; [ mit asl20 ];
    platforms = lib.platforms.linux;
    mainProgram = "castored";
  };
}
