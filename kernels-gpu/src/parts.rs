//! The parts that several rungs share.
//!
//! | the work of a block | |
//! |---|---|
//! | [`head`] | which head of which sequence, and where its rows lie |
//! | [`policy`] | which keys a row sees, which weights are kept |
//! | [`schedule`], [`queue`] | which tile of queries a block takes, and the next one |
//!
//! | arithmetic | |
//! |---|---|
//! | [`softmax`] | the online softmax, one row at a time |
//! | [`online`] | the same on a warp's fragments, and the epilogue |
//! | [`dropout`] | Philox |
//! | [`score`], [`gradient`] | one score at a time, and its gradient |
//! | [`fragment`] | the two products of attention on a warp's fragments |
//! | [`attend`], [`warp_rows`] | the work of a warp on a KV tile: in the first tensor core rungs, in the later ones |
//! | [`scalar_tile`] | products of tiles in scalar arithmetic |
//! | [`gemm`] | matrix products: the projections and standard attention are made of these |
//!
//! | memory | |
//! |---|---|
//! | [`tile`] | tiles between global and shared memory |
//! | [`columns`] | which columns of a tile a tensor has |
//! | [`chunk`] | sixteen bytes as values |
//! | [`ragged`] | rows of a sequence as tensor maps see them |
//! | [`pipeline`] | a ring of stages between a producer and consumers |

pub mod attend;
pub mod chunk;
pub mod columns;
pub mod dropout;
pub mod fragment;
pub mod gemm;
pub mod gradient;
pub mod head;
pub mod online;
pub mod pipeline;
pub mod policy;
pub mod queue;
pub mod ragged;
pub mod scalar_tile;
pub mod schedule;
pub mod score;
pub mod softmax;
pub mod tile;
pub mod warp_rows;
