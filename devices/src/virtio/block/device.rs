//! The device as the transport sees it: configuration space, queues, start and reset.

use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::counters::{Counts, DiskCountersHandle};
use super::image::{DiskError, Image, SECTOR};
use super::request::{Handler, MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, MAX_ZERO_RANGES};
use crate::virtio::device::{ActivateError, Activation, VirtioDevice, read_config_space};
use crate::virtio::thread::ThreadKind;
use crate::virtio::worker::{ChainHandler, QueueWorkers};

const QUEUE_SIZE: u16 = 256;
/// Most pieces of data in a request: with header and status they fill a queue.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The most queues that a disk can have.
const MAX_QUEUES: u16 = 64;

/// What a disk is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BlockConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Whether the guest may not write to it. The image is opened so that nobody can, whatever the driver does.
    pub read_only: bool,
    /// What the guest finds as the disk's serial number; of more than 20 bytes the rest is left out.
    pub id: String,
    /// Number of queues, each with its own thread; brought into the range from 1 to 64.
    pub queues: u16,
}

/// A virtio-blk device.
pub struct BlockDevice {
    image: Arc<Image>,
    id: Arc<str>,
    counters: DiskCountersHandle,
    queue_sizes: Vec<u16>,
    workers: QueueWorkers,
}

impl BlockDevice {
    /// Makes a device; the image is opened and locked here, until the device is dropped.
    ///
    /// # Errors
    /// [`DiskError`], which names what to change.
    pub fn new(config: BlockConfig) -> Result<BlockDevice, DiskError> {
        let image = Image::open(&config.path, config.read_only)?;
        Ok(BlockDevice {
            image: Arc::new(image),
            id: config.id.into(),
            counters: DiskCountersHandle { path: config.path, counts: Arc::new(Counts::default()) },
            queue_sizes: vec![QUEUE_SIZE; config.queues.clamp(1, MAX_QUEUES).into()],
            workers: QueueWorkers::default(),
        })
    }

    /// A handle to the disk's counters, which may outlive the device.
    pub fn counters(&self) -> DiskCountersHandle {
        self.counters.clone()
    }

    /// What serves the requests of a driver that accepted these features.
    pub(in crate::virtio) fn handler(&self, features: u64) -> impl ChainHandler + Clone + use<> {
        Handler {
            image: Arc::clone(&self.image),
            counts: Arc::clone(&self.counters.counts),
            id: Arc::clone(&self.id),
            writes_through: features >> VIRTIO_BLK_F_FLUSH & 1 == 0,
        }
    }

    /// `struct virtio_blk_config`, as far as the features that are offered need it; little-endian.
    fn config_space(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let image = &self.image;
        let blocks = image.physical_block / image.logical_block;
        put(0, &image.sectors.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(image.logical_block as u32).to_le_bytes());
        put(24, &[blocks.ilog2() as u8]);
        put(26, &(blocks as u16).to_le_bytes());
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_RANGES.to_le_bytes());
        put(44, &((image.physical_block / SECTOR) as u32).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_ZERO_RANGES.to_le_bytes());
        put(56, &[1]);
        space
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let access: &[u32] = if self.image.read_only {
            &[VIRTIO_BLK_F_RO]
        } else {
            &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
        };
        let always = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
        ];
        always.iter().chain(access).fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let handler = self.handler(activation.features);
        let owner = format_args!("the disk {}", self.id);
        self.workers.start(ThreadKind::Data, owner, activation, |index| {
            (format!("blk{index}-{}", self.id), handler.clone())
        })
    }

    fn reset(&mut self) {
        self.workers.stop();
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        self.reset();
    }
}
