//! Warp collectives: each lane brings registers, the last to come computes for all.

use super::{
    block::{Block, LaneState},
    current::{checked, suspend, with},
    fault::{FaultKind, Place},
};
use crate::hardware::FULL_MASK;

/// Registers that a lane hands to a collective, at most.
pub(crate) const COLLECTIVE_REGISTERS: usize = 16;

/// Registers of the 32 lanes of a warp.
pub(crate) type WarpRegisters = [[u32; COLLECTIVE_REGISTERS]; 32];

/// A collective in the making: who has come, with what.
#[derive(Default)]
pub(super) struct Collective {
    name: &'static str,
    at: Option<Place>,
    expected: u32,
    arrived: u32,
    input: WarpRegisters,
    output: WarpRegisters,
}

impl Collective {
    /// Forgets what another block did.
    pub fn reset(&mut self) {
        (self.at, self.expected, self.arrived) = (None, 0, 0);
    }
}

/// The work of the last lane of a collective for all.
pub(crate) struct WarpCall<'a> {
    /// The block.
    pub block: &'a mut Block,
    /// Index of the warp in the block.
    pub warp: usize,
    /// Lanes that take part.
    pub mask: u32,
    /// The input of each lane.
    pub input: &'a WarpRegisters,
    /// The output of each lane.
    pub output: &'a mut WarpRegisters,
}

impl WarpCall<'_> {
    /// Refuses an operation that only a whole warp can do.
    pub fn whole_warp(&self, name: &str, at: Place) -> Result<(), FaultKind> {
        if self.mask == FULL_MASK {
            return Ok(());
        }
        let lanes = self.mask.count_ones();
        Err(FaultKind::Misuse {
            message: format!("{name} in a warp of {lanes} lanes: it needs all 32"),
            this: self.block.site(at),
        })
    }
}

/// A collective of the lanes of `mask` in the current warp: each brings registers, the
/// last to come computes the outputs of all.
pub(crate) fn collective<const I: usize, const O: usize>(
    name: &'static str,
    mask: u32,
    input: [u32; I],
    at: Place,
    compute: impl FnOnce(WarpCall<'_>) -> Result<(), FaultKind>,
) -> [u32; O] {
    const { assert!(I <= COLLECTIVE_REGISTERS && O <= COLLECTIVE_REGISTERS) };
    let suspended = checked(|b| {
        let (lane, warp) = (b.current % 32, b.warp());
        let mask = mask & b.present(warp);
        let this = b.site(at);
        if mask >> lane & 1 == 0 {
            return Err(FaultKind::Misuse {
                message: format!(
                    "{name} with the mask {mask:#010x}, which lacks lane {lane} itself"
                ),
                this,
            });
        }
        let call = &mut b.warps[warp];
        if call.arrived == 0 {
            (call.name, call.at, call.expected) = (name, Some(at), mask);
        } else if !same_call(call, name, at) || call.expected != mask {
            let other = call.at.map_or(String::new(), |p| format!(" at {}:{}", p.file(), p.line()));
            return Err(FaultKind::Divergence(format!(
                "{this} is in {name} with mask {mask:#010x} while lanes {:#010x} of its warp are in {}{other} with mask {:#010x}",
                call.arrived, call.name, call.expected
            )));
        }
        call.arrived |= 1 << lane;
        call.input[lane][..I].copy_from_slice(&input);
        if call.arrived != mask {
            b.set_state(b.current, LaneState::InCollective { name, at });
            return Ok(true);
        }
        call.arrived = 0;
        // The registers leave the block while `compute` has all of it.
        let spare = b.spare.take().unwrap_or_default();
        let mut call = std::mem::replace(&mut b.warps[warp], spare);
        let result = compute(WarpCall {
            block: b,
            warp,
            mask,
            input: &call.input,
            output: &mut call.output,
        });
        b.spare = Some(std::mem::replace(&mut b.warps[warp], call));
        if b.recording.is_some() {
            b.record_collective(name, warp, mask, at);
        }
        for other in (0..32).filter(|l| mask >> l & 1 == 1) {
            b.set_state(warp * 32 + other, LaneState::Ready);
        }
        result.map(|()| false)
    });
    if suspended {
        suspend();
    }
    with(|b| {
        let mut registers = [0; O];
        registers.copy_from_slice(&b.warps[b.warp()].output[b.current % 32][..O]);
        registers
    })
}

/// Whether the collective that a warp's lanes are in is this one. Lanes come by the same line, so
/// that addresses decide it; texts are compared only where a line was compiled more than once.
fn same_call(call: &Collective, name: &'static str, at: Place) -> bool {
    let same_place = |place: Place| std::ptr::eq(place, at) || place == at;
    (std::ptr::eq(call.name, name) || call.name == name) && call.at.is_some_and(same_place)
}

impl WarpCall<'_> {
    /// Indices in the warp of the lanes that take part.
    pub fn lanes(&self) -> impl Iterator<Item = usize> + use<> {
        let mask = self.mask;
        (0..32).filter(move |l| mask >> l & 1 == 1)
    }

    /// The same, as indices in the block.
    pub fn lanes_of_block(&self) -> Vec<u16> {
        self.lanes().map(|l| (self.warp * 32 + l) as u16).collect()
    }

    /// Orders the memory accesses of the lanes that take part.
    pub fn synchronise(&mut self) {
        let lanes = self.lanes_of_block();
        self.block.synchronise(&lanes);
    }
}
