//! Trains an attention module: steps of SGD and of AdamW, from safetensors file to safetensors file.
//!
//! ```sh
//! cargo run --example train
//! ```
//!
//! A module with weights of its own learns what another one computes. The loss is half the squared
//! distance of y from the target, its mean over tokens; so dy is the distance itself over the number of
//! tokens. Weights, gradients and AdamW's two moments have the names and shapes of the same `state_dict`:
//! each is a [`Weights`], and a file.

use std::{path::Path, sync::Arc};

use flash_attention::{
    CpuDevice, DType, Device, Error, GpuDevice, Tensor,
    module::{Kernels, Linear, MultiHeadAttention, Pass, Weights},
    registry,
    session::Session,
};

const BATCH: usize = 2;
const TOKENS: usize = 24;
const HEADS: usize = 2;
const HIDDEN: usize = 64;
const STEPS: i32 = 4;

/// How weights follow their gradients.
#[derive(Clone, Copy, Debug)]
enum Optimiser {
    /// `w -= rate * g`.
    Sgd { rate: f32 },
    /// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    AdamW { rate: f32, beta1: f32, beta2: f32, epsilon: f32, decay: f32 },
}

const SGD: Optimiser = Optimiser::Sgd { rate: 0.1 };
const ADAM_W: Optimiser =
    Optimiser::AdamW { rate: 3e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, decay: 1e-2 };

impl Optimiser {
    /// Step `step`, from 1 on: the weights in `folder` and what belongs to them, by the gradients of
    /// the weights there.
    fn step(self, folder: &Path, step: i32, gradients: Weights) -> Result<(), Error> {
        let path = |name: &str| folder.join(name).with_extension("safetensors");
        let mut w = elements(Weights::load(&path("weights"))?);
        let g = elements(gradients);
        match self {
            Self::Sgd { rate } => {
                for (w, g) in w.iter_mut().zip(g) {
                    *w -= rate * g;
                }
            }
            Self::AdamW { rate, beta1, beta2, epsilon, decay } => {
                let before = |name: &str| match step {
                    1 => Ok(vec![0.0; g.len()]),
                    _ => Weights::load(&path(name)).map(elements),
                };
                let (mut m, mut v) = (before("m")?, before("v")?);
                // The moments began at 0.
                let [of_m, of_v] = [beta1, beta2].map(|beta| 1.0 - beta.powi(step));
                for (((w, g), m), v) in w.iter_mut().zip(&g).zip(&mut m).zip(&mut v) {
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *w -= rate * (*m / of_m / ((*v / of_v).sqrt() + epsilon) + decay * *w);
                }
                weights(&m)?.save(&path("m"))?;
                weights(&v)?.save(&path("v"))?;
            }
        }
        weights(&w)?.save(&path("weights"))
    }
}

/// The elements of all weights and biases.
fn elements(weights: Weights) -> Vec<f32> {
    let projections = weights.into_projections();
    projections.iter().flat_map(|l| [l.weight.to_f32(), l.bias.to_f32()].concat()).collect()
}

/// The reverse of [`elements`].
fn weights(elements: &[f32]) -> Result<Weights, Error> {
    let linear = |index: usize| -> Result<Linear, Error> {
        let (weight, bias) = elements[index * (HIDDEN + 1) * HIDDEN..].split_at(HIDDEN * HIDDEN);
        Ok(Linear {
            weight: Tensor::from_f32(DType::F32, &[HIDDEN, HIDDEN], weight)?,
            bias: Tensor::from_f32(DType::F32, &[HIDDEN], &bias[..HIDDEN])?,
        })
    };
    Weights::new([linear(0)?, linear(1)?, linear(2)?, linear(3)?])
}

/// Trains the module in `folder` and returns the loss before each step and after the last.
fn train(folder: &Path, optimiser: Optimiser) -> Result<Vec<f64>, Error> {
    let device: Arc<dyn Device> = match GpuDevice::open(0) {
        Ok(gpu) => Arc::new(gpu),
        Err(_) => Arc::new(CpuDevice::new()),
    };
    let session = Session::new(device);
    let x = Tensor::random(DType::F32, &[BATCH, TOKENS, HIDDEN], 1, 0.0);
    let pass = Pass { causal: true, ..Pass::default() };
    let path = folder.join("weights.safetensors");
    Weights::random(DType::F32, HIDDEN, 2)?.save(&path)?;

    let teacher =
        MultiHeadAttention::new(&session, &Weights::random(DType::F32, HIDDEN, 3)?, HEADS)?;
    let problem = teacher.problem(BATCH, TOKENS, false, &pass)?;
    let kernels = Kernels::best(&registry::Backward::new(problem), &session.target())?;
    let (target, _) = teacher.forward(kernels.forward, &x, None, &pass)?;

    let mut losses = Vec::new();
    for step in 1..=STEPS + 1 {
        let module = MultiHeadAttention::new(&session, &Weights::load(&path)?, HEADS)?;
        let (outputs, _) = module.forward(kernels.forward, &x, None, &pass)?;
        let distances: Vec<f32> = outputs
            .y
            .to_f32()
            .iter()
            .zip(target.y.to_f32())
            .map(|(y, target)| y - target)
            .collect();
        let tokens = (BATCH * TOKENS) as f32;
        let squares = distances.iter().map(|d| f64::from(d * d));
        losses.push(squares.sum::<f64>() / (2.0 * f64::from(tokens)));
        if step > STEPS {
            break;
        }
        let dy: Vec<f32> = distances.iter().map(|distance| distance / tokens).collect();
        let dy = Tensor::from_f32(DType::F32, x.shape(), &dy)?;
        let (gradients, _) = module.backward(kernels, &x, &dy, None, &pass)?;
        optimiser.step(folder, step, gradients.weights)?;
    }
    println!("by {} and {}", kernels.forward.name, kernels.backward.name);
    Ok(losses)
}

fn main() -> Result<(), Error> {
    for (name, optimiser) in [("SGD", SGD), ("AdamW", ADAM_W)] {
        let folder = std::env::temp_dir().join(format!("flash-attention-train-{name}"));
        let io = |source| Error::Io { path: folder.clone(), source };
        std::fs::create_dir_all(&folder).map_err(io)?;
        let losses = train(&folder, optimiser)?;
        println!("{name}: loss {losses:.3?}, files in {}", folder.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each step lowers the loss; the last step's files remain.
    #[test]
    fn the_loss_falls_with_each_step() {
        for (optimiser, files) in [(SGD, 1), (ADAM_W, 3)] {
            let folder = tempfile::tempdir().unwrap();
            let losses = train(folder.path(), optimiser).unwrap();
            assert_eq!(losses.len(), STEPS as usize + 1);
            assert!(
                losses.is_sorted_by(|before, after| after < before),
                "{optimiser:?} {losses:?}"
            );
            assert!(losses[STEPS as usize] < 0.9 * losses[0], "{optimiser:?} {losses:?}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), files);
            let trained = Weights::load(&folder.path().join("weights.safetensors")).unwrap();
            assert_ne!(trained, Weights::random(DType::F32, HIDDEN, 2).unwrap());
        }
    }
}
