//! The tests of the GPU backend (`tests/gpu`) on cust as the owner.

#[path = "../../tests/gpu/device.rs"]
mod device;
#[path = "../../tests/gpu/fake_driver.rs"]
mod fake_driver;
#[path = "../../tests/gpu/graph.rs"]
mod graph;
#[path = "../../tests/gpu/head.rs"]
mod head;
#[path = "../../tests/gpu/maps.rs"]
mod maps;
#[path = "../../tests/gpu/plans.rs"]
mod plans;
#[path = "../../tests/gpu/raw.rs"]
mod raw;
#[path = "../../tests/gpu/replay.rs"]
mod replay;
#[path = "../../tests/gpu/session.rs"]
mod session;

/// The device under test.
type Gpu = device_cust::CustDevice;
