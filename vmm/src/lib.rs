//! daxvm: a small KVM virtual machine monitor with a built-in virtio-fs device whose DAX state is decided per file.

pub mod initramfs;
