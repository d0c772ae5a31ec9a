//! The guest's agent on this machine: its program, spoken to as the driver does, on a temporary directory. What it says
//! about files that the guest tests rely on is tried here, including that it finds what is wrong.

use std::error::Error;
use std::fs;
use std::io::{BufReader, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::io::Errno;
use serde::de::DeserializeOwned;
use tests::guest::data::{Content, random_offsets};
use tests::guest::{
    Access, Bytes, Data, Digest, DirectRead, FallocateHow, GuestPath, Known, Line, LockKind, MakeKnown, Map,
    Op, OpenHow, OpenLoop, Opened, Pass, Passes, Random, Reply, Sha256, SmallFiles, SmallFilesPhase, Stat,
    Verified, Verify, Way, Write, read_line, write_line,
};

type Outcome = Result<(), Box<dyn Error>>;

const CONTENT: Content = Content { seed: 1, len: 300_001 };

struct Agent {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Agent {
    fn start() -> Result<Agent, Box<dyn Error>> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_guest-init"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().ok_or("no pipe")?;
        let stdout = BufReader::new(child.stdout.take().ok_or("no pipe")?);
        Ok(Agent { child, stdin, stdout })
    }

    fn reply(&mut self, op: &Op) -> Result<Reply, Box<dyn Error>> {
        write_line(&mut self.stdin, op)?;
        match read_line(&mut self.stdout)? {
            Some(Line::Message(reply)) => Ok(reply),
            other => Err(format!("instead of a reply: {other:?}").into()),
        }
    }

    fn call<T: DeserializeOwned>(&mut self, op: Op) -> Result<T, Box<dyn Error>> {
        Ok(serde_json::from_value(self.reply(&op)??)?)
    }

    fn errno(&mut self, op: Op) -> Result<Option<i32>, Box<dyn Error>> {
        Ok(self.reply(&op)?.err().and_then(|failure| failure.errno))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An agent and a directory with a file of known content.
fn scene() -> Result<(Agent, tempfile::TempDir, PathBuf), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("file");
    CONTENT.write_to(&file)?;
    Ok((Agent::start()?, dir, file))
}

fn flip(path: &Path, offset: u64) -> std::io::Result<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[!byte[0]], offset)
}

#[test]
fn lines_of_any_length_survive_and_damaged_ones_are_answered() -> Outcome {
    let mut agent = Agent::start()?;
    for len in [0, 1, 4095, 65_536, 1 << 20] {
        let text = "é".repeat(len);
        assert!(agent.call::<String>(Op::Echo(text.clone()))? == text, "{len}");
    }
    agent.stdin.write_all(b"kernel noise\n@{\"Echo\": oops\n")?;
    let Some(Line::Message(reply)) = read_line::<Reply>(&mut agent.stdout)? else {
        return Err("no reply".into());
    };
    assert!(reply.is_err_and(|failure| failure.text.contains("damaged")));
    assert_eq!(agent.call::<String>(Op::Echo("on".into()))?, "on");
    Ok(())
}

#[test]
fn every_way_to_read_gives_the_digest_that_the_host_expects() -> Outcome {
    let (mut agent, _dir, file) = scene()?;
    let random = Random { seed: 2, count: 500 };
    let whole = [(); 3].map(|()| CONTENT.sha256());
    let offsets = [2, 3, 4].map(|seed| CONTENT.random_sha256(seed, random.count));
    for (how, expected) in [
        (Access::Read(1000), &whole),
        (Access::Mmap, &whole),
        (Access::RandomRead(random), &offsets),
        (Access::RandomMmap(random), &offsets),
    ] {
        let digests: Vec<Digest> =
            agent.call(Op::Sha256(Sha256 { path: (&file).into(), how, readers: 3 }))?;
        let digests: Vec<_> = digests.into_iter().map(|digest| digest.sha256).collect();
        assert_eq!(digests, *expected, "{how:?}");
    }
    Ok(())
}

#[test]
fn going_over_a_file_sees_every_word_that_the_host_expects() -> Outcome {
    let (mut agent, dir, _) = scene()?;
    let content = Content { seed: 9, len: 70 * 4096 };
    let file = dir.path().join("whole pages");
    content.write_to(&file)?;
    let some = Random { seed: 3, count: 200 };
    for (random, expected) in [
        (None, content.sum_of_words((0..content.len).step_by(4096))),
        (Some(some), content.sum_of_words(random_offsets(some.seed, some.count, content.len))),
    ] {
        for mmap in [false, true] {
            let ask = Passes { path: (&file).into(), mmap, random, passes: 3 };
            let passes: Vec<Pass> = agent.call(Op::Passes(ask))?;
            assert_eq!(
                passes.iter().map(|pass| pass.sum).collect::<Vec<_>>(),
                [expected; 3],
                "{mmap} {random:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn verify_finds_one_wrong_byte_by_every_reader() -> Outcome {
    let (mut agent, _dir, file) = scene()?;
    let verify = |mmap| Op::Verify(Verify { files: vec![((&file).into(), CONTENT)], readers: 4, mmap });
    for mmap in [false, true] {
        let found: Verified = agent.call(verify(mmap))?;
        assert_eq!((found.bytes, found.differs), (CONTENT.len * 4, vec![]));
    }
    flip(&file, 150_000)?;
    for mmap in [false, true] {
        let found: Verified = agent.call(verify(mmap))?;
        assert_eq!(found.differs, vec![(GuestPath::from(&file), 150_000); 4]);
    }
    fs::File::options().write(true).open(&file)?.set_len(CONTENT.len - 1)?;
    let found: Verified = agent.call(verify(true))?;
    assert_eq!(found.differs.len(), 4);
    Ok(())
}

#[test]
fn writes_land_where_they_belong() -> Outcome {
    let (mut agent, _dir, file) = scene()?;
    let path = GuestPath::from(&file);
    let new = Content { seed: 9, ..CONTENT };
    for mmap in [false, true] {
        CONTENT.write_to(&file)?;
        // Everything but one byte at either end.
        let data = Data::Content(Content { len: CONTENT.len - 2, ..new });
        let write = Write { path: path.clone(), offset: 1, data, mmap, fsync: true, writers: 3 };
        agent.call::<()>(Op::Write(write))?;
        assert_eq!(new.differs_from(&fs::File::open(&file)?)?, Some(0), "mmap {mmap}");
        let ends = fs::read(&file)?;
        let mut expected = fs::read(&file)?;
        tests::guest::data::fill(CONTENT.seed, 0, &mut expected[..1]);
        tests::guest::data::fill(new.seed, 1, &mut expected[1..CONTENT.len as usize - 1]);
        tests::guest::data::fill(CONTENT.seed, CONTENT.len - 1, &mut expected[CONTENT.len as usize - 1..]);
        assert!(ends == expected, "mmap {mmap}");
    }
    let data = Data::Bytes(Bytes(b"beyond".to_vec()));
    let write = Write { path: path.clone(), offset: CONTENT.len, data, mmap: false, fsync: true, writers: 1 };
    agent.call::<()>(Op::Write(write))?;
    assert_eq!(agent.call::<Bytes>(Op::ReadBytes(path, CONTENT.len, 100))?.0, b"beyond");
    Ok(())
}

#[test]
fn mappings_are_kept_and_a_missing_page_is_an_error() -> Outcome {
    let (mut agent, _dir, file) = scene()?;
    let path = GuestPath::from(&file);
    let len = CONTENT.len as usize;
    let map: u32 = agent.call(Op::Map(Map { path: path.clone(), offset: 0, len, writable: true }))?;
    assert_eq!(agent.call::<Option<u64>>(Op::MapVerify(map, CONTENT.seed))?, None);
    agent.call::<()>(Op::MapWrite(map, 70_000, Bytes(b"mapped".to_vec())))?;
    agent.call::<()>(Op::MapSync(map))?;
    assert_eq!(&fs::read(&file)?[70_000..70_006], b"mapped");
    assert_eq!(agent.call::<Option<u64>>(Op::MapVerify(map, CONTENT.seed))?, Some(70_000));
    agent.call::<()>(Op::Truncate(path.clone(), 4096))?;
    let fault = Some(Errno::FAULT.raw_os_error());
    assert_eq!(agent.errno(Op::MapRead(map, 200_000, 10))?, fault);
    assert_eq!(agent.errno(Op::MapWrite(map, 200_000, Bytes(vec![1])))?, fault);
    assert!(agent.reply(&Op::MapRead(map, CONTENT.len, 1))?.is_err(), "beyond the mapping");
    assert_eq!(agent.call::<Bytes>(Op::MapRead(map, 4000, 10))?.0.len(), 10);
    agent.call::<()>(Op::Unmap(map))?;
    assert!(agent.reply(&Op::MapRead(map, 0, 1))?.is_err(), "after it was unmapped");
    Ok(())
}

#[test]
fn direct_reads_go_into_a_mapping() -> Outcome {
    let (mut agent, dir, file) = scene()?;
    let buffer = dir.path().join("buffer");
    fs::write(&buffer, vec![0; 65_536])?;
    let map: u32 =
        agent.call(Op::Map(Map { path: (&buffer).into(), offset: 0, len: 65_536, writable: true }))?;
    let read = DirectRead { path: (&file).into(), offset: 8192, len: 32_768, map, at: 4096 };
    let reply = agent.reply(&Op::DirectReadIntoMap(read))?;
    if reply.as_ref().is_err_and(|failure| failure.errno == Some(Errno::INVAL.raw_os_error())) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: the temporary directory's file system has no O_DIRECT");
        return Ok(());
    }
    assert_eq!(reply?, 32_768);
    agent.call::<()>(Op::MapSync(map))?;
    assert_eq!(fs::read(&buffer)?[4096..][..32_768], fs::read(&file)?[8192..][..32_768]);
    Ok(())
}

#[test]
fn small_files_check_what_they_find() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mut agent = Agent::start()?;
    let work = |phase| {
        Op::SmallFiles(SmallFiles {
            dir: GuestPath::from(dir.path()),
            first: 0,
            count: 50,
            sizes: (0, 6000),
            phase,
        })
    };
    agent.call::<u64>(work(SmallFilesPhase::Create))?;
    assert_eq!(fs::read_dir(dir.path())?.count(), 50);
    agent.call::<u64>(work(SmallFilesPhase::Read))?;
    let victim = dir.path().join("file-000007");
    let bytes = fs::read(&victim)?;
    flip(&victim, bytes.len() as u64 - 1)?;
    let failure = agent.reply(&work(SmallFilesPhase::Read))?.err().ok_or("a wrong byte was not seen")?;
    assert!(failure.text.contains("file 7"), "{failure}");
    agent.call::<u64>(work(SmallFilesPhase::Rename))?;
    agent.call::<u64>(work(SmallFilesPhase::Remove))?;
    assert_eq!(fs::read_dir(dir.path())?.count(), 0);
    assert!(agent.reply(&work(SmallFilesPhase::Remove))?.is_err(), "a missing file was not seen");
    Ok(())
}

#[test]
fn names_attributes_and_holes() -> Outcome {
    let (mut agent, dir, file) = scene()?;
    let at = |name: &str| GuestPath::from(&dir.path().join(name));
    agent.call::<()>(Op::Mkfifo(at("fifo")))?;
    assert_eq!(agent.call::<Stat>(Op::Stat(at("fifo")))?.mode & 0o170_000, 0o010_000);
    agent.call::<()>(Op::Symlink("file".into(), at("link")))?;
    assert_eq!(agent.call::<GuestPath>(Op::ReadLink(at("link")))?, GuestPath::from("file"));
    agent.call::<()>(Op::Link(at("file"), at("second")))?;
    assert_eq!(agent.call::<Stat>(Op::Stat(at("second")))?.nlink, 2);
    assert_eq!(agent.call::<u64>(Op::CopyFileRange(at("file"), at("copy")))?, CONTENT.len);
    assert_eq!(CONTENT.differs_from(&fs::File::open(dir.path().join("copy"))?)?, None);
    let mib = 1 << 20;
    agent.call::<()>(Op::Truncate(at("file"), 3 * mib))?;
    let runs: Vec<(u64, u64)> = agent.call(Op::DataRuns(at("file")))?;
    assert!(
        runs.iter().map(|(from, to)| to - from).sum::<u64>() <= CONTENT.len.next_multiple_of(65_536),
        "{runs:?}"
    );
    agent.call::<()>(Op::Fallocate(at("file"), FallocateHow::PunchHole, 0, 4096))?;
    assert_eq!(fs::read(&file)?[..4096], [0; 4096]);
    agent.call::<()>(Op::SetMtime(at("file"), 5, 6))?;
    assert_eq!(agent.call::<Stat>(Op::Stat(at("file")))?.mtime, (5, 6));
    assert_eq!(agent.errno(Op::Rmdir(at("none")))?, Some(Errno::NOENT.raw_os_error()));
    let names: Vec<GuestPath> = agent.call(Op::ReadDir(GuestPath::from(dir.path())))?;
    assert_eq!(names, ["copy", "fifo", "file", "link", "second"].map(GuestPath::from));
    Ok(())
}

#[test]
fn handles_and_locks() -> Outcome {
    let (mut agent, _dir, file) = scene()?;
    let how = OpenHow { write: true, ..OpenHow::default() };
    let open = || Op::Open((&file).into(), how);
    let (one, two): (u32, u32) = (agent.call(open())?, agent.call(open())?);
    assert!(agent.call::<bool>(Op::TryLock(one, LockKind::Flock))?);
    assert!(!agent.call::<bool>(Op::TryLock(two, LockKind::Flock))?);
    agent.call::<()>(Op::Close(one))?;
    assert!(agent.call::<bool>(Op::TryLock(two, LockKind::Flock))?);
    agent.call::<()>(Op::WriteAt(two, 10, Bytes(b"handle".to_vec())))?;
    assert_eq!(agent.call::<Bytes>(Op::ReadAt(two, 10, 6))?.0, b"handle");
    assert_eq!(agent.call::<Stat>(Op::StatHandle(two))?.size, CONTENT.len);
    assert!(agent.reply(&Op::ReadAt(one, 0, 1))?.is_err(), "a handle that was closed");
    Ok(())
}

#[test]
fn a_program_runs_and_answers() -> Outcome {
    let mut agent = Agent::start()?;
    let argv = vec![GuestPath::from(env!("CARGO_BIN_EXE_guest-init"))];
    let output: tests::guest::CommandOutput =
        agent.call(Op::Command(argv, "@{\"Echo\":\"inner\"}\n".into()))?;
    assert_eq!((output.status, output.stdout.as_str()), (Some(0), "@{\"Ok\":\"inner\"}\n"));
    assert!(agent.reply(&Op::Command(vec!["/no/such/program".into()], String::new()))?.is_err());
    Ok(())
}

#[test]
fn files_become_known_in_every_way() -> Outcome {
    let (mut agent, dir) = (Agent::start()?, tempfile::tempdir()?);
    let sizes = vec![0, 1, (4 << 20) + 1];
    for way in [Way::Create, Way::LookUp, Way::Listing, Way::Link, Way::Unnamed] {
        match way {
            Way::LookUp | Way::Listing => {}
            _ => sizes.iter().try_for_each(|size| remove_if_there(&dir.path().join(size.to_string())))?,
        }
        for size in &sizes {
            fs::File::create(dir.path().join(format!("first-{size}")))?.set_len(*size)?;
        }
        let ask = MakeKnown { dir: dir.path().into(), sizes: sizes.clone(), way };
        let known: Vec<Known> = agent.call(Op::MakeKnown(ask))?;
        assert_eq!(known, [Known { known: false, opened: false, errno: 0 }; 3], "{way:?}");
    }
    assert_eq!(fs::metadata(dir.path().join("1"))?.len(), 1);
    // One that is not what its name says.
    fs::write(dir.path().join("7"), b"12345678")?;
    let ask = MakeKnown { dir: dir.path().into(), sizes: vec![7], way: Way::LookUp };
    assert!(agent.reply(&Op::MakeKnown(ask))?.is_err());
    Ok(())
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[test]
fn files_are_opened_in_a_row() -> Outcome {
    let (mut agent, dir) = (Agent::start()?, tempfile::tempdir()?);
    let path = dir.path().join("file");
    CONTENT.write_to(&path)?;
    let ask = OpenLoop { files: vec![(GuestPath::from(&path), CONTENT)], threads: 2, millis: 20 };
    let opened: Opened = agent.call(Op::OpenLoop(ask.clone()))?;
    assert!(opened.opens >= 2 && (opened.dax, opened.changes) == (0, 0), "{opened:?}");
    fs::File::options().write(true).open(&path)?.write_at(b"another", 0)?;
    assert!(agent.reply(&Op::OpenLoop(ask))?.is_err());

    let seen: Vec<(u64, bool)> = agent.call(Op::AppendSteps(GuestPath::from(&path), 10, 3))?;
    assert_eq!(seen, [(CONTENT.len, false)]);
    assert_eq!(fs::metadata(&path)?.len(), CONTENT.len + 30);
    Ok(())
}

/// On whatever file system the temporary directory is: the agent sees and sets what this program does.
#[test]
fn flags_are_those_of_the_file_system() -> Outcome {
    let (mut agent, dir) = (Agent::start()?, tempfile::tempdir()?);
    const NO_DUMP: u32 = 0x40;
    let Ok(before) = tests::inode_flags::get(dir.path()) else {
        println!("skipped: the temporary directory's file system has no flags");
        return Ok(());
    };
    assert_eq!(agent.call::<u32>(Op::Flags(dir.path().into()))?, before);
    agent.call::<()>(Op::SetFlags(dir.path().into(), before | NO_DUMP))?;
    assert_eq!(tests::inode_flags::get(dir.path())?, before | NO_DUMP);
    let attributes = tests::inode_flags::get_extended(dir.path())?;
    assert_eq!(agent.call::<tests::inode_flags::Extended>(Op::Extended(dir.path().into()))?, attributes);
    assert_ne!(attributes.xflags & 0x80, 0, "FS_XFLAG_NODUMP");
    let without = tests::inode_flags::Extended { xflags: attributes.xflags & !0x80, ..attributes };
    agent.call::<()>(Op::SetExtended(dir.path().into(), without))?;
    assert_eq!(tests::inode_flags::get(dir.path())?, before);
    Ok(())
}
