//! Outputs beside the expected outputs in the input file.

use flash_attention::{
    Problem,
    verify::{Differences, Worst, Yardstick},
};

/// One output compared with the one in the file.
pub struct Comparison {
    /// Name of the tensor.
    pub name: &'static str,
    /// The differences.
    pub differences: Differences,
    /// Largest error of the plain algorithm against f64.
    pub plain: Yardstick,
    /// Largest error of our output against f64.
    pub ours_from_f64: f64,
    /// Largest error of the file's output against f64.
    pub theirs_from_f64: f64,
    /// Index of an element, as `[b, h, i, d]`, from its place among the compared elements.
    pub place: Place,
    /// Compared rows, and all rows.
    pub compared: (usize, usize),
    /// The name of a row.
    pub rows: &'static str,
}

/// The index of an element from its place among the compared elements.
pub type Place = Box<dyn Fn(usize) -> Vec<usize>>;

/// Index of an element of the rows compared, `width` elements each.
pub fn place(problem: &Problem, rows: &[usize], width: usize) -> Place {
    // Rows are counted as the LSE's.
    let (rows, [_, heads, seq]) = (rows.to_vec(), problem.lse_shape());
    Box::new(move |element| {
        let (row, d) = (rows[element / width], element % width);
        let mut index = vec![row / seq / heads, row / seq % heads, row % seq];
        if width > 1 {
            index.push(d);
        }
        index
    })
}

impl Comparison {
    /// Whether the difference is within the limit.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.plain.allows(self.differences.max_abs)
    }

    /// Two lines: the verdict, and the errors of both outputs against f64.
    #[must_use]
    pub fn lines(&self) -> String {
        let d = &self.differences;
        let Worst { index, actual, expected } = d.worst;
        let (compared, all) = self.compared;
        format!(
            "{} {}: differs from the file's by at most {:.1e} (mean {:.1e}, median {:.1e}; relative \
             at most {:.1e}), allowed {:.1e}; worst {:?}: {actual} for {expected}\n  \
             from f64: ours {:.1e}, the file's {:.1e}, the plain algorithm {:.1e}; {compared} of \
             {all} {} compared",
            self.name,
            if self.passes() { "passed" } else { "FAILED" },
            d.max_abs,
            d.mean_abs,
            d.median_abs,
            d.max_rel,
            self.plain.limit(),
            (self.place)(index),
            self.ours_from_f64,
            self.theirs_from_f64,
            self.plain.error(),
            self.rows,
        )
    }
}
