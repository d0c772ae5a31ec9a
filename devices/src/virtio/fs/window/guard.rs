//! What happens when the device itself touches a page of a window that is not there.
//!
//! Descriptors may point into a window, and then the device copies to and from it. The host kills a process that touches
//! a page beyond the end of a mapped file (SIGBUS; a guest can have a file mapped that is shorter than its chunk, and the
//! host can truncate one), or that writes to a read-only mapping (SIGSEGV; no driver that works as it should asks for
//! it). Here the page is replaced by one of zeros that belongs to no file, and the copy goes on: what the guest then has
//! is its own affair, and only in that page. The window's watcher is told, and sees to it that the file is shown again.
//!
//! vCPUs that touch such pages get no signal: see `repair.rs` and `vmm/src/vcpu.rs`.

use std::io;
use std::ops::Range;
use std::sync::Once;
use std::sync::OnceLock;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release,
};

use super::CHUNK_SIZE;
use super::spare::give_up;

const PAGE: usize = 4096;

/// A range of addresses that is guarded, and how often that was needed.
struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    replaced: AtomicU64,
    /// Addresses of pages that were replaced and not taken yet; 0 where there is room.
    pages: [AtomicUsize; PAGES],
    /// Whether there were more.
    overflowed: AtomicBool,
}

/// Replaced pages that a window remembers, until they are looked at.
const PAGES: usize = 32;

/// The eventfd that is told of replaced pages; below 0 if there is none.
static TOLD: AtomicI32 = AtomicI32::new(-1);

/// Has the eventfd `fd` told of replaced pages. It must stay open until the process ends.
pub(super) fn tell(fd: libc::c_int) {
    TOLD.store(fd, Relaxed);
}

/// Windows that a process can have: a signal handler can neither allocate nor lock.
const SLOTS: usize = 256;

static GUARDED: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        replaced: AtomicU64::new(0),
        pages: [const { AtomicUsize::new(0) }; PAGES],
        overflowed: AtomicBool::new(false),
    }
}; SLOTS];

/// The handlers that were there before, for SIGBUS and SIGSEGV.
static PREVIOUS: [OnceLock<libc::sigaction>; 2] = [const { OnceLock::new() }; 2];
const SIGNALS: [libc::c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// Guards a range of addresses until it is dropped.
pub(super) struct Guard(&'static Slot);

impl Guard {
    /// Guards `range`, which must be a window's for as long as the guard lives. The first guard of a process installs
    /// the handlers; what they are not concerned with goes to those that were there before.
    ///
    /// # Errors
    /// ENOSPC, if the process has more windows than can be guarded; what sigaction(2) says.
    pub(super) fn new(range: Range<usize>) -> io::Result<Guard> {
        install()?;
        let free =
            GUARDED.iter().find(|slot| slot.taken.compare_exchange(false, true, AcqRel, Relaxed).is_ok());
        let slot = free.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        slot.replaced.store(0, Relaxed);
        slot.pages.iter().for_each(|page| page.store(0, Relaxed));
        slot.overflowed.store(false, Relaxed);
        slot.end.store(range.end, Relaxed);
        slot.start.store(range.start, Release);
        Ok(Guard(slot))
    }

    /// Pages that were replaced.
    pub(super) fn replaced(&self) -> u64 {
        self.0.replaced.load(Relaxed)
    }

    /// Addresses of pages that were replaced since the last call; if they were too many, one of each chunk.
    pub(super) fn take_pages(&self) -> Vec<usize> {
        let Slot { start, end, pages, overflowed, .. } = self.0;
        if overflowed.swap(false, AcqRel) {
            pages.iter().for_each(|page| page.store(0, Release));
            return (start.load(Relaxed)..end.load(Relaxed)).step_by(CHUNK_SIZE as usize).collect();
        }
        pages.iter().map(|page| page.swap(0, AcqRel)).filter(|page| *page != 0).collect()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Empty first, whatever the handler has seen of the other.
        self.0.end.store(0, Release);
        self.0.start.store(0, Release);
        self.0.taken.store(false, Release);
    }
}

fn install() -> io::Result<()> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| {
        for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
            // SAFETY: an all-zero sigaction is valid: no flags, an empty mask.
            let (mut action, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_signal;
            action.sa_sigaction = handler as usize;
            // On the alternate stack, as the handler of Rust's library needs that finds overflows of the other.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: the handler does nothing but what a signal handler may; both structures are valid.
            if unsafe { libc::sigaction(signal, &action, &mut old) } != 0 {
                result = Err(io::Error::last_os_error());
                return;
            }
            let _ = previous.set(old);
        }
    });
    result
}

/// Async-signal-safe: it loads and stores atomics, and calls mmap(2) and write(2), which are system calls and no more.
extern "C" fn on_signal(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure to a handler with SA_SIGINFO, with the address for these signals.
    let address = unsafe { (*info).si_addr() } as usize;
    if !replace_page(address) {
        pass_on(signal, info, context);
    }
}

/// Replaces the page at `address` if it is a window's.
fn replace_page(address: usize) -> bool {
    let within = |slot: &&Slot| (slot.start.load(Acquire)..slot.end.load(Acquire)).contains(&address);
    let Some(slot) = GUARDED.iter().find(within) else { return false };
    let page = address & !(PAGE - 1);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the page lies in a window, and whoever made the guard promised that it still is one. Rust holds no reference
    // into windows, and what is in them changes at any time.
    let map = || unsafe {
        libc::mmap(page as *mut libc::c_void, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    // The page has neighbours to both sides, so it may take two mappings more.
    if map() == libc::MAP_FAILED && !((0..3).any(|_| give_up() && map() != libc::MAP_FAILED)) {
        return false;
    }
    slot.replaced.fetch_add(1, Relaxed);
    let is_kept = |room: &AtomicUsize| room.compare_exchange(0, page, AcqRel, Relaxed).is_ok();
    if !slot.pages.iter().any(is_kept) {
        slot.overflowed.store(true, Release);
    }
    let told = TOLD.load(Relaxed);
    if told >= 0 {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: write(2) is async-signal-safe and reads 8 bytes of a live array.
        unsafe { libc::write(told, one.as_ptr().cast(), one.len()) };
    }
    true
}

/// Does what would have been done without this handler.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let index = usize::from(signal == SIGNALS[1]);
    let previous = PREVIOUS[index].get();
    match previous {
        Some(action) if !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) => {
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: with this flag, that is the type of the handler that was installed.
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(action.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: without the flag, that is the type of the handler that was installed.
                let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(action.sa_sigaction) };
                handler(signal);
            }
        }
        _ => {
            // SAFETY: an all-zero sigaction is the default action. The faulting instruction runs again and ends the
            // process, with a core that shows where.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
        }
    }
}
