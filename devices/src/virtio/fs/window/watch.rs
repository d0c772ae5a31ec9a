//! Watches the files that windows show, since nobody tells a process that pages which it has mapped are gone.
//!
//! inotify reports a change of size (and every write by other means than a mapping) as IN_MODIFY; a watch belongs to the
//! inode, whatever becomes of its names. One inotify instance serves all windows of the process (a user has 128 of them as
//! a rule), and one thread, from the first mapped file to the end.
//!
//! The thread asks the window to look at the file, and rests a little before it asks again: a file that is written to all
//! the time costs as many looks as there are rests, not as there are writes.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::files::FileKey;
use super::guard;
use super::state::Shared;
use crate::virtio::thread::{self, ThreadKind};

/// How long the thread rests after it has looked at what was reported.
const REST: Duration = Duration::from_millis(2);

/// Who wants to know of changes of a watched file.
struct Target {
    window: Weak<Shared>,
    key: FileKey,
}

/// The watches of the process.
pub(super) struct Watcher {
    inotify: OwnedFd,
    /// Signalled when a page of a window was replaced (`guard.rs`).
    replaced: EventFd,
    /// By watch descriptor: two windows that show a file have the same, as inotify has one for an inode.
    targets: Mutex<HashMap<i32, Vec<Target>>>,
    windows: Mutex<Vec<Weak<Shared>>>,
}

impl Watcher {
    /// The process's watcher. `None` if the host does not allow one, which is said once.
    pub(super) fn get() -> Option<&'static Watcher> {
        static WATCHER: OnceLock<Option<Watcher>> = OnceLock::new();
        let watcher = WATCHER.get_or_init(|| match Watcher::new() {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "Cannot watch shared files: a guest waits longer when one shrinks. Raise fs.inotify.max_user_instances"
                );
                None
            }
        });
        watcher.as_ref()
    }

    /// Starts the thread, once. Before a file is mapped there is nothing to look at, and whoever confines the process
    /// wants no threads that are not.
    fn start(&'static self) {
        static THREAD: OnceLock<()> = OnceLock::new();
        THREAD.get_or_init(|| {
            guard::tell(self.replaced.as_raw_fd());
            if let Err(error) = thread::start(ThreadKind::Watcher, "dax-watch", || self.run()) {
                tracing::warn!(%error, "Cannot watch shared files: no thread");
            }
        });
    }

    fn new() -> io::Result<Watcher> {
        Ok(Watcher {
            inotify: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?,
            replaced: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            targets: Mutex::default(),
            windows: Mutex::default(),
        })
    }

    /// Has pages of this window that were replaced looked at.
    pub(super) fn add_window(&self, window: Weak<Shared>) {
        let mut windows = lock(&self.windows);
        windows.retain(|window| window.strong_count() > 0);
        windows.push(window);
    }

    /// Watches a file for a window. From when this returns, no change is missed.
    ///
    /// # Errors
    /// ENOSPC, when the user has all the watches that fs.inotify.max_user_watches allows.
    pub(super) fn watch(
        &'static self,
        fd: BorrowedFd<'_>,
        window: Weak<Shared>,
        key: FileKey,
    ) -> io::Result<i32> {
        self.start();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let mut targets = lock(&self.targets);
        let watch = inotify::add_watch(&self.inotify, path, WatchFlags::MODIFY)?;
        targets.entry(watch).or_default().push(Target { window, key });
        Ok(watch)
    }

    /// Ends what [`Watcher::watch`] began.
    pub(super) fn unwatch(&self, watch: i32, window: &Weak<Shared>) {
        let mut targets = lock(&self.targets);
        let Some(of_file) = targets.get_mut(&watch) else { return };
        of_file.retain(|target| !target.window.ptr_eq(window));
        if of_file.is_empty() {
            targets.remove(&watch);
            // It fails if the host has removed the watch, with the inode or with the file system.
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
    }

    fn run(&self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        loop {
            let mut fds = [
                PollFd::new(&self.inotify, PollFlags::IN),
                PollFd::from_borrowed_fd(fd_of(&self.replaced), PollFlags::IN),
            ];
            // It can only be interrupted.
            let _ = poll(&mut fds, None);
            let has_replaced = self.replaced.read().is_ok();
            let (changed, is_all) = self.changed(&mut buffer);
            for (window, key) in self.concerned(&changed, is_all) {
                window.look_at(key);
            }
            if has_replaced {
                let windows: Vec<_> = lock(&self.windows).iter().filter_map(Weak::upgrade).collect();
                windows.iter().for_each(|window| window.mend());
            }
            std::thread::sleep(REST);
        }
    }

    /// The watches of what has changed, and whether some may be missing.
    fn changed(&self, buffer: &mut [MaybeUninit<u8>]) -> (BTreeSet<i32>, bool) {
        let (mut changed, mut is_all) = (BTreeSet::new(), false);
        let mut events = Reader::new(&self.inotify, buffer);
        // It ends with EAGAIN, when there is nothing more to read.
        while let Ok(event) = events.next() {
            is_all |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            changed.insert(event.wd());
        }
        (changed, is_all)
    }

    fn concerned(&self, changed: &BTreeSet<i32>, is_all: bool) -> Vec<(std::sync::Arc<Shared>, FileKey)> {
        let targets = lock(&self.targets);
        let those = targets.iter().filter(|(watch, _)| is_all || changed.contains(watch));
        those.flat_map(|(_, targets)| targets).filter_map(|at| Some((at.window.upgrade()?, at.key))).collect()
    }
}

fn fd_of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `event`, which outlives what is returned.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// What is kept stays right through a panic: it is changed in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
