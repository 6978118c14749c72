//! Where a build runs: the decision for or against a sandbox, and what is in it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, mknod};
use nix_compat::conf::{Sandbox, SandboxPath};
use nix_compat::derivation::Output;
use nix_compat::store_path::StorePath;

use crate::attributes::Attributes;
use crate::failure::Failure;
use crate::hooks::ask_pre_build;
use crate::room::Room;
use crate::run::{Control, Job};
use crate::sandbox::{Bind, HostView, SandboxView, View};

/// What a fixed-output derivation needs of the host to reach the network.
const NETWORK_FILES: [&str; 3] = ["/etc/resolv.conf", "/etc/services", "/etc/hosts"];

/// What a derivation that requires the feature `kvm` needs.
const KVM: &str = "/dev/kvm";
/// How many user namespaces the kernel allows. Zero is how administrators forbid them.
const MAX_USER_NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

/// A build's surroundings.
pub(crate) struct Place {
    pub(crate) view: View,
    pub(crate) host_network: bool,
    /// The build directory, as the builder sees it.
    pub(crate) build_dir_inside: String,
    /// All store paths the builder can read.
    pub(crate) inputs: BTreeSet<StorePath>,
}

impl Place {
    pub(crate) fn new(
        job: &Job,
        attributes: &Attributes<'_>,
        room: &Room,
        builds_dir: PathBuf,
        mut inputs: BTreeSet<StorePath>,
        control: &Control,
    ) -> Result<Self, Failure> {
        let has_network = job.drv.has_network();
        let no_chroot = attributes.flag("__noChroot");
        let sandboxed = match job.options.sandbox {
            Sandbox::On if no_chroot => {
                let text = format!(
                    "derivation '{}' has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'",
                    job.name()
                );
                return Err(Failure::rejected(text));
            }
            Sandbox::On => true,
            Sandbox::Off => false,
            Sandbox::Relaxed => !no_chroot && !has_network,
        };
        let sandboxed = sandboxed && sandbox_possible(job.options.sandbox_fallback)?;
        if !sandboxed && job.user.identity().has_range() {
            return Err(Failure::rejected("feature 'uid-range' is only supported in sandboxed builds"));
        }
        let more = match &job.options.hooks.pre_build {
            Some(hook) => ask_pre_build(hook, &job.name(), sandboxed.then(|| room.root()).as_deref(), control)?,
            None => Vec::new(),
        };
        if !sandboxed {
            hide_valid_outputs(job, room)?;
            let build_dir = room.build_dir();
            let view = View::Host(HostView {
                store_mount: job.config.store_mount.as_path().into(),
                scratch: room.store().into(),
                overlay_work: room.overlay_work().into(),
                inputs: base_names(&inputs),
                build_dir: build_dir.as_path().into(),
                builds_dir: builds_dir.into(),
            });
            let build_dir_inside = build_dir.to_string_lossy().into_owned();
            return Ok(Self { view, host_network: true, build_dir_inside, inputs });
        }

        let mut binds = binds(job, &more, has_network, &mut inputs)?;
        binds.extend(impure_host_deps(job, attributes)?);
        if attributes.requires_feature("kvm") {
            binds.push(Bind { source: KVM.into(), target: KVM.into(), optional: true });
        }
        let build_dir_inside = job.options.sandbox_build_dir.clone();
        let view = View::Sandbox(SandboxView {
            root: room.root().into(),
            store_mount: job.config.store_mount.as_path().into(),
            store_dir: job.store.store_dir().as_str().into(),
            scratch: room.store().into(),
            inputs: base_names(&inputs),
            build_dir: room.build_dir().into(),
            build_dir_inside: build_dir_inside.as_str().into(),
            tmp: room.tmp().into(),
            binds,
            shm_size: job.options.shm_size.clone(),
        });
        Ok(Self { view, host_network: has_network, build_dir_inside, inputs })
    }
}

/// Files of the machine that the derivation asks for, as far as the settings allow that. They need not be there. Links
/// are not followed, so that nobody learns where they lead.
fn impure_host_deps(job: &Job, attributes: &Attributes<'_>) -> Result<Vec<Bind>, Failure> {
    let wanted = attributes.words("__impureHostDeps").unwrap_or_default();
    let allowed: Vec<PathBuf> = job.options.impure_host_deps.iter().filter_map(|path| canonical(path)).collect();
    let bind = |path: String| {
        let found = canonical(&path).filter(|found| allowed.iter().any(|allowed| found.starts_with(allowed)));
        let found = found.ok_or_else(|| {
            let drv = job.name();
            let text = format!(
                "derivation '{drv}' requested impure path '{path}', but it was not in allowed-impure-host-deps"
            );
            Failure::misc(text).by_settings()
        })?;
        Ok(Bind { source: found.as_path().into(), target: found.into(), optional: true })
    };
    wanted.into_iter().map(bind).collect()
}

/// An absolute path without `.` and `..`, whatever lies there.
fn canonical(path: &str) -> Option<PathBuf> {
    let mut canonical = PathBuf::from("/");
    for part in path.strip_prefix('/')?.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(canonical.pop()),
            name => canonical.push(name),
        }
    }
    Some(canonical)
}

/// Whether the kernel can make a sandbox. Where it cannot, builds are done without one, if the setting allows it.
fn sandbox_possible(fallback: bool) -> Result<bool, Failure> {
    let limit = fs::read_to_string(MAX_USER_NAMESPACES).unwrap_or_default();
    if limit.trim() != "0" {
        return Ok(true);
    }
    if fallback {
        tracing::warn!("building without a sandbox: the kernel allows no user namespaces");
        return Ok(false);
    }
    let text = "this system does not support the kernel namespaces that are required for sandboxing; use '--no-sandbox' \
                to disable sandboxing";
    Err(Failure::misc(text).by_settings())
}

/// Outputs that are valid already (when they are built again) must not be in the builder's way. In a sandbox they are
/// no inputs and therefore not there; in an overlay a whiteout takes them away.
fn hide_valid_outputs(job: &Job, room: &Room) -> Result<(), Failure> {
    for path in job.drv.outputs.values().filter_map(Output::path) {
        if job.store.is_valid(path)? {
            let whiteout = room.store().join(path.base_name());
            mknod(&whiteout, SFlag::S_IFCHR, Mode::empty(), 0)
                .map_err(|e| Failure::misc(format!("cannot hide '{}' from its builder: {e}", whiteout.display())))?;
        }
    }
    Ok(())
}

fn base_names(paths: &BTreeSet<StorePath>) -> Vec<String> {
    paths.iter().map(|path| path.base_name().to_owned()).collect()
}

/// The sandbox paths, with those of the pre-build hook. Those in the store bring their closure along, and need no bind
/// where they are already.
fn binds(
    job: &Job,
    more: &[(String, SandboxPath)],
    has_network: bool,
    inputs: &mut BTreeSet<StorePath>,
) -> Result<Vec<Bind>, Failure> {
    let mut binds = Vec::new();
    let paths = job.options.sandbox_paths.iter().filter(|(target, _)| !more.iter().any(|(other, _)| other == *target));
    for (target, path) in paths.chain(more.iter().map(|(target, path)| (target, path))) {
        let mut source = path.source.clone();
        let mut shown = false;
        if let Ok((store_path, rest)) = job.store.store_dir().to_store_path(&path.source) {
            inputs.extend(job.store.closure([&store_path])?);
            shown = *target == path.source;
            // The store is mounted where paths say it is, except in tests.
            let rest = rest.trim_start_matches('/');
            let mut below = job.config.store_mount.join(store_path.base_name());
            if !rest.is_empty() {
                below.push(rest);
            }
            source = below.to_string_lossy().into_owned();
        }
        if !shown {
            binds.push(Bind {
                source: source.as_str().into(),
                target: target.as_str().into(),
                optional: path.optional,
            });
        }
    }
    if has_network {
        for file in NETWORK_FILES {
            // Often a link to a place that the sandbox does not have.
            let source = fs::canonicalize(file).unwrap_or_else(|_| Path::new(file).to_owned());
            binds.push(Bind { source: source.into(), target: file.into(), optional: true });
        }
    }
    Ok(binds)
}
