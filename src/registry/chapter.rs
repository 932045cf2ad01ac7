//! The registry entry of docs/adding-a-kernel.md, compiled as the table's entries are.

use simt::Dim3;

use super::{
    AttentionLimits, Features, KernelSpec, Sizes, Step, Target,
    table::{ALL_FEATURES, grid, step},
};
use crate::{dtype::DType, problem::Problem};

/// The entry of the chapter's kernel, which `kernels-gpu/tests/chapter.rs` compiles. Entries with
/// the same arguments stand in for its own, which kernels-gpu does not have.
mod flash_rows {
    pub use kernels_gpu::forward::flash_tiled::ENTRIES;
    pub const BR: u32 = 4;
}

const FLASH_ROWS: KernelSpec = KernelSpec {
    name: "flash_rows",
    summary: "one warp per row, online softmax, nothing shared",
    idea: "the online softmax without tiles",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[64],
        features: Features { any_head_dim: false, ..ALL_FEATURES },
        // All sizes at which something else begins: the tests run lengths beside each. A tile of
        // one key has none below it.
        sizes: |_, _| Sizes { rows: vec![flash_rows::BR], keys: vec![2] },
    },
    draft: |p, _| {
        let step =
            Step { grid: grid(p, flash_rows::BR), ..step(p, flash_rows::ENTRIES, p.head_dim())? };
        Ok(step.into())
    },
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
    let draft = (FLASH_ROWS.draft)(&problem, &target).expect("within its limits");
    let [step] = &draft.steps[..] else { panic!("{draft:?}") };
    assert!(draft.sections.is_empty());
    assert_eq!(step.entry.symbol, "flash_tiled_bf16_d64");
    assert_eq!(step.grid, Dim3::from(3 * 3 * 2));
    assert_eq!(step.block, Dim3::from(step.entry.threads));
}
