//! What the fuzz targets call (fuzz/), and the unit tests with inputs of their own. All panic where a promise is broken.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::entry::EntryPoint;
use crate::boot::{self, Boot, Initramfs};
use crate::config::RunConfig;
use crate::layout;
use crate::matrix::{Matrix, MatrixFileError};

/// Any kernel image and initramfs are loaded into guest memory, or refused with a message; ACPI's tables stay as they are.
pub fn kernel(data: &[u8]) {
    const MARK: [u8; 8] = *b"as it is";
    let Some((head, image)) = data.split_at_checked(4) else { return };
    let ram = [8u64, 16, 32, 64][usize::from(head[0] % 4)] << 20;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram as usize)]).unwrap();
    memory.write_slice(&MARK, GuestAddress(layout::boot::ACPI.start)).unwrap();
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(image).unwrap();
    let initramfs = &image[image.len() - image.len().min(usize::from(head[1]) << 4)..];
    let command_line = "x".repeat(usize::from(head[2]) << 4);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let what = Boot {
        kernel: Path::new(&path),
        initramfs: (head[3] % 2 == 1).then_some(Initramfs::Bytes(initramfs)),
        command_line: &command_line,
        ram,
        rsdp: layout::boot::ACPI.start,
    };
    match boot::load(&memory, &what) {
        Ok(EntryPoint::Linux64(entry) | EntryPoint::Pvh(entry)) => {
            let text: [u8; 1] = memory.read_obj(GuestAddress(layout::boot::COMMAND_LINE.start)).unwrap();
            assert_eq!(text[0], if command_line.is_empty() { 0 } else { b'x' }, "entered at {entry:#x}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let acpi: [u8; 8] = memory.read_obj(GuestAddress(layout::boot::ACPI.start)).unwrap();
    assert_eq!(acpi, MARK);
}

/// Any bytes are a configuration, which then means the same when it is written and read again, or have mistakes in named
/// places; and so for a matrix of cases.
pub fn config_file(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let lines = text.lines().count() + 1;
    match RunConfig::parse(&text, Path::new("/fuzz/daxvm.toml")) {
        Ok(config) => {
            config.problems().iter().for_each(|problem| assert!(!problem.message.is_empty()));
            if let Ok(written) = config.to_toml() {
                let again = RunConfig::parse(&written, Path::new("/fuzz/daxvm.toml"));
                assert_eq!(again.as_ref(), Ok(&config), "{written}");
            }
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty());
            for mistake in mistakes {
                assert!((1..=lines).contains(&mistake.line) && mistake.column >= 1, "{mistake}");
            }
        }
    }
    match Matrix::parse(Path::new("daxvm-test.toml"), Path::new("/fuzz"), &text) {
        Ok(matrix) => assert!(!matrix.cases.is_empty()),
        Err(MatrixFileError::Mistakes { mistakes, .. }) => assert!(!mistakes.is_empty()),
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::fuzzing::exercise;

    #[test]
    fn any_kernel_image_is_loaded_or_refused() {
        exercise("kernel", 500, kernel);
    }

    #[test]
    fn any_file_is_a_configuration_or_has_mistakes() {
        exercise("config_file", 500, config_file);
    }
}
