//! The device, driven by a fake guest.

mod attributes;
mod budget;
mod cache;
mod changes;
mod device;
mod escape;
mod files;
mod hostile;
mod inherit;
mod ioctl;
mod kernel;
mod mapping;
mod negotiation;
mod rings;
mod tmpfile;
