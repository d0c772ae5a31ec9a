//! A decision allocates nothing. The test is alone in its program, since it counts all allocations of the program.

#[path = "../benches/thousand_rules/mod.rs"]
mod thousand_rules;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use devices::virtio::fs::policy::Policy;

/// The system's allocator, which counts for each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
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

/// What `work` allocates.
fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn a_decision_allocates_nothing() {
    let files = thousand_rules::files();
    let policies = [
        Policy::Never,
        Policy::Always,
        Policy::Inode,
        Policy::Size(1),
        Policy::Auto,
        thousand_rules::mixed(),
        thousand_rules::without_paths(),
        thousand_rules::alike_globs(),
    ];
    let counted = allocations(|| drop(std::hint::black_box(vec![1])));
    assert_eq!(counted, 1, "allocations are counted");
    for policy in &policies {
        // The first decision counts too: nothing is put off until it.
        for facts in &files {
            for current in [None, Some(false), Some(true)] {
                let made = allocations(|| {
                    std::hint::black_box(policy.decide(facts, current));
                    std::hint::black_box(policy.allows_mapping(facts));
                });
                assert_eq!(made, 0, "{policy} {facts:?}");
            }
        }
    }
}
