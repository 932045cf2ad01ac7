//! The registers of a block, which its warpgroups give back and take.

use super::{
    block::{Block, LaneState},
    collectives::collective,
    current,
    fault::{FaultKind, Place, Site},
    options::SyncKind,
};
use crate::hardware::{FULL_MASK, LANES, WARPGROUP_THREADS, registers_at_launch};

/// The direction in which a warp's registers change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Decrease,
    Increase,
}

impl Direction {
    fn kind(self) -> SyncKind {
        match self {
            Self::Decrease => SyncKind::RegistersDecrease,
            Self::Increase => SyncKind::RegistersIncrease,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Decrease => "decrease_registers",
            Self::Increase => "increase_registers",
        }
    }
}

/// The registers of the blocks of a cluster: what each thread of a warp has, and what each
/// block has left.
#[derive(Default)]
pub(crate) struct Registers {
    /// The registers of each thread of each warp.
    of_warp: Vec<u32>,
    /// The registers of each block that are not in use.
    free: Vec<u32>,
    /// The changes that each warp has come to: the threads of a warpgroup come to the same.
    changes: Vec<Vec<(Place, u32)>>,
}

impl Registers {
    pub fn reset(&mut self, blocks: usize, threads: usize) {
        let warps = blocks * threads.div_ceil(LANES as usize);
        let at_launch = registers_at_launch(threads as u32);
        self.of_warp.clear();
        self.of_warp.resize(warps, at_launch);
        self.free.clear();
        self.free.resize(blocks, 0);
        self.changes.iter_mut().for_each(Vec::clear);
        self.changes.resize_with(warps, Vec::new);
    }
}

const WARPS: usize = (WARPGROUP_THREADS / LANES) as usize;

impl Block {
    /// Notes that the current warp comes to a change.
    fn come_to_registers(
        &mut self,
        direction: Direction,
        count: u32,
        at: Place,
    ) -> Result<(), FaultKind> {
        let (warp, this) = (self.warp(), self.site(at));
        let pool = &mut self.registers;
        pool.changes[warp].push((at, count));
        let place = pool.changes[warp].len() - 1;
        let group = warp / WARPS * WARPS..(warp / WARPS + 1) * WARPS;
        let others = pool.changes.get(group).unwrap_or_default();
        if let Some(&(other, other_count)) = others
            .iter()
            .filter_map(|changes| changes.get(place))
            .find(|&&change| change != (at, count))
        {
            return Err(FaultKind::Divergence(format!(
                "warps of a warpgroup change their registers differently: {this} to {count}, and \
                 another to {other_count} at {}:{}",
                other.file(),
                other.line()
            )));
        }
        let has = pool.of_warp[warp];
        let wrong = match direction {
            Direction::Decrease => count > has,
            Direction::Increase => count < has,
        };
        if wrong {
            let name = direction.name();
            let message = format!("{name} to {count}, where each thread has {has}");
            return Err(FaultKind::Misuse { message, this });
        }
        if direction == Direction::Decrease {
            self.set_registers(count);
            for lane in 0..self.threads() {
                if matches!(self.lanes[lane].state, LaneState::AtRegisters { .. }) {
                    self.set_state(lane, LaneState::Ready);
                }
            }
        }
        Ok(())
    }

    fn set_registers(&mut self, count: u32) {
        let (warp, rank) = (self.warp(), self.rank());
        let has = &mut self.registers.of_warp[warp];
        let free = &mut self.registers.free[rank];
        *free = *free + *has * LANES - count * LANES;
        *has = count;
    }

    /// Registers of the block of that rank that no warp has.
    pub(super) fn free_registers(&self, rank: usize) -> u32 {
        self.registers.free[rank]
    }

    /// Checks that all warps of a warpgroup came to the same changes.
    pub(super) fn finish_registers(&self) -> Result<(), FaultKind> {
        for group in self.registers.changes.chunks(WARPS) {
            let most = group.iter().enumerate().max_by_key(|(_, changes)| changes.len());
            let Some((warp, changes)) = most else { continue };
            let Some(fewer) = group.iter().find(|c| c.len() < changes.len()) else { continue };
            let (at, _) = changes[fewer.len()];
            return Err(FaultKind::Misuse {
                message: "a change of registers that not all warps of the warpgroup came to"
                    .to_owned(),
                this: Site { lane: warp as u32 * LANES, location: Some(at) },
            });
        }
        Ok(())
    }
}

/// Changes the registers of each thread of the current warp to `count`. Taking waits until the
/// block has them.
pub(crate) fn change(direction: Direction, count: u32, at: Place) {
    if current::left_out(direction.kind(), at) {
        return;
    }
    let _: [u32; 0] = collective(direction.name(), FULL_MASK, [count], at, |call| {
        call.block.come_to_registers(direction, count, at)
    });
    if direction == Direction::Decrease {
        return;
    }
    loop {
        let waits = current::with(|b| {
            let need = (count - b.registers.of_warp[b.warp()]) * LANES;
            if need > b.registers.free[b.rank()] {
                b.set_state(b.current, LaneState::AtRegisters { need, at });
                return true;
            }
            b.set_registers(count);
            false
        });
        if !waits {
            return;
        }
        current::suspend();
    }
}
