//! How the fuzz targets (fuzz/) are run without a fuzzer: with the kept inputs, and with random ones.

use std::path::Path;
use std::time::{Duration, Instant};

/// Calls `run` with every input that is kept for `target` (fuzz/corpus), and `count` times with a random one: half of them
/// kept ones that were changed a little, if there are any. The same each time.
///
/// With the variable FUZZ_SECONDS it goes on for so long, and prints how far it came.
///
/// # Panics
/// What `run` panics with, after the input was printed; if the kept inputs cannot be read.
pub fn exercise(target: &str, count: u32, run: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut kept: Vec<_> = match std::fs::read_dir(&directory) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    };
    kept.sort();
    let kept: Vec<_> = kept.into_iter().map(|path| std::fs::read(path).unwrap()).collect();
    kept.iter().for_each(|input| run_loudly(target, input, run));
    let seconds = std::env::var("FUZZ_SECONDS").map_or(0, |seconds| seconds.parse().unwrap());
    let (start, mut random, mut round) = (Instant::now(), Random(0x5eed), 0);
    while round < count || start.elapsed() < Duration::from_secs(seconds) {
        let input = match round % 2 {
            1 if !kept.is_empty() => {
                let input = random.below(kept.len());
                random.change(&kept[input])
            }
            _ => random.input(),
        };
        run_loudly(target, &input, run);
        round += 1;
    }
    if seconds > 0 {
        println!("{target}: {} kept inputs and {round} random ones in {:?}", kept.len(), start.elapsed());
    }
}

fn run_loudly(target: &str, input: &[u8], run: fn(&[u8])) {
    /// Prints the input when `run` panics.
    struct Loud<'a>(&'a str, &'a [u8]);
    impl Drop for Loud<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("fuzz target {} panics with {:?}", self.0, self.1);
            }
        }
    }
    let _loud = Loud(target, input);
    run(input);
}

/// A generator of random numbers (xorshift64*), the same for all time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end
    }

    /// Up to 1 KiB, of which more or less is zero.
    fn input(&mut self) -> Vec<u8> {
        let (len, density) = (self.below(1024), self.below(256) as u8);
        (0..len).map(|_| if self.next() as u8 <= density { (self.next() >> 24) as u8 } else { 0 }).collect()
    }

    /// A few bytes changed, put in or left out.
    fn change(&mut self, input: &[u8]) -> Vec<u8> {
        let mut changed = input.to_vec();
        for _ in 0..1 + self.below(8) {
            let at = self.below(changed.len() + 1);
            let byte = (self.next() >> 24) as u8;
            match (self.below(4), changed.get_mut(at)) {
                (0, _) => changed.insert(at, byte),
                (1, Some(_)) => drop(changed.remove(at)),
                (2, Some(old)) => *old ^= 1 << (byte % 8),
                (_, Some(old)) => *old = byte,
                (_, None) => changed.push(byte),
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn inputs_are_of_all_kinds() {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static LONG: AtomicU32 = AtomicU32::new(0);
        exercise("no such target", 100, |data| {
            COUNT.fetch_add(1, Ordering::Relaxed);
            LONG.fetch_add(u32::from(data.len() > 500), Ordering::Relaxed);
        });
        assert!(COUNT.load(Ordering::Relaxed) >= 100);
        assert!((20..).contains(&LONG.load(Ordering::Relaxed)));
        let mut random = Random(1);
        assert!((0..50).any(|_| random.change(b"input").len() != 5));
        assert!((0..50).all(|_| random.change(b"").len() < 9));
    }
}
