//! A block's tiles and the registers that they take, known at compile time.

use simt::wgmma::{
    Accumulator, CHUNK_ROW_BYTES, Descriptor, Fragments, Operand, RegisterProduct, SharedProduct,
    WaitGroup,
};

use super::{
    consumer::{self, Setting},
    tile::ScoreTile,
    tiles::Tiles,
    wide,
};
use crate::backward::order::Place;

/// Head dims, and what follows from them.
pub trait Geometry {
    /// The tiles of a block.
    const TILES: Tiles;
    /// Whether the sums of dQ have an order.
    const ORDERED: bool;

    /// Sᵀ and dPᵀ of a consumer, `[64, BR]`.
    type Scores: ScoreTile<Self::Weights>;
    /// Pᵀ and dSᵀ in the storage type, as the operand of the products that follow.
    type Weights: Copy + AsRef<[[u32; 4]]>;
    /// dK of a consumer, `[64, D]`.
    type KeyGradient: GradientTile<Self::Weights>;
    /// dV of a consumer, `[64, Dv]`.
    type ValueGradient: GradientTile<Self::Weights>;

    /// The keys of a block.
    #[inline(always)]
    #[must_use]
    fn place() -> Place {
        Place::at(const { Self::TILES.place() }, Self::ORDERED)
    }

    /// dK and dV of a block, and its part of dQ: the work of a consumer.
    ///
    /// # Safety
    /// The whole warpgroup calls it, the rings bring what is multiplied, and the buffers must have the
    /// shapes that [`backward_hopper`](super::backward_hopper()) states.
    unsafe fn consume<T: Operand>(setting: Setting<'_, T>);

    /// Starts Sᵀ = K Qᵀ.
    ///
    /// # Safety
    /// As for [`SharedProduct::product_shared`].
    unsafe fn start_scores<T: Operand>(s: &mut Self::Scores, k: Descriptor, q: Descriptor);

    /// Starts dPᵀ = V dOᵀ.
    ///
    /// # Safety
    /// As for [`SharedProduct::product_shared`].
    unsafe fn start_dp<T: Operand>(dp: &mut Self::Scores, v: Descriptor, d_o: Descriptor);
}

/// dK or dV of a consumer in a thread's registers: groups of 8 columns, two keys of each.
pub trait GradientTile<Weights>: WaitGroup {
    /// All zero.
    fn zero() -> Self;
    /// The values of this thread.
    fn values(&self) -> &[[f32; 4]];
    /// Starts `self += weights rows`.
    ///
    /// # Safety
    /// As for [`RegisterProduct::product_registers`].
    unsafe fn start<T: Operand>(&mut self, weights: &Weights, rows: Descriptor);
}

impl<const GROUPS: usize, const STEPS: usize> GradientTile<Fragments<STEPS>> for Accumulator<GROUPS>
where
    Self: RegisterProduct<STEPS>,
{
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
    unsafe fn start<T: Operand>(&mut self, weights: &Fragments<STEPS>, rows: Descriptor) {
        // SAFETY: all four warps are here, and the operands stay, as the trait asks.
        unsafe { self.product_registers::<T>(weights, rows) };
    }
}

/// The geometry of head dim `D` with values of `D_V`, with an order of the sums of dQ or without.
pub struct Hopper<const D: u32, const D_V: u32, const ORDERED: bool>;

/// Implements [`Geometry`], whose arrays have lengths that no generic code can compute.
macro_rules! geometry {
    ($d:literal, $d_v:literal, wide) => {
        geometry!(@impl () $d, $d_v, false, wide);
    };
    ($d:literal, $d_v:literal, consumer) => {
        geometry!(@impl (const ORDERED: bool) $d, $d_v, ORDERED, consumer);
    };
    (@impl ($($ordered:tt)*) $d:literal, $d_v:literal, $is_ordered:tt, $consumer:ident) => {
        impl<$($ordered)*> Geometry for Hopper<$d, $d_v, $is_ordered> {
            const TILES: Tiles = Tiles::with_values($d, $d_v);
            const ORDERED: bool = $is_ordered;

            type Scores = Accumulator<{ Tiles::of($d).rows as usize / 8 }>;
            type Weights = Fragments<{ Tiles::of($d).rows as usize / 16 }>;
            type KeyGradient = Accumulator<{ $d / 8 }>;
            type ValueGradient = Accumulator<{ $d_v / 8 }>;

            #[inline(always)]
            unsafe fn consume<T: Operand>(setting: Setting<'_, T>) {
                // SAFETY: passed on to the caller.
                unsafe { $consumer::work::<T, Self>(setting) };
            }

            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn start_scores<T: Operand>(s: &mut Self::Scores, k: Descriptor, q: Descriptor) {
                const K_CHUNK: u32 = Tiles::of($d).keys * CHUNK_ROW_BYTES;
                const Q_CHUNK: u32 = Tiles::of($d).rows * CHUNK_ROW_BYTES;
                // SAFETY: all four warps are here, and the operands stay, as the trait asks.
                unsafe {
                    SharedProduct::<{ $d / 16 }>::product_shared::<T, K_CHUNK, Q_CHUNK>(s, k, q);
                }
            }

            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn start_dp<T: Operand>(dp: &mut Self::Scores, v: Descriptor, d_o: Descriptor) {
                const V_CHUNK: u32 = Tiles::of($d).keys * CHUNK_ROW_BYTES;
                const DO_CHUNK: u32 = Tiles::of($d).rows * CHUNK_ROW_BYTES;
                // SAFETY: all four warps are here, and the operands stay, as the trait asks.
                unsafe {
                    SharedProduct::<{ $d_v / 16 }>::product_shared::<T, V_CHUNK, DO_CHUNK>(
                        dp, v, d_o,
                    );
                }
            }
        }
    };
}

geometry!(64, 64, consumer);
geometry!(128, 128, consumer);
geometry!(192, 192, wide);
geometry!(192, 128, wide);
geometry!(256, 256, wide);
