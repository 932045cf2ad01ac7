//! Decoding: a few queries against a long cache of keys and values.
//!
//! | file | contents |
//! |---|---|
//! | [`decode_split`] | attention of a part of the keys (sm_80) |
//! | [`decode_e4m3`] | the same of a cache in e4m3 (sm_80, and with the conversion of sm_90a) |
//! | [`decode_combine`] | the parts of a row become one |
//! | [`decode_append`] | new keys and values take their places in the cache |
//! | [`rows`] | the queries of all heads that share keys, as rows of one tile |
//! | [`cache`] | where keys and values are: one after the other, or in pages |
//! | [`sums`] | the warps of a block become one |
//!
//! A prefill has a block for each tile of query rows. A decoder has one row: a block for each head would
//! leave most of the GPU idle, and read the keys again for each head that shares them. So the heads of a
//! group are rows of one tile, and the keys of a sequence are split between blocks:
//!
//! ```text
//!            keys of a sequence
//!         +-------+-------+-------+
//! rows of | part  | part  | part  |     decode_split: a block each; O under the part's own
//! a group |   0   |   1   |   2   |     maximum, and the sum of its weights
//!         +-------+-------+-------+
//!             \       |       /
//!               O and the LSE           decode_combine: the online softmax again, over parts
//! ```

pub mod cache;
pub mod decode_append;
pub mod decode_combine;
pub mod decode_e4m3;
pub mod decode_split;
pub mod rows;
pub mod sums;
