//! Who a build runs as: one user for each build at a time.
//!
//! A build must not be able to touch another one's processes or files, so no two of them share a user id. As root the
//! ids are those of the members of `build-users-group`, or, when there is no such group, taken from a range that
//! belongs to nobody. A daemon that is not root has only itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::unistd::{Group, User, geteuid};
use nix_compat::derivation::BasicDerivation;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::attributes::Attributes;
use crate::sandbox::Identity;

/// Distance of allocated ids: room for builds that will get a range of them.
const IDS_PER_BUILD: u32 = 65_536;

/// Whether a derivation requires a range of user ids.
pub(crate) fn needs_id_range(drv: &BasicDerivation) -> bool {
    Attributes::new(drv).is_ok_and(|attributes| attributes.requires_feature("uid-range"))
}

/// The ids that are in use, and the news that one is not any more.
#[derive(Debug, Default)]
pub(crate) struct Users {
    /// First ids, with how many belong to them.
    taken: Mutex<BTreeMap<u32, u32>>,
    freed: Notify,
}

/// The right to be one user. Dropping it gives the user to the next build, so it must outlive the build's processes.
#[derive(Debug)]
pub(crate) struct UserLease {
    users: Arc<Users>,
    identity: Identity,
}

/// Where user ids come from.
#[derive(Clone, Debug)]
pub(crate) struct UserSource {
    pub(crate) group: Option<String>,
    /// Whether ids are to be taken from the range.
    pub(crate) auto: bool,
    pub(crate) first_id: u32,
    pub(crate) id_count: u32,
}

/// Why there is no user for a build.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("cannot look up {what} '{name}': {source}")]
    Lookup { what: &'static str, name: String, source: nix::errno::Errno },
    #[error("the Unix user '{0}' in the build users group is root")]
    Root(String),
    #[error("feature 'uid-range' requires the setting 'auto-allocate-uids' to be enabled")]
    NotAllocated,
    #[error("the range of user ids beginning with {0} leaves no room for a build")]
    NoRange(u32),
}

impl Users {
    /// Waits for a user that no other build is.
    ///
    /// With `range` the user has [`IDS_PER_BUILD`] ids to itself.
    pub(crate) async fn lease(self: &Arc<Self>, source: &UserSource, range: bool) -> Result<UserLease, UserError> {
        if range && (!source.auto || !geteuid().is_root()) {
            return Err(UserError::NotAllocated);
        }
        let count = if range { IDS_PER_BUILD } else { 1 };
        if !geteuid().is_root() {
            return Ok(UserLease { users: self.clone(), identity: Identity::Caller });
        }
        let candidates = candidates(source)?;
        loop {
            // Asked for before looking, so that no release in between is missed.
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if let Some(identity) = self.take_first(&candidates, count) {
                return Ok(UserLease { users: self.clone(), identity });
            }
            freed.await;
        }
    }

    fn take_first(&self, candidates: &[(u32, u32)], count: u32) -> Option<Identity> {
        let mut taken = self.taken.lock();
        let free = |first: u32| {
            let last = first.saturating_add(count - 1);
            // Another client may have another range, so they need not be aligned.
            taken.range(..=last).next_back().is_none_or(|(&other, &length)| other.saturating_add(length - 1) < first)
        };
        let &(uid, gid) = candidates.iter().find(|(uid, _)| free(*uid))?;
        taken.insert(uid, count);
        Some(Identity::BuildUser { uid, gid, count })
    }
}

/// The users a build could be, with their groups.
fn candidates(source: &UserSource) -> Result<Vec<(u32, u32)>, UserError> {
    let lookup = |what, name: &str| {
        let name = name.to_owned();
        move |source| UserError::Lookup { what, name, source }
    };
    let group = match &source.group {
        Some(name) => Group::from_name(name).map_err(lookup("group", name))?,
        None => None,
    };
    if let Some(group) = group {
        let mut users = Vec::new();
        for name in &group.mem {
            let Some(user) = User::from_name(name).map_err(lookup("user", name))? else { continue };
            if user.uid.is_root() {
                return Err(UserError::Root(name.clone()));
            }
            users.push((user.uid.as_raw(), group.gid.as_raw()));
        }
        if !users.is_empty() {
            return Ok(users);
        }
    }
    let count = (source.id_count / IDS_PER_BUILD).max(1);
    let ids: Vec<(u32, u32)> = (0..count)
        .map_while(|slot| source.first_id.checked_add(slot.checked_mul(IDS_PER_BUILD)?))
        .filter(|first| first.checked_add(IDS_PER_BUILD - 1).is_some())
        .filter(|&id| id != 0)
        .map(|id| (id, id))
        .collect();
    if ids.is_empty() { Err(UserError::NoRange(source.first_id)) } else { Ok(ids) }
}

impl UserLease {
    /// Who the build is.
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }
}

impl Drop for UserLease {
    fn drop(&mut self) {
        if let Identity::BuildUser { uid, .. } = self.identity {
            self.users.taken.lock().remove(&uid);
            self.users.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(id_count: u32) -> UserSource {
        UserSource { group: None, auto: true, first_id: 872_415_232, id_count }
    }

    #[test]
    fn ids_are_never_root_and_never_overflow() {
        assert_eq!(candidates(&source(2 * IDS_PER_BUILD)).unwrap().len(), 2);
        let at_the_end = UserSource { first_id: u32::MAX - IDS_PER_BUILD - 9, ..source(10 * IDS_PER_BUILD) };
        assert_eq!(candidates(&at_the_end).unwrap().len(), 1);
        assert!(candidates(&UserSource { first_id: 0, ..source(1) }).is_err());
    }

    #[tokio::test]
    async fn a_user_is_one_build_at_a_time() {
        if !geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let users = Arc::new(Users::default());
        let source = source(IDS_PER_BUILD);
        let first = users.lease(&source, false).await.unwrap();
        let mut second = Box::pin(users.lease(&source, false));
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        second.await.unwrap();
    }

    #[test]
    fn ranges_never_overlap() {
        let users = Users::default();
        let take = |first: u32, count: u32| users.take_first(&[(first, first)], count).is_some();
        assert!(take(1000, 100) && take(1100, 1) && take(999, 1));
        for (first, count) in [(1000, 1), (1099, 1), (1100, 1), (900, 101), (1050, 1000), (1101 - 100, 1)] {
            assert!(!take(first, count), "{first} {count}");
        }
        assert!(take(1101, 10) && take(900, 99));
    }

    #[tokio::test]
    async fn a_range_is_only_had_by_allocation() {
        let users = Arc::new(Users::default());
        let named = UserSource { auto: false, ..source(IDS_PER_BUILD) };
        assert!(matches!(users.lease(&named, true).await, Err(UserError::NotAllocated)));
        if geteuid().is_root() {
            let lease = users.lease(&source(IDS_PER_BUILD), true).await.unwrap();
            assert!(matches!(lease.identity(), Identity::BuildUser { count: IDS_PER_BUILD, .. }));
        }
    }
}
