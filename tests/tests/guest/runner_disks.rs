//! `daxvm run --disk ... -- CMD`: disks and randomness.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;

use tests::guest::data::{Content, Hasher};
use tests::vm::{CommandRun, Kernel, scratch};

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::runner::{RunnerCheck, ensure_end};

/// The checks that need one kernel only.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![("a-disk-is-read-into-the-window", into_window)]
}

const MIB: u64 = 1 << 20;

/// Two disks, one of them read-only, and a source of entropy; their drivers are modules of Debian's kernels.
pub fn disks(kernel: &Kernel) -> Outcome {
    let dir = tempfile::tempdir_in(scratch())?;
    let path = |name: &str| dir.path().join(name);
    let (first, second) = (Content { seed: 91, len: 8 * MIB }, Content { seed: 92, len: 3 * MIB + 512 });
    first.write_to(&path("first"))?;
    second.write_to(&path("second"))?;
    // 4 KiB that begin in the first MiB, and the last sector, with and without the guest's page cache.
    let script = "set -e; cd /sys/block; cat vda/size vda/ro vdb/size vdb/ro; cat /dev/vda /dev/vdb | sha256sum; \
        dd if=/dev/vda bs=1M iflag=direct status=none | sha256sum; \
        if (echo no >/dev/vdb) 2>/dev/null; then echo written; fi; \
        yes kept | head -c 4096 | dd of=/dev/vda bs=4096 seek=255 conv=fsync status=none; \
        yes last | head -c 512 | dd of=/dev/vda bs=512 seek=16383 oflag=direct status=none; \
        head -c 64 /dev/hwrng | wc -c";
    let mut both = Hasher::default();
    for name in ["first", "second"] {
        both.update(&fs::read(path(name))?);
    }
    let expected = format!("16384\n0\n6145\n1\n{}  -\n{}  -\n64\n", both.finish(), first.sha256());
    let run = CommandRun::shell(kernel, script).option("--disk").option(path("first")).option("--disk");
    let ended = run.option(format!("{},ro", path("second").display())).run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(String::from_utf8_lossy(&ended.stdout), expected, "{}", ended.stderr);
    let image = File::open(path("first"))?;
    let mut found = [0; 4096];
    image.read_exact_at(&mut found, 255 * 4096)?;
    ensure_eq!(found, b"kept\n".repeat(820)[..4096], "what was written with a flush");
    image.read_exact_at(&mut found[..512], 8 * MIB - 512)?;
    ensure_eq!(found[..512], b"last\n".repeat(103)[..512], "what was written directly");
    ensure_eq!(second.differs_from(&File::open(path("second"))?)?, None, "the read-only disk");
    Ok(())
}

/// A program reads a disk with O_DIRECT into what it has mapped of a DAX file; then the host takes half of that file away.
fn into_window(kernel: &Kernel) -> Outcome {
    let dir = tempfile::tempdir_in(scratch())?;
    let content = Content { seed: 93, len: 4 * MIB };
    content.write_to(&dir.path().join("disk"))?;
    let share = dir.path().join("share");
    fs::create_dir(&share)?;
    let file = share.join("file");
    File::create(&file)?.set_len(content.len)?;
    let script = "set -e; mount -t virtiofs -o dax=always t /mnt; exec python3 -c '\n\
        import mmap, os, sys\n\
        disk = os.open(\"/dev/vda\", os.O_RDONLY | os.O_DIRECT)\n\
        file = os.open(\"/mnt/file\", os.O_RDWR)\n\
        view = memoryview(mmap.mmap(file, 4 << 20))\n\
        print(os.preadv(disk, [view], 0), flush=True)\n\
        sys.stdin.readline()\n\
        def read(at):\n\
        \x20   try: return os.preadv(disk, [view[at:at + (1 << 20)]], at)\n\
        \x20   except OSError as error: return error.errno\n\
        print(read(0), read(3 << 20), flush=True)\n'";
    let option = format!("tag=t,window=32M,dax=always,cache=always,path={}", share.display());
    let run = CommandRun::shell(kernel, script).option("--share").option(option).option("--disk");
    let mut running = run.option(dir.path().join("disk")).start()?;
    ensure_eq!(running.wait_for_line()?, "4194304", "bytes read into the window");
    ensure_eq!(content.differs_from(&File::open(&file)?)?, None, "the host's file");
    File::options().write(true).open(&file)?.set_len(2 * MIB)?;
    running.child.stdin.take().ok_or("no pipe")?.write_all(b"go on\n")?;
    let ended = running.wait()?;
    ensure_end(&ended, 0, "exited")?;
    // What is behind the end is read to memory that is nobody's, or refused: the guest goes on, and the rest is right.
    let printed = String::from_utf8_lossy(&ended.stdout).into_owned();
    ensure!(
        ["1048576 1048576\n", "1048576 5\n", "1048576 14\n"].contains(&&*printed),
        "it printed {printed:?}"
    );
    ensure_eq!(file.metadata()?.len(), 2 * MIB, "the size of the file");
    let half = Content { len: 2 * MIB, ..content };
    ensure_eq!(half.differs_from(&File::open(&file)?)?, None, "what is left of the file");
    Ok(())
}
