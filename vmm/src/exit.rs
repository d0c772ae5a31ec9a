//! What an exit of a vCPU means: an access that goes to a bus, or the end of the machine. Testable without KVM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::bus::Bus;
use kvm_ioctls::VcpuExit;

/// The two address spaces that exits lead to.
#[derive(Clone, Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Guest-physical memory that is not RAM.
    pub memory: Arc<Bus>,
    /// Exits so far, whatever for.
    pub activity: Arc<AtomicU64>,
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fatal {
    /// A triple fault.
    TripleFault,
    /// KVM could not go on; what it said.
    Kvm(String),
}

impl Buses {
    /// Carries out one exit.
    ///
    /// # Errors
    /// The vCPU cannot go on.
    pub fn handle(&self, exit: VcpuExit) -> Result<(), Fatal> {
        self.activity.fetch_add(1, Ordering::Relaxed);
        match exit {
            VcpuExit::IoIn(port, data) => {
                self.ports.read(port.into(), data);
            }
            VcpuExit::IoOut(port, data) => {
                self.ports.write(port.into(), data);
            }
            VcpuExit::MmioRead(address, data) => {
                self.memory.read(address, data);
            }
            VcpuExit::MmioWrite(address, data) => {
                self.memory.write(address, data);
            }
            VcpuExit::Intr | VcpuExit::Hlt => {}
            VcpuExit::Shutdown => return Err(Fatal::TripleFault),
            VcpuExit::FailEntry(reason, cpu) => {
                return Err(Fatal::Kvm(format!("entry failed on CPU {cpu}, hardware reason {reason:#x}")));
            }
            VcpuExit::InternalError => {
                let message = "KVM could not carry out an instruction of the guest. If /proc/cpuinfo has neither vmx nor \
                               svm, the KVM of this machine is not one in hardware, and runs no kernel";
                return Err(Fatal::Kvm(message.into()));
            }
            other => return Err(Fatal::Kvm(format!("unexpected exit {other:?}"))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::bus::BusDevice;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Register(Mutex<Vec<u8>>);

    impl BusDevice for Register {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.0.lock().unwrap()[..data.len()]);
        }
        fn write(&self, _: u64, data: &[u8]) {
            *self.0.lock().unwrap() = data.to_vec();
        }
    }

    #[test]
    fn accesses_go_to_their_bus() {
        let buses = Buses::default();
        let (port, register) = (Arc::new(Register::default()), Arc::new(Register::default()));
        buses.ports.insert(0x60, 1, port.clone()).unwrap();
        buses.memory.insert(0xc000_0000, 8, register.clone()).unwrap();
        buses.handle(VcpuExit::IoOut(0x60, &[1])).unwrap();
        buses.handle(VcpuExit::MmioWrite(0xc000_0000, &[2, 3])).unwrap();
        let (mut from_port, mut from_memory) = ([0], [0, 0]);
        buses.handle(VcpuExit::IoIn(0x60, &mut from_port)).unwrap();
        buses.handle(VcpuExit::MmioRead(0xc000_0000, &mut from_memory)).unwrap();
        assert_eq!((from_port, from_memory), ([1], [2, 3]));
        assert_eq!(buses.activity.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn nobody_there_is_no_error_but_the_end_is() {
        let buses = Buses::default();
        let mut data = [0; 4];
        buses.handle(VcpuExit::MmioRead(0xdead_0000, &mut data)).unwrap();
        assert_eq!(data, [0xff; 4]);
        assert_eq!(buses.handle(VcpuExit::Shutdown), Err(Fatal::TripleFault));
        assert!(matches!(buses.handle(VcpuExit::InternalError), Err(Fatal::Kvm(_))));
    }
}
