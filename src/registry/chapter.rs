//! The registry entry of docs/adding-a-kernel.md, compiled as the table's entries are.

use simt::Dim3;

use super::{
    KernelSpec, Sizes, Step, Target,
    table::{ALL_FEATURES, one_step, symbol, tiles},
};
use crate::{dtype::DType, problem::Problem};

/// What the chapter's kernel states, which `kernels-gpu/tests/chapter.rs` compiles.
mod flash_rows {
    pub const THREADS: u32 = 128;
    pub const BR: u32 = 4;
}

const FLASH_ROWS: KernelSpec = KernelSpec {
    name: "flash_rows",
    summary: "one warp per row, online softmax, nothing shared",
    idea: "the online softmax without tiles",
    dtypes: &DType::ALL,
    head_dims: &[64],
    capability: (7, 5),
    exact_capability: false,
    // All sizes at which something else begins: the tests run lengths beside each. A tile of
    // one key has none below it.
    sizes: |_, _| Sizes { rows: vec![flash_rows::BR], keys: vec![2] },
    features: ALL_FEATURES,
    plan: |p, _| {
        one_step(Step {
            symbol: symbol("flash_rows", p),
            grid: Dim3::new(
                tiles(p.seq_q(), flash_rows::BR),
                tiles(p.heads(), 1),
                tiles(p.batch(), 1),
            ),
            block: flash_rows::THREADS.into(),
            shared_bytes: 0,
        })
    },
    tensor_maps: None,
    queue: false,
};

#[test]
fn the_chapter_shows_this_entry_and_its_plan_covers_the_rows() {
    let chapter = include_str!("../../docs/adding-a-kernel.md");
    let entry = include_str!("chapter.rs").split("const FLASH_ROWS").nth(1);
    let entry = entry.and_then(|text| text.split_once("\n};\n")).expect("the entry above").0;
    assert!(
        chapter.contains(&format!("const FLASH_ROWS{entry}\n}};\n")),
        "copy one into the other"
    );

    let target = Target::new((7, 5), 65_536, 1);
    let problem = Problem::builder(2, 3, 9, 64).dtype(DType::BF16).build().expect("a problem");
    let plan = (FLASH_ROWS.plan)(&problem, &target);
    assert_eq!(plan.steps.len(), 1);
    assert_eq!(plan.steps[0].symbol, "flash_rows_bf16_d64");
    assert_eq!(plan.steps[0].grid, Dim3::new(3, 3, 2));
    assert_eq!(plan.steps[0].block, Dim3::new(128, 1, 1));
}
