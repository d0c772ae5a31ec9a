//! What happens when a thread makes a system call that its filter forbids: the process says so, and ends.
//!
//! The call is not carried out; the kernel sends SIGSYS to the thread instead. What the handler does is async-signal-safe:
//! it formats into an array, and makes system calls that every filter allows. It does not end the VM in order, as the
//! thread is either mistaken or in somebody else's hands.

use std::fmt::{self, Write};
use std::io;

use syscalls::Sysno;

use crate::console::restore_terminal_from_handler;
use crate::outcome::ExitReason;

/// `si_code` of a signal by a filter (asm-generic/siginfo.h).
const SYS_SECCOMP: i32 = 1;
/// Where `si_syscall` is in `siginfo_t`, in units of 4 bytes: behind three numbers, padding, and an address.
const SYSCALL_AT: usize = 6;

/// Has violations of this process reported from now on.
pub(super) fn report() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_violation;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler does nothing but what a signal handler may; the structure is valid.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_violation(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure to a handler with SA_SIGINFO.
    if unsafe { (*info).si_code } != SYS_SECCOMP {
        // Somebody else has sent it, who could end the process as well.
        return;
    }
    // SAFETY: with this code, the structure has the number of the call there; it is aligned to 8 bytes.
    let number = unsafe { *info.cast::<i32>().add(SYSCALL_AT) };
    let mut message = Message { text: [0; Message::SIZE], len: 0 };
    describe(&mut message, &thread_name(), number);
    restore_terminal_from_handler();
    let text = &message.text[..message.len];
    // SAFETY: write(2) reads as many bytes of a live array as it is told; _exit(2) takes any status, and runs nothing of
    // ours.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(ExitReason::Crash(String::new()).status(true).into())
    }
}

fn describe(message: &mut Message, thread: &str, number: i32) {
    let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    // What does not fit is left out.
    let _ = writeln!(
        message,
        "daxvm: thread {thread} made the forbidden system call {name} ({number}): this is a bug in daxvm, or an attack by \
         the guest. The guest is ended. If you trust it, --sandbox=off goes without the filter; please report this."
    );
}

/// The name of the calling thread.
fn thread_name() -> Name {
    let mut name = [0; 16];
    // SAFETY: prctl(2) writes at most 16 bytes here, with the final NUL.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    Name(name)
}

struct Name([u8; 16]);

impl std::ops::Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        let len = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        // A tag that was cut off in the middle of a character.
        let valid = |text| std::str::from_utf8(text);
        let name = &self.0[..len];
        valid(name).unwrap_or_else(|e| valid(&name[..e.valid_up_to()]).unwrap_or("unknown"))
    }
}

/// Text in an array: a signal handler cannot allocate.
struct Message {
    text: [u8; Message::SIZE],
    len: usize,
}

impl Message {
    const SIZE: usize = 512;
}

impl Write for Message {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.text[self.len..];
        let fits = text.len().min(room.len());
        room[..fits].copy_from_slice(&text.as_bytes()[..fits]);
        self.len += fits;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_is_one_line_that_names_thread_and_call() {
        for (number, name) in [(59, "execve (59)"), (i32::MAX, "unknown (2147483647)"), (-1, "unknown (-1)")]
        {
            let mut message = Message { text: [0; Message::SIZE], len: 0 };
            describe(&mut message, "fs1-daxvm-root1", number);
            let text = std::str::from_utf8(&message.text[..message.len]).unwrap();
            assert!(text.starts_with(&format!(
                "daxvm: thread fs1-daxvm-root1 made the forbidden system call {name}:"
            )));
            assert!(text.ends_with(".\n") && text.matches('\n').count() == 1, "{text}");
        }
        assert!(!thread_name().is_empty());
        assert_eq!(&*Name(*b"fs0-\xc3\xa4\xc3\0\0\0\0\0\0\0\0\0"), "fs0-ä");
    }
}
