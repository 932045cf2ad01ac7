//! FlashAttention kernels in Rust.
