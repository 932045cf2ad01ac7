//! The GPU backend without a GPU: on `cuda-driver/fake`, a driver library whose GPU is
//! the emulator. The tests take turns, since a process has one driver.

mod device;
mod environment;
mod fake_driver;
mod session;
