//! Kernels under the emulator, line by line: which synchronisation prevents what.

pub mod break_sync;
pub mod source;
pub mod specimen;
