//! Bank conflicts.
//!
//! Shared memory has 32 banks of 4 bytes. A warp's 16-byte accesses take four passes, one
//! per eight lanes, if the eight pieces lie in different groups of four banks; pieces at
//! the same address count once.

/// Lanes that one pass serves.
const LANES_OF_A_PASS: usize = 8;
/// Groups of four banks.
const GROUPS: usize = 8;

/// Banks of shared memory, each of a word of four bytes.
const BANKS: usize = 32;

/// Passes that the accesses of the lanes of `mask` take, of `bytes` bytes each, and those that they would
/// take without conflicts. A pass serves as many lanes as 128 bytes are for; lanes that access the same
/// word share it.
pub(super) fn passes(mask: u32, addresses: &[u64; 32], bytes: u32) -> (u64, u64) {
    let (words, lanes_of_a_pass) = (bytes.div_ceil(4) as usize, (128 / bytes.max(4)) as usize);
    let (mut passes, mut least) = (0, 0);
    for first in (0..32).step_by(lanes_of_a_pass.min(32)) {
        let lanes = (first..first + lanes_of_a_pass.min(32)).filter(|lane| mask >> lane & 1 == 1);
        let mut of_bank = [const { Vec::<u64>::new() }; BANKS];
        for word in lanes.flat_map(|lane| (0..words as u64).map(move |w| addresses[lane] / 4 + w)) {
            let bank = &mut of_bank[word as usize % BANKS];
            if !bank.contains(&word) {
                bank.push(word);
            }
        }
        let most = of_bank.iter().map(Vec::len).max().unwrap_or(0) as u64;
        passes += most;
        least += most.min(1);
    }
    (passes, least)
}

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
