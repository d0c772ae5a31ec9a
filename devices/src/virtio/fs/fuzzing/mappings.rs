//! SETUPMAPPING and REMOVEMAPPING in any order, against a model: what each chunk of the window shows.

use arbitrary::Unstructured;
use fuse_backend_rs::abi::virtio_fs::SetupmappingIn;
use vm_memory::ByteValued;

use super::{choose, guest, take};
use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, READ, ROOT, WRITE};
use crate::virtio::fs::window::{CHUNK_SIZE, MIN_WINDOW_SIZE};

const CHUNKS: u64 = MIN_WINDOW_SIZE / CHUNK_SIZE;
const FILES: [(&str, u64); 4] = [("a", 1), ("b", 4), ("c", 16), ("d", 40)];

/// What a chunk shows: the number of a file, and of its chunk.
type Shown = Option<(usize, u64)>;

/// Any mappings are those of the model: the window shows what was mapped last, all of it or none of it, and nothing where
/// it was unmapped; what is refused changes nothing.
pub fn mappings(data: &[u8]) {
    let mut source = Unstructured::new(data);
    let mut guest = guest(|_| ());
    let share = guest.path("share");
    for (name, chunks) in FILES {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(share.join(name)).unwrap();
        file.set_len(chunks * CHUNK_SIZE).unwrap();
        for chunk in 0..chunks {
            file.write_all_at(&[name.as_bytes()[0], chunk as u8], chunk * CHUNK_SIZE).unwrap();
        }
    }
    guest.init(PER_FILE).unwrap();
    let nodes = FILES.map(|(name, _)| guest.lookup(ROOT, name).unwrap().nodeid);
    let mut model: [Shown; CHUNKS as usize] = [None; CHUNKS as usize];
    for _ in 0..64 {
        if source.is_empty() {
            break;
        }
        match take::<u8>(&mut source) % 8 {
            0 => {
                guest.init(PER_FILE).unwrap();
                for (name, _) in FILES {
                    guest.lookup(ROOT, name).unwrap();
                }
                model.fill(None);
            }
            1..5 => setup(&mut guest, &nodes, &mut model, &mut source),
            _ => remove(&mut guest, &mut model, &mut source),
        }
        check(&guest, &model);
    }
}

fn setup(guest: &mut FakeGuest, nodes: &[u64; 4], model: &mut [Shown], source: &mut Unstructured<'_>) {
    let file = usize::from(take::<u8>(source)) % nodes.len();
    let (moffset, foffset, len) = (place(source), place(source), place(source));
    let flags = choose(source, &[READ, WRITE, READ | WRITE, READ, 0, 4, u64::MAX]);
    let ask = SetupmappingIn { fh: u64::MAX, foffset, len, flags, moffset };
    let outcome = guest.call(opcode::SETUPMAPPING, nodes[file], &[ask.as_slice()]);
    let chunks = chunks(moffset, len);
    // The client asks for a part of a chunk at the end of a file, never.
    let is_good = chunks.is_some()
        && foffset.is_multiple_of(CHUNK_SIZE)
        && foffset.checked_add(len).is_some_and(is_offset);
    let is_legal = is_good && flags != 0 && flags & !(READ | WRITE) == 0;
    assert_eq!(outcome.is_ok(), is_legal, "{ask:x?} {outcome:?}");
    if let (true, Some(chunks)) = (is_legal, chunks) {
        let first = foffset / CHUNK_SIZE;
        for (number, chunk) in chunks.enumerate() {
            model[chunk] = Some((file, first + number as u64));
        }
    }
}

fn remove(guest: &mut FakeGuest, model: &mut [Shown], source: &mut Unstructured<'_>) {
    let entries: Vec<_> = (0..take::<u8>(source) % 4).map(|_| (place(source), place(source))).collect();
    let lie = if take::<u8>(source).is_multiple_of(16) { take(source) } else { entries.len() as u32 };
    let outcome = guest.removemapping(lie, &entries);
    if lie as usize != entries.len() {
        return assert_eq!(outcome, Err(libc::EINVAL));
    }
    let mut all_good = true;
    for (moffset, len) in entries {
        match chunks(moffset, len) {
            Some(chunks) => chunks.for_each(|chunk| model[chunk] = None),
            None => all_good = false,
        }
    }
    assert_eq!(outcome.is_ok(), all_good, "{outcome:?}");
}

/// A place or a length: mostly one that is possible.
fn place(source: &mut Unstructured<'_>) -> u64 {
    let chunks = u64::from(take::<u8>(source) % 20) * CHUNK_SIZE;
    let odd = [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        4096,
        CHUNK_SIZE / 2,
        1 << 62,
        1 << 63,
        u64::MAX,
        0u64.wrapping_sub(CHUNK_SIZE),
    ];
    chunks.wrapping_add(choose(source, &odd))
}

fn is_offset(offset: u64) -> bool {
    i64::try_from(offset).is_ok()
}

/// The chunks of a range, if it is one of the window's.
fn chunks(moffset: u64, len: u64) -> Option<std::ops::Range<usize>> {
    let end = moffset.checked_add(len)?;
    let is_whole = moffset.is_multiple_of(CHUNK_SIZE) && len.is_multiple_of(CHUNK_SIZE);
    (is_whole && len > 0 && end <= MIN_WINDOW_SIZE)
        .then_some((moffset / CHUNK_SIZE) as usize..(end / CHUNK_SIZE) as usize)
}

fn check(guest: &FakeGuest, model: &[Shown]) {
    let mapped = guest.counters().window.unwrap().mapped_chunks;
    assert_eq!(mapped, model.iter().flatten().count() as u64);
    for (chunk, shown) in model.iter().enumerate() {
        let expected = match *shown {
            Some((file, number)) if number < FILES[file].1 => [FILES[file].0.as_bytes()[0], number as u8],
            _ => [0; 2],
        };
        assert_eq!(guest.window(chunk as u64 * CHUNK_SIZE), expected, "chunk {chunk}: {shown:?}");
    }
}
