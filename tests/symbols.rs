//! A program that uses this library defines no symbol of the CUDA driver and links nothing of
//! CUDA, so that it stands in the way of no other library that does.

#[path = "gpu/symbols.rs"]
mod symbols;

use flash_attention::GpuDevice;
use symbols::{defined_in_library, of_executable, of_the_driver};

#[test]
fn no_crate_of_the_library_defines_a_function_of_the_driver() {
    for name in ["flash_attention", "cuda_driver", "kernels_gpu", "simt"] {
        let defined = defined_in_library(name);
        assert!(defined.len() > 10, "{name}: {defined:?}");
        assert_eq!(of_the_driver(&defined), [""; 0], "{name}");
    }
}

#[test]
fn a_program_links_no_function_of_the_driver() {
    // Links what opening a GPU takes, whether there is one or not.
    _ = GpuDevice::open(u32::MAX);
    let all = of_executable();
    assert!(all.len() > 100, "the executable was stripped of its symbols: {all:?}");
    assert_eq!(of_the_driver(&all), [""; 0]);
}
