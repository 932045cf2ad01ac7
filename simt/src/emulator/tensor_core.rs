//! wgmma as an agent of its own: a product starts when the 128 lanes of a warpgroup have
//! asked for it, and is theirs when they have waited for it.

use std::collections::VecDeque;

use super::{
    block::{Block, LaneState, fenced},
    clock::{Agent, Clock, Time},
    collectives::collective,
    current,
    fault::{FaultKind, Place, Site},
    options::SyncKind,
    record::{Action, Counts},
    shadow::{Access, window},
    tensor_map::swizzle,
};
use crate::hardware::{FULL_MASK, widen_f16};

/// Lanes of a warpgroup.
const LANES: usize = 128;
/// Rows of a product.
const ROWS: usize = 64;
/// Columns of A per step.
const STEP: usize = 16;

/// Where A comes from.
#[derive(Clone, Copy)]
pub(crate) enum OperandA<'a> {
    /// Shared memory, for a number of steps.
    Shared(SharedTile, usize),
    /// This lane's fragments.
    Registers(&'a [[u32; 4]]),
}

/// The layout of an operand in shared memory.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum SharedTile {
    /// Rows along the dimension that is summed over, chunks `chunk` bytes apart.
    KMajor { tile: u64, chunk: u32 },
    /// Rows along the rows (of A) or columns (of B) of the result; the tile says how far its chunks
    /// are apart.
    MnMajor { tile: u64 },
}

/// A product as one lane asks for it.
pub(crate) struct Product<'a> {
    pub a: OperandA<'a>,
    pub b: SharedTile,
    /// Columns of B and of the result.
    pub columns: usize,
    /// Whether to add to the accumulator.
    pub accumulate: bool,
    pub bf16: bool,
}

/// The values that all lanes must agree on.
#[derive(Clone, Copy, PartialEq)]
struct Common {
    a: Option<SharedTile>,
    b: SharedTile,
    steps: usize,
    columns: usize,
    accumulate: bool,
    bf16: bool,
    at: Place,
}

impl Common {
    /// The counts of the warpgroup's product.
    fn counts(&self) -> Counts {
        let depth = self.steps * STEP;
        // Elements of 16 bits: of B, and of A where it is there.
        let rows = self.columns + if self.a.is_some() { ROWS } else { 0 };
        Counts {
            tensor_flops: (2 * ROWS * self.columns * depth) as u64,
            tensor_instructions: self.steps as u64,
            shared_bytes_read: (2 * rows * depth) as u64,
            ..Counts::default()
        }
    }
}

struct Running {
    number: u64,
    common: Common,
    arrived: usize,
    /// Fragments of A, `[LANES][steps * 4]`, when it is in registers.
    a: Vec<u32>,
    /// Before the start the accumulator, then the result: `[LANES][columns / 2]`.
    values: Vec<f32>,
    time: Time,
    taken: usize,
}

/// The products of a block's warpgroups.
#[derive(Default)]
pub(crate) struct TensorCores {
    running: [VecDeque<Running>; Agent::WARPGROUPS],
    /// Products that each lane has asked for.
    asked: Vec<u64>,
}

impl TensorCores {
    pub fn reset(&mut self, threads: usize) {
        self.running.iter_mut().for_each(VecDeque::clear);
        self.asked.clear();
        self.asked.resize(threads, 0);
    }

    /// Products that a lane has asked for.
    pub fn asked(&self, lane: u16) -> u64 {
        self.asked[usize::from(lane)]
    }
}

/// Ends the launch if a product is still in flight on an accumulator that is looked at.
pub(crate) fn check_landed(in_flight: Option<u64>, at: Place) {
    if in_flight.is_some() {
        current::checked(|b| Err::<(), _>(FaultKind::AccumulatorInFlight { this: b.site(at) }));
    }
}

/// Asks for a product; returns its number.
pub(crate) fn start(
    product: &Product<'_>,
    in_flight: Option<u64>,
    values: &[f32],
    at: Place,
) -> u64 {
    current::checked(|b| {
        let (lane, group) = (b.current, b.current / LANES);
        let this = b.site(at);
        if (group + 1) * LANES > b.threads() {
            let message = format!(
                "wgmma in a warpgroup of {} threads: it needs {LANES}",
                b.threads() - group * LANES
            );
            return Err(FaultKind::Misuse { message, this });
        }
        let (a, steps) = match product.a {
            OperandA::Shared(tile, steps) => (Some(tile), steps),
            OperandA::Registers(fragments) => (None, fragments.len()),
        };
        let &Product { b: operand_b, columns, accumulate, bf16, .. } = product;
        let common = Common { a, b: operand_b, steps, columns, accumulate, bf16, at };
        let number = b.tensor_cores.asked[lane];
        b.tensor_cores.asked[lane] += 1;
        b.record_event_of(|| (Action::WgmmaStart(number), common.counts()), at);
        let running = &mut b.tensor_cores.running[group];
        if running.back().is_none_or(|r| r.number < number) {
            running.push_back(Running {
                number,
                common,
                arrived: 0,
                a: vec![0; if a.is_none() { LANES * steps * 4 } else { 0 }],
                values: vec![0.0; LANES * columns / 2],
                time: 0,
                taken: 0,
            });
        }
        // A product on an accumulator that is still in flight goes on from its result.
        let before = in_flight.map(|n| {
            let before = running.iter().find(|r| r.number == n).expect("not yet taken");
            let of_lane = values.len() * (lane % LANES);
            before.values[of_lane..of_lane + values.len()].to_vec()
        });
        let product_index = running.iter().position(|r| r.number == number).expect("just made");
        let earlier_waits =
            in_flight.is_some_and(|n| running.iter().any(|r| r.number == n && r.arrived < LANES));
        let r = &mut running[product_index];
        if r.common != common {
            let (here, there) = (at, r.common.at);
            return Err(FaultKind::Divergence(format!(
                "threads of warpgroup {group} ask for different wgmma products, at {}:{} and at {}:{}",
                there.file(),
                there.line(),
                here.file(),
                here.line()
            )));
        }
        if accumulate && earlier_waits {
            let message = "a product on an accumulator still in flight: wait for the one before it"
                .to_owned();
            return Err(FaultKind::Misuse { message, this });
        }
        let index = lane % LANES;
        if let OperandA::Registers(fragments) = product.a {
            let flat = fragments.as_flattened();
            r.a[index * flat.len()..][..flat.len()].copy_from_slice(flat);
        }
        r.values[index * values.len()..][..values.len()]
            .copy_from_slice(before.as_deref().unwrap_or(values));
        r.arrived += 1;
        if r.arrived == LANES {
            b.has_agents = true;
            if let Some(recording) = &mut b.recording {
                recording.count(at, common.counts());
            }
            compute(b, group, product_index)?;
            let time = b.tensor_cores.running[group][product_index].time;
            b.mbarriers.gathered(group, number, time);
            for lane in group * LANES..(group + 1) * LANES {
                if matches!(b.lanes[lane].state, LaneState::AtWgmma { .. }) {
                    b.set_state(lane, LaneState::Ready);
                }
            }
        }
        Ok(number)
    })
}

/// Waits for all but the last `pending` products, and hands over what is in flight on one
/// accumulator if it is among them.
///
/// The lanes of a warp wait together. (PTX asks for the same of all warps of the warpgroup; but
/// the instruction waits for a warp's own products, and warps that come to it in different arms
/// of a branch, which each takes as a whole, are what flash_hopper measures.)
pub(crate) fn wait_group(pending: u32, in_flight: &mut Option<u64>, values: &mut [f32], at: Place) {
    let Some(pending) = current::pending(SyncKind::WgmmaWait, pending, at) else { return };
    let _: [u32; 0] = collective("wait_group", FULL_MASK, [pending], at, |call| {
        call.whole_warp("wait_group", at)
    });
    let mut has_come = false;
    loop {
        let suspended = current::with(|b| {
            let (lane, group) = (b.current, b.current / LANES);
            let complete = b.tensor_cores.asked[lane].saturating_sub(pending.into());
            if !has_come {
                b.record_event(|| Action::WgmmaWait(complete), at);
            }
            has_come = true;
            let running = &mut b.tensor_cores.running[group];
            if running.iter().any(|r| r.number < complete && r.arrived < LANES) {
                b.set_state(lane, LaneState::AtWgmma { at });
                return true;
            }
            let known = &mut b.lanes[lane].clock.warps[Agent::warpgroup(group).index()];
            for r in running.iter_mut().filter(|r| r.number < complete) {
                *known = (*known).max(r.time);
                if *in_flight == Some(r.number) {
                    let of_lane = values.len() * (lane % LANES);
                    values.copy_from_slice(&r.values[of_lane..of_lane + values.len()]);
                    *in_flight = None;
                    r.taken += 1;
                }
            }
            while running.front().is_some_and(|r| r.taken == LANES) {
                running.pop_front();
            }
            false
        });
        if !suspended {
            return;
        }
        current::suspend();
    }
}

impl Block {
    /// Checks that every product was waited for when the block ends.
    pub(super) fn finish_products(&self) -> Result<(), FaultKind> {
        for (group, running) in self.tensor_cores.running.iter().enumerate() {
            if let Some(r) = running.front() {
                return Err(FaultKind::Misuse {
                    message:
                        "the kernel ended with this wgmma product not waited for by all threads"
                            .to_owned(),
                    this: Site { lane: (group * LANES) as u32, location: Some(r.common.at) },
                });
            }
        }
        Ok(())
    }

    /// The knowledge that every warp of a warpgroup shares: each has at least one lane that does.
    fn known_to_warpgroup(&self, group: usize) -> Clock {
        let warps: Vec<Clock> = (0..LANES / 32)
            .map(|warp| {
                let mut joined = Clock::new(0);
                let first = group * LANES + warp * 32;
                for lane in &self.lanes[first..first + 32] {
                    joined.join(&lane.clock);
                }
                // A warp knows its own accesses: wgmma's fence orders them.
                joined.warps[first / 32] = self.time;
                joined
            })
            .collect();
        let mut known = warps[0].clone();
        for other in &warps[1..] {
            known.meet(other);
        }
        known
    }
}

/// Eight elements of shared memory, 16 bytes under the 128-byte swizzle.
fn unit(
    b: &mut Block,
    clock: &Clock,
    group: usize,
    now: Time,
    address: u32,
    at: Place,
) -> Result<[u16; 8], FaultKind> {
    let rank = group * LANES / b.block_threads();
    let offset = window(rank) + swizzle(address, 128);
    let lane = Agent::warpgroup(group).lane();
    let this = Site { lane: lane.into(), location: Some(at) };
    if !b.shared.holds(rank, offset, 16) {
        let (index, len) = (offset.wrapping_sub(window(rank)).into(), b.shared.len().into());
        return Err(FaultKind::OutOfBounds { space: "shared", what: "wgmma", index, len, this });
    }
    let by = Access { lane, now, clock, location: at };
    let threads = b.block_threads();
    let fenced = |lane: u16| fenced(&b.lanes, threads, rank, clock, lane);
    b.shared.read_async(offset, 16, by, fenced)?;
    b.stats.shared_bytes_read += 16;
    // SAFETY: in bounds, and a multiple of 16.
    Ok(unsafe { b.shared.at(offset).cast::<[u16; 8]>().read() })
}

/// The fields of a descriptor: address, and the two strides, in bytes.
fn fields(descriptor: u64) -> (u32, u32, u32) {
    let field = |shift: u32| (descriptor >> shift & 0x3fff) as u32 * 16;
    (field(0), field(16), field(32))
}

fn compute(b: &mut Block, group: usize, index: usize) -> Result<(), FaultKind> {
    let now = b.tick();
    let clock = b.known_to_warpgroup(group);
    let r = &mut b.tensor_cores.running[group][index];
    let common = r.common;
    let fragments = std::mem::take(&mut r.a);
    let mut values = std::mem::take(&mut r.values);
    let (columns, depth, at) = (common.columns, common.steps * STEP, common.at);
    let widen = |bits: u16| {
        if common.bf16 { f32::from_bits(u32::from(bits) << 16) } else { widen_f16(bits) }
    };

    // A [ROWS, depth] and B [depth, columns].
    let mut a = vec![0.0f32; ROWS * depth];
    let mut bt = vec![0.0f32; depth * columns];
    let mut read = |tile, extent, put: &mut dyn FnMut(usize, usize, f32)| {
        let mut unit_at = |address: u32, chunk: u32, row: usize, column: usize| {
            let (_, _, stride) = fields(match tile {
                SharedTile::KMajor { tile, .. } | SharedTile::MnMajor { tile } => tile,
            });
            let at_byte = address
                + (column as u32 / 64) * chunk
                + (row as u32 / 8) * stride
                + (row as u32 % 8) * 128
                + (column as u32 % 64) * 2;
            unit(b, &clock, group, now, at_byte, at)
        };
        match tile {
            SharedTile::KMajor { tile, chunk } => {
                for (mn, k) in
                    (0..extent).flat_map(|mn| (0..depth).step_by(8).map(move |k| (mn, k)))
                {
                    let unit = unit_at(fields(tile).0, chunk, mn, k)?;
                    unit.into_iter().enumerate().for_each(|(e, bits)| put(mn, k + e, widen(bits)));
                }
            }
            SharedTile::MnMajor { tile } => {
                let (address, chunk, _) = fields(tile);
                for (k, mn) in
                    (0..depth).flat_map(|k| (0..extent).step_by(8).map(move |mn| (k, mn)))
                {
                    let unit = unit_at(address, chunk, k, mn)?;
                    unit.into_iter().enumerate().for_each(|(e, bits)| put(mn + e, k, widen(bits)));
                }
            }
        }
        Ok::<(), FaultKind>(())
    };
    if let Some(tile) = common.a {
        read(tile, ROWS, &mut |row, k, value| a[row * depth + k] = value)?;
    } else {
        for lane in 0..LANES {
            for step in 0..common.steps {
                for (register, row, k) in fragment_places(lane) {
                    let bits = fragments[(lane * common.steps + step) * 4 + register];
                    let to = row * depth + step * STEP + k;
                    a[to] = widen(bits as u16);
                    a[to + 1] = widen((bits >> 16) as u16);
                }
            }
        }
    }
    read(common.b, columns, &mut |n, k, value| bt[k * columns + n] = value)?;

    let mut row_values = vec![0.0f32; columns];
    for row in 0..ROWS {
        // The four lanes that hold this row, and which half of their registers.
        let first_lane = row / 16 * 32 + row % 8 * 4;
        let half = row % 16 / 8 * 2;
        let place = |column: usize| {
            let lane = first_lane + column % 8 / 2;
            lane * columns / 2 + column / 8 * 4 + half + column % 2
        };
        for (column, value) in row_values.iter_mut().enumerate() {
            *value = if common.accumulate { values[place(column)] } else { 0.0 };
        }
        for k in 0..depth {
            let factor = a[row * depth + k];
            for (value, other) in row_values.iter_mut().zip(&bt[k * columns..][..columns]) {
                *value += factor * other;
            }
        }
        for (column, &value) in row_values.iter().enumerate() {
            values[place(column)] = value;
        }
    }
    let r = &mut b.tensor_cores.running[group][index];
    (r.values, r.time) = (values, now);
    Ok(())
}

/// For a lane's four registers of a step: register, row and first column of the pair.
fn fragment_places(lane: usize) -> [(usize, usize, usize); 4] {
    let (row, column) = (lane / 32 * 16 + lane % 32 / 4, lane % 4 * 2);
    [(0, row, column), (1, row + 8, column), (2, row, column + 8), (3, row + 8, column + 8)]
}
