//! Fragments between shared memory and registers: `ldmatrix` and `stmatrix`.
//!
//! One instruction moves up to four 8 x 8 matrices of 16-bit elements. A row of a matrix
//! is 16 bytes; the address of row `r` of matrix `m` is that of lane `8 m + r`. Register
//! `m` of lane `l` then holds two elements of matrix `m`:
//!
//! ```text
//!                  columns                 plain: row l / 4, columns 2 (l % 4) and + 1
//!         +----+----+----+----+            transposed: rows 2 (l % 4) and + 1,
//! row 0   | l0 | l1 | l2 | l3 |                        column l / 4
//! row 1   | l4 | l5 | l6 | l7 |
//!   ...   +----+----+----+----+
//! ```
//!
//! which is how [`mma`](crate::mma) wants its operands. The lower half of a register is
//! the element of the lower index. All lanes of the warp must take part. Like every
//! access to shared memory it needs a barrier after another lane's write.

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{
    collectives::{self, WarpCall},
    current,
};
#[cfg(not(target_arch = "nvptx64"))]
use crate::warp::FULL_MASK;
use crate::{memory::Memory, shared::Shared};

/// Bytes of a row of a matrix.
pub const ROW_BYTES: u32 = 16;

macro_rules! load {
    ($($(#[$doc:meta])* $name:ident, $n:literal, $text:literal, $transposed:literal, $($i:literal)*;)*) => {$(
        $(#[$doc])*
        ///
        /// Each lane gives the index of the first element of its row; lanes beyond the
        /// last matrix's rows give any.
        #[inline(always)]
        #[must_use]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $name<T: Memory>(tile: Shared<T>, row: u32) -> [u32; $n] {
            const { assert!(T::BYTES == 2, "matrices have 16-bit elements") };
            #[cfg(target_arch = "nvptx64")]
            {
                let mut v = [0u32; $n];
                // SAFETY: `Shared::dynamic` asks that every index is in bounds, and aligned for a
                // row.
                unsafe {
                    core::arch::asm!($text, $(out(reg32) v[$i],)* in(reg32) tile.address_of(row),
                        options(readonly, nostack));
                }
                v
            }
            #[cfg(not(target_arch = "nvptx64"))]
            load(stringify!($name), tile, row, $transposed, Location::caller())
        }
    )*};
}

load! {
    /// Loads two matrices.
    load_x2, 2, "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{{0}, {1}}}, [{2}];", false, 0 1;
    /// Loads four matrices.
    load_x4, 4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];", false, 0 1 2 3;
    /// Loads two matrices, transposed.
    load_x2_transposed, 2, "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{{0}, {1}}}, [{2}];", true, 0 1;
    /// Loads four matrices, transposed.
    load_x4_transposed, 4, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];", true, 0 1 2 3;
}

/// Loads 16 bytes per lane, each from its own index, in their order: an ordinary
/// load, of which the emulator counts the bank conflicts. For elements that are no matrix
/// of 16-bit ones.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_chunk<T: Memory>(tile: Shared<T>, index: u32) -> [u32; 4] {
    #[cfg(target_arch = "nvptx64")]
    {
        tile.read_as(index)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        check_row(tile, index, "read", at);
        let address = [tile.address_of(index)];
        collectives::collective("load_chunk", FULL_MASK, address, at, |call: WarpCall<'_>| {
            call.whole_warp("load_chunk", at)?;
            let base = call.warp * 32;
            let offsets: [u32; 32] = std::array::from_fn(|lane| call.input[lane][0]);
            for (lane, &offset) in offsets.iter().enumerate() {
                let block = &mut *call.block;
                let from = block.as_lane(base + lane, |b| b.shared_read(offset, ROW_BYTES, at))?;
                // SAFETY: `shared_read` checked bounds and alignment.
                let chunk = unsafe { from.cast::<[u32; 4]>().read() };
                call.output[lane][..4].copy_from_slice(&chunk);
            }
            call.block.count_conflicts(&offsets);
            Ok(())
        })
    }
}

/// Stores four matrices: the reverse of [`load_x4`]. From sm_90 on.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn store_x4<T: Memory>(tile: Shared<T>, row: u32, v: [u32; 4]) {
    const { assert!(T::BYTES == 2, "matrices have 16-bit elements") };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: `Shared::dynamic` asks that every index is in bounds, and aligned for a row.
    unsafe {
        core::arch::asm!("stmatrix.sync.aligned.m8n8.x4.shared.b16 [{0}], {{{1}, {2}, {3}, {4}}};",
            in(reg32) tile.address_of(row), in(reg32) v[0], in(reg32) v[1], in(reg32) v[2],
            in(reg32) v[3], options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        check_row(tile, row, "write", at);
        let input = [tile.address_of(row), v[0], v[1], v[2], v[3]];
        let _: [u32; 0] =
            collectives::collective("store_x4", FULL_MASK, input, at, |call: WarpCall<'_>| {
                call.whole_warp("store_x4", at)?;
                let base = call.warp * 32;
                for lane in 0..32 {
                    let (matrix, r) = (lane / 8, lane % 8);
                    let block = &mut *call.block;
                    let offset = call.input[lane][0];
                    let to =
                        block.as_lane(base + lane, |b| b.shared_write(offset, ROW_BYTES, at))?;
                    let words: [u32; 4] =
                        std::array::from_fn(|w| call.input[4 * r + w][1 + matrix]);
                    // SAFETY: `shared_write` checked bounds and alignment.
                    unsafe { to.cast::<[u32; 4]>().write(words) };
                }
                let offsets: [u32; 32] = std::array::from_fn(|l| call.input[l][0]);
                call.block.count_conflicts(&offsets);
                Ok(())
            });
    }
}

#[cfg(not(target_arch = "nvptx64"))]
fn check_row<T: Memory>(
    tile: Shared<T>,
    row: u32,
    what: &'static str,
    at: &'static Location<'static>,
) {
    current::checked(|b| tile.check::<[u32; 4]>(b, row, what, at));
}

#[cfg(not(target_arch = "nvptx64"))]
fn load<T: Memory, const N: usize>(
    name: &'static str,
    tile: Shared<T>,
    row: u32,
    transposed: bool,
    at: &'static Location<'static>,
) -> [u32; N] {
    let lane = current::with(|b| b.current % 32);
    if lane < 8 * N {
        check_row(tile, row, "read", at);
    }
    collectives::collective(name, FULL_MASK, [tile.address_of(row)], at, |call: WarpCall<'_>| {
        call.whole_warp(name, at)?;
        let base = call.warp * 32;
        let mut offsets = [0; 32];
        for matrix in 0..N {
            let mut rows = [[0u16; 8]; 8];
            for (r, row) in rows.iter_mut().enumerate() {
                let lane = 8 * matrix + r;
                offsets[lane] = call.input[lane][0];
                let block = &mut *call.block;
                let from =
                    block.as_lane(base + lane, |b| b.shared_read(offsets[lane], ROW_BYTES, at))?;
                // SAFETY: `shared_read` checked bounds and alignment.
                *row = unsafe { from.cast::<[u16; 8]>().read() };
            }
            for lane in 0..32 {
                let (long, short) = (lane / 4, 2 * (lane % 4));
                let pair = if transposed {
                    [rows[short][long], rows[short + 1][long]]
                } else {
                    [rows[long][short], rows[long][short + 1]]
                };
                call.output[lane][matrix] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
            }
        }
        call.block.count_conflicts(&offsets[..8 * N]);
        Ok(())
    })
}
