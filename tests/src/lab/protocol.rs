//! What client, daemon and agent say to each other: frames of a kind, a length and that many bytes.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Changes whenever the meaning of a frame does, so that a lab that is up is not misunderstood by a newer program.
pub const VERSION: u32 = 1;

/// How much of standard input may be under way before the agent has given it to the job.
pub const STDIN_CREDIT: usize = 512 * 1024;

/// Data frames carry at most this much.
pub const CHUNK: usize = 64 * 1024;

/// Larger frames are a mistake: only a job's environment comes anywhere near.
const LARGEST: usize = 16 * 1024 * 1024;

/// What a frame means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Agent to daemon, once: [`Host`] as JSON.
    Hello = 1,
    /// Client to daemon, and back with [`Host`] as JSON.
    Status,
    /// Client to daemon: end the lab.
    Stop,
    /// To the agent: a [`Job`] as JSON.
    Start,
    /// To the agent: bytes for standard input.
    Stdin,
    /// To the agent: the end of standard input.
    StdinEnd,
    /// To the agent: a signal number for the job's process group.
    Signal,
    /// To the agent: rows and columns of the terminal, two little-endian u16.
    Resize,
    /// To the agent: nobody waits for the job any more.
    Kill,
    /// From the agent: bytes of standard output.
    Stdout,
    /// From the agent: bytes of standard error.
    Stderr,
    /// From the agent: so many bytes of standard input (u32) were taken.
    Credit,
    /// From the agent: why the job did not start or end as it should.
    Trouble,
    /// From the agent, last: the exit status, a little-endian i32.
    Exit,
}

impl Kind {
    const ALL: [Self; 14] = [
        Self::Hello,
        Self::Status,
        Self::Stop,
        Self::Start,
        Self::Stdin,
        Self::StdinEnd,
        Self::Signal,
        Self::Resize,
        Self::Kill,
        Self::Stdout,
        Self::Stderr,
        Self::Credit,
        Self::Trouble,
        Self::Exit,
    ];

    fn parse(byte: u8) -> io::Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or_else(|| invalid(format!("unknown frame kind {byte}")))
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it means.
    pub kind: Kind,
    /// Its contents.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame with contents.
    pub fn new(kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, payload: payload.into() }
    }

    /// A frame with a value as JSON.
    pub fn json(kind: Kind, value: &impl Serialize) -> io::Result<Self> {
        Ok(Self { kind, payload: serde_json::to_vec(value)? })
    }

    /// The value that the contents are JSON of.
    pub fn parse<'a, T: Deserialize<'a>>(&'a self) -> io::Result<T> {
        serde_json::from_slice(&self.payload).map_err(io::Error::from)
    }

    /// The contents as a number of four bytes.
    pub fn number(&self) -> io::Result<i32> {
        let bytes =
            self.payload.as_slice().try_into().map_err(|_| invalid("a number has four bytes".into()))?;
        Ok(i32::from_le_bytes(bytes))
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("frames are far below 4 GiB");
        let mut bytes = Vec::with_capacity(5 + self.payload.len());
        bytes.push(self.kind as u8);
        bytes.extend(length.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// Takes one whole frame from the front of `bytes`, if it is there.
    pub fn decode(bytes: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let Some((header, rest)) = bytes.split_first_chunk::<5>() else { return Ok(None) };
        let kind = Kind::parse(header[0])?;
        let length = length(header)?;
        if rest.len() < length {
            return Ok(None);
        }
        let payload = rest[..length].to_vec();
        bytes.drain(..5 + length);
        Ok(Some(Self { kind, payload }))
    }

    /// Reads one whole frame.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let mut header = [0; 5];
        from.read_exact(&mut header)?;
        let mut payload = vec![0; length(&header)?];
        let kind = Kind::parse(header[0])?;
        from.read_exact(&mut payload)?;
        Ok(Self { kind, payload })
    }

    /// Writes the frame in one piece.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        to.write_all(&self.encode())
    }
}

fn length(header: &[u8; 5]) -> io::Result<usize> {
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length > LARGEST { Err(invalid(format!("a frame of {length} bytes"))) } else { Ok(length) }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("The lab's protocol was violated: {what}"))
}

/// What is to be run, and as whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments.
    pub argv: Vec<OsString>,
    /// The whole environment; the lab adds its own names.
    pub env: Vec<(OsString, OsString)>,
    /// The working directory.
    pub cwd: PathBuf,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File creation mask.
    pub umask: u32,
    /// Rows and columns, if the job wants a terminal instead of pipes.
    pub terminal: Option<(u16, u16)>,
}

/// What the lab's host says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Host {
    /// [`VERSION`] of the agent.
    pub version: u32,
    /// The host's kernel, as `uname -r` says.
    pub kernel: String,
    /// What jobs find in their environment.
    pub env: Vec<(String, String)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_in_any_pieces() {
        let frames = [
            Frame::new(Kind::Stdin, *b"bytes"),
            Frame::new(Kind::StdinEnd, []),
            Frame::new(Kind::Exit, [7; 4]),
        ];
        let wire: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        let mut buffer = Vec::new();
        let mut decoded = Vec::new();
        for byte in wire {
            buffer.push(byte);
            decoded.extend(Frame::decode(&mut buffer).unwrap());
        }
        assert_eq!(decoded, frames);
    }

    #[test]
    fn every_kind_has_its_byte() {
        for kind in Kind::ALL {
            assert_eq!(Kind::parse(kind as u8).unwrap(), kind);
        }
        assert!(Kind::parse(0).is_err());
    }

    #[test]
    fn absurd_lengths_are_refused() {
        let mut bytes = vec![Kind::Stdin as u8, 255, 255, 255, 255];
        assert!(Frame::decode(&mut bytes).is_err());
        assert!(Frame::read(bytes.as_slice()).is_err());
    }
}
