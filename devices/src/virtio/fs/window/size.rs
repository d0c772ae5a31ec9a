//! How large a DAX window may be, and how large it is when nobody says.

use super::CHUNK_SIZE;

/// The smallest window, in bytes (16 chunks). With fewer, tasks that hold one chunk each while they wait for a second
/// one can block each other in the guest for good (fs/fuse/dax.c waits without a time limit).
pub const MIN_WINDOW_SIZE: u64 = 32 << 20;

/// The largest window, in bytes.
pub const MAX_WINDOW_SIZE: u64 = 256 << 30;

/// What part of its RAM the default window costs the guest: one fiftieth, 2 %.
const DEFAULT_COST_DIVISOR: u64 = 50;

/// Bytes of window for each byte of page descriptors: 64 bytes for each page of 4 KiB, 16 MiB for each GiB.
const WINDOW_PER_COST: u64 = 4096 / 64;

/// A size that no DAX window can have.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum WindowSizeError {
    /// Not 0 and below [`MIN_WINDOW_SIZE`].
    #[error("A DAX window of {0} bytes is too small: use 32M or more, or 0 for none")]
    TooSmall(u64),
    /// Above [`MAX_WINDOW_SIZE`].
    #[error("A DAX window of {0} bytes is too large: use 256G or less")]
    TooLarge(u64),
    /// Not a multiple of 2 MiB.
    #[error("A DAX window is a multiple of 2 MiB, which {size} bytes are not: use {}M or {}M", below >> 20, above >> 20)]
    Unaligned {
        /// The size that was asked for, in bytes.
        size: u64,
        /// The nearest valid size below it, in bytes.
        below: u64,
        /// The nearest valid size above it, in bytes.
        above: u64,
    },
}

/// Says whether a DAX window can have this size: 0 (no window), or a multiple of 2 MiB from 32 MiB to 256 GiB.
///
/// # Errors
/// [`WindowSizeError`], which names the nearest sizes that are valid.
pub fn check_window_size(bytes: u64) -> Result<u64, WindowSizeError> {
    match bytes {
        0 => Ok(0),
        1..MIN_WINDOW_SIZE => Err(WindowSizeError::TooSmall(bytes)),
        _ if bytes > MAX_WINDOW_SIZE => Err(WindowSizeError::TooLarge(bytes)),
        _ if bytes.is_multiple_of(CHUNK_SIZE) => Ok(bytes),
        _ => {
            let below = bytes - bytes % CHUNK_SIZE;
            Err(WindowSizeError::Unaligned { size: bytes, below, above: below + CHUNK_SIZE })
        }
    }
}

/// The window size, in bytes, for a guest with this much RAM when the user gives none.
///
/// The guest's kernel keeps 64 bytes for each page of the window from the moment that it finds the device, used or not:
/// 16 MiB for each GiB. The default costs it 2 % of its RAM, that is 1.28 times its RAM, within the valid sizes.
pub fn default_window_size(guest_ram_bytes: u64) -> u64 {
    let bytes = (guest_ram_bytes / DEFAULT_COST_DIVISOR).saturating_mul(WINDOW_PER_COST);
    (bytes - bytes % CHUNK_SIZE).clamp(MIN_WINDOW_SIZE, MAX_WINDOW_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_sizes_are_returned_as_they_are() {
        for size in [0, MIN_WINDOW_SIZE, 34 << 20, 1 << 30, (256 << 30) - CHUNK_SIZE, MAX_WINDOW_SIZE] {
            assert_eq!(check_window_size(size), Ok(size));
        }
    }

    #[test]
    fn other_sizes_are_refused_with_the_nearest_valid_ones() {
        let message = |size| check_window_size(size).unwrap_err().to_string();
        for size in [1, 4096, CHUNK_SIZE, MIN_WINDOW_SIZE - 1] {
            assert!(message(size).contains("32M or more, or 0"), "{}", message(size));
        }
        for size in [MAX_WINDOW_SIZE + 1, MAX_WINDOW_SIZE + CHUNK_SIZE, u64::MAX] {
            assert!(message(size).contains("256G or less"), "{}", message(size));
        }
        assert!(message((33 << 20) + 5).ends_with("use 32M or 34M"));
        assert!(message(MAX_WINDOW_SIZE - 1).ends_with("use 262142M or 262144M"));
    }

    #[test]
    fn the_default_costs_two_percent_and_is_always_valid() {
        for ram in [0, 1 << 20, 64 << 20, 512 << 20, 6 << 30, 1 << 40, u64::MAX] {
            let size = default_window_size(ram);
            assert_eq!(check_window_size(size), Ok(size));
            if size > MIN_WINDOW_SIZE && size < MAX_WINDOW_SIZE {
                let cost = size / WINDOW_PER_COST;
                assert!(cost <= ram / 50 && cost + (CHUNK_SIZE / WINDOW_PER_COST) >= ram / 50 - 1);
            }
        }
        assert_eq!(default_window_size(512 << 20), 654 << 20);
    }
}
