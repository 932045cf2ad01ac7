//! The forward ladder, one file per rung. Read them in this order:
//!
//! | rung | the idea it adds |
//! |---|---|
//! | [`naive`] | attention as the textbook has it; the N x N matrix in memory |
//! | [`standard`] | the same three steps, done well: the fair baseline (sm_80) |
//! | [`flash_tiled`] | tiles in shared memory, online softmax, no N x N matrix |
//! | [`flash_mma`] | both products on the tensor cores, weights stay in registers |
//! | [`flash_swizzled`] | tiles without bank conflicts and without padding |
//! | [`flash_async`] | the next tile arrives during the arithmetic on this one |
//! | [`flash_pipelined`] | copies ahead, two fragments per warp, no wasted work (sm_80) |
//! | [`flash_tf32`] | f32 on the tensor cores: each product is three of tf32 (sm_80) |
//! | [`flash_hopper`] | copies, products and softmax at the same time (sm_90a) |
//!
//! [`weights`] computes the attention weights that a flash kernel did not keep.

pub mod flash_async;
pub mod flash_hopper;
pub mod flash_mma;
pub mod flash_pipelined;
pub mod flash_swizzled;
pub mod flash_tf32;
pub mod flash_tiled;
pub mod naive;
pub mod standard;
pub mod weights;
