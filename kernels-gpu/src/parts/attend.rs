//! The work of a warp on a KV tile, in the rungs from flash_mma to flash_async: 16 rows,
//! every score through the mask, O rescaled each time.

use simt::{layout::TileLayout, mma::TensorCore, scalar::Scalar, shared::Shared, unroll, warp};

use crate::parts::{
    fragment::{self, SharedQueries},
    online::RowState,
    policy::Policy,
    tile,
};

/// Query rows of a tile: 16 per warp.
pub const BR: u32 = 64;
/// Keys of a tile.
pub const BC: u32 = 64;
/// Threads of a block: four warps.
pub const THREADS: u32 = tile::FOUR_WARPS;

/// Products of 8 keys in a tile.
const KEY_TILES: usize = BC as usize / 8;

const _: () = assert!(BR == fragment::ROWS * THREADS / warp::LANES, "every row has its warp");

/// The state of a warp's 16 rows: O columns of 8.
pub struct FragmentRows<const O: usize> {
    /// The first row.
    pub first_row: u32,
    /// Maxima and sums.
    pub rows: RowState,
    /// O, not normalised yet.
    pub acc_o: [[f32; 4]; O],
}

/// Q, and the tiles of K and V whose first key is `first_key`, in shared memory.
pub struct SharedTiles<T, L> {
    /// Q of the warp's rows.
    pub q: SharedQueries<T, L>,
    /// The tile of K.
    pub k: Shared<T>,
    /// The tile of V.
    pub v: Shared<T>,
    /// Its first key.
    pub first_key: u32,
}

impl<const O: usize> FragmentRows<O> {
    /// Rows that have seen no key.
    #[inline(always)]
    pub fn new(first_row: u32) -> Self {
        Self { first_row, rows: RowState::EMPTY, acc_o: [[0.0; 4]; O] }
    }

    /// Takes in a tile of BC keys.
    #[inline(always)]
    pub fn attend<T: Scalar, C: TensorCore<T>, L: TileLayout, const D: usize>(
        &mut self,
        policy: &Policy,
        tiles: SharedTiles<T, L>,
    ) {
        let (row, column) = fragment::row_and_column();
        let (i, j) = (self.first_row + row, tiles.first_key + column);

        // S = Q Kᵀ [16, BC] of this warp.
        let mut s = [[[0.0f32; 4]; KEY_TILES]];
        let k = (tiles.k, fragment::b_origin::<L>(0));
        fragment::add_scores::<T, C, L, D, KEY_TILES, 1>(&mut s, tiles.q, k);

        // Shape, scale and mask.
        policy.shape_scores::<T, KEY_TILES, 1>(&mut s, i, j);
        fragment::scale_rows(&mut s[0], [policy.scale_log2(); 2]);
        policy.hide(&mut s, i, j);

        // Online softmax: P replaces S.
        let [mut p] = s;
        let alpha = self.rows.update(&mut p);
        fragment::scale_rows(&mut self.acc_o, alpha);
        let kept = policy.kept_weights::<KEY_TILES>(i, j);
        unroll!(for TILE in 0..8 {
            Policy::drop_weights(&mut p[TILE], kept, TILE);
        });

        // O += P V [16, D] of this warp.
        let v = (tiles.v, fragment::a_origin::<L>(0));
        fragment::add_output::<T, C, L, KEY_TILES, O>(&mut self.acc_o, &p, v);
    }
}
