//! What the registers of vectors hold (XMM, YMM, ZMM), in the area that KVM_GET_XSAVE fills: XSAVE's standard form
//! (Intel's Software Developer's Manual, volume 1, 13.4).

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::kvm_xsave;

/// The leaf of CPUID that says where in the area a state component is.
const LEAF: u32 = 0xd;

/// The state components, by number (volume 1, 13.1).
const YMM_HIGH: u32 = 2;
const ZMM_HIGH: u32 = 6;
const ZMM_16_TO_31: u32 = 7;

/// Where XMM0 is, in the legacy region.
const XMM: usize = 160;

/// The element at `index`, of `size` bytes (4 or 8), of vector register `number` (0 to 31); `None` where there is none.
pub fn element(area: &kvm_xsave, number: usize, index: usize, size: usize) -> Option<u64> {
    // The components are where the host has them, which KVM does not change for a guest.
    element_at(area, number, index, size, |component| __cpuid_count(LEAF, component).ebx as usize)
}

/// The same, with `start_of` a component in the area, in bytes; 0 for one that the CPU does not have.
fn element_at(
    area: &kvm_xsave,
    number: usize,
    index: usize,
    size: usize,
    start_of: impl Fn(u32) -> usize,
) -> Option<u64> {
    let component = |number| Some(start_of(number)).filter(|start| *start > 0);
    let at = index * size;
    let place = match (number, at) {
        (0..16, 0..16) => XMM + 16 * number + at,
        (0..16, 16..32) => component(YMM_HIGH)? + 16 * number + (at - 16),
        (0..16, 32..64) => component(ZMM_HIGH)? + 32 * number + (at - 32),
        (16..32, 0..64) => component(ZMM_16_TO_31)? + 64 * (number - 16) + at,
        _ => return None,
    };
    let low = *area.region.get(place / 4)?;
    match size {
        4 => Some(low.into()),
        8 => Some(u64::from(low) | u64::from(*area.region.get(place / 4 + 1)?) << 32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where an Intel CPU has them.
    fn start_of(component: u32) -> usize {
        match component {
            YMM_HIGH => 576,
            ZMM_HIGH => 1152,
            ZMM_16_TO_31 => 1664,
            _ => 0,
        }
    }

    #[test]
    fn the_parts_of_a_register_are_where_xsave_puts_them() {
        let mut area = kvm_xsave::default();
        for (at, word) in area.region.iter_mut().enumerate() {
            *word = 4 * at as u32;
        }
        let at = |number, index| element_at(&area, number, index, 4, start_of);
        assert_eq!((at(0, 0), at(0, 3), at(15, 1)), (Some(160), Some(172), Some(160 + 15 * 16 + 4)));
        assert_eq!((at(0, 4), at(15, 7)), (Some(576), Some(576 + 15 * 16 + 12)));
        assert_eq!((at(0, 8), at(15, 15)), (Some(1152), Some(1152 + 15 * 32 + 28)));
        assert_eq!((at(16, 0), at(31, 15)), (Some(1664), Some(1664 + 15 * 64 + 60)));
        assert_eq!(element_at(&area, 1, 1, 8, start_of), Some(184 | 188 << 32));
        // Outside of the register, a number that there is not, a component that the CPU does not have.
        assert_eq!((at(0, 16), at(32, 0)), (None, None));
        assert_eq!(element_at(&area, 0, 4, 4, |_| 0), None);
    }
}
