//! `ptx-builder ptxas` looks at entries ahead, in the combinations of constants that
//! `ptx-builder/src/combinations.rs` names.

use std::collections::BTreeSet;

use flash_attention::{
    DType, Problem,
    problem::Dropout,
    registry::{self, Target},
};

#[path = "../ptx-builder/src/combinations.rs"]
#[allow(dead_code)]
mod combinations;

/// flash_hopper's entries for three consumers have no registers to spare for padding and dropout.
/// They are launched without, and checked in exactly what they are launched with.
#[test]
fn three_consumers_are_checked_in_all_that_they_are_launched_with() {
    let kernel = registry::find("flash_hopper").expect("a kernel");
    let target = Target::new((9, 0), 232_448, 132);
    let mut launched = BTreeSet::new();
    let dtypes = [DType::F16, DType::BF16].into_iter();
    let sizes = dtypes.flat_map(|dtype| [64, 80, 96].map(|d| (dtype, d)));
    for ((dtype, d), features) in sizes.flat_map(|size| (0..8).map(move |i| (size, i))) {
        let on = |feature: u32| features >> feature & 1 == 1;
        let problem = Problem::builder(4, 12, 2048, d)
            .dtype(dtype)
            .causal(on(0))
            .mask(on(1))
            .dropout(on(2).then_some(Dropout { p: 0.1, seed: 1 }))
            .build()
            .expect("a problem");
        let plan = kernel.plan(&problem, &target).expect("within the kernel's limits");
        for entry in plan.entries().filter(|entry| entry.entry.symbol.ends_with("_x3")) {
            let on = entry.constants.iter().filter(|&(_, value)| value != 0).collect::<Vec<_>>();
            launched.insert((entry.entry.symbol, on));
        }
    }
    let entries = kernels_gpu::entries().map(|entry| entry.symbol);
    let checked: BTreeSet<_> = entries
        .filter(|symbol| symbol.starts_with("flash_hopper") && symbol.ends_with("_x3"))
        .flat_map(|symbol| {
            let combinations = combinations::of_entry(symbol, combinations::PREFIX);
            combinations.iter().map(move |combination| (symbol, combination.to_vec()))
        })
        .collect();
    assert_eq!(launched, checked);
}
