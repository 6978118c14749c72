//! What a builder may not do even as the user it is.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{SetupError, Step, sys};

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

/// The same for a call that makes a file only with one of these flags.
fn any_privilege_bit_of_new(flags_argument: u8) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    // O_TMPFILE shares a bit with O_DIRECTORY, which excludes making anything.
    let tmpfile = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u64;
    let mut rules = Vec::new();
    for flag in [libc::O_CREAT as u64, tmpfile] {
        for bit in PRIVILEGE_BITS {
            let masked = |argument: u8, bits: u64| {
                SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), bits)
            };
            rules.push(SeccompRule::new(vec![masked(flags_argument, flag)?, masked(flags_argument + 1, bit)?])?);
        }
    }
    Ok(rules)
}

/// Numbers of the system calls that are filtered, which differ between architectures.
struct Numbers {
    /// The mode is their second argument.
    mode_second: &'static [i64],
    /// The mode is their third argument.
    mode_third: &'static [i64],
    /// Flags are their second argument, and the mode their third.
    open_second: &'static [i64],
    /// Flags are their third argument, and the mode their fourth.
    open_third: &'static [i64],
    set_attribute: &'static [i64],
}

const NATIVE: Numbers = Numbers {
    #[cfg(target_arch = "x86_64")]
    mode_second: &[libc::SYS_chmod, libc::SYS_mknod, libc::SYS_creat, libc::SYS_fchmod],
    #[cfg(not(target_arch = "x86_64"))]
    mode_second: &[libc::SYS_fchmod],
    mode_third: &[libc::SYS_fchmodat, FCHMODAT2, libc::SYS_mknodat],
    #[cfg(target_arch = "x86_64")]
    open_second: &[libc::SYS_open],
    #[cfg(not(target_arch = "x86_64"))]
    open_second: &[],
    open_third: &[libc::SYS_openat],
    set_attribute: &[libc::SYS_setxattr, libc::SYS_lsetxattr, libc::SYS_fsetxattr, SETXATTRAT],
};

/// The same calls, in the same order, of 32-bit programs on x86-64 (`asm/unistd_32.h`).
#[cfg(target_arch = "x86_64")]
const I386: Numbers = Numbers {
    mode_second: &[15, 14, 8, 94],
    mode_third: &[306, FCHMODAT2, 297],
    open_second: &[5],
    open_third: &[295],
    set_attribute: &[226, 227, 228, SETXATTRAT],
};

/// The filters, compiled: no file gets a setuid or setgid bit, and extended attributes (which a NAR cannot hold) look
/// unsupported.
fn programs() -> Result<[BpfProgram; 2], Box<dyn std::error::Error>> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let compile = |rules, errno: i32| -> Result<BpfProgram, seccompiler::BackendError> {
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch)?.try_into()
    };
    let compile_all = |numbers: &Numbers| -> Result<[BpfProgram; 2], seccompiler::BackendError> {
        let mut modes: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for (calls, argument) in [(numbers.mode_second, 1), (numbers.mode_third, 2)] {
            for call in calls {
                modes.insert(*call, any_privilege_bit(argument)?);
            }
        }
        for (calls, flags) in [(numbers.open_second, 1), (numbers.open_third, 2)] {
            for call in calls {
                modes.insert(*call, any_privilege_bit_of_new(flags)?);
            }
        }
        let attributes = numbers.set_attribute.iter().map(|call| (*call, Vec::new())).collect();
        Ok([compile(modes, libc::EPERM)?, compile(attributes, libc::ENOTSUP)?])
    };
    let native = compile_all(&NATIVE)?;
    #[cfg(target_arch = "x86_64")]
    let native = {
        let [modes, attributes] = native;
        let [modes_32, attributes_32] = compile_all(&I386)?;
        [x86::with_32_bit(modes, modes_32)?, x86::with_32_bit(attributes, attributes_32)?]
    };
    Ok(native)
}

/// What seccompiler compiles kills programs of every architecture but one. On x86-64 there are two, and 32-bit programs
/// are ordinary there.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use nix::libc;
    use seccompiler::{BpfProgram, sock_filter};

    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const AUDIT_ARCH_I386: u32 = 0x4000_0003;
    /// Added to the numbers of x32, a third architecture that has the second one's name and no programs.
    const X32: u32 = 0x4000_0000;
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const JUMP_UNLESS_LESS: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    /// Where `seccomp_data` has the number of the call and the architecture.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;

    fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
        sock_filter { code, jt, jf, k }
    }

    /// One program of two compiled for x86-64, of which the second has the numbers of i386.
    pub(super) fn with_32_bit(native: BpfProgram, mut other: BpfProgram) -> Result<BpfProgram, &'static str> {
        // Both begin with a look at the architecture; all jumps are relative, and every way ends with a return.
        match other.get_mut(1) {
            Some(check) if check.code == JUMP_IF_EQUAL && check.k == AUDIT_ARCH_X86_64 => check.k = AUDIT_ARCH_I386,
            _ => return Err("the compiled filter does not begin as expected"),
        }
        let native_length = u32::try_from(native.len()).map_err(|_| "the compiled filter is too long")?;
        let mut program = vec![
            instruction(LOAD, ARCH, 0, 0),
            instruction(JUMP_IF_EQUAL, AUDIT_ARCH_I386, 0, 1),
            instruction(JUMP, 3 + native_length, 0, 0),
            instruction(LOAD, NUMBER, 0, 0),
            instruction(JUMP_UNLESS_LESS, X32, 0, 1),
            instruction(RETURN, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, 0, 0),
        ];
        program.extend(native);
        program.extend(other);
        Ok(program)
    }
}

/// Installs the filters for this process and all that it starts. Sets no_new_privs, which cannot be undone either.
pub(super) fn filter_system_calls() -> Result<(), SetupError> {
    for program in programs().map_err(invalid).step(|| "compiling the system call filter")? {
        seccompiler::apply_filter(&program).map_err(invalid).step(|| "installing the system call filter")?;
    }
    Ok(())
}

/// The same for a process that may administer its namespace, and that does not give up new privileges.
pub(super) fn filter_system_calls_of_privileged() -> Result<(), SetupError> {
    for program in programs().map_err(invalid).step(|| "compiling the system call filter")? {
        sys::install_filter(&program).step(|| "installing the system call filter")?;
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
