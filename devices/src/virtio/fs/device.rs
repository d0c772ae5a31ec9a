//! The device as the transport sees it: configuration space, queues, the window, start and reset.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::cache::CacheMode;
use super::counters::{CountersHandle, Counts};
use super::policy::{Policy, Prefault};
use super::server::{Server, ServerConfig};
use super::window::{DaxWindow, WindowSizeError, check_window_size};
use crate::virtio::device::{
    ActivateError, Activation, HostMemory, SharedMemory, VirtioDevice, read_config_space,
};
use crate::virtio::thread::ThreadKind;
use crate::virtio::worker::{ChainError, ChainHandler, QueueWorkers};

/// VIRTIO_ID_FS.
const DEVICE_TYPE: u32 = 26;
/// Length of the tag in the configuration space, in bytes; a shorter one is padded with NUL.
const TAG_LEN: usize = 36;
/// The most request queues that a device can have.
pub const MAX_REQUEST_QUEUES: u16 = 64;
/// Size of the queue for FORGET and other requests that must not wait.
const HIPRIO_QUEUE_SIZE: u16 = 128;
/// Size of a request queue. The guest sends no request with more pages than this less 4.
const REQUEST_QUEUE_SIZE: u16 = 1024;
/// The identifier of the window among the device's shared memory regions.
const WINDOW_ID: u8 = 0;

/// What a share is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileSystemConfig {
    /// The name that the guest mounts; 1 to 36 bytes without NUL.
    pub tag: String,
    /// The directory to share; it may be a symbolic link to one.
    pub path: PathBuf,
    /// Whether the guest may change nothing. The device enforces it, whatever the guest's mount says.
    pub read_only: bool,
    /// Size of the DAX window in bytes; 0 for none, else as [`check_window_size`] says.
    pub window_size: u64,
    /// Which files are DAX.
    pub policy: Policy,
    /// Which pages of DAX files are put in the guest's reach as it maps them, where no rule of the policy says it.
    pub prefault: Prefault,
    /// What the guest may keep of what it has seen.
    pub cache: CacheMode,
    /// Number of request queues, each with its own thread; 1 to [`MAX_REQUEST_QUEUES`].
    pub request_queues: u16,
    /// The most descriptors of this process that the server keeps for what the guest knows and has open: one for each
    /// file and directory, and one for each time that it is open. The guest gets ENFILE when it wants more.
    /// [`super::descriptors_per_share`] divides what there is.
    pub descriptors: u64,
}

/// A tag that no share can have.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("The tag {0:?} of a share must have 1 to 36 bytes and no NUL: choose another one")]
pub struct TagError(pub String);

/// Says whether a share can have this tag: 1 to 36 bytes without NUL.
///
/// # Errors
/// [`TagError`].
pub fn check_tag(tag: &str) -> Result<(), TagError> {
    match tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
        true => Err(TagError(tag.to_owned())),
        false => Ok(()),
    }
}

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FileSystemError {
    /// The tag is empty, too long or contains NUL.
    #[error(transparent)]
    Tag(#[from] TagError),
    /// There is nothing at the path, it is no directory, or it cannot be reached.
    #[error("Cannot share {}: give a directory that exists and that you may read", path.display())]
    Path {
        /// The path as it was given.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// No window can have this size.
    #[error(transparent)]
    WindowSize(#[from] WindowSizeError),
    /// There is no address space for the window.
    #[error("Cannot reserve a DAX window of {size} bytes: choose a smaller one")]
    Window {
        /// The size in bytes.
        size: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// No device has so many queues.
    #[error("A share has 1 to {MAX_REQUEST_QUEUES} request queues, not {0}")]
    RequestQueues(u16),
    /// The file server cannot start.
    #[error("Cannot serve {}: is /proc mounted?", path.display())]
    Server {
        /// The path as it was given.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A virtio-fs device that shares one directory.
///
/// Its queues are those that Linux expects: 0 for high priority, then the request queues. There is no notification
/// queue, as no driver knows one.
pub struct FileSystemDevice {
    tag: Arc<str>,
    pub(super) server: Arc<Server>,
    window: Option<Arc<DaxWindow>>,
    counts: Arc<Counts>,
    queue_sizes: Vec<u16>,
    workers: QueueWorkers,
}

impl FileSystemDevice {
    /// Makes a device; the directory is opened and the window reserved here, once and for all.
    ///
    /// It clears the process's umask, because modes come from the guest.
    ///
    /// # Errors
    /// [`FileSystemError`], which names what to change.
    pub fn new(config: FileSystemConfig) -> Result<FileSystemDevice, FileSystemError> {
        let root = open_directory(&config.path)?;
        FileSystemDevice::with_root(config, root)
    }

    /// The same for a directory that has been opened (O_PATH will do) and may be the root of a tree that is mounted
    /// nowhere; `config.path` is where it comes from.
    ///
    /// # Errors
    /// [`FileSystemError`], which names what to change.
    pub fn with_root(config: FileSystemConfig, root: File) -> Result<FileSystemDevice, FileSystemError> {
        let FileSystemConfig {
            tag,
            path,
            read_only,
            window_size,
            policy,
            prefault,
            cache,
            request_queues,
            descriptors,
        } = config;
        check_tag(&tag)?;
        if !(1..=MAX_REQUEST_QUEUES).contains(&request_queues) {
            return Err(FileSystemError::RequestQueues(request_queues));
        }
        let window = match check_window_size(window_size)? {
            0 => None,
            size => {
                let window = DaxWindow::new(size);
                Some(Arc::new(window.map_err(|source| FileSystemError::Window { size, source })?))
            }
        };
        if let Some(window) = window.as_ref().filter(|_| is_own_tree(&root)) {
            window.begin_paths_at(&path);
        }
        let counts = Arc::new(Counts::new(policy.clone(), window_size));
        let tag = Arc::<str>::from(tag);
        let server = ServerConfig {
            tag: Arc::clone(&tag),
            root,
            read_only,
            policy,
            prefault,
            cache,
            window: window.clone(),
            counts: Arc::clone(&counts),
            descriptors,
        };
        let server = match Server::new(server) {
            Ok(server) => Arc::new(server),
            Err(source) => return Err(FileSystemError::Server { path, source }),
        };
        let mut queue_sizes = vec![REQUEST_QUEUE_SIZE; usize::from(request_queues) + 1];
        queue_sizes[0] = HIPRIO_QUEUE_SIZE;
        Ok(FileSystemDevice { tag, server, window, counts, queue_sizes, workers: QueueWorkers::default() })
    }

    /// A handle to the share's counters, which may outlive the device.
    pub fn counters(&self) -> CountersHandle {
        CountersHandle {
            tag: Arc::clone(&self.tag),
            counts: Arc::clone(&self.counts),
            window: self.window.clone(),
        }
    }

    /// The configuration space: `tag` and the little-endian `num_request_queues`.
    fn config_space(&self) -> [u8; TAG_LEN + 4] {
        let mut space = [0; TAG_LEN + 4];
        space[..self.tag.len()].copy_from_slice(self.tag.as_bytes());
        space[TAG_LEN..].copy_from_slice(&(self.queue_sizes.len() as u32 - 1).to_le_bytes());
        space
    }
}

impl VirtioDevice for FileSystemDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn shared_memory(&self) -> Option<SharedMemory> {
        let memory: Arc<dyn HostMemory> = self.window.clone()?;
        Some(SharedMemory { id: WINDOW_ID, memory })
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let owner = format_args!("the share {}", self.tag);
        self.workers.start(ThreadKind::FileSystem, owner, activation, |index| {
            let handler = Handler { server: Arc::clone(&self.server), is_prepared: false };
            (format!("fs{index}-{}", self.tag), handler)
        })
    }

    fn reset(&mut self) {
        self.workers.stop();
        self.server.end_session();
    }
}

impl Drop for FileSystemDevice {
    fn drop(&mut self) {
        self.reset();
    }
}

/// What a queue's thread does.
struct Handler {
    server: Arc<Server>,
    /// Whether the thread has been prepared.
    is_prepared: bool,
}

impl ChainHandler for Handler {
    fn handle(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        if !self.is_prepared {
            drop_groups();
            self.is_prepared = true;
        }
        self.server.handle(memory, chain)
    }
}

/// Whether the host shows paths below a directory as beginning there, as it does for trees that are mounted nowhere.
fn is_own_tree(root: &File) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", root.as_raw_fd()));
    link.is_ok_and(|path| path == Path::new("/"))
}

/// Opens the directory to share, without the right to anything but to start from it.
///
/// # Errors
/// [`FileSystemError::Path`].
pub fn open_directory(path: &Path) -> Result<File, FileSystemError> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path);
    opened.map_err(|source| FileSystemError::Path { path: path.to_owned(), source })
}

/// Takes this thread out of the process's groups. Supplementary ones would count when a file is created in the name of
/// one of the guest's users, and give it the set-group-id bit of a group that the user is not in (CVE-2022-0358). Root's
/// may be any (`Group=` of systemd), where the guest's root has files of group 0.
fn drop_groups() {
    // By system call, because the C library's functions change all threads. They fail for want of privileges, and then
    // the server cannot act in the name of others either.
    // SAFETY: with a count of 0 setgroups(2) reads no memory, and setresgid(2) takes three numbers.
    unsafe {
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>());
        libc::syscall(libc::SYS_setresgid, 0, 0, 0);
    }
}
