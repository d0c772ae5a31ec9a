//! The device, driven by a fake guest.

mod attributes;
mod device;
mod files;
mod hostile;
mod ioctl;
mod mapping;
mod negotiation;
