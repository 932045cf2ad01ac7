//! The ladder of projections `y = x wᵀ + bias`, one file a rung.
//!
//! | rung | the idea it adds |
//! |---|---|
//! | [`linear_naive`] | a thread per element |
//! | [`linear_tiled`] | tiles in shared memory, pieces in registers |
//! | [`linear_mma`] | tensor cores, slices brought while others are used (sm_80) |
//! | [`linear_hopper`] | two blocks share what one of them fetches (sm_90a) |

pub mod linear_hopper;
pub mod linear_mma;
pub mod linear_naive;
pub mod linear_tiled;
