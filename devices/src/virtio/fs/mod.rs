//! The virtio-fs device (virtio 1.2, section 5.11).
