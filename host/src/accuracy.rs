//! A kernel's outputs against attention in f64, as results record it.

use flash_attention::{
    DType, Layout, Problem, Tensor,
    module::{ModuleGradients, oracle as module_oracle},
    oracle::{self, Rows},
    session::{Gradients, Inputs, Outputs},
    verify::{Credit, Differences, GradientCredit, GradientVerification, Verification, Yardstick},
};

use crate::{
    inputs::ModuleTensors,
    results::{Check, Histogram, Level, Spread},
};

/// The right answer for some rows of a problem, and the plain algorithm's error.
pub struct Oracle {
    problem: Problem,
    rows: Vec<usize>,
    reference: Rows,
    credit: Credit,
}

impl Oracle {
    /// Computes at most `rows` rows in f64, spread over the problem.
    #[must_use]
    pub fn new(problem: &Problem, inputs: &Inputs<'_>, rows: usize) -> Self {
        let rows = oracle::sample_rows(problem, rows);
        let reference = oracle::reference(problem, inputs, &rows);
        let credit = Credit::of(problem, inputs, &rows, &reference);
        Self { problem: *problem, rows, reference, credit }
    }

    /// The number of rows whose outputs in f64 cost about `multiplications` multiplications; at least 64.
    #[must_use]
    pub fn affordable_rows(problem: &Problem, multiplications: usize) -> usize {
        let columns = problem.head_dim().max(problem.head_dim_v());
        (multiplications / (problem.seq_k() * columns).max(1)).max(64)
    }

    /// Whether every row is compared.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.rows.len() == self.problem.rows()
    }

    /// Rows compared.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Compares O and LSE.
    #[must_use]
    pub fn checks(&self, kernel: &str, outputs: &Outputs, threshold: Option<f64>) -> [Check; 2] {
        let Self { problem, rows, reference, credit } = self;
        let v = Verification::new(problem, outputs, rows, reference, *credit);
        let d = problem.head_dim_v();
        let check =
            |tensor: &str, differences: &Differences, plain: Yardstick, width: usize| Check {
                kernel: kernel.into(),
                level: Level::Attention,
                seq: problem.seq_q(),
                dtype: problem.dtype(),
                tensor: tensor.into(),
                compared: differences.count as u64,
                elements: (problem.rows() * width) as u64,
                worst_index: self.index(differences.worst.index, width),
                ..check(differences, plain, threshold)
            };
        [check("o", &v.o, v.credit.o, d), check("lse", &v.lse, v.credit.lse, 1)]
    }

    /// Compares O alone, for an implementation that gives no LSE.
    #[must_use]
    pub fn check_o(&self, kernel: &str, o: Tensor) -> Check {
        let lse = Tensor::zeros(DType::F32, &self.problem.lse_shape());
        let [o, _] = self.checks(kernel, &Outputs { o, lse, weights: None }, None);
        o
    }

    /// `[b, h, i, d]`, or `[b, h, i]` where a row has one element, of an element compared.
    fn index(&self, element: usize, width: usize) -> Vec<usize> {
        let p = &self.problem;
        let (row, d) = (self.rows[element / width], element % width);
        // Rows are counted as the LSE's.
        let [_, heads, rows] = p.lse_shape();
        let (bh, i) = (row / rows, row % rows);
        let mut index = vec![bh / heads, bh % heads, i];
        if width > 1 {
            index.push(d);
        }
        index
    }
}

/// The right gradients of some heads of K and V and of the heads of Q that share them, and the
/// plain algorithm's error.
pub struct GradientOracle {
    problem: Problem,
    heads: Vec<usize>,
    reference: oracle::Gradients,
    credit: GradientCredit,
}

impl GradientOracle {
    /// Computes in f64 as many heads as have `rows` rows together, spread over the problem. If the
    /// fewest heads that can be compared have more rows, dO keeps `rows` rows of them and is 0 in the
    /// others: these add nothing to any gradient and take no time to compute.
    #[must_use]
    pub fn new(problem: &Problem, inputs: &Inputs<'_>, d_o: &mut Tensor, rows: usize) -> Self {
        let of_head = problem.group() * problem.seq_q();
        let wanted = [problem.bias().is_some(), problem.has_sinks()];
        let heads = Self::compared(problem, rows / of_head, wanted);
        if rows < of_head * heads.len() && problem.varlen().is_none() {
            let of_each = (rows / heads.len()).max(1);
            heads.iter().for_each(|&head| thin(problem, d_o, head, of_each));
        }
        let reference = oracle::gradients(problem, inputs, d_o, &heads);
        let credit = GradientCredit::of(problem, inputs, d_o, &heads, &reference);
        Self { problem: *problem, heads, reference, credit }
    }

    /// `count` of some heads, evenly apart.
    #[must_use]
    pub fn spread(heads: &[usize], count: usize) -> Vec<usize> {
        let last = count.saturating_sub(1).max(1);
        (0..count).map(|i| heads[i * (heads.len() - 1) / last]).collect()
    }

    /// At least one and about `count` heads of K and V, evenly apart. Where the gradients of the bias or
    /// of the sinks are `wanted`, all heads that add to one element of these come together.
    #[must_use]
    pub fn compared(p: &Problem, count: usize, [bias, sinks]: [bool; 2]) -> Vec<usize> {
        let bias = p.bias().filter(|_| bias);
        let entries_join = sinks || bias.is_some_and(|bias| !bias.per_batch);
        let heads_join = bias.is_some_and(|bias| !bias.per_head);
        let all = oracle::all_heads(p);
        let unit = |head: usize| {
            let (b, h) = (head / p.kv_heads(), head % p.kv_heads());
            (if entries_join { 0 } else { b }, if heads_join { 0 } else { h })
        };
        let mut units: Vec<_> = all.iter().map(|&head| unit(head)).collect();
        units.sort_unstable();
        units.dedup();
        let of_unit = all.len() / units.len().max(1);
        let numbers: Vec<usize> = (0..units.len()).collect();
        let chosen = Self::spread(&numbers, (count / of_unit.max(1)).clamp(1, units.len()));
        let is_chosen = |&head: &usize| chosen.iter().any(|&number| units[number] == unit(head));
        all.into_iter().filter(is_chosen).collect()
    }

    /// The number of query rows whose gradients in f64 cost about `multiplications` multiplications; at
    /// least 64.
    #[must_use]
    pub fn affordable_rows(problem: &Problem, multiplications: usize) -> usize {
        (multiplications / (5 * problem.seq_k() * problem.head_dim()).max(1)).max(64)
    }

    /// Compares dQ, dK and dV, and the gradients of the bias and of the sinks where there are these.
    #[must_use]
    pub fn checks(
        &self,
        kernel: &str,
        inputs: &Inputs<'_>,
        gradients: &Gradients,
        threshold: Option<f64>,
    ) -> Vec<Check> {
        let Self { problem: p, heads, reference, credit } = self;
        let v = GradientVerification::new(p, inputs, gradients, heads, reference, *credit);
        let check_of = |(name, differences, plain): (&str, &Differences, Yardstick)| {
            let (tensor, elements) = match name {
                "dQ" => ("dq", p.q_elements()),
                "dK" => ("dk", p.k_elements()),
                "dV" => ("dv", p.v_elements()),
                "dB" => ("dbias", p.bias_shape().map_or(0, |shape| shape.iter().product())),
                _ => ("dsinks", p.heads()),
            };
            Check {
                kernel: kernel.into(),
                level: Level::Backward,
                seq: p.seq_q(),
                dtype: p.dtype(),
                elements: elements as u64,
                worst_index: gradient_index(p, heads, tensor, differences.worst.index),
                tensor: tensor.into(),
                ..check(differences, plain, threshold)
            }
        };
        v.each().map(check_of).collect()
    }
}

/// Keeps `rows` rows of dO for the heads of Q that share a head of K, and makes the others 0.
fn thin(p: &Problem, d_o: &mut Tensor, head: usize, rows: usize) {
    let (b, h_kv) = (head / p.kv_heads(), head % p.kv_heads());
    let (all, row_bytes) = (p.group() * p.seq_q(), p.head_dim_v() * p.dtype().size());
    let kept = |row: usize| (row + 1) * rows / all > row * rows / all;
    for row in (0..all).filter(|&row| !kept(row)) {
        let (h, i) = (h_kv * p.group() + row / p.seq_q(), row % p.seq_q());
        let at = match p.layout() {
            Layout::HeadsFirst => (b * p.heads() + h) * p.seq_q() + i,
            Layout::TokensFirst => (b * p.seq_q() + i) * p.heads() + h,
        };
        d_o.as_bytes_mut()[at * row_bytes..][..row_bytes].fill(0);
    }
}

/// `[b, h, i, d]` of an element of some heads' `dq`, `dk` or `dv`; for packed sequences, the
/// element's place among the compared elements. `[b, h, i, j]` of `dbias`, `[h]` of `dsinks`.
#[must_use]
pub fn gradient_index(p: &Problem, heads: &[usize], tensor: &str, element: usize) -> Vec<usize> {
    if tensor == "dsinks" {
        return vec![oracle::whole_sinks(p, heads)[element]];
    }
    if tensor == "dbias" {
        let of_matrix = p.seq_q() * p.seq_k();
        let matrix = oracle::whole_biases(p, heads)[element / of_matrix];
        let (i, j) = (element % of_matrix / p.seq_k(), element % p.seq_k());
        let of_entry = if p.bias().is_some_and(|bias| bias.per_head) { p.heads() } else { 1 };
        return vec![matrix / of_entry, matrix % of_entry, i, j];
    }
    if p.varlen().is_some() {
        return vec![element];
    }
    let (group, seq) = if tensor == "dq" { (p.group(), p.seq_q()) } else { (1, p.seq_k()) };
    let width = if tensor == "dv" { p.head_dim_v() } else { p.head_dim() };
    let (row, d) = (element / width, element % width);
    let (head, of_head) = (heads[row / (group * seq)], row % (group * seq));
    let h = head % p.kv_heads() * group + of_head / seq;
    vec![head / p.kv_heads(), h, of_head % seq, d]
}

/// The right answer for some tokens of a module's output, and the plain algorithm's error.
pub struct ModuleOracle {
    problem: Problem,
    tokens: Vec<usize>,
    reference: Vec<f64>,
    credit: Yardstick,
}

impl ModuleOracle {
    /// Computes some tokens in f64.
    #[must_use]
    pub fn new(problem: &Problem, tensors: &ModuleTensors, tokens: Vec<usize>) -> Self {
        let ModuleTensors { weights, x, mask } = tensors;
        let mask = mask.as_deref();
        let reference = module_oracle::reference(problem, weights, x, mask, &tokens);
        let credit = module_oracle::credit(problem, weights, x, mask, &tokens, &reference);
        Self { problem: *problem, tokens, reference, credit }
    }

    /// Compares y.
    #[must_use]
    pub fn check(&self, kernel: &str, y: &Tensor, threshold: Option<f64>) -> Check {
        let p = &self.problem;
        let actual = module_oracle::tokens_of(y, &self.tokens);
        let differences = Differences::new(&actual, &self.reference);
        let hidden = p.heads() * p.head_dim();
        let worst = differences.worst.index;
        let token = self.tokens[worst / hidden];
        Check {
            kernel: kernel.into(),
            level: Level::Module,
            seq: p.seq_q(),
            dtype: p.dtype(),
            tensor: "y".into(),
            elements: y.len() as u64,
            worst_index: vec![token / p.seq_q(), token % p.seq_q(), worst % hidden],
            ..check(&differences, self.credit, threshold)
        }
    }
}

/// The right gradients of a module, and the plain algorithm's error.
pub struct ModuleGradientOracle {
    problem: Problem,
    reference: module_oracle::Gradients,
    credit: [Yardstick; module_oracle::Gradients::COUNT],
}

impl ModuleGradientOracle {
    /// Computes every gradient in f64. dy is 0 for all but some tokens: the other tokens add
    /// nothing to any gradient and take no time to compute.
    #[must_use]
    pub fn new(
        problem: &Problem,
        tensors: &ModuleTensors,
        dy: &mut Tensor,
        tokens: &[usize],
    ) -> Self {
        let ModuleTensors { weights, x, mask } = tensors;
        let mask = mask.as_deref();
        module_oracle::thin(dy, tokens);
        let reference = module_oracle::gradients(problem, weights, x, mask, dy);
        let credit = module_oracle::credit_gradients(problem, weights, x, mask, dy, &reference);
        Self { problem: *problem, reference, credit }
    }

    /// Compares the gradients of x and of the parameters.
    #[must_use]
    pub fn checks(
        &self,
        kernel: &str,
        gradients: ModuleGradients,
        threshold: Option<f64>,
    ) -> Vec<Check> {
        self.checks_of(kernel, &gradients.into_tensors(), threshold)
    }

    /// As [`checks`](Self::checks), of the tensors in the order of [`ModuleGradients::NAMES`]; without
    /// one for each name there is no check.
    #[must_use]
    pub fn checks_of(
        &self,
        kernel: &str,
        gradients: &[Tensor],
        threshold: Option<f64>,
    ) -> Vec<Check> {
        if gradients.len() != ModuleGradients::NAMES.len() {
            return Vec::new();
        }
        let both = gradients.iter().zip(self.reference.each()).zip(self.credit);
        both.map(|((found, (tensor, expected)), credit)| {
            self.check(kernel, tensor, [&found.to_f64(), expected], (credit, threshold))
        })
        .collect()
    }

    fn check(
        &self,
        kernel: &str,
        tensor: &str,
        [found, expected]: [&[f64]; 2],
        (plain, threshold): (Yardstick, Option<f64>),
    ) -> Check {
        let p = &self.problem;
        let differences = Differences::new(found, expected);
        Check {
            kernel: kernel.into(),
            level: Level::ModuleBackward,
            seq: p.seq_q(),
            dtype: p.dtype(),
            worst_index: module_gradient_index(p, tensor, differences.worst.index),
            tensor: tensor.into(),
            ..check(&differences, plain, threshold)
        }
    }
}

/// `[b, n, i]` of an element of dx, `[o, i]` of a weight's gradient, `[o]` of a bias's.
#[must_use]
pub fn module_gradient_index(p: &Problem, tensor: &str, element: usize) -> Vec<usize> {
    let hidden = p.heads() * p.head_dim();
    let (row, column) = (element / hidden, element % hidden);
    match tensor {
        "dx" => vec![row / p.seq_q(), row % p.seq_q(), column],
        bias if bias.ends_with("bias") => vec![element],
        _ => vec![row, column],
    }
}

/// The verdicts and figures of one comparison; the caller adds the names.
#[must_use]
pub fn check(differences: &Differences, plain: Yardstick, threshold: Option<f64>) -> Check {
    let error = differences.max_abs;
    Check {
        kernel: String::new(),
        level: Level::Attention,
        seq: 0,
        dtype: DType::F32,
        tensor: String::new(),
        compared: differences.count as u64,
        elements: differences.count as u64,
        abs: Spread { max: error, mean: differences.mean_abs, median: differences.median_abs },
        rel: Spread {
            max: differences.max_rel,
            mean: differences.mean_rel,
            median: differences.median_rel,
        },
        rel_rms: differences.rel_rms,
        plain_max_abs: plain.error(),
        threshold,
        within_threshold: threshold.is_none_or(|threshold| error <= threshold),
        within_twice: plain.allows(error),
        worst_index: vec![differences.worst.index],
        worst_got: differences.worst.actual,
        worst_expected: differences.worst.expected,
        abs_histogram: histogram(&differences.abs_histogram),
        rel_histogram: histogram(&differences.rel_histogram),
    }
}

/// Whole decades, without the empty ones at both ends.
fn histogram(counts: &flash_attention::verify::Histogram) -> Histogram {
    use flash_attention::verify::Histogram as Counts;
    let per_decade = Counts::BINS_PER_DECADE as usize;
    let decades: Vec<&[u64]> = counts.bins.chunks(per_decade).collect();
    let filled = |decade: &&[u64]| decade.iter().any(|&n| n > 0);
    let first = decades.iter().position(filled).unwrap_or(0);
    let end = decades.iter().rposition(filled).map_or(first, |last| last + 1);
    Histogram {
        first: Counts::FIRST_DECADE + first as i32,
        per_decade: Counts::BINS_PER_DECADE as u32,
        counts: decades[first..end].concat(),
        zeros: counts.zeros,
    }
}

/// The reason that a check failed, in one line.
#[must_use]
pub fn complaint(check: &Check) -> String {
    let Check { tensor, worst_index, worst_got, worst_expected, plain_max_abs, .. } = check;
    let limit = match check.threshold {
        Some(threshold) if !check.within_threshold => format!("the threshold {threshold:e}"),
        _ => format!("twice the plain algorithm's error {plain_max_abs:.1e}"),
    };
    format!(
        "{tensor} is wrong: {worst_got} for {worst_expected} at {worst_index:?}, beyond {limit}"
    )
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;
    use flash_attention::Bias;

    use super::*;
    use crate::inputs::Tensors;

    #[test]
    fn heads_that_add_to_one_element_come_together() {
        let p = Problem::builder(2, 6, 5, 8).kv_heads(3).sinks(true);
        let bias =
            |per_batch, per_head| p.bias(Some(Bias { per_batch, per_head })).build().unwrap();
        let compared = |p: &Problem, count, wanted| GradientOracle::compared(p, count, wanted);
        let own = bias(true, true);
        assert_eq!(compared(&own, 0, [false; 2]), [0]);
        assert_eq!(compared(&own, 2, [true, false]), [0, 5]);
        assert_eq!(compared(&own, 9, [false; 2]), [0, 1, 2, 3, 4, 5]);
        // Both entries of a head.
        assert_eq!(compared(&own, 1, [false, true]), [0, 3]);
        assert_eq!(compared(&bias(false, true), 4, [true, false]), [0, 2, 3, 5]);
        assert_eq!(compared(&bias(true, false), 1, [true, false]), [0, 1, 2]);
        assert_eq!(compared(&bias(false, false), 1, [true, false]), [0, 1, 2, 3, 4, 5]);
        assert_eq!(compared(&bias(true, false), 1, [true; 2]), [0, 1, 2, 3, 4, 5]);
        assert_eq!(gradient_index(&own, &[1, 4], "dsinks", 1), [3]);
        assert_eq!(gradient_index(&bias(false, true), &[1, 4], "dbias", 25 + 7), [0, 3, 1, 2]);
    }

    #[test]
    fn the_worst_element_of_a_module_is_named() {
        let problem = Problem::builder(2, 2, 5, 32).dtype(DType::F16);
        let problem = problem.layout(flash_attention::Layout::TokensFirst).build().unwrap();
        let tensors = ModuleTensors::random(&problem, 1).unwrap();
        let tokens = module_oracle::sample_tokens(&problem, 3);
        let oracle = ModuleOracle::new(&problem, &tensors, tokens);
        let mut y = vec![0.0; 10 * 64];
        for (token, row) in oracle.tokens.iter().zip(oracle.reference.chunks(64)) {
            y[token * 64..(token + 1) * 64].copy_from_slice(row);
        }
        let tensor = |y: &[f64]| Tensor::from_f64(DType::F16, &[2, 5, 64], y).unwrap();
        let good = oracle.check("k", &tensor(&y), None);
        assert!(good.passed() && (good.compared, good.elements) == (3 * 64, 640));
        y[9 * 64 + 17] += 0.5;
        let bad = oracle.check("k", &tensor(&y), None);
        assert!(!bad.passed() && bad.worst_index == [1, 4, 17], "{:?}", bad.worst_index);
    }

    #[test]
    fn the_worst_element_is_named() {
        let problem = Problem::builder(1, 2, 5, 32).build().unwrap();
        let tensors = Tensors::random(&problem, 1);
        let oracle = Oracle::new(&problem, &tensors.inputs(), usize::MAX);
        assert!(oracle.is_complete() && oracle.rows() == 10);
        let mut o = oracle.reference.o.clone();
        o[(5 + 3) * 32 + 7] += 0.1;
        let outputs = Outputs {
            o: Tensor::from_f64(DType::F32, &problem.o_shape(), &o).unwrap(),
            lse: Tensor::from_f64(DType::F32, &problem.lse_shape(), &oracle.reference.lse).unwrap(),
            weights: None,
        };
        let [o, lse] = oracle.checks("k", &outputs, Some(1.0));
        assert_eq!(o.worst_index, [0, 1, 3, 7]);
        assert!(o.within_threshold && !o.within_twice && !o.passed() && lse.passed());
        assert_abs_diff_eq!(o.abs.max, 0.1, epsilon = 1e-6);
        assert_eq!(o.abs_histogram.counts.iter().sum::<u64>() + o.abs_histogram.zeros, 320);
        assert!(complaint(&o).contains("[0, 1, 3, 7]"), "{}", complaint(&o));
    }
}
