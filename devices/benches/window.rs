//! What it costs to map and unmap chunks: SETUPMAPPING and REMOVEMAPPING through the queues of a device, and the parts of
//! that, with windows from 16 chunks to 131,072. A table with the parts follows the measurements; docs/window.md says how
//! to read it.
//!
//! Queues are filled before their bell is rung, so that a thread that has to wake up counts once for many requests.

mod fuse_client;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use devices::virtio::fs::window::{CHUNK_SIZE, DaxWindow};
use fuse_client::{Access, Client, Cost, IN_FLIGHT, MOST_ENTRIES, cost};

/// Windows, in chunks: the smallest one, 2 GiB, and the largest one.
const WINDOWS: [u64; 3] = [16, 1024, 131_072];

/// The window, in chunks, that several queues use at once, and how many.
const SHARED: u64 = 1024;
const QUEUES: [usize; 2] = [2, 4];

/// Chunks that are mapped at a time: all of a small window, and so few of a large one that the mappings of a process
/// suffice, wherever they are.
const MOST_CHUNKS: u64 = 4096;

/// Nanoseconds for each operation and of CPU time for it, by the name of the measurement, all samples.
static RESULTS: Mutex<BTreeMap<String, [Vec<f64>; 2]>> = Mutex::new(BTreeMap::new());

/// Measures an operation. `work` does it as often as it likes at once, up to the number that it is given; it returns how
/// often, and how long that took.
fn measure(c: &mut Criterion, name: &str, mut work: impl FnMut(u64) -> (u64, Cost)) {
    let mut group = c.benchmark_group("window");
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1500));
    group.bench_function(name, |b| {
        b.iter_custom(|count| {
            let (mut done, mut total) = (0, Cost::default());
            while done < count {
                let (some, cost) = work(count - done);
                (done, total) = (done + some, total + cost);
            }
            let mut results = RESULTS.lock().unwrap_or_else(PoisonError::into_inner);
            let samples = results.entry(name.to_owned()).or_default();
            for (samples, time) in samples.iter_mut().zip([total.time, total.cpu]) {
                samples.push(time.as_nanos() as f64 / done as f64);
            }
            // More may have been done than was asked for, where it is done in batches.
            total.time.mul_f64(count as f64 / done as f64)
        });
    });
    group.finish();
}

/// The chunks that are used, far from each other in a large window. Neighbours in this order are not neighbours there,
/// unless `adjacent` is set. The first chunk is none of them: the file stays mapped there, so that the window knows it.
fn places(chunks: u64, adjacent: bool) -> Vec<u64> {
    let used = chunks.min(MOST_CHUNKS);
    match adjacent {
        true => (1..used).collect(),
        false => (1..used).map(|index| index * 7 % used * (chunks / used)).collect(),
    }
}

/// Single requests in flight together, as parallel readers make them, over some queues.
fn requests(c: &mut Criterion, chunks: u64, queues: usize) {
    let mut client = Client::mount(chunks, queues as u16);
    client.stay_mapped();
    let places = places(chunks, false);
    let batch = (IN_FLIGHT * queues).min(places.len());
    let name = |what: &str| format!("{what}, {chunks} chunks, {queues} queues");
    let mut next = 0;
    let mut round = |client: &mut Client, is_setup: bool, is_timed_setup: bool, access| {
        let some: Vec<u64> = (0..batch).map(|index| places[(next + index) % places.len()]).collect();
        if !is_setup {
            next = (next + batch) % places.len();
        }
        for (index, chunk) in some.iter().enumerate() {
            match is_setup {
                true => client.setup(index % queues, *chunk, *chunk, access),
                false => client.remove(index % queues, &[(*chunk, 1)]),
            }
        }
        let time = client.serve();
        client.check(0);
        if is_setup == is_timed_setup { time } else { Cost::default() }
    };
    for (what, is_timed_setup, access) in [
        ("SETUPMAPPING", true, Access::Read),
        ("SETUPMAPPING to write", true, Access::ReadWrite),
        ("REMOVEMAPPING", false, Access::Read),
    ] {
        measure(c, &name(what), |_| {
            let first = round(&mut client, true, is_timed_setup, access);
            let second = round(&mut client, false, is_timed_setup, access);
            (batch as u64, first + second)
        });
    }
}

/// One chunk of a file at a time, so that the file comes and goes with it.
fn strangers(c: &mut Criterion, chunks: u64) {
    let mut client = Client::mount(chunks, 1);
    measure(c, "both, of a new file", |_| {
        for _ in 0..IN_FLIGHT / 2 {
            client.setup(0, 0, 0, Access::Read);
            client.remove(0, &[(0, 1)]);
        }
        let time = client.serve();
        client.check(0);
        (IN_FLIGHT as u64 / 2, time)
    });
}

/// REMOVEMAPPINGs with many entries; the time is that of an entry.
fn batches(c: &mut Criterion, chunks: u64) {
    for (order, adjacent) in [("adjacent", true), ("scattered", false)] {
        let mut client = Client::mount(chunks, 1);
        client.stay_mapped();
        let places = places(chunks, adjacent);
        let some = &places[..places.len().min(MOST_ENTRIES)];
        let ranges: Vec<_> = some.iter().map(|chunk| (*chunk, 1)).collect();
        measure(c, &format!("entry of REMOVEMAPPING, {chunks} chunks, {order}"), |_| {
            for chunk in some {
                client.setup(0, *chunk, *chunk, Access::Read);
            }
            client.serve();
            client.check(0);
            client.remove(0, &ranges);
            let time = client.serve();
            client.check(0);
            (some.len() as u64, time)
        });
    }
}

/// What a queue and the taking apart of a request cost.
fn queue(c: &mut Criterion) {
    let mut client = Client::mount(16, 1);
    measure(c, "queue", |_| {
        (0..IN_FLIGHT).for_each(|_| client.nothing(0));
        let time = client.serve();
        client.forget();
        (IN_FLIGHT as u64, time)
    });
    measure(c, "queue and parse", |_| {
        (0..IN_FLIGHT).for_each(|_| client.bad_setup(0));
        let time = client.serve();
        client.check(libc::EINVAL);
        (IN_FLIGHT as u64, time)
    });
}

/// The window without a device, and the system call without a window.
fn bare(c: &mut Criterion, chunks: u64) {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(chunks * CHUNK_SIZE).expect("a large file");
    let places = places(chunks, false);
    let window = DaxWindow::new(chunks * CHUNK_SIZE).expect("a window");
    window.map(0, 0, CHUNK_SIZE, true, file.as_fd()).expect("a mapping");
    measure(c, &format!("table and mmap, {chunks} chunks"), |_| {
        let cost = cost(|| {
            for chunk in &places {
                let at = chunk * CHUNK_SIZE;
                window.map(at, at, CHUNK_SIZE, true, file.as_fd()).expect("a mapping");
            }
        });
        for chunk in &places {
            window.unmap(chunk * CHUNK_SIZE, CHUNK_SIZE).expect("a hole");
        }
        (places.len() as u64, cost)
    });
    drop(window);

    mmaps(c, chunks, 1);
}

/// The system call alone, by so many threads at once.
fn mmaps(c: &mut Criterion, chunks: u64, threads: usize) {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(chunks * CHUNK_SIZE).expect("a large file");
    let places = places(chunks, false);
    let (bytes, prot) = ((chunks * CHUNK_SIZE) as usize, libc::PROT_READ | libc::PROT_WRITE);
    let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let shared = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the kernel chooses the place.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, nothing, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    let address = base as usize;
    let map_some = |places: &[u64]| {
        for chunk in places {
            let offset = (chunk * CHUNK_SIZE) as usize;
            // SAFETY: within what was just reserved, of which nobody has a reference.
            let mapped = unsafe {
                let at = (address + offset) as *mut libc::c_void;
                libc::mmap(at, CHUNK_SIZE as usize, prot, shared, file.as_raw_fd(), offset as i64)
            };
            assert_ne!(mapped, libc::MAP_FAILED);
        }
    };
    measure(c, &mmaps_name(chunks, threads), |_| {
        let cost = match threads {
            1 => cost(|| map_some(&places)),
            _ => cost_of_threads(places.chunks(places.len().div_ceil(threads)), map_some),
        };
        // SAFETY: as above.
        let hole = unsafe { libc::mmap(base, bytes, prot, nothing | libc::MAP_FIXED, -1, 0) };
        assert_ne!(hole, libc::MAP_FAILED);
        (places.len() as u64, cost)
    });
    // SAFETY: the range was reserved above and is not used any more.
    unsafe { libc::munmap(base, bytes) };
}

fn mmaps_name(chunks: u64, threads: usize) -> String {
    match threads {
        1 => format!("mmap, {chunks} chunks"),
        _ => format!("mmap, {chunks} chunks, {threads} threads"),
    }
}

/// What work costs that is done in parts, each by a thread, at once.
fn cost_of_threads<T: Send>(parts: impl Iterator<Item = T>, work: impl Fn(T) + Sync) -> Cost {
    let start = Instant::now();
    let cpu = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || cost(|| work(part)).cpu)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    Cost { time: start.elapsed(), cpu }
}

fn all(c: &mut Criterion) {
    queue(c);
    for chunks in WINDOWS {
        bare(c, chunks);
        requests(c, chunks, 1);
        batches(c, chunks);
    }
    for queues in QUEUES {
        requests(c, SHARED, queues);
        mmaps(c, SHARED, queues);
    }
    strangers(c, 1024);
    parts();
    scaling();
}

/// Prints what was measured, and the parts of a SETUPMAPPING as differences of that. The parts are of CPU time, which
/// depends least on what else the machine does.
fn parts() {
    let mut results = RESULTS.lock().unwrap_or_else(PoisonError::into_inner);
    println!("\n{:<46} {:>9} {:>9} {:>9}", "nanoseconds", "least", "median", "CPU");
    for (name, [time, cpu]) in results.iter_mut() {
        time.sort_by(f64::total_cmp);
        cpu.sort_by(f64::total_cmp);
        println!("{name:<46} {:>9.0} {:>9.0} {:>9.0}", time[0], time[time.len() / 2], cpu[cpu.len() / 2]);
    }
    let of = |name: &str| results.get(name).map(|[_, cpu]| cpu[cpu.len() / 2]);
    let columns = ["all", "queue", "parse", "file", "table", "mmap"];
    let columns: String = columns.iter().map(|name| format!(" {name:>9}")).collect();
    println!("\n{:<14}{columns}", "SETUPMAPPING");
    for chunks in WINDOWS {
        let row = || {
            let (queue, parsed) = (of("queue")?, of("queue and parse")?);
            let whole = of(&format!("SETUPMAPPING, {chunks} chunks, 1 queues"))?;
            let window = of(&format!("table and mmap, {chunks} chunks"))?;
            let mmap = of(&format!("mmap, {chunks} chunks"))?;
            Some([whole, queue, parsed - queue, whole - parsed - window, window - mmap, mmap])
        };
        // With a filter on the command line not all are there.
        let Some(row) = row() else { continue };
        let row: String = row.iter().map(|time| format!(" {time:>9.0}")).collect();
        println!("{:<14}{row}", format!("{chunks} chunks"));
    }
}

/// Prints how many requests several queues carry out in the time in which one carries out one, beside what as many threads
/// reach that do nothing but the system call: the kernel changes an address space for one at a time.
fn scaling() {
    let results = RESULTS.lock().unwrap_or_else(PoisonError::into_inner);
    let of = |name: &str| results.get(name).map(|[time, _]| time[time.len() / 2]);
    let columns: String = QUEUES.iter().map(|queues| format!(" {:>9}", format!("{queues} queues"))).collect();
    println!("\n{:<46}{columns}", "times as many as with one queue");
    for what in ["SETUPMAPPING", "SETUPMAPPING to write", "REMOVEMAPPING", "mmap"] {
        let name = |queues| match what {
            "mmap" => mmaps_name(SHARED, queues),
            _ => format!("{what}, {SHARED} chunks, {queues} queues"),
        };
        let ratios: Option<Vec<f64>> =
            QUEUES.iter().map(|queues| Some(of(&name(1))? / of(&name(*queues))?)).collect();
        let Some(ratios) = ratios else { continue };
        let ratios: String = ratios.iter().map(|ratio| format!(" {ratio:>9.2}")).collect();
        println!("{what:<46}{ratios}");
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
