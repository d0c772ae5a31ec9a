//! MSI-X (PCI Local Bus 3.0, section 6.8.2): the vector table, the pending bits and their meaning for delivery.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes of a table entry: address (8), data (4), vector control (4).
const ENTRY_SIZE: usize = 16;
const CONTROL_MASKED: u32 = 1;
/// Message control register: MSI-X enable and function mask, the only writable bits.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
pub(super) const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// The write that interrupts the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Guest-physical address of the write.
    pub address: u64,
    /// Value written.
    pub data: u32,
}

/// The hypervisor's side of a function's vectors: delivers them without an exit to user space (KVM: irqfd).
pub trait MsiRouter: Send + Sync {
    /// From now on vector `vector` is delivered as `message`.
    ///
    /// # Errors
    /// The hypervisor refuses the message.
    fn route(&self, vector: u16, message: MsiMessage) -> io::Result<()>;

    /// Delivers vector `vector` as it was routed last.
    ///
    /// # Errors
    /// Signalling the hypervisor failed.
    fn deliver(&self, vector: u16) -> io::Result<()>;
}

/// What decides on the hot path, without a lock, whether a vector is delivered or remembered.
struct Gate {
    masked: AtomicBool,
    pending: AtomicBool,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    message: MsiMessage,
    control: u32,
}

struct Table {
    entries: Vec<Entry>,
    routed: Vec<Option<MsiMessage>>,
    enabled: bool,
    function_masked: bool,
}

/// The MSI-X state of one function.
pub struct Msix {
    router: Arc<dyn MsiRouter>,
    gates: Vec<Gate>,
    table: Mutex<Table>,
}

impl Msix {
    /// Vectors 0 to `vectors` - 1, all masked, as after a reset.
    pub fn new(vectors: u16, router: Arc<dyn MsiRouter>) -> Msix {
        let entry = Entry { control: CONTROL_MASKED, ..Default::default() };
        Msix {
            router,
            gates: (0..vectors)
                .map(|_| Gate { masked: AtomicBool::new(true), pending: AtomicBool::new(false) })
                .collect(),
            table: Mutex::new(Table {
                entries: vec![entry; vectors.into()],
                routed: vec![None; vectors.into()],
                enabled: false,
                function_masked: false,
            }),
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.gates.len() as u16
    }

    /// Interrupts the guest with `vector`; remembered as pending while masked. Unknown vectors are ignored.
    ///
    /// # Errors
    /// Signalling the hypervisor failed.
    pub fn trigger(&self, vector: u16) -> io::Result<()> {
        let Some(gate) = self.gates.get(usize::from(vector)) else { return Ok(()) };
        if gate.masked.load(Ordering::SeqCst) {
            gate.pending.store(true, Ordering::SeqCst);
            // Unmasking looks at `pending` after it opens the gate. If it looked before the store above, the gate is
            // open by now, and the interrupt is delivered here.
            if gate.masked.load(Ordering::SeqCst) || !gate.pending.swap(false, Ordering::SeqCst) {
                return Ok(());
            }
        }
        self.router.deliver(vector)
    }

    /// The guest writes the message control register of the capability.
    pub fn write_control(&self, control: u16) {
        let mut table = self.lock();
        table.enabled = control & CONTROL_ENABLE != 0;
        table.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        for vector in 0..self.vectors() {
            self.refresh(&mut table, vector);
        }
    }

    /// The guest reads the table; `offset` from its start.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        let Some(entry) = table.entries.get(offset as usize / ENTRY_SIZE) else {
            return data.fill(0);
        };
        let bytes = entry.to_bytes();
        let start = offset as usize % ENTRY_SIZE;
        match bytes.get(start..start + data.len()) {
            Some(field) => data.copy_from_slice(field),
            None => data.fill(0),
        }
    }

    /// The guest writes the table; accesses other than aligned 4 or 8 bytes are ignored, as the specification allows.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let index = offset as usize / ENTRY_SIZE;
        let start = offset as usize % ENTRY_SIZE;
        let mut table = self.lock();
        if index >= table.entries.len() || !matches!(data.len(), 4 | 8) || !start.is_multiple_of(data.len()) {
            return;
        }
        let mut bytes = table.entries[index].to_bytes();
        bytes[start..start + data.len()].copy_from_slice(data);
        table.entries[index] = Entry::from_bytes(&bytes);
        self.refresh(&mut table, index as u16);
    }

    /// The guest reads the pending bit array.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(i).saturating_mul(8);
            let gates = self.gates.iter().skip(first).take(8).zip(0..);
            *byte = gates
                .fold(0, |bits, (gate, bit)| bits | u8::from(gate.pending.load(Ordering::SeqCst)) << bit);
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut table = self.lock();
        for entry in &mut table.entries {
            *entry = Entry { control: CONTROL_MASKED, ..Default::default() };
        }
        table.enabled = false;
        table.function_masked = false;
        for (vector, gate) in self.gates.iter().enumerate() {
            self.refresh(&mut table, vector as u16);
            gate.pending.store(false, Ordering::SeqCst);
        }
    }

    /// Brings the gate and the route of one vector in line with the table.
    fn refresh(&self, table: &mut Table, vector: u16) {
        let index = usize::from(vector);
        let entry = table.entries[index];
        let gate = &self.gates[index];
        let masked = !table.enabled || table.function_masked || entry.control & CONTROL_MASKED != 0;
        if masked {
            gate.masked.store(true, Ordering::SeqCst);
            return;
        }
        // A message only counts once it is unmasked, so a driver that writes an entry field by field behind the mask
        // costs one change of the route.
        if table.routed[index] != Some(entry.message) {
            match self.router.route(vector, entry.message) {
                Ok(()) => table.routed[index] = Some(entry.message),
                Err(error) => tracing::warn!(vector, %error, "Cannot route an MSI-X vector"),
            }
        }
        gate.masked.store(false, Ordering::SeqCst);
        if gate.pending.swap(false, Ordering::SeqCst)
            && let Err(error) = self.router.deliver(vector)
        {
            tracing::warn!(vector, %error, "Cannot deliver a pending MSI-X vector");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; ENTRY_SIZE]) -> Entry {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Entry {
            message: MsiMessage { address: u64::from(word(4)) << 32 | u64::from(word(0)), data: word(8) },
            control: word(12) & CONTROL_MASKED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Wire {
        routes: Mutex<Vec<(u16, MsiMessage)>>,
        delivered: Mutex<Vec<u16>>,
    }

    impl MsiRouter for Wire {
        fn route(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
            self.routes.lock().unwrap().push((vector, message));
            Ok(())
        }
        fn deliver(&self, vector: u16) -> io::Result<()> {
            self.delivered.lock().unwrap().push(vector);
            Ok(())
        }
    }

    fn program(msix: &Msix, vector: u64, data: u32) {
        msix.write_table(vector * 16, &0xfee0_0000_u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &0_u32.to_le_bytes());
    }

    #[test]
    fn masked_vectors_pend_and_fire_once_when_unmasked() {
        let wire = Arc::new(Wire::default());
        let msix = Msix::new(3, wire.clone());
        msix.trigger(1).unwrap();
        msix.trigger(1).unwrap();
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b010);
        program(&msix, 1, 0x41);
        assert!(wire.delivered.lock().unwrap().is_empty(), "not before MSI-X is enabled");
        msix.write_control(CONTROL_ENABLE);
        assert_eq!(*wire.delivered.lock().unwrap(), [1]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0);
        msix.trigger(1).unwrap();
        msix.trigger(2).unwrap();
        msix.trigger(77).unwrap();
        assert_eq!(*wire.delivered.lock().unwrap(), [1, 1]);
        let message = MsiMessage { address: 0xfee0_0000, data: 0x41 };
        assert_eq!(*wire.routes.lock().unwrap(), [(1, message)]);
    }

    #[test]
    fn the_function_mask_holds_every_vector() {
        let wire = Arc::new(Wire::default());
        let msix = Msix::new(2, wire.clone());
        program(&msix, 0, 1);
        msix.write_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        msix.trigger(0).unwrap();
        assert!(wire.delivered.lock().unwrap().is_empty());
        msix.write_control(CONTROL_ENABLE);
        assert_eq!(*wire.delivered.lock().unwrap(), [0]);
    }

    #[test]
    fn a_route_changes_only_with_the_message() {
        let wire = Arc::new(Wire::default());
        let msix = Msix::new(1, wire.clone());
        msix.write_control(CONTROL_ENABLE);
        program(&msix, 0, 1);
        msix.write_table(12, &1_u32.to_le_bytes());
        program(&msix, 0, 1);
        assert_eq!(wire.routes.lock().unwrap().len(), 1);
        msix.write_table(12, &1_u32.to_le_bytes());
        program(&msix, 0, 2);
        assert_eq!(wire.routes.lock().unwrap().len(), 2);
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let wire = Arc::new(Wire::default());
        let msix = Msix::new(1, wire.clone());
        msix.write_control(CONTROL_ENABLE);
        msix.trigger(0).unwrap();
        let state = || {
            let (mut table, mut pending) = ([0; ENTRY_SIZE], [0; 8]);
            msix.read_table(0, &mut table);
            msix.read_pending(0, &mut pending);
            (table, pending)
        };
        let before = state();
        assert_eq!((before.0[12], before.1[0]), (1, 1), "masked and pending");
        for offset in (0..40).chain([4096, u64::MAX / 2, u64::MAX - 7]) {
            for len in [1, 2, 3, 4, 8, 16] {
                let is_proper =
                    matches!(len, 4 | 8) && offset % len as u64 == 0 && offset < ENTRY_SIZE as u64;
                if !is_proper {
                    msix.write_table(offset, &vec![0xff; len]);
                    assert_eq!(state(), before, "after {len} bytes at {offset:#x}");
                }
                // Across the end of an entry, and beyond the last one.
                let mut found = vec![0xff; len];
                msix.read_table(offset, &mut found);
                let entry = before.0.get(offset as usize..).and_then(|rest| rest.get(..len));
                assert_eq!(found, entry.unwrap_or(&vec![0; len]), "{len} bytes at {offset:#x}");
                let mut found = vec![0xff; len];
                msix.read_pending(offset, &mut found);
                assert!((1..len).all(|at| found[at] == 0) && found[0] == u8::from(offset == 0));
            }
        }
        assert!(wire.routes.lock().unwrap().is_empty() && wire.delivered.lock().unwrap().is_empty());
    }
}
