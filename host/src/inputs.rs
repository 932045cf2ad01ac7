//! Random tensors for a problem: the same seed gives the same numbers everywhere.

use flash_attention::{Alibi, DType, Error, Problem, Tensor, module::Weights, session::Inputs};

/// Inputs on the host.
#[derive(Clone, Debug)]
pub struct Tensors {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Vec<u8>>,
    alibi_slopes: Option<Tensor>,
    bias: Option<Tensor>,
    sinks: Option<Tensor>,
    cu_seqlens: Option<[Vec<u32>; 2]>,
}

impl Tensors {
    /// Q, K and V from the normal distribution, and the problem's other tensors: a mask, the usual
    /// slopes, bias and sinks from the normal distribution.
    #[must_use]
    pub fn random(problem: &Problem, seed: u64) -> Self {
        let draw = |shape: [usize; 4], stream: u64| {
            Tensor::random(problem.dtype(), &shape, seed.wrapping_mul(3).wrapping_add(stream), 0.0)
        };
        Self {
            q: draw(problem.q_shape(), 0),
            k: draw(problem.k_shape(), 1),
            v: draw(problem.v_shape(), 2),
            mask: problem.has_mask().then(|| tail_mask(problem.batch(), problem.seq_k(), seed)),
            alibi_slopes: problem.alibi_shape().map(|shape| slopes(&shape, problem.heads())),
            bias: problem.bias_shape().map(|shape| beside(problem.dtype(), &shape, seed, 0)),
            sinks: problem.sinks_shape().map(|shape| beside(DType::F32, &shape, seed, 1)),
            cu_seqlens: problem
                .varlen()
                .map(|_| cu_seqlens(problem.batch(), [problem.seq_q(), problem.seq_k()], seed)),
        }
    }

    /// The tensors in the form that a session takes.
    #[must_use]
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            mask: self.mask.as_deref(),
            alibi_slopes: self.alibi_slopes.as_ref(),
            bias: self.bias.as_ref(),
            sinks: self.sinks.as_ref(),
            cu_seqlens_q: self.cu_seqlens.as_ref().map(|[q, _]| q.as_slice()),
            cu_seqlens_k: self.cu_seqlens.as_ref().map(|[_, k]| k.as_slice()),
            ..Inputs::new(&self.q, &self.k, &self.v)
        }
    }
}

/// The gradient of O, from the normal distribution.
#[must_use]
pub fn gradient_of_o(problem: &Problem, seed: u64) -> Tensor {
    beside(problem.dtype(), &problem.o_shape(), seed, 4)
}

/// The gradient of a module's y, from the normal distribution.
#[must_use]
pub fn gradient_of_y(problem: &Problem, seed: u64) -> Tensor {
    let hidden = problem.heads() * problem.head_dim();
    beside(problem.dtype(), &[problem.batch(), problem.seq_q(), hidden], seed, 4)
}

/// The start offsets of packed sequences of random lengths in Q and in K. Each sequence has from
/// one to the given number of rows, and as many keys as rows if the two given numbers are the same.
#[must_use]
pub fn cu_seqlens(batch: usize, [seq_q, seq_k]: [usize; 2], seed: u64) -> [Vec<u32>; 2] {
    let ends = |most: usize, stream| {
        // The later digits of a normal draw are spread evenly.
        let draws = beside(DType::F32, &[batch], seed, stream);
        let share = |b| (draws.get(b) * 1e3).abs().fract();
        let length = |b| ((share(b) * most as f64) as u32 + 1).min(most as u32);
        let ends = (0..batch).scan(0, |end, b| {
            *end += length(b);
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    };
    [ends(seq_q, 2), ends(seq_k, if seq_q == seq_k { 2 } else { 3 })]
}

/// The usual slopes of `heads` heads, repeated over batch entries where the shape has them.
fn slopes(shape: &[usize], heads: usize) -> Tensor {
    let slopes = Alibi::usual_slopes(heads);
    let mut tensor = Tensor::zeros(DType::F32, shape);
    for (bytes, slope) in tensor.as_bytes_mut().chunks_exact_mut(4).zip(slopes.iter().cycle()) {
        bytes.copy_from_slice(&slope.to_ne_bytes());
    }
    tensor
}

/// A tensor beside Q, K and V, from separate streams.
fn beside(dtype: DType, shape: &[usize], seed: u64, stream: u64) -> Tensor {
    Tensor::random(dtype, shape, !seed.wrapping_mul(5).wrapping_add(stream), 0.0)
}

/// Parameters and input of a module on the host.
#[derive(Clone, Debug)]
pub struct ModuleTensors {
    /// The parameters.
    pub weights: Weights,
    /// Input, `[B, N, hidden]`.
    pub x: Tensor,
    /// Padding mask `[B, N]`, if the problem has one.
    pub mask: Option<Vec<u8>>,
}

impl ModuleTensors {
    /// Parameters and x from the normal distribution.
    ///
    /// # Errors
    /// As [`Weights::random`].
    pub fn random(problem: &Problem, seed: u64) -> Result<Self, Error> {
        let (batch, seq) = (problem.batch(), problem.seq_q());
        let hidden = problem.heads() * problem.head_dim();
        Ok(Self {
            weights: Weights::random(problem.dtype(), hidden, seed)?,
            // Weights draw from streams of their own.
            x: Tensor::random(problem.dtype(), &[batch, seq, hidden], !seed.wrapping_mul(3), 0.0),
            mask: problem.has_mask().then(|| tail_mask(batch, seq, seed)),
        })
    }

    /// x, then weight and bias of each projection.
    pub fn each(&self) -> impl Iterator<Item = &Tensor> {
        let parameters = self.weights.projections().iter().flat_map(|l| [&l.weight, &l.bias]);
        std::iter::once(&self.x).chain(parameters)
    }
}

/// A padding mask for sequences of different lengths: each batch entry sees its first keys, from
/// half of them to all.
#[must_use]
pub fn tail_mask(batch: usize, seq: usize, seed: u64) -> Vec<u8> {
    // Any stream that the tensors do not use will do: a normal draw decides the length.
    let draws = Tensor::random(DType::F32, &[batch], !seed, 0.0);
    let mut mask = vec![0; batch * seq];
    for (b, row) in mask.chunks_exact_mut(seq).enumerate() {
        let share = 1.0 - draws.get(b).abs().min(1.0) / 2.0;
        let visible = ((share * seq as f64) as usize).clamp(1, seq);
        row[..visible].fill(1);
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_hide_up_to_half() {
        let mask = tail_mask(8, 100, 42);
        let visible: Vec<usize> =
            mask.chunks(100).map(|row| row.iter().map(|&x| usize::from(x)).sum()).collect();
        assert!(visible.iter().all(|n| (50..=100).contains(n)), "{visible:?}");
        assert!(visible.iter().any(|n| n != &visible[0]));
        assert_eq!(tail_mask(2, 1, 1), [1, 1]);
    }

    #[test]
    fn packed_lengths_are_spread_and_the_same_for_the_same_seed() {
        let [q, k] = cu_seqlens(1000, [64, 64], 42);
        assert_eq!((&q, q.len()), (&k, 1001));
        let mut seen: Vec<u32> = q.windows(2).map(|at| at[1] - at[0]).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, (1..=64).collect::<Vec<_>>());
        assert_eq!(cu_seqlens(1000, [64, 64], 42), [q.clone(), k]);
        assert_ne!(cu_seqlens(1000, [64, 65], 42)[1], q);
        assert_eq!(cu_seqlens(2, [1, 0], 1), [vec![0, 1, 2], vec![0, 0, 0]]);
    }

    #[test]
    fn q_k_and_v_differ() {
        let problem = Problem::builder(1, 1, 4, 32).build().unwrap();
        let tensors = Tensors::random(&problem, 1);
        assert!(tensors.q != tensors.k && tensors.k != tensors.v);
        assert!(tensors.inputs().check(&problem).is_ok());
    }
}
