//! Who is at the other end of a socket, and what they may do.

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use nix_compat::conf::Settings;
use std::ffi::CString;
use std::os::fd::AsFd;

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
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
        Self { pid, uid, gid, user }
    }

    /// What this peer may do; `None` when it may not connect at all.
    ///
    /// Stock's rule: `trusted-users` first, then `allowed-users`; a member of the build users' group is never
    /// let in.
    pub fn trust(&self, settings: &Settings) -> Option<Trust> {
        let group = Group::from_gid(Gid::from_raw(self.gid)).ok().flatten().map(|g| g.name).unwrap_or_default();
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
        let Ok(Some(group)) = Group::from_name(name) else { return false };
        if group.gid.as_raw() == self.gid || group.mem.contains(&self.user) {
            return true;
        }
        let Ok(user) = CString::new(self.user.as_str()) else { return false };
        getgrouplist(&user, Gid::from_raw(self.gid)).is_ok_and(|groups| groups.contains(&group.gid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(trusted: &[&str], allowed: &[&str]) -> Settings {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Settings { trusted_users: list(trusted), allowed_users: list(allowed), ..Settings::default() }
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
