//! What the registers of vectors (XMM, YMM, ZMM) and of masks hold, in the area that KVM_GET_XSAVE fills: XSAVE's standard form
//! (Intel's Software Developer's Manual, volume 1, 13.4).

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::kvm_xsave;

/// The leaf of CPUID that says where in the area a state component is.
const LEAF: u32 = 0xd;

/// The state components, by number (volume 1, 13.1).
const YMM_HIGH: u32 = 2;
const MASKS: u32 = 5;
const ZMM_HIGH: u32 = 6;
const ZMM_16_TO_31: u32 = 7;

/// Where XMM0 is, in the legacy region.
const XMM: usize = 160;

/// The registers of vectors and of masks of a vCPU.
pub struct Vectors {
    area: Box<kvm_xsave>,
    /// Where in the area a component is, in bytes; 0 for one that the CPU does not have.
    start_of: fn(u32) -> usize,
}

impl Vectors {
    /// Those that KVM has put into `area`, where this machine's CPU puts them.
    pub fn new(area: kvm_xsave) -> Vectors {
        Vectors { area: Box::new(area), start_of: |component| __cpuid_count(LEAF, component).ebx as usize }
    }

    /// The element at `index`, of `size` bytes (4 or 8), of vector register `number` (0 to 31); `None` where there is none.
    pub fn element(&self, number: usize, index: usize, size: usize) -> Option<u64> {
        let at = index * size;
        let place = match (number, at) {
            (0..16, 0..16) => XMM + 16 * number + at,
            (0..16, 16..32) => self.component(YMM_HIGH)? + 16 * number + (at - 16),
            (0..16, 32..64) => self.component(ZMM_HIGH)? + 32 * number + (at - 32),
            (16..32, 0..64) => self.component(ZMM_16_TO_31)? + 64 * (number - 16) + at,
            _ => return None,
        };
        match size {
            4 => self.word(place).map(u64::from),
            8 => self.double(place),
            _ => None,
        }
    }

    /// Mask register `number` (0 to 7); `None` where there is none.
    pub fn mask(&self, number: usize) -> Option<u64> {
        self.double(self.component(MASKS)? + 8 * number)
    }

    fn component(&self, number: u32) -> Option<usize> {
        Some((self.start_of)(number)).filter(|start| *start > 0)
    }

    fn double(&self, place: usize) -> Option<u64> {
        Some(u64::from(self.word(place)?) | u64::from(self.word(place + 4)?) << 32)
    }

    fn word(&self, place: usize) -> Option<u32> {
        self.area.region.get(place / 4).copied()
    }
}

#[cfg(test)]
impl Vectors {
    /// Where an Intel CPU has them.
    pub fn of_intel(area: kvm_xsave) -> Vectors {
        let start_of = |component| match component {
            YMM_HIGH => 576,
            MASKS => 1088,
            ZMM_HIGH => 1152,
            ZMM_16_TO_31 => 1664,
            _ => 0,
        };
        Vectors { area: Box::new(area), start_of }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_register_are_where_xsave_puts_them() {
        let mut area = kvm_xsave::default();
        for (at, word) in area.region.iter_mut().enumerate() {
            *word = 4 * at as u32;
        }
        let vectors = Vectors::of_intel(area);
        let at = |number, index| vectors.element(number, index, 4);
        assert_eq!((at(0, 0), at(0, 3), at(15, 1)), (Some(160), Some(172), Some(160 + 15 * 16 + 4)));
        assert_eq!((at(0, 4), at(15, 7)), (Some(576), Some(576 + 15 * 16 + 12)));
        assert_eq!((at(0, 8), at(15, 15)), (Some(1152), Some(1152 + 15 * 32 + 28)));
        assert_eq!((at(16, 0), at(31, 15)), (Some(1664), Some(1664 + 15 * 64 + 60)));
        assert_eq!(vectors.element(1, 1, 8), Some(184 | 188 << 32));
        assert_eq!((vectors.mask(0), vectors.mask(7)), (Some(1088 | 1092 << 32), Some(1144 | 1148 << 32)));
        // Outside of the register, a number that there is not, components that the CPU does not have.
        assert_eq!((at(0, 16), at(32, 0)), (None, None));
        let old = Vectors { start_of: |_| 0, ..vectors };
        assert_eq!((old.element(0, 4, 4), old.mask(1)), (None, None));
    }
}
