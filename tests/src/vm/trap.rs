//! Has a thread of a running daxvm go wrong where it enters a function, by ptrace(2): a program that people use has no switch
//! for that, and a thread that was given one would not be what they use.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::mem::offset_of;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use elf::ElfBytes;
use elf::endian::LittleEndian;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustc_demangle::demangle;

use super::{HostProcess, VmError};

/// What a thread does where it is caught.
#[derive(Clone, Copy, Debug)]
pub enum Misdeed {
    /// It panics with [`PANIC_MESSAGE`].
    Panic,
    /// It makes the system call of this number, with zeros for arguments.
    SystemCall(i64),
}

/// The end of the message with which a thread panics.
pub const PANIC_MESSAGE: &str = "attempt to add with overflow";

/// The function that is called where a sum is too large. It takes the caller's place in the source, and does not return.
const PANICS: &str = "core::panicking::panic_const::panic_const_add_overflow";

/// syscall(2), of the C library.
const CALLS: &str = "syscall";

/// How far below the stack's top the place in the source is put: the stacks of threads have 2 MiB.
const BELOW: u64 = 128 << 10;

/// How long a thread may take to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// The key of the address at which a program begins, in /proc/PID/auxv (include/uapi/linux/auxvec.h).
const AT_ENTRY: u64 = 9;

/// What ptrace(2) reports of a thread that was interrupted (include/uapi/linux/ptrace.h).
const PTRACE_EVENT_STOP: i32 = 128;

/// A thread that is to go wrong.
///
/// ptrace(2) wants all of it done by one thread of the caller's.
#[derive(Debug)]
pub struct Trap {
    thread: Pid,
    function: u64,
    /// Where [`PANICS`] and [`CALLS`] are.
    misdeeds: [u64; 2],
    is_attached: bool,
}

impl Trap {
    /// Has the thread that is called `thread` stop as soon as it enters a function, which has one of these names.
    ///
    /// # Errors
    /// There is no such thread, none or more than one such function, or this process may not trace the other.
    pub fn set(process: &HostProcess, thread: &str, function: &[&str]) -> Result<Trap, VmError> {
        let functions = [function, &[PANICS], &[CALLS]];
        let [function, panics, calls] = addresses(process, functions)?;
        let thread = Pid::from_raw(process.thread(thread)?);
        ptrace::seize(thread, Options::empty()).map_err(refused("tracing a thread of daxvm"))?;
        let mut trap = Trap { thread, function, misdeeds: [panics, calls], is_attached: true };
        trap.interrupt().map_err(refused("stopping a thread of daxvm"))?;
        trap.arm(function).map_err(refused("a breakpoint"))?;
        ptrace::cont(thread, None).map_err(refused("letting a thread of daxvm go on"))?;
        Ok(trap)
    }

    /// Waits until the thread has come there, and has it do this in that function's place.
    ///
    /// # Errors
    /// It does not come there within half a minute.
    pub fn spring(mut self, misdeed: Misdeed) -> Result<(), VmError> {
        self.mislead(misdeed).map_err(refused("misleading a thread of daxvm"))
    }

    fn mislead(&mut self, misdeed: Misdeed) -> nix::Result<()> {
        let mut registers = loop {
            match self.wait()? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                    let registers = ptrace::getregs(self.thread)?;
                    if registers.rip == self.function {
                        break registers;
                    }
                    ptrace::cont(self.thread, None)?;
                }
                // A signal is the thread's own business.
                WaitStatus::Stopped(_, signal) => ptrace::cont(self.thread, signal)?,
                WaitStatus::PtraceEvent(..) => ptrace::cont(self.thread, None)?,
                _ => {
                    self.is_attached = false;
                    return Err(Errno::ESRCH);
                }
            }
        };
        // As if the function's own caller had called the other.
        let [panics, calls] = self.misdeeds;
        (registers.rip, registers.rdi) = match misdeed {
            Misdeed::Panic => (panics, self.put_location(registers.rsp - BELOW)?),
            Misdeed::SystemCall(number) => (calls, number.cast_unsigned()),
        };
        if let Misdeed::SystemCall(_) = misdeed {
            (registers.rsi, registers.rdx, registers.rcx, registers.r8, registers.r9) = (0, 0, 0, 0, 0);
        }
        ptrace::setregs(self.thread, registers)?;
        self.let_go()
    }

    /// Puts a `core::panic::Location` at `at`: its file (address, length), line and column.
    fn put_location(&self, at: u64) -> nix::Result<u64> {
        // Eight bytes; the last is the zero that newer ones have.
        let file = u64::from_le_bytes(*b"a trap!\0");
        let (line, column) = (1, 1);
        for (index, word) in (0..).zip([at + 24, 8, column << 32 | line, file]) {
            let address = (at + 8 * index) as ptrace::AddressType;
            ptrace::write(self.thread, address, word.cast_signed())?;
        }
        Ok(at)
    }

    /// Has the CPU stop the thread when it is about to execute what is at `address`; at 0, never. The code stays as it is, as
    /// other threads execute it too.
    fn arm(&self, address: u64) -> nix::Result<()> {
        let register =
            |number: usize| (offset_of!(libc::user, u_debugreg) + 8 * number) as ptrace::AddressType;
        // Off before the address changes. Bit 0 of DR7 is for this thread; what it is about, and of what size, is 0: code.
        ptrace::write_user(self.thread, register(7), 0)?;
        ptrace::write_user(self.thread, register(0), address.cast_signed())?;
        ptrace::write_user(self.thread, register(7), (address != 0).into())
    }

    /// Stops the thread, whatever it does.
    fn interrupt(&mut self) -> nix::Result<()> {
        ptrace::interrupt(self.thread)?;
        loop {
            match self.wait()? {
                WaitStatus::PtraceEvent(_, _, PTRACE_EVENT_STOP) => return Ok(()),
                WaitStatus::Stopped(_, signal) => ptrace::cont(self.thread, signal)?,
                WaitStatus::PtraceEvent(..) => ptrace::cont(self.thread, None)?,
                _ => {
                    self.is_attached = false;
                    return Err(Errno::ESRCH);
                }
            }
        }
    }

    fn wait(&self) -> nix::Result<WaitStatus> {
        let end = Instant::now() + PATIENCE;
        loop {
            // Threads are no children.
            match waitpid(self.thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
                WaitStatus::StillAlive => return Err(Errno::ETIMEDOUT),
                status => return Ok(status),
            }
        }
    }

    /// Lets the thread, which is stopped, go on untraced.
    fn let_go(&mut self) -> nix::Result<()> {
        self.arm(0)?;
        self.is_attached = false;
        ptrace::detach(self.thread, None)
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        // A thread that is still traced would keep its process from ending.
        if self.is_attached && self.interrupt().is_ok() {
            let _ = self.let_go();
        }
    }
}

fn refused(what: &str) -> impl FnOnce(Errno) -> VmError + '_ {
    move |errno| VmError::system(what)(errno.into())
}

/// Where these functions are in the process's memory, each of which has one of the names given for it.
fn addresses<const N: usize>(process: &HostProcess, functions: [&[&str]; N]) -> Result<[u64; N], VmError> {
    let what = || format!("functions {functions:?}");
    let program = Program::read(process.proc()).map_err(VmError::system(what()))?;
    let found = program.find(functions).map_err(VmError::system(what()))?;
    let mut addresses = [0; N];
    for (address, found) in addresses.iter_mut().zip(&found) {
        let mut found = found.iter();
        let (Some(&first), None) = (found.next(), found.next()) else {
            return Err(VmError::system(what())(io::Error::other("not each of them is there, and once")));
        };
        *address = first;
    }
    Ok(addresses)
}

/// A program that runs.
struct Program {
    file: Vec<u8>,
    auxiliary: Vec<u8>,
}

impl Program {
    fn read(proc: &Path) -> io::Result<Program> {
        Ok(Program { file: fs::read(proc.join("exe"))?, auxiliary: fs::read(proc.join("auxv"))? })
    }

    fn find<const N: usize>(&self, functions: [&[&str]; N]) -> io::Result<[BTreeSet<u64>; N]> {
        let program = ElfBytes::<LittleEndian>::minimal_parse(&self.file).map_err(io::Error::other)?;
        let (symbols, names) = program
            .symbol_table()
            .map_err(io::Error::other)?
            .ok_or_else(|| io::Error::other("the program has no symbols"))?;
        let words: Vec<u64> =
            self.auxiliary.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let entry = words.chunks(2).find(|pair| pair[0] == AT_ENTRY).map_or(0, |pair| pair[1]);
        let base = entry.wrapping_sub(program.ehdr.e_entry);
        let mut found = [const { BTreeSet::new() }; N];
        for symbol in symbols.iter() {
            // Without the hash at the end of names.
            let name = format!("{:#}", demangle(names.get(symbol.st_name as usize).unwrap_or_default()));
            for (found, _) in found.iter_mut().zip(functions).filter(|(_, names)| names.contains(&&*name)) {
                found.insert(base.wrapping_add(symbol.st_value));
            }
        }
        Ok(found)
    }
}
