//! Chunks of a file that is known are mapped and unmapped without an allocation, by whatever thread. The test is alone in
//! its program, since it counts all allocations of the program but its own.

#[allow(dead_code)]
#[path = "../benches/fuse_client/mod.rs"]
mod fuse_client;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use fuse_client::{Access, Client, MOST_ENTRIES};

/// The system's allocator, which counts what others than the test's thread allocate.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static IS_TEST: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !IS_TEST.get() {
            ALLOCATIONS.fetch_add(1, SeqCst);
        }
        // SAFETY: the caller's promises are passed on as they are.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on as they are.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How many there were when the threads that were just started, such as the watcher's, had what they make for themselves.
fn settled() -> usize {
    loop {
        let before = ALLOCATIONS.load(SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(500));
        if ALLOCATIONS.load(SeqCst) == before {
            return before;
        }
    }
}

#[test]
fn mapping_a_known_file_allocates_nothing() {
    IS_TEST.set(true);
    let mut client = Client::mount(512, 2);
    let before = ALLOCATIONS.load(SeqCst);
    // Its name is read, and it is watched from now on.
    client.stay_mapped();
    assert_ne!(ALLOCATIONS.load(SeqCst), before, "allocations are counted");
    // A thread's first request has things made that belong to the thread.
    client.setup(1, 1, 1, Access::Read);
    client.serve();
    client.check(0);
    let before = settled();
    for access in [Access::Read, Access::ReadWrite] {
        for chunk in 1..=200 {
            client.setup(chunk as usize % 2, chunk, chunk, access);
        }
        client.serve();
        client.check(0);
        assert_eq!(ALLOCATIONS.load(SeqCst), before, "{access:?}");
    }
    let each: Vec<_> = (1..=MOST_ENTRIES as u64).rev().map(|chunk| (chunk, 1)).collect();
    client.remove(1, &each);
    client.remove(0, &[(7, 2)]);
    client.serve();
    client.check(0);
    assert_eq!(ALLOCATIONS.load(SeqCst), before);
    assert_eq!(client.device.counters().snapshot().window.map(|window| window.mapped_chunks), Some(1));
}
