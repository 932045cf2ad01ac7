//! The facts of a block at compile time: its tiles, and the registers that they take.

use simt::{
    unroll,
    wgmma::{
        Accumulator, CHUNK_ROW_BYTES, Descriptor, Fragments, Operand, RegisterProduct,
        SharedProduct, WaitGroup,
    },
};

use super::{
    score_tile::ScoreTile,
    tiles::{CONSUMER_ROWS, Tiles},
};
use crate::parts::pipeline::{Depth, Stages};

/// Bytes of a chunk of Q: 64 columns of a consumer's rows.
const Q_CHUNK: u32 = CONSUMER_ROWS * CHUNK_ROW_BYTES;

/// Head dims and a number of consumers, and what follows from them.
pub trait Geometry {
    /// The tiles of a block.
    const TILES: Tiles;
    /// Consumers.
    const CONSUMERS: u32 = Self::TILES.consumers;
    /// Whether consumers take turns at the tensor cores: two do.
    const TURNS: bool = Self::CONSUMERS == 2;
    /// Whether a consumer asks for the next K ahead of its products. Of three consumers with two stages
    /// none does: K has seldom landed by then, and the question costs them 1 %.
    const ASKS_AHEAD: bool = Self::TURNS || Self::TILES.kv_stages > 2;

    /// Stages of Q.
    type QStages: Depth;
    /// Stages of K, and of V.
    type KvStages: Depth;
    /// S of a consumer, `[64, BC]`; P replaces it.
    type Scores: ScoreTile<Self::Weights>;
    /// P in the storage type, as the operand of the second product.
    type Weights: Copy;
    /// O of a consumer, `[64, Dv]`.
    type Output: OutputTile;

    /// No weights yet.
    const NO_WEIGHTS: Self::Weights;

    /// Starts S = Q Kᵀ.
    ///
    /// # Safety
    /// As for [`SharedProduct::product_shared`].
    unsafe fn start_scores<T: Operand>(s: &mut Self::Scores, q: Descriptor, k: Descriptor);

    /// Starts O += P V.
    ///
    /// # Safety
    /// As for [`RegisterProduct::product_registers`].
    unsafe fn start_output<T: Operand>(o: &mut Self::Output, p: &Self::Weights, v: Descriptor);
}

/// O of a consumer in a thread's registers: groups of 8 columns, two rows of each.
pub trait OutputTile: WaitGroup {
    /// Groups of 8 columns.
    const GROUPS: usize;
    /// All zero.
    fn zero() -> Self;
    /// The values of this thread.
    fn values(&self) -> &[[f32; 4]];
    /// Multiplies the thread's two rows.
    fn scale_rows(&mut self, factors: [f32; 2]);
}

impl<const GROUPS: usize> OutputTile for Accumulator<GROUPS>
where
    Self: WaitGroup,
{
    const GROUPS: usize = GROUPS;

    #[inline(always)]
    fn zero() -> Self {
        Self::zero()
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn values(&self) -> &[[f32; 4]] {
        self.values()
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn scale_rows(&mut self, factors: [f32; 2]) {
        let values = self.values_mut();
        unroll!(for G in 0..32 {
            if G < GROUPS {
                values[G][0] *= factors[0];
                values[G][1] *= factors[0];
                values[G][2] *= factors[1];
                values[G][3] *= factors[1];
            }
        });
    }
}

/// The geometry of head dim `D`, values of head dim `D_V`, and a number of consumers.
pub struct Hopper<const D: u32, const D_V: u32, const CONSUMERS: u32>;

/// Implements [`Geometry`], whose arrays have lengths that no generic code can compute.
macro_rules! geometry {
    ($d:literal, $d_v:literal, $consumers:literal) => {
        impl Geometry for Hopper<$d, $d_v, $consumers> {
            const TILES: Tiles = Tiles::with_values($d, $d_v, $consumers);

            type QStages = Stages<{ Self::TILES.q_stages }>;
            type KvStages = Stages<{ Self::TILES.kv_stages }>;
            type Scores = Accumulator<{ Self::TILES.keys as usize / 8 }>;
            type Weights = Fragments<{ Self::TILES.keys as usize / 16 }>;
            type Output = Accumulator<{ $d_v / 8 }>;

            const NO_WEIGHTS: Self::Weights = [[0; 4]; Self::TILES.keys as usize / 16];

            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn start_scores<T: Operand>(s: &mut Self::Scores, q: Descriptor, k: Descriptor) {
                const K_CHUNK: u32 =
                    Tiles::with_values($d, $d_v, $consumers).keys * CHUNK_ROW_BYTES;
                // SAFETY: all four warps are here, and the operands stay, as the trait asks.
                unsafe {
                    SharedProduct::<{ $d / 16 }>::product_shared::<T, Q_CHUNK, K_CHUNK>(s, q, k);
                }
            }

            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn start_output<T: Operand>(
                o: &mut Self::Output,
                p: &Self::Weights,
                v: Descriptor,
            ) {
                // SAFETY: all four warps are here, and the operands stay, as the trait asks.
                unsafe { o.product_registers::<T>(p, v) };
            }
        }
    };
}

geometry!(64, 64, 3);
geometry!(64, 64, 2);
geometry!(80, 80, 3);
geometry!(80, 80, 2);
geometry!(96, 96, 3);
geometry!(96, 96, 2);
geometry!(128, 128, 2);
geometry!(192, 128, 2);
geometry!(192, 192, 2);
geometry!(256, 256, 2);
