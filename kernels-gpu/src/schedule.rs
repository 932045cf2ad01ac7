//! Which query tile of which head a block works on: longest first, heads that share the
//! L2 cache together.
//!
//! In a causal launch the last query tile of a head visits all its keys and the first
//! one next to none. Blocks start in the order of their index; if the long ones come last,
//! most of the GPU waits for them. So tiles come in descending order. Taking all heads
//! at once would then stream every head's keys and values through the cache at the
//! same time: heads are taken in sections whose keys and values fit.

/// What a section of heads may occupy of the L2 cache (50 MB on an H100) in KiB.
const SECTION_KIB: u32 = 32 << 10;

/// A block's share of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Head, counted over the batch.
    pub head: u32,
    /// Query tile of the head.
    pub q_tile: u32,
}

/// Quotient and remainder. A divisor of zero counts as one: nothing is launched then, and
/// the compiler sees that there is nothing to panic about.
#[inline(always)]
#[must_use]
pub fn divide(a: u32, b: u32) -> (u32, u32) {
    let b = b.max(1);
    (a / b, a % b)
}

/// Work of block `block` when all tiles take the same time: head after head.
#[inline(always)]
#[must_use]
pub fn in_order(block: u32, num_q_tiles: u32) -> Work {
    let (head, q_tile) = divide(block, num_q_tiles);
    Work { head, q_tile }
}

/// Work of block `block` when later tiles take longer. `head_kib` is the size of a
/// head's keys and values.
#[inline(always)]
#[must_use]
pub fn longest_first(block: u32, num_q_tiles: u32, heads: u32, head_kib: u32) -> Work {
    let section_heads = divide(SECTION_KIB, head_kib).0.max(1).min(heads);
    let (section, in_section) = divide(block, section_heads * num_q_tiles);
    // The last section may have fewer heads.
    let first = section * section_heads;
    let (place, head) = divide(in_section, section_heads.min(heads - first));
    Work { head: first + head, q_tile: num_q_tiles - 1 - place }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_of_every_head_comes_once() {
        for (heads, tiles, head_kib) in
            [(1, 1, 1), (7, 5, SECTION_KIB / 3), (16, 9, SECTION_KIB * 2), (3, 4, 0)]
        {
            for longest in [false, true] {
                let mut seen = vec![false; (heads * tiles) as usize];
                for block in 0..heads * tiles {
                    let work = if longest {
                        longest_first(block, tiles, heads, head_kib)
                    } else {
                        in_order(block, tiles)
                    };
                    let index = (work.head * tiles + work.q_tile) as usize;
                    assert!(!std::mem::replace(&mut seen[index], true), "{work:?} twice");
                }
                assert!(seen.iter().all(|&s| s));
            }
        }
    }

    #[test]
    fn tiles_descend_within_a_section() {
        let order: Vec<_> =
            (0..12).map(|b| longest_first(b, 4, 3, 1)).map(|w| (w.q_tile, w.head)).collect();
        assert_eq!(order[..4], [(3, 0), (3, 1), (3, 2), (2, 0)]);
        // Two heads fit a section: the third comes after both are done.
        let last = longest_first(8, 4, 3, SECTION_KIB / 2);
        assert_eq!(last, Work { head: 2, q_tile: 3 });
    }
}
