//! The client's side of one job.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::LabError;
use super::protocol::{CHUNK, Frame, Job, Kind, STDIN_CREDIT};

/// A job that was sent to the lab. Dropping it ends the job.
pub struct Session {
    stream: UnixStream,
    sender: Sender,
    credit: Arc<Credit>,
}

/// Sends to a running job from any thread.
#[derive(Clone)]
pub struct Sender(Arc<Mutex<UnixStream>>);

impl Sender {
    /// Sends a signal to the job's process group.
    pub fn signal(&self, number: u8) -> io::Result<()> {
        self.send(&Frame::new(Kind::Signal, [number]))
    }

    /// Tells the job's terminal its size.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        self.send(&Frame::new(Kind::Resize, [rows.to_le_bytes(), columns.to_le_bytes()].concat()))
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        // A frame is written whole or the connection is dead, so a panic elsewhere left nothing half done.
        frame.write(&*self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How much standard input may still be sent.
struct Credit {
    bytes: Mutex<usize>,
    grown: Condvar,
}

impl Session {
    /// Starts a job.
    pub fn start(stream: UnixStream, job: &Job) -> Result<Self, LabError> {
        let sender = Sender(Arc::new(Mutex::new(stream.try_clone().map_err(LabError::Connection)?)));
        let start = Frame::json(Kind::Start, job).map_err(LabError::Connection)?;
        sender.send(&start).map_err(LabError::Connection)?;
        let credit = Arc::new(Credit { bytes: Mutex::new(STDIN_CREDIT), grown: Condvar::new() });
        Ok(Self { stream, sender, credit })
    }

    /// What sends to the job from other threads.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Copies `input` to the job's standard input, in a thread that ends with the input or with the job's connection.
    pub fn feed(&self, mut input: impl Read + Send + 'static) {
        let (sender, credit) = (self.sender.clone(), self.credit.clone());
        std::thread::spawn(move || {
            let mut chunk = vec![0; CHUNK];
            // Errors mean that the job is gone, which the thread that waits for it reports.
            loop {
                let room = credit.wait().min(CHUNK);
                match input.read(&mut chunk[..room]) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Ok(count @ 1..) => {
                        credit.take(count);
                        if sender.send(&Frame::new(Kind::Stdin, &chunk[..count])).is_err() {
                            return;
                        }
                    }
                    Ok(_) | Err(_) => {
                        let _ = sender.send(&Frame::new(Kind::StdinEnd, []));
                        return;
                    }
                }
            }
        });
    }

    /// Carries the job's output until it ends; gives its exit status. The job is ended when the deadline passes and
    /// when an output cannot be written.
    pub fn wait(
        mut self,
        mut stdout: impl Write,
        mut stderr: impl Write,
        deadline: Option<Instant>,
    ) -> Result<i32, LabError> {
        loop {
            if let Some(deadline) = deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                // A limit of zero would mean none.
                let left = left.max(Duration::from_millis(1));
                self.stream.set_read_timeout(Some(left)).map_err(LabError::Connection)?;
            }
            let frame = match Frame::read(&mut self.stream) {
                Ok(frame) => frame,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(LabError::TimedOut),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(LabError::HostEnded);
                }
                Err(error) => return Err(LabError::Connection(error)),
            };
            match frame.kind {
                Kind::Stdout => {
                    stdout
                        .write_all(&frame.payload)
                        .and_then(|()| stdout.flush())
                        .map_err(LabError::Output)?;
                }
                Kind::Stderr => {
                    stderr
                        .write_all(&frame.payload)
                        .and_then(|()| stderr.flush())
                        .map_err(LabError::Output)?;
                }
                Kind::Trouble => {
                    let reason = String::from_utf8_lossy(&frame.payload);
                    writeln!(stderr, "lab: {reason}").map_err(LabError::Output)?;
                }
                Kind::Credit => {
                    let bytes = frame.number().map_err(LabError::Connection)?;
                    self.credit.give(usize::try_from(bytes).unwrap_or(0));
                }
                Kind::Exit => return frame.number().map_err(LabError::Connection),
                _ => {}
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The feeding thread may hold another handle of the connection.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.credit.give(CHUNK);
    }
}

impl Credit {
    fn wait(&self) -> usize {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        *self.grown.wait_while(bytes, |bytes| *bytes == 0).unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, count: usize) {
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner) -= count;
    }

    fn give(&self, count: usize) {
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner) += count;
        self.grown.notify_all();
    }
}
