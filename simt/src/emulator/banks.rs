//! Bank conflicts of accesses of 16 bytes a lane.
//!
//! Shared memory has 32 banks of 4 bytes. A warp's 16-byte accesses take four passes, one
//! per eight lanes, if the eight pieces lie in different groups of four banks; pieces at
//! the same address count once.

/// Lanes that one pass serves.
const LANES_OF_A_PASS: usize = 8;
/// Groups of four banks.
const GROUPS: usize = 8;

/// Passes beyond those that the accesses at `offsets` take without conflicts.
pub(super) fn conflicts(offsets: &[u32]) -> u64 {
    let mut extra = 0;
    for pass in offsets.chunks(LANES_OF_A_PASS) {
        let mut pieces = [0; GROUPS];
        for (lane, &offset) in pass.iter().enumerate() {
            if !pass[..lane].contains(&offset) {
                pieces[offset as usize / 16 % GROUPS] += 1;
            }
        }
        extra += pieces.into_iter().max().map_or(0, |most: u64| most.saturating_sub(1));
    }
    extra
}
