//! What a builder may not do even as the user it is.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{SetupError, Step};

/// The setuid and setgid bits of a file mode.
const PRIVILEGE_BITS: [u64; 2] = [libc::S_ISUID as u64, libc::S_ISGID as u64];

/// `fchmodat2`, which libc does not name on every target. The number is the same on all of them.
const FCHMODAT2: i64 = 452;
/// `setxattrat`, likewise.
const SETXATTRAT: i64 = 463;

fn invalid(e: impl std::fmt::Display) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, e.to_string())
}

/// One rule per bit: any of them matching is enough.
fn any_privilege_bit(mode_argument: u8) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    PRIVILEGE_BITS
        .iter()
        .map(|&bit| {
            let set = SeccompCondition::new(mode_argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bit), bit)?;
            SeccompRule::new(vec![set])
        })
        .collect()
}

/// The filters, compiled: no file gets a setuid or setgid bit, and extended attributes (which a NAR cannot hold) look
/// unsupported.
fn programs() -> Result<[BpfProgram; 2], Box<dyn std::error::Error>> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let mut modes: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    #[cfg(target_arch = "x86_64")]
    {
        modes.insert(libc::SYS_chmod, any_privilege_bit(1)?);
        modes.insert(libc::SYS_mknod, any_privilege_bit(1)?);
        modes.insert(libc::SYS_creat, any_privilege_bit(1)?);
    }
    modes.insert(libc::SYS_fchmod, any_privilege_bit(1)?);
    modes.insert(libc::SYS_fchmodat, any_privilege_bit(2)?);
    modes.insert(FCHMODAT2, any_privilege_bit(2)?);
    modes.insert(libc::SYS_mknodat, any_privilege_bit(2)?);

    let mut attributes: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in [libc::SYS_setxattr, libc::SYS_lsetxattr, libc::SYS_fsetxattr, SETXATTRAT] {
        attributes.insert(call, Vec::new());
    }

    let compile = |rules, errno: i32| -> Result<BpfProgram, seccompiler::BackendError> {
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch)?.try_into()
    };
    Ok([compile(modes, libc::EPERM)?, compile(attributes, libc::ENOTSUP)?])
}

/// Installs the filters for this process and all that it starts. Sets no_new_privs, which cannot be undone either.
pub(super) fn filter_system_calls() -> Result<(), SetupError> {
    for program in programs().map_err(invalid).step(|| "compiling the system call filter")? {
        seccompiler::apply_filter(&program).map_err(invalid).step(|| "installing the system call filter")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn filters_compile() {
        super::programs().unwrap();
    }
}
