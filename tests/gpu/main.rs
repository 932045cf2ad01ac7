//! The GPU backend without a GPU: on `cuda-driver/fake`, a driver library whose GPU is
//! the emulator. The tests take turns, since a process has one driver.
//!
//! `device-cust` runs the same tests on its owner.

mod device;
mod environment;
mod fake_driver;
mod graph;
mod head;
mod maps;
mod plans;
mod raw;
mod replay;
mod session;

/// The device under test.
type Gpu = flash_attention::GpuDevice;
