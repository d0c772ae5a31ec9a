//! `struct virtio_pci_common_cfg` (virtio 1.2, section 4.1.4.3) and the device status state machine (section 2.1),
//! strict: what a driver may not do in a state has no effect. Rings cannot change once the device lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// No MSI-X vector.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Device status bits.
pub(super) mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// What the transport has to do after a write.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// DRIVER_OK was set: start the device.
    Activate,
    /// Zero was written: stop the device.
    Reset,
}

/// A queue as the driver sets it up.
pub(super) struct QueueSetup {
    pub queue: Queue,
    pub vector: Arc<AtomicU16>,
}

/// The registers.
pub(super) struct CommonConfig {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    /// Shared with the queues' threads, which may set NEEDS_RESET.
    pub status: Arc<AtomicU8>,
    pub config_vector: Arc<AtomicU16>,
    vectors: u16,
    pub queues: Vec<QueueSetup>,
}

impl CommonConfig {
    /// Registers of a device that offers the feature bits `offered`, with queues of at most `sizes` descriptors.
    ///
    /// # Errors
    /// A size is no power of two up to 32768.
    pub fn new(offered: u64, sizes: &[u16], vectors: u16) -> Result<CommonConfig, virtio_queue::Error> {
        let queue = |&size| {
            let vector = Arc::new(AtomicU16::new(NO_VECTOR));
            Ok(QueueSetup { queue: Queue::new(size)?, vector })
        };
        Ok(CommonConfig {
            offered,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            status: Arc::new(AtomicU8::new(0)),
            config_vector: Arc::new(AtomicU16::new(NO_VECTOR)),
            vectors,
            queues: sizes.iter().map(queue).collect::<Result<_, _>>()?,
        })
    }

    /// The feature bits that the driver accepted.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for setup in &mut self.queues {
            setup.queue.reset();
            setup.vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.status.store(0, Ordering::SeqCst);
    }

    /// The guest reads. Reads that do not match a field (or a half of a 64-bit one) read as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let ring = |address: fn(&Queue) -> u64| queue.map_or(0, |setup| address(&setup.queue));
        let value: u64 = match (offset, data.len()) {
            (0, 4) => self.device_feature_select.into(),
            (4, 4) => half(self.offered, self.device_feature_select).into(),
            (8, 4) => self.driver_feature_select.into(),
            (12, 4) => half(self.accepted, self.driver_feature_select).into(),
            (16, 2) => self.config_vector.load(Ordering::Relaxed).into(),
            (18, 2) => self.queues.len() as u64,
            (20, 1) => self.status.load(Ordering::SeqCst).into(),
            (21, 1) => 0, // config_generation: no device here changes its configuration
            (22, 2) => self.queue_select.into(),
            // Size 0 says that there is no such queue.
            (24, 2) => queue.map_or(0, |setup| setup.queue.size().into()),
            (26, 2) => queue.map_or(NO_VECTOR, |setup| setup.vector.load(Ordering::Relaxed)).into(),
            (28, 2) => queue.is_some_and(|setup| setup.queue.ready()).into(),
            (30, 2) => self.queue_select.into(),
            (32..56, 4 | 8) if offset.is_multiple_of(data.len() as u64) => {
                let address = match offset & !7 {
                    32 => ring(QueueT::desc_table),
                    40 => ring(QueueT::avail_ring),
                    _ => ring(QueueT::used_ring),
                };
                if offset % 8 == 4 { address >> 32 } else { address }
            }
            _ => 0,
        };
        let length = data.len().min(8);
        data[..length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    /// The guest writes. Writes that match no field, or that the state forbids, have no effect.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        let mut bytes = [0; 8];
        bytes.get_mut(..data.len())?.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = value as u32,
            (8, 4) => self.driver_feature_select = value as u32,
            (12, 4) => self.write_features(value as u32),
            (16, 2) => self.config_vector.store(self.known_vector(value as u16), Ordering::Relaxed),
            (20, 1) => return self.write_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (24.., _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        None
    }

    fn write_features(&mut self, value: u32) {
        let status = self.status.load(Ordering::SeqCst);
        if status & status::DRIVER == 0 || status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(value),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Option<Action> {
        if value == 0 {
            return Some(Action::Reset);
        }
        let old = self.status.load(Ordering::SeqCst);
        // NEEDS_RESET is the device's; the driver must not clear a bit, nor skip a step.
        let mut new = value & !status::NEEDS_RESET;
        let kept = old & !status::NEEDS_RESET;
        if new & kept != kept {
            tracing::warn!(old, new, "The driver cleared a device status bit: ignored");
            return None;
        }
        let steps = [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];
        for (step, next) in steps.iter().zip(&steps[1..]) {
            if new & next != 0 && new & step == 0 {
                tracing::warn!(old, new, "The driver skipped a step of initialisation: ignored");
                return None;
            }
        }
        let added = new & !old;
        if added & status::FEATURES_OK != 0
            && (self.accepted & !self.offered != 0 || self.accepted >> VIRTIO_F_VERSION_1 & 1 == 0)
        {
            // The driver reads the status back and finds that the device does not agree.
            new &= !(status::FEATURES_OK | status::DRIVER_OK);
        }
        self.status.fetch_or(new, Ordering::SeqCst);
        let live = old & status::FAILED == 0 && new & status::FAILED == 0;
        (new & !old & status::DRIVER_OK != 0 && live).then_some(Action::Activate)
    }

    fn write_queue(&mut self, offset: u64, length: usize, value: u64) {
        let status = self.status.load(Ordering::SeqCst);
        let configurable = status & status::FEATURES_OK != 0 && status & status::DRIVER_OK == 0;
        let vector = self.known_vector(value as u16);
        let Some(setup) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        // Linux gives queues their vectors in the same state as their rings, NetBSD when they are enabled.
        let is_vector = (offset, length) == (26, 2);
        if !configurable || (setup.queue.ready() && !is_vector) {
            return;
        }
        let queue = &mut setup.queue;
        let low = Some(value as u32);
        let result = match (offset, length) {
            (24, 2) => queue.try_set_size(value as u16),
            (26, 2) => {
                setup.vector.store(vector, Ordering::Relaxed);
                Ok(())
            }
            (28, 2) => {
                queue.set_ready(value == 1);
                Ok(())
            }
            (32, 8) => queue.try_set_desc_table_address(GuestAddress(value)),
            (40, 8) => queue.try_set_avail_ring_address(GuestAddress(value)),
            (48, 8) => queue.try_set_used_ring_address(GuestAddress(value)),
            (32, 4) => {
                queue.set_desc_table_address(low, None);
                Ok(())
            }
            (36, 4) => {
                queue.set_desc_table_address(None, low);
                Ok(())
            }
            (40, 4) => {
                queue.set_avail_ring_address(low, None);
                Ok(())
            }
            (44, 4) => {
                queue.set_avail_ring_address(None, low);
                Ok(())
            }
            (48, 4) => {
                queue.set_used_ring_address(low, None);
                Ok(())
            }
            (52, 4) => {
                queue.set_used_ring_address(None, low);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = result {
            tracing::warn!(queue = self.queue_select, %error, "The driver set up a queue wrongly: ignored");
        }
    }

    fn known_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

    fn config() -> CommonConfig {
        CommonConfig::new(VERSION_1 | 0b101, &[16, 64], 3).unwrap()
    }

    fn set_status(config: &mut CommonConfig, value: u8) -> Option<Action> {
        config.write(20, &[value])
    }

    fn status(config: &CommonConfig) -> u8 {
        let mut data = [0];
        config.read(20, &mut data);
        data[0]
    }

    fn negotiate(config: &mut CommonConfig, features: u64) {
        set_status(config, 1);
        set_status(config, 3);
        for select in 0..2_u32 {
            config.write(8, &select.to_le_bytes());
            config.write(12, &half(features, select).to_le_bytes());
        }
        set_status(config, 11);
    }

    fn read(config: &CommonConfig, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        config.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    #[test]
    fn a_driver_that_follows_the_steps_gets_its_device() {
        let mut config = config();
        negotiate(&mut config, VERSION_1 | 1);
        assert_eq!(status(&config), 11);
        assert_eq!(config.features(), VERSION_1 | 1);
        assert_eq!(set_status(&mut config, 15), Some(Action::Activate));
        assert_eq!(set_status(&mut config, 15), None, "only once");
        assert_eq!(set_status(&mut config, 0), Some(Action::Reset));
    }

    #[test]
    fn features_that_were_not_offered_or_lack_version_1_are_not_agreed_to() {
        for features in [VERSION_1 | 2, 1, 0, u64::MAX] {
            let mut config = config();
            negotiate(&mut config, features);
            assert_eq!(status(&config), 3, "{features:#x}");
            assert_eq!(set_status(&mut config, 7), None);
            assert_eq!(set_status(&mut config, 15), None, "FEATURES_OK fails again");
        }
    }

    #[test]
    fn steps_cannot_be_skipped_nor_bits_cleared() {
        let mut config = config();
        for wrong in [2, 4, 8, 12, 15 & !1] {
            assert_eq!(set_status(&mut config, wrong), None);
            assert_eq!(status(&config), 0, "{wrong:#x}");
        }
        negotiate(&mut config, VERSION_1);
        set_status(&mut config, 3);
        assert_eq!(status(&config), 11);
    }

    #[test]
    fn features_and_queues_are_frozen_in_the_wrong_state() {
        let mut config = config();
        config.write(24, &8_u16.to_le_bytes());
        assert_eq!(read(&config, 24, 2), 16, "before FEATURES_OK");
        negotiate(&mut config, VERSION_1);
        config.write(8, &0_u32.to_le_bytes());
        config.write(12, &4_u32.to_le_bytes());
        assert_eq!(config.features(), VERSION_1, "after FEATURES_OK");
        config.write(24, &8_u16.to_le_bytes());
        config.write(32, &0x1000_u32.to_le_bytes());
        config.write(36, &1_u32.to_le_bytes());
        config.write(28, &1_u16.to_le_bytes());
        config.write(24, &4_u16.to_le_bytes());
        config.write(26, &2_u16.to_le_bytes());
        set_status(&mut config, 15);
        for (offset, value) in [(24, 16), (26, 1), (28, 0)] {
            config.write(offset, &u16::to_le_bytes(value));
        }
        config.write(32, &0_u64.to_le_bytes());
        // CVE-2026-5747: a queue rewritten after DRIVER_OK.
        assert_eq!((read(&config, 24, 2), read(&config, 26, 2), read(&config, 28, 2)), (8, 2, 1));
        assert_eq!(read(&config, 32, 8), 0x1_0000_1000);
        config.reset();
        assert_eq!((read(&config, 24, 2), read(&config, 26, 2), read(&config, 28, 2)), (16, 0xffff, 0));
        assert_eq!(read(&config, 32, 8), 0);
    }

    #[test]
    fn impossible_sizes_vectors_and_queues_have_no_effect() {
        let mut config = config();
        negotiate(&mut config, VERSION_1);
        for size in [0_u16, 3, 32, 0x8000] {
            config.write(24, &size.to_le_bytes());
            assert_eq!(read(&config, 24, 2), 16);
        }
        config.write(26, &3_u16.to_le_bytes());
        assert_eq!(read(&config, 26, 2), u64::from(NO_VECTOR));
        config.write(22, &2_u16.to_le_bytes());
        assert_eq!(read(&config, 24, 2), 0, "there is no third queue");
        config.write(28, &1_u16.to_le_bytes());
        assert_eq!(read(&config, 28, 2), 0);
    }

    /// The registers (virtio 1.2, section 4.1.4.3): offset and bytes. Those of 8 bytes may be accessed by halves.
    const REGISTERS: [(u64, usize); 16] = [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
        (16, 2),
        (18, 2),
        (20, 1),
        (21, 1),
        (22, 2),
        (24, 2),
        (26, 2),
        (28, 2),
        (30, 2),
        (32, 8),
        (40, 8),
        (48, 8),
    ];

    #[test]
    fn accesses_of_any_other_width_and_place_read_zero_and_change_nothing() {
        let mut config = config();
        negotiate(&mut config, VERSION_1);
        config.write(32, &0x1_2345_6000_u64.to_le_bytes());
        let all = |config: &CommonConfig| REGISTERS.map(|(offset, len)| read(config, offset, len));
        let before = all(&config);
        assert_eq!((before[13], before[2]), (0x1_2345_6000, 1));
        for offset in 0..80 {
            for len in [1, 2, 3, 4, 8, 9] {
                let is_half = (32..56).contains(&offset) && offset % 4 == 0 && len == 4;
                if is_half || REGISTERS.contains(&(offset, len)) {
                    continue;
                }
                assert!(config.write(offset, &vec![0xff; len]).is_none(), "{len} bytes at {offset}");
                assert_eq!(all(&config), before, "after {len} bytes at {offset}");
                let mut found = vec![0xff; len];
                config.read(offset, &mut found);
                // Of what is longer than any register, the rest is whatever it was.
                assert_eq!(found[..len.min(8)], vec![0; len.min(8)], "{len} bytes at {offset}");
            }
        }
    }
}
