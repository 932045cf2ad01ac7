//! Kernels under the emulator, line by line: what each does, and which
//! synchronisation prevents what.

pub mod break_sync;
pub mod gpu;
pub mod profile;
pub mod source;
pub mod specimen;
pub mod trace;
