//! A block's tiles and the registers that they take, known at compile time.

use simt::wgmma::{
    Accumulator, CHUNK_ROW_BYTES, Descriptor, Fragments, Operand, RegisterProduct, SharedProduct,
    WaitGroup,
};

use super::{
    consumer::{Consumer, Setting},
    tile::ScoreTile,
    tiles::Tiles,
    wide::Wide,
};
use crate::backward::order::Place;

/// A head dim, and what follows from it.
pub trait Geometry {
    /// The tiles of a block.
    const TILES: Tiles;
    /// Whether the sums of dQ have an order.
    const ORDERED: bool;

    /// Sᵀ and dPᵀ of a consumer, `[64, BR]`.
    type Scores: ScoreTile<Self::Weights>;
    /// Pᵀ and dSᵀ in the storage type, as the operand of the products that follow.
    type Weights: Copy + AsRef<[[u32; 4]]>;
    /// dK and dV of a consumer, `[64, D]`.
    type Gradient: GradientTile;

    /// Which keys a block has.
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

    /// Starts `K Qᵀ` or `V dOᵀ`.
    ///
    /// # Safety
    /// As for [`SharedProduct::product_shared`].
    unsafe fn start_scores<T: Operand>(s: &mut Self::Scores, keys: Descriptor, rows: Descriptor);

    /// Starts `gradient += weights rows`.
    ///
    /// # Safety
    /// As for [`RegisterProduct::product_registers`].
    unsafe fn start_gradient<T: Operand>(
        gradient: &mut Self::Gradient,
        weights: &Self::Weights,
        rows: Descriptor,
    );
}

/// dK or dV of a consumer in a thread's registers: groups of 8 columns, two keys of each.
pub trait GradientTile: WaitGroup {
    /// All zero.
    fn zero() -> Self;
    /// The values of this thread.
    fn values(&self) -> &[[f32; 4]];
}

impl<const GROUPS: usize> GradientTile for Accumulator<GROUPS>
where
    Self: WaitGroup,
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
}

/// The geometry of head dim `D`, with an order of the sums of dQ or without.
pub struct Hopper<const D: u32, const ORDERED: bool>;

/// Implements [`Geometry`], whose arrays have lengths that no generic code can compute.
macro_rules! geometry {
    ($d:literal, $consumer:ident) => {
        impl<const ORDERED: bool> Geometry for Hopper<$d, ORDERED> {
            const TILES: Tiles = Tiles::of($d);
            const ORDERED: bool = ORDERED;

            type Scores = Accumulator<{ Tiles::of($d).rows as usize / 8 }>;
            type Weights = Fragments<{ Tiles::of($d).rows as usize / 16 }>;
            type Gradient = Accumulator<{ $d / 8 }>;

            #[inline(always)]
            unsafe fn consume<T: Operand>(setting: Setting<'_, T>) {
                // SAFETY: passed on to the caller.
                unsafe { $consumer::<T, Self>::new(setting).work() };
            }

            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn start_scores<T: Operand>(
                s: &mut Self::Scores,
                keys: Descriptor,
                rows: Descriptor,
            ) {
                const K_CHUNK: u32 = Tiles::of($d).keys * CHUNK_ROW_BYTES;
                const Q_CHUNK: u32 = Tiles::of($d).rows * CHUNK_ROW_BYTES;
                // SAFETY: all four warps are here, and the operands stay, as the trait asks.
                unsafe {
                    SharedProduct::<{ $d / 16 }>::product_shared::<T, K_CHUNK, Q_CHUNK>(
                        s, keys, rows,
                    );
                }
            }

            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn start_gradient<T: Operand>(
                gradient: &mut Self::Gradient,
                weights: &Self::Weights,
                rows: Descriptor,
            ) {
                // SAFETY: all four warps are here, and the operands stay, as the trait asks.
                unsafe { gradient.product_registers::<T>(weights, rows) };
            }
        }
    };
}

geometry!(64, Consumer);
geometry!(128, Consumer);
geometry!(192, Wide);
geometry!(256, Wide);
