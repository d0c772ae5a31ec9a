//! The agent proper: requests in, operations done, replies out. It needs no guest: tests run it on any directory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead};

use serde::Serialize;

use super::ops::{
    Mapping, changing, contest, files, journal, maps, passes, per_file, read, small, system, write,
};
use super::rogue::Rogue;
use super::wire::{Line, read_line};
use super::{End, Failure, Op, Reply};

/// What an agent keeps between requests: open files and mappings, by the numbers the driver knows them by, and devices.
#[derive(Default)]
pub struct Agent {
    pub(super) files: HashMap<u32, File>,
    pub(super) maps: HashMap<u32, Mapping>,
    last: u32,
    rogue: Option<Rogue>,
}

impl Agent {
    /// Serves requests until the input ends or a request says how to end; `reply` sends one reply.
    pub fn serve(
        &mut self,
        input: &mut impl BufRead,
        mut reply: impl FnMut(&Reply) -> io::Result<()>,
    ) -> io::Result<Option<End>> {
        loop {
            match read_line(input) {
                Ok(Some(Line::Message(Op::End(end)))) => return Ok(Some(end)),
                Ok(Some(Line::Message(op))) => reply(&self.perform(op))?,
                Ok(Some(Line::Other(_))) => {}
                Ok(None) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => reply(&Err(error.into()))?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Does one operation.
    pub fn perform(&mut self, op: Op) -> Reply {
        let what = Self::label(&op);
        self.dispatch(op).map_err(|failure| failure.within(what))
    }

    /// The start of an operation's text, enough to know it by in an error.
    fn label(op: &Op) -> String {
        let mut text = format!("{op:?}");
        if let Some((cut, _)) = text.char_indices().nth(120) {
            text.truncate(cut);
            text.push_str("...");
        }
        text
    }

    fn dispatch(&mut self, op: Op) -> Reply {
        match op {
            Op::Echo(text) => done(Ok(text)),
            Op::End(_) => Err(Failure::new("only a guest can end")),
            Op::ReadText(path) => done(system::read_text(&path)),
            Op::WriteText(path, text) => done(system::write_text(&path, &text)),
            Op::Command(argv, stdin) => done(system::command(&argv, &stdin)),
            Op::KernelLog(text) => done(system::kernel_log(&text)),
            Op::DropCaches => done(system::drop_caches()),
            Op::Pci => done(system::pci()),
            Op::Mount(mount) => done(system::mount(&mount)),
            Op::Umount(target, lazy) => done(system::umount(&target, lazy)),
            Op::SmallFiles(work) => done(small::small_files(&work)),
            Op::MakeKnown(ask) => done(per_file::make_known(&ask)),
            Op::AppendSteps(path, step, count) => done(per_file::append_steps(&path, step, count)),
            Op::OpenLoop(ask) => done(per_file::open_loop(&ask)),
            Op::Sha256(request) => done(read::sha256(&request)),
            Op::Verify(request) => done(read::verify(&request)),
            Op::Passes(ask) => done(passes::passes(&ask)),
            Op::ReadBytes(path, offset, len) => done(read::read_bytes(&path, offset, len)),
            Op::Write(request) => done(write::write(&request)),
            Op::Changing(ask) => done(changing::changing(&ask)),
            Op::Journal(ask) => {
                done(journal::journal(&ask, |path, number| println!("synced {path} {number}")))
            }
            Op::Contest(ask) => done(contest::contest(&ask)),
            Op::Open(path, how) => done(files::open(&path, how).map(|file| self.keep_file(file))),
            Op::ReadAt(id, offset, len) => done(read::read_at(self.file(id)?, offset, len)),
            Op::WriteAt(id, offset, bytes) => done(write::write_at(self.file(id)?, offset, &bytes.0)),
            Op::StatHandle(id) => done(files::stat_handle(self.file(id)?)),
            Op::LinkHandle(id, path) => done(per_file::link_handle(self.file(id)?, &path)),
            Op::TryLock(id, kind) => done(files::try_lock(self.file(id)?, kind)),
            Op::Unlock(id, kind) => done(files::unlock(self.file(id)?, kind)),
            Op::Close(id) => done(self.files.remove(&id).map(drop).ok_or_else(|| unknown(id))),
            Op::Map(map) => done(Mapping::of(&map).map(|mapping| self.keep_map(mapping))),
            Op::MapRead(id, offset, len) => done(self.map(id)?.read(offset, len)),
            Op::MapGather(id, offsets) => done(self.map(id)?.gather(offsets)),
            Op::MapWrite(id, offset, bytes) => done(self.map(id)?.write(offset, &bytes.0)),
            Op::MapVerify(id, seed) => done(Ok(self.map(id)?.verify(seed))),
            Op::MapSync(id) => done(self.map(id)?.sync()),
            Op::Unmap(id) => done(self.maps.remove(&id).map(drop).ok_or_else(|| unknown(id))),
            Op::DirectReadIntoMap(read) => done(maps::direct_read(&read, self.map(read.map)?)),
            Op::TakeDevices(writable, read_only) => done(self.take_devices(&writable, &read_only)),
            Op::Attempt(name) => done(self.rogue.as_mut().ok_or_else(no_devices)?.attempt(&name)),
            Op::LeaveDevices => done(self.rogue.take().ok_or_else(no_devices)?.leave()),
            other => files::perform(other),
        }
    }

    fn take_devices(&mut self, writable: &str, read_only: &str) -> Result<Vec<String>, Failure> {
        let rogue = Rogue::take(writable, read_only)?;
        Ok(self.rogue.insert(rogue).names())
    }

    fn keep_file(&mut self, file: File) -> u32 {
        self.last += 1;
        self.files.insert(self.last, file);
        self.last
    }

    fn keep_map(&mut self, mapping: Mapping) -> u32 {
        self.last += 1;
        self.maps.insert(self.last, mapping);
        self.last
    }

    fn file(&self, id: u32) -> Result<&File, Failure> {
        self.files.get(&id).ok_or_else(|| unknown(id))
    }

    fn map(&self, id: u32) -> Result<&Mapping, Failure> {
        self.maps.get(&id).ok_or_else(|| unknown(id))
    }
}

fn unknown(id: u32) -> Failure {
    Failure::new(format!("nothing is kept under {id}"))
}

fn no_devices() -> Failure {
    Failure::new("no devices were taken")
}

/// An operation's result as a reply.
pub(super) fn done<T: Serialize>(result: Result<T, Failure>) -> Reply {
    serde_json::to_value(result?).map_err(|error| Failure::new(error.to_string()))
}
