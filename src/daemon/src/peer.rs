//! Who is at the other end of a socket, and what they may do.

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use nix_compat::conf::Settings;
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// What a client may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Everything: `trusted-users`.
    Trusted,
    /// What cannot harm others: `allowed-users`.
    Untrusted,
}

/// The process that connected.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its process id, for messages.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// The user's name, or the number where it has none.
    pub user: String,
}

impl Peer {
    /// Asks the kernel who opened the other end.
    ///
    /// # Errors
    /// When the socket is not a Unix socket.
    pub fn of(socket: &impl AsFd) -> nix::Result<Self> {
        let credentials = getsockopt(socket, PeerCredentials)?;
        Ok(Self::from_ids(credentials.pid(), credentials.uid(), credentials.gid()))
    }

    /// A peer with these ids; its name is looked up.
    pub fn from_ids(pid: i32, uid: u32, gid: u32) -> Self {
        let found = found("user", uid, User::from_uid(Uid::from_raw(uid)));
        let user = found.map_or_else(|| uid.to_string(), |user| user.name);
        Self { pid, uid, gid, user }
    }

    /// Makes a directory of the user's own, with the user's name, in one that is for such. One that is there stays as
    /// it is.
    ///
    /// # Errors
    /// When it cannot be made or given away.
    pub(crate) fn make_directory(&self, within: &Path) -> io::Result<()> {
        let path = within.join(&self.user);
        // A name is no path.
        if path.parent() != Some(within) || path.symlink_metadata().is_ok() {
            return Ok(());
        }
        match std::fs::create_dir(within) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        match std::fs::create_dir(&path) {
            // By another connection of the user's.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(e),
            Ok(()) => std::os::unix::fs::lchown(&path, Some(self.uid), None),
        }
    }

    /// What this peer may do; `None` when it may not connect at all.
    ///
    /// Stock's rule: `trusted-users` first, then `allowed-users`; a member of the build users' group is never
    /// let in.
    pub fn trust(&self, settings: &Settings) -> Option<Trust> {
        let group = found("group", self.gid, Group::from_gid(Gid::from_raw(self.gid)));
        let group = group.map(|group| group.name).unwrap_or_default();
        if self.listed(&settings.trusted_users) {
            return Some(Trust::Trusted);
        }
        if settings.build_users_group.as_deref().is_some_and(|builders| !builders.is_empty() && builders == group) {
            return None;
        }
        self.listed(&settings.allowed_users).then_some(Trust::Untrusted)
    }

    /// Whether a list of users, `@group`s and `*` has this peer.
    fn listed(&self, list: &[String]) -> bool {
        list.iter().any(|entry| match entry.strip_prefix('@') {
            Some(group) => self.is_in_group(group),
            None => entry == "*" || *entry == self.user,
        })
    }

    fn is_in_group(&self, name: &str) -> bool {
        let Some(group) = found("group", name, Group::from_name(name)) else { return false };
        if group.gid.as_raw() == self.gid || group.mem.contains(&self.user) {
            return true;
        }
        let Ok(user) = CString::new(self.user.as_str()) else { return false };
        getgrouplist(&user, Gid::from_raw(self.gid)).is_ok_and(|groups| groups.contains(&group.gid))
    }
}

/// What was looked up. Who cannot be looked up is nobody, which has to be said: it may be why somebody is refused.
fn found<T>(what: &str, which: impl std::fmt::Display, result: nix::Result<Option<T>>) -> Option<T> {
    result.unwrap_or_else(|error| {
        tracing::warn!("cannot look up the {what} {which}: {error}");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(trusted: &[&str], allowed: &[&str]) -> Settings {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Settings { trusted_users: list(trusted), allowed_users: list(allowed), ..Settings::default() }
    }

    #[test]
    fn a_directory_of_ones_own() {
        let dir = tempfile::tempdir().unwrap();
        let within = dir.path().join("per-user");
        let peer = |user: &str| Peer { user: user.to_owned(), ..Peer::from_ids(1, nix::unistd::geteuid().as_raw(), 0) };
        for _ in 0..2 {
            peer("me").make_directory(&within).unwrap();
        }
        for user in ["../you", "", ".", "..", "a/b"] {
            peer(user).make_directory(&within).unwrap();
        }
        let names = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(names(&within), ["me"]);
        assert_eq!(names(dir.path()), ["per-user"]);
    }

    #[test]
    fn the_lists_decide() {
        let root = Peer::from_ids(1, 0, 0);
        let nobody = Peer::from_ids(2, 65534, 65534);
        assert_eq!(root.trust(&settings(&["root"], &["*"])), Some(Trust::Trusted));
        assert_eq!(nobody.trust(&settings(&["root"], &["*"])), Some(Trust::Untrusted));
        assert_eq!(nobody.trust(&settings(&["root"], &["@root"])), None);
        assert_eq!(root.trust(&settings(&[], &["@root"])), Some(Trust::Untrusted));
        // Root is let in by the lists only.
        assert_eq!(root.trust(&settings(&[], &[])), None);
    }
}
