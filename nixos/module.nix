# Puts castored in the place of nix-daemon.socket: the same socket path, the same nix.conf, the same build users.
#
#   imports = [ ./castored/nixos/module.nix ];
#   services.castored.enable = true;
#
# Meant for machines whose /nix/store belongs to castored from the start, or whose system does not boot from it: the
# mount covers what lies in /nix/store below it.
{ config, lib, pkgs, ... }:

let
  cfg = config.services.castored;
  socketPath = "/nix/var/nix/daemon-socket/socket";
in
{
  options.services.castored = {
    enable = lib.mkEnableOption "castored instead of nix-daemon";

    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The castored package to run.";
    };

    grpcListen = lib.mkOption {
      type = lib.types.str;
      default = "127.0.0.1:8000";
      example = "none";
      description = "Loopback address on which blobs, directories and path infos can be looked at over gRPC.";
    };

    httpListen = lib.mkOption {
      type = with lib.types; nullOr str;
      default = null;
      example = "0.0.0.0:5000";
      description = "Address at which the store is served as a binary cache over HTTP, if at all.";
    };

    httpPushTokenFile = lib.mkOption {
      type = with lib.types; nullOr str;
      default = null;
      example = "/run/keys/castored-push";
      description = "File with a token on each line; whoever knows one may push into the store over HTTP. Nobody may without it.";
    };

    uploadTo = lib.mkOption {
      type = with lib.types; listOf str;
      default = [ ];
      example = [ "https://cache.example.org?compression=zstd" ];
      description = "URLs of stores to which everything that is built here is sent, in the background.";
    };

    settings = lib.mkOption {
      type = with lib.types; attrsOf (oneOf [ bool int str (listOf str) ]);
      default = { };
      example = { max-jobs = 4; };
      description = "Settings for nix.conf, which castored reads as nix-daemon does. Merged into `nix.settings`.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = config.nix.enable;
        message = "services.castored replaces only the daemon: the clients and nix.conf still come from `nix.enable`.";
      }
    ];

    nix.settings = cfg.settings;

    # A client run by root must not open the store behind the daemon's back.
    environment.variables.NIX_REMOTE = "daemon";
    environment.systemPackages = [ cfg.package ];

    # Stock's units stay defined by the Nix module, but are never started.
    systemd.sockets.nix-daemon.enable = lib.mkForce false;
    systemd.services.nix-daemon.enable = lib.mkForce false;

    systemd.sockets.castored = {
      description = "castored socket (worker protocol)";
      wantedBy = [ "sockets.target" ];
      unitConfig.RequiresMountsFor = [ "/nix/var" ];
      socketConfig = {
        ListenStream = socketPath;
        SocketMode = "0666";
        DirectoryMode = "0755";
      };
    };

    systemd.services.castored = {
      description = "castored, a Nix daemon over a content-addressed store";
      # The store is a mount of this service, so whatever a user or a service runs from it comes later.
      wantedBy = [ "multi-user.target" ];
      before = [ "multi-user.target" "systemd-user-sessions.service" ];
      requires = [ "castored.socket" ];
      after = [ "castored.socket" ];
      unitConfig.RequiresMountsFor = [ "/nix/var" ];
      path = [ pkgs.fuse3 ];
      # A switch does not restart it: builds would end. `castored daemon --replace` has the new one take over.
      restartIfChanged = false;
      # Its program lies in the store, so systemd could not start it again while nobody serves the store: a keeper of its
      # own does, from memory. Should that end as well, this often in a minute is a defect.
      startLimitIntervalSec = 60;
      startLimitBurst = 20;
      serviceConfig = {
        Type = "notify";
        ExecStart = "${lib.getExe cfg.package} daemon --grpc-listen ${cfg.grpcListen}"
          + lib.optionalString (cfg.httpListen != null) " --http ${cfg.httpListen}"
          + lib.optionalString (cfg.httpPushTokenFile != null) " --http-push-token-file ${cfg.httpPushTokenFile}"
          # systemd has a meaning for percent and dollar signs.
          + lib.optionalString (cfg.uploadTo != [ ])
            " --option upload-to ${lib.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (builtins.toJSON (toString cfg.uploadTo))}";
        Restart = "always";
        RestartSec = 0;
        KillMode = "mixed";
        TimeoutStartSec = "5min";
        LimitNOFILE = 1048576;
        TasksMax = "infinity";
        Delegate = true;
        OOMPolicy = "continue";
        PrivateMounts = false;
      };
    };
  };
}
