//! A build's control group (cgroup v2), where the setting `use-cgroups` wants one.
//!
//! Groups of builds lie below the daemon's own, under the name that stock gives to those of builds without a build user.
//! What a group is good for needs no controllers: its processor time, and that all of its processes can be killed at
//! once. Controllers that there are share out what they control fairly between builds, and have two limits set.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::failure::Failure;
use crate::run::CpuTime;
use crate::sandbox::Identity;

/// Begins the name of a build's group; the daemon's process id and a number follow.
const PREFIX: &str = "nix-build-pid-";
/// The daemon's own group when it has to leave the one that builds are below: where there are controllers, a group has
/// either processes or groups in it.
const OWN: &str = "castored";
/// Most processes and threads of a build: far more than any needs, far less than the machine has numbers for.
const MAX_TASKS: u32 = 65_536;
/// How long the processes of a group may take to be gone after they were killed.
const DYING: Duration = Duration::from_secs(10);
/// How often it is looked whether they are.
const GLANCE: Duration = Duration::from_millis(2);

/// Why there is no group for a build.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("cannot determine the cgroups file system")]
    NoFilesystem,
    #[error("cannot determine cgroup name from /proc/self/cgroup")]
    NoName,
    #[error("expected cgroup directory \"{}\"", .0.display())]
    NotThere(PathBuf),
    #[error("cannot {action} cgroup \"{}\": {source}", path.display())]
    Group { action: &'static str, path: PathBuf, source: io::Error },
}

impl From<CgroupError> for Failure {
    /// Without the setting there would be no need of a group.
    fn from(error: CgroupError) -> Self {
        Failure::misc(error).by_settings()
    }
}

/// The group of a running build. Dropping it kills what is in it and removes it.
#[derive(Debug)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the group of a build that runs as `identity`. With a range of users the build's root may divide it further.
    pub(crate) fn create(identity: Identity) -> Result<Self, CgroupError> {
        static ROOT: Mutex<Option<PathBuf>> = Mutex::new(None);
        let root = {
            let mut root = ROOT.lock();
            match &*root {
                Some(root) => root.clone(),
                None => root.insert(prepare(root_of_builds()?)).clone(),
            }
        };
        Self::below(&root, identity)
    }

    fn below(root: &Path, identity: Identity) -> Result<Self, CgroupError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let group = loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = root.join(format!("{PREFIX}{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                // A daemon in another pid namespace may have our number.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(CgroupError::Group { action: "create", path, source }),
                Ok(()) => break Self(path),
            }
        };
        group.limit();
        if let Identity::BuildUser { uid, gid, .. } = identity
            && identity.has_range()
        {
            for file in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
                let path = group.0.join(file);
                let failed = |source| CgroupError::Group { action: "give away", path: path.clone(), source };
                chown(&path, Some(uid), Some(gid)).map_err(failed)?;
            }
        }
        Ok(group)
    }

    /// What a build must not do to the rest of the machine. A file is there where its controller is.
    fn limit(&self) {
        for (file, value) in [("pids.max", MAX_TASKS.to_string()), ("memory.oom.group", "1".to_owned())] {
            let path = self.0.join(file);
            if path.exists()
                && let Err(error) = fs::write(&path, value)
            {
                tracing::warn!("cannot set {}: {error}", path.display());
            }
        }
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Ends it, with all that is still in it; gives the processor time that it has taken.
    pub(crate) fn end(self) -> Option<CpuTime> {
        self.kill();
        cpu_time(&fs::read_to_string(self.0.join("cpu.stat")).ok()?)
    }

    fn kill(&self) {
        let killed = fs::write(self.0.join("cgroup.kill"), "1");
        let start = Instant::now();
        while is_populated(&self.0) {
            if start.elapsed() > DYING {
                tracing::warn!("processes of {} do not die: {killed:?}", self.0.display());
                return;
            }
            thread::sleep(GLANCE);
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.kill();
        if let Err(error) = remove(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Whether there are processes in a group or below it.
fn is_populated(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.events")).is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// Removes a group and those that its build has made below it.
fn remove(group: &Path) -> io::Result<()> {
    let (mut todo, mut found) = (vec![group.to_owned()], Vec::new());
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
        }
        found.push(dir);
    }
    // What is below was found later.
    found.iter().rev().try_for_each(fs::remove_dir)
}

/// The group that builds' groups are made in: the daemon's.
fn root_of_builds() -> Result<PathBuf, CgroupError> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mount = mounted(&read("/proc/self/mounts")).ok_or(CgroupError::NoFilesystem)?;
    let groups = read("/proc/self/cgroup");
    let name = own(&groups).ok_or(CgroupError::NoName)?;
    let root = mount.join(name.trim_start_matches('/'));
    if root.is_dir() { Ok(root) } else { Err(CgroupError::NotThere(root)) }
}

/// Where cgroup v2 is mounted, by a list in the form of fstab(5).
fn mounted(mounts: &str) -> Option<PathBuf> {
    let place = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let place = words.next()?;
        (words.next() == Some("cgroup2")).then_some(place)
    })?;
    let unescaped = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    Some(unescaped.iter().fold(place.to_owned(), |place, (code, text)| place.replace(code, text)).into())
}

/// The name of a process's group, by what cgroups(7) has in `/proc/PID/cgroup`.
fn own(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Hands the controllers on to the groups below, as far as there are any, and removes what earlier daemons have left.
fn prepare(root: PathBuf) -> PathBuf {
    for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Empty since that daemon's death: with it, its builds have died.
            let _ = remove(&entry.path());
        }
    }
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let hand_on = || fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
        let handed = hand_on().or_else(|error| {
            if error.kind() != io::ErrorKind::ResourceBusy {
                return Err(error);
            }
            let own = root.join(OWN);
            match fs::create_dir(&own) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => fs::write(own.join("cgroup.procs"), "0")?,
            }
            hand_on()
        });
        if let Err(error) = handed {
            tracing::info!("builds have no {controller} controller: {error}");
        }
    }
    root
}

fn cpu_time(stat: &str) -> Option<CpuTime> {
    let number = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    Some(CpuTime { user: number("user_usec ")?, system: number("system_usec ")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_groups_are() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/a\\040group cgroup2 rw 0 0\n";
        assert_eq!(mounted(mounts), Some(PathBuf::from("/sys/fs/a group")));
        assert_eq!(mounted("cgroup2 /x tmpfs rw 0 0\ntmpfs /cgroup2 cgroup rw 0 0\n"), None);
        assert_eq!(own("4:memory:/a\n1:cpu:/\n0::/b/c d\n"), Some("/b/c d"));
        assert_eq!(own("4:memory:/a\n"), None);
        assert_eq!(CgroupError::NoFilesystem.to_string(), "cannot determine the cgroups file system");
    }

    #[test]
    fn processor_time() {
        let time = cpu_time("usage_usec 30\nuser_usec 10\nsystem_usec 20\nnice_usec 0\n").unwrap();
        assert_eq!((time.user, time.system), (10, 20));
        assert!(cpu_time("usage_usec 30\n").is_none());
    }

    #[test]
    fn limits_are_set_where_their_controllers_are() {
        let dir = tempfile::tempdir().unwrap();
        let group = std::mem::ManuallyDrop::new(Cgroup(dir.path().to_owned()));
        fs::write(dir.path().join("pids.max"), "max").unwrap();
        group.limit();
        assert_eq!(fs::read_to_string(dir.path().join("pids.max")).unwrap(), "65536");
        assert!(!dir.path().join("memory.oom.group").exists());
    }

    #[test]
    fn all_of_a_group_dies_with_it() {
        let Ok(root) = root_of_builds() else {
            println!("SKIPPED: no cgroup2 is mounted");
            return;
        };
        let group = match Cgroup::below(&root, Identity::Caller) {
            Ok(group) => group,
            Err(error) => {
                println!("SKIPPED: {error}");
                return;
            }
        };
        let inner = group.path().join("inner/most");
        fs::create_dir_all(&inner).unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(inner.join("cgroup.procs"), child.id().to_string()).unwrap();
        assert!(is_populated(group.path()));
        let (path, start) = (group.path().to_owned(), Instant::now());
        let reaped = thread::spawn(move || child.wait().unwrap());
        assert!(group.end().is_some());
        assert!(!reaped.join().unwrap().success() && start.elapsed() < Duration::from_secs(5));
        assert!(!path.exists());
    }
}
