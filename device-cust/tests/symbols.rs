//! The counterpart of the library's `tests/symbols.rs`: this crate does define the driver's
//! functions, for cust to link to, and reading symbols finds them.

#[path = "../../tests/gpu/symbols.rs"]
mod symbols;

use symbols::{defined_in_library, of_the_driver};

#[test]
fn this_crate_defines_the_functions_that_cust_links_to() {
    let defined = defined_in_library("device_cust");
    let of_the_driver = of_the_driver(&defined);
    for name in ["cuInit", "cuMemAlloc_v2", "cuLaunchKernel", "cuGetErrorString"] {
        assert!(of_the_driver.contains(&name), "{name}: {of_the_driver:?}");
    }
}
