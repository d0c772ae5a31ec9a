//! Which system calls which threads make. Each was read in the code or seen in a run; why it is there is said where that
//! is not plain.

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xsave,
};
use rustix::ioctl::opcode;
use syscalls::Sysno::{self, *};

/// System calls that are allowed.
pub(super) struct Table {
    /// Whatever their arguments are; in groups, for who reads this.
    pub always: &'static [&'static [Sysno]],
    /// Only then.
    pub limited: &'static [Limited],
}

impl Table {
    /// Those that are always allowed.
    pub fn always(&self) -> impl Iterator<Item = Sysno> {
        self.always.iter().copied().flatten().copied()
    }

    /// All of them.
    pub fn calls(&self) -> impl Iterator<Item = Sysno> {
        self.always().chain(self.limited.iter().map(|Limited(call, _)| *call))
    }
}

/// A system call that is allowed in some cases.
pub(super) struct Limited(pub Sysno, pub When);

/// When a system call is allowed. The number is that of an argument, from 0, of which the low 32 bits are looked at.
#[derive(Clone, Copy)]
pub(super) enum When {
    /// It is one of these.
    OneOf(u8, &'static [u32]),
    /// It has all of these bits.
    With(u8, u32),
    /// It has none of these bits.
    Without(u8, u32),
    /// It is the number of this process.
    OwnProcess(u8),
}

/// Nothing that is mapped is ever code.
const NO_CODE: When = When::Without(2, libc::PROT_EXEC as u32);

/// What every thread does.
pub(super) static ANY: Table = Table {
    always: &[
        // Descriptors that are open.
        &[read, write, readv, writev, close, poll, ppoll, fstat, lseek],
        // Memory.
        &[munmap, mremap, madvise, brk],
        // Other threads, and time.
        &[futex, sched_yield, sched_getaffinity, membarrier],
        &[clock_gettime, clock_nanosleep, nanosleep, gettimeofday],
        // Signals.
        &[rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack, restart_syscall],
        // A thread's beginning and end.
        &[set_robust_list, rseq, gettid, getpid, exit, exit_group],
        // Seeds of hash tables.
        &[getrandom],
    ],
    limited: &[
        Limited(mmap, NO_CODE),
        Limited(mprotect, NO_CODE),
        Limited(prctl, When::OneOf(0, &[PR_SET_NAME, PR_GET_NAME, PR_SET_VMA])),
        Limited(fcntl, When::OneOf(1, &[F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL])),
        // The terminal is given back whoever ends the process.
        Limited(ioctl, When::OneOf(1, &[TCSETS, TCSETS2])),
        Limited(tgkill, When::OwnProcess(0)),
    ],
};

/// What is done to windows: by who maps files, who watches them, and by vCPUs, which have pages repaired; and what a
/// session of a share begins and ends with, which vCPUs cause by a reset.
pub(super) static WINDOW: Table = Table {
    always: &[
        // Files are opened again by /proc/self/fd, and looked at.
        &[open, openat, statx, newfstatat, umask],
        // Their names, for messages.
        &[readlink, readlinkat],
        // Set-id bits and capabilities go before a file may be written through a mapping.
        &[fchmod, fremovexattr],
        // Holes are given back.
        &[fallocate],
        &[inotify_add_watch, inotify_rm_watch, eventfd2],
        // What of a file is in memory.
        &[mincore, cachestat],
    ],
    limited: &[Limited(ioctl, When::OneOf(1, &[KVM_PRE_FAULT_MEMORY]))],
};

/// What vCPUs do besides.
pub(super) static VCPU: Table = Table {
    always: &[],
    limited: &[
        Limited(
            ioctl,
            When::OneOf(
                1,
                &[KVM_RUN, KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_GET_XSAVE, KVM_KVMCLOCK_CTRL],
            ),
        ),
        // Faults that a guest is to take.
        Limited(ioctl, When::OneOf(1, &[KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS])),
        // BARs that are moved, vectors, doorbells.
        Limited(
            ioctl,
            When::OneOf(1, &[KVM_SET_USER_MEMORY_REGION, KVM_IOEVENTFD, KVM_IRQFD, KVM_SET_GSI_ROUTING]),
        ),
    ],
};

/// What the server of a share does besides.
pub(super) static FILE_SYSTEM: Table = Table {
    always: &[
        // Names.
        &[getdents64, mkdirat, mknodat, symlinkat, linkat, unlinkat, renameat, renameat2],
        // Attributes.
        &[fstatfs, statfs, fchmodat, fchmodat2, fchown, fchownat, utimensat, ftruncate],
        &[getxattr, setxattr, listxattr, removexattr, fgetxattr, fsetxattr, flistxattr],
        // Data.
        &[pread64, pwrite64, preadv, pwritev, preadv2, pwritev2, copy_file_range],
        &[fsync, fdatasync, syncfs, sync_file_range, dup],
        // Files whose pages are put in the guest's reach: what may be known of them, and what is read ahead.
        &[faccessat2, fadvise64],
        // In whose name.
        &[setresuid, setresgid, setgroups, capget, capset],
    ],
    limited: &[Limited(ioctl, When::OneOf(1, &[FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_IOC_GETFLAGS]))],
};

/// What disks, ports and the entropy source do besides.
pub(super) static DATA: Table = Table {
    always: &[
        &[preadv, pwritev, fsync, fdatasync, fallocate, statx],
        // Sockets that there are: a port's other end, and the one that tells the guest's init that nobody reads any more.
        &[sendto, recvfrom, shutdown],
    ],
    limited: &[],
};

/// What the API socket and the metrics file take.
pub(super) static OBSERVER: Table = Table {
    always: &[
        // Clients.
        &[accept4, recvfrom, sendto, shutdown],
        // The file.
        &[openat, unlink, unlinkat, rename, renameat, renameat2, linkat, fchmod],
        &[statx, newfstatat, readlink, getcwd],
    ],
    limited: &[Limited(ioctl, When::OneOf(1, &[FIONBIO]))],
};

/// What is done besides by threads that the guest says nothing to: they start others, wait for signals and timers, move
/// what is typed, and clear up.
pub(super) static PROCESS: Table = Table {
    always: &[
        // Narrower filters.
        &[seccomp],
        // The main thread.
        &[epoll_create1, epoll_ctl, epoll_wait, epoll_pwait, timerfd_create, timerfd_settime],
        // Input that is copied.
        &[pipe2, splice, sendfile, copy_file_range],
        // Signals, and the guest's init.
        &[rt_sigtimedwait, setsockopt, getsockopt, shutdown, recvfrom, sendto],
        &[unlink, lstat, stat, getcwd, sysinfo, prlimit64],
        // The filter beside this one answers it; to refuse it here would be stronger than the answer.
        &[clone3],
    ],
    limited: &[
        Limited(clone, When::With(0, libc::CLONE_THREAD as u32)),
        Limited(prctl, When::OneOf(0, &[PR_SET_NO_NEW_PRIVS])),
        Limited(ioctl, When::OneOf(1, &[TCGETS, TCGETS2, TIOCGWINSZ, FIONBIO])),
    ],
};

// Numbers as the kernel has them, which looks at 32 bits.
const PR_SET_NAME: u32 = libc::PR_SET_NAME as u32;
const PR_GET_NAME: u32 = libc::PR_GET_NAME as u32;
const PR_SET_VMA: u32 = libc::PR_SET_VMA as u32;
const PR_SET_NO_NEW_PRIVS: u32 = libc::PR_SET_NO_NEW_PRIVS as u32;
const F_DUPFD_CLOEXEC: u32 = libc::F_DUPFD_CLOEXEC as u32;
const F_GETFD: u32 = libc::F_GETFD as u32;
const F_SETFD: u32 = libc::F_SETFD as u32;
const F_GETFL: u32 = libc::F_GETFL as u32;
const F_SETFL: u32 = libc::F_SETFL as u32;
const TCGETS: u32 = libc::TCGETS as u32;
const TCSETS: u32 = libc::TCSETS as u32;
const TCGETS2: u32 = libc::TCGETS2 as u32;
const TCSETS2: u32 = libc::TCSETS2 as u32;
const TIOCGWINSZ: u32 = libc::TIOCGWINSZ as u32;
const FIONBIO: u32 = libc::FIONBIO as u32;
/// linux/fs.h.
const FS_IOC_GETFLAGS: u32 = opcode::read::<libc::c_long>(b'f', 1);
/// With struct fsxattr, of 28 bytes.
const FS_IOC_FSGETXATTR: u32 = opcode::read::<[u8; 28]>(b'X', 31);
const FS_IOC_FSSETXATTR: u32 = opcode::write::<[u8; 28]>(b'X', 32);
/// linux/kvm.h.
const KVM: u8 = KVMIO as u8;
const KVM_SET_USER_MEMORY_REGION: u32 = opcode::write::<kvm_userspace_memory_region>(KVM, 0x46);
const KVM_SET_GSI_ROUTING: u32 = opcode::write::<kvm_irq_routing>(KVM, 0x6a);
const KVM_IRQFD: u32 = opcode::write::<kvm_irqfd>(KVM, 0x76);
const KVM_IOEVENTFD: u32 = opcode::write::<kvm_ioeventfd>(KVM, 0x79);
const KVM_RUN: u32 = opcode::none(KVM, 0x80);
const KVM_GET_REGS: u32 = opcode::read::<kvm_regs>(KVM, 0x81);
const KVM_GET_SREGS: u32 = opcode::read::<kvm_sregs>(KVM, 0x83);
const KVM_GET_VCPU_EVENTS: u32 = opcode::read::<kvm_vcpu_events>(KVM, 0x9f);
const KVM_SET_VCPU_EVENTS: u32 = opcode::write::<kvm_vcpu_events>(KVM, 0xa0);
const KVM_GET_XSAVE: u32 = opcode::read::<kvm_xsave>(KVM, 0xa4);
const KVM_SET_SREGS: u32 = opcode::write::<kvm_sregs>(KVM, 0x84);
const KVM_KVMCLOCK_CTRL: u32 = opcode::none(KVM, 0xad);
/// With struct kvm_pre_fault_memory, of 64 bytes.
const KVM_PRE_FAULT_MEMORY: u32 = opcode::read_write::<[u64; 8]>(KVM, 0xd5);
