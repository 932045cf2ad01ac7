//! A model of Llama's form: grouped heads, rotary embeddings, and windows as Mistral has them. It reads a
//! prompt, then goes on greedily with a cache of keys and values: once with this crate's attention, once with
//! candle's own operations. Prints tokens per second of both, and whether they chose the same tokens.
//!
//! Weights are random unless a folder with `config.json` and `model.safetensors` is given.
//!
//! ```sh
//! cargo run --release -p flash-attention-candle --example llama -- --prompt 512 --tokens 64
//! cargo run --release -p flash-attention-candle --features cuda --example llama -- \
//!     --device cuda --dtype f16 --hidden 4096 --heads 32 --kv-heads 8 --layers 16 --prompt 8192
//! ```
//!
//! | option | default | |
//! |---|---|---|
//! | `--device` | cpu | or cuda |
//! | `--dtype` | f32 | f16 or bf16 |
//! | `--prompt`, `--tokens` | 256, 32 | tokens read and written |
//! | `--layers`, `--hidden`, `--heads`, `--kv-heads` | 4, 256, 8, 2 | sizes of random weights |
//! | `--window` | 0 | keys that a row sees, itself included; 0 is all |
//! | `--model` | none | a folder |

mod own;

use std::{collections::HashMap, fs::File, path::Path, time::Instant};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use flash_attention_candle::{Options, Window, attention};
use own::argument;

/// Sizes of a model, by the names of `config.json`.
#[derive(Clone, Debug, serde::Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    #[serde(default)]
    num_key_value_heads: Option<usize>,
    #[serde(default = "usual_theta")]
    rope_theta: f64,
    rms_norm_eps: f64,
    #[serde(default)]
    sliding_window: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: bool,
}

const fn usual_theta() -> f64 {
    10_000.0
}

impl Config {
    fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    const fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Causal, and no further back than the window.
    fn window(&self) -> Window {
        let left = self.sliding_window.map(|keys| keys.saturating_sub(1) as u32);
        Window { left, right: Some(0) }
    }

    /// Names and shapes of the weights.
    fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let (c, wide, kv) =
            (self.hidden_size, self.intermediate_size, self.kv_heads() * self.head_dim());
        let mut weights = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, c]),
            ("model.norm.weight".to_owned(), vec![c]),
            ("lm_head.weight".to_owned(), vec![self.vocab_size, c]),
        ];
        for layer in 0..self.num_hidden_layers {
            for (name, shape) in [
                ("input_layernorm", vec![c]),
                ("self_attn.q_proj", vec![c, c]),
                ("self_attn.k_proj", vec![kv, c]),
                ("self_attn.v_proj", vec![kv, c]),
                ("self_attn.o_proj", vec![c, c]),
                ("post_attention_layernorm", vec![c]),
                ("mlp.gate_proj", vec![wide, c]),
                ("mlp.up_proj", vec![wide, c]),
                ("mlp.down_proj", vec![c, wide]),
            ] {
                weights.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        weights
    }

    /// The same random weights each time.
    fn random(&self, dtype: DType, device: &Device) -> Result<HashMap<String, Tensor>> {
        let of = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
            let tensor = match shape[..] {
                [_] => Tensor::ones(shape, dtype, device)?,
                _ => {
                    let f32 = flash_attention::DType::F32;
                    let deviation = 1.0 / (shape[1] as f64).sqrt();
                    let numbers = flash_attention::Tensor::random(f32, &shape, seed as u64, 0.0);
                    let numbers = numbers.scaled(deviation).to_f32();
                    Tensor::from_vec(numbers, shape, device)?.to_dtype(dtype)?
                }
            };
            Ok((name, tensor))
        };
        self.weights().into_iter().enumerate().map(of).collect()
    }
}

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Candle,
    Flash,
}

struct Layer {
    norms: [Tensor; 2],
    qkvo: [Tensor; 4],
    gate_up_down: [Tensor; 3],
}

struct Model {
    config: Config,
    embedding: Tensor,
    norm: Tensor,
    head: Tensor,
    layers: Vec<Layer>,
    /// Cosines and sines of every position, `[capacity, D / 2]`.
    rotary: [Tensor; 2],
}

/// Keys and values of each layer so far, `[B, Hkv, capacity, D]`.
struct Cache {
    layers: Vec<[Tensor; 2]>,
    len: usize,
}

impl Model {
    fn new(config: &Config, weights: VarBuilder, capacity: usize) -> Result<Self> {
        let (c, d) = (config.hidden_size, config.head_dim());
        let (wide, kv) = (config.intermediate_size, config.kv_heads() * d);
        let get = |name: &str, shape: &[usize]| weights.get(shape, &format!("{name}.weight"));
        let layer = |at: usize| -> Result<Layer> {
            let get =
                |name: &str, shape: &[usize]| get(&format!("model.layers.{at}.{name}"), shape);
            Ok(Layer {
                norms: [get("input_layernorm", &[c])?, get("post_attention_layernorm", &[c])?],
                qkvo: [
                    get("self_attn.q_proj", &[c, c])?,
                    get("self_attn.k_proj", &[kv, c])?,
                    get("self_attn.v_proj", &[kv, c])?,
                    get("self_attn.o_proj", &[c, c])?,
                ],
                gate_up_down: [
                    get("mlp.gate_proj", &[wide, c])?,
                    get("mlp.up_proj", &[wide, c])?,
                    get("mlp.down_proj", &[c, wide])?,
                ],
            })
        };
        let embedding = get("model.embed_tokens", &[config.vocab_size, c])?;
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => get("lm_head", &[config.vocab_size, c])?,
        };
        let mut angles = Vec::with_capacity(capacity * d / 2);
        for position in 0..capacity {
            let rate = |i: usize| config.rope_theta.powf(-2.0 * i as f64 / d as f64);
            angles.extend((0..d / 2).map(|i| (position as f64 * rate(i)) as f32));
        }
        let angles = Tensor::from_vec(angles, (capacity, d / 2), weights.device())?;
        let dtype = embedding.dtype();
        Ok(Self {
            config: config.clone(),
            norm: get("model.norm", &[c])?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            rotary: [angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?],
            embedding,
            head,
        })
    }

    fn cache(&self) -> Result<Cache> {
        let capacity = self.rotary[0].dim(0)?;
        let shape = (1, self.config.kv_heads(), capacity, self.config.head_dim());
        let empty = || Tensor::zeros(shape, self.embedding.dtype(), self.embedding.device());
        let layers = self.layers.iter().map(|_| Ok([empty()?, empty()?])).collect::<Result<_>>()?;
        Ok(Cache { layers, len: 0 })
    }

    /// Scores of what follows the last of these tokens, which join the cache.
    fn forward(&self, tokens: &[u32], cache: &mut Cache, by: By) -> Result<Tensor> {
        let (n, eps) = (tokens.len(), self.config.rms_norm_eps as f32);
        let tokens = Tensor::new(tokens, self.embedding.device())?;
        let mut x = self.embedding.embedding(&tokens)?.unsqueeze(0)?;
        let [cos, sin] = &self.rotary;
        let rotary = [cos.narrow(0, cache.len, n)?, sin.narrow(0, cache.len, n)?];
        for (layer, kv) in self.layers.iter().zip(&cache.layers) {
            let normed = candle_nn::ops::rms_norm(&x, &layer.norms[0], eps)?;
            x = (x + self.attention(&normed, layer, &rotary, kv, cache.len, by)?)?;
            let normed = candle_nn::ops::rms_norm(&x, &layer.norms[1], eps)?;
            let [gate, up, down] = &layer.gate_up_down;
            let wide = (linear(&normed, gate)?.silu()? * linear(&normed, up)?)?;
            x = (x + linear(&wide, down)?)?;
        }
        cache.len += n;
        let last =
            candle_nn::ops::rms_norm(&x.narrow(1, n - 1, 1)?.contiguous()?, &self.norm, eps)?;
        linear(&last, &self.head)?.flatten_all()
    }

    fn attention(
        &self,
        x: &Tensor,
        layer: &Layer,
        [cos, sin]: &[Tensor; 2],
        [k_cache, v_cache]: &[Tensor; 2],
        before: usize,
        by: By,
    ) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let d = self.config.head_dim();
        let heads =
            |x: Tensor, heads: usize| x.reshape((b, n, heads, d))?.transpose(1, 2)?.contiguous();
        let [q, k, v, o] = &layer.qkvo;
        let q = heads(linear(x, q)?, self.config.num_attention_heads)?;
        let k = heads(linear(x, k)?, self.config.kv_heads())?;
        let v = heads(linear(x, v)?, self.config.kv_heads())?;
        let q = candle_nn::rotary_emb::rope(&q, cos, sin)?;
        k_cache.slice_set(&candle_nn::rotary_emb::rope(&k, cos, sin)?, 2, before)?;
        v_cache.slice_set(&v, 2, before)?;
        // Views: nothing of the cache is copied.
        let (k, v) = (k_cache.narrow(2, 0, before + n)?, v_cache.narrow(2, 0, before + n)?);
        let window = self.config.window();
        let attended = match by {
            By::Flash => attention(&q, &k, &v, &Options { window, ..Options::default() })?,
            By::Candle => {
                let hidden = match (n, self.config.sliding_window) {
                    (1, None) => None,
                    _ => Some(own::hidden(n, before + n, window, q.dtype(), q.device())?),
                };
                own::attention(&q, &k, &v, hidden.as_ref())?
            }
        };
        linear(&attended.transpose(1, 2)?.reshape((b, n, c))?, o)
    }
}

/// `x Wᵀ` of `[B, N, C]`.
fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (b, n, c) = x.dims3()?;
    x.reshape((b * n, c))?.matmul(&w.t()?)?.reshape((b, n, ()))
}

/// Runs of each attention, of which the median rate is shown.
const ROUNDS: usize = 3;

/// The results of a run.
struct Written {
    tokens: Vec<u32>,
    /// Tokens per second, of reading and of writing.
    rates: [f64; 2],
}

fn write(model: &Model, prompt: &[u32], count: usize, by: By) -> Result<Written> {
    let mut cache = model.cache()?;
    let device = model.embedding.device();
    let greedy = |scores: &Tensor| scores.argmax(0)?.to_scalar::<u32>();
    let start = Instant::now();
    let mut tokens = vec![greedy(&model.forward(prompt, &mut cache, by)?)?];
    device.synchronize()?;
    let reading = prompt.len() as f64 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    while tokens.len() < count {
        let last = tokens[tokens.len() - 1];
        tokens.push(greedy(&model.forward(&[last], &mut cache, by)?)?);
    }
    device.synchronize()?;
    let writing = (count - 1) as f64 / start.elapsed().as_secs_f64();
    Ok(Written { tokens, rates: [reading, writing] })
}

fn main() -> Result<()> {
    let device = own::device(&argument("--device", "cpu".to_owned())?)?;
    let dtype: DType = argument("--dtype", DType::F32)?;
    let (prompt, count): (usize, usize) = (argument("--prompt", 256)?, argument("--tokens", 32)?);
    let folder = argument("--model", String::new())?;
    let hidden = argument("--hidden", 256)?;
    let (config, weights) = if folder.is_empty() {
        let config = Config {
            vocab_size: 1000,
            hidden_size: hidden,
            intermediate_size: hidden * 11 / 4,
            num_hidden_layers: argument("--layers", 4)?,
            num_attention_heads: argument("--heads", 8)?,
            num_key_value_heads: Some(argument("--kv-heads", 2)?),
            rope_theta: usual_theta(),
            rms_norm_eps: 1e-5,
            sliding_window: Some(argument("--window", 0)?).filter(|&keys| keys > 0),
            tie_word_embeddings: false,
        };
        let weights = config.random(dtype, &device)?;
        (config, weights)
    } else {
        let folder = Path::new(&folder);
        let config = serde_json::from_reader(File::open(folder.join("config.json"))?);
        let weights = candle_core::safetensors::load(folder.join("model.safetensors"), &device)?;
        (config.map_err(candle_core::Error::wrap)?, weights)
    };
    println!("{config:?}, {dtype:?}");
    let weights = VarBuilder::from_tensors(weights, dtype, &device);
    let model = Model::new(&config, weights, prompt + count)?;
    let prompt: Vec<u32> = (0..prompt).map(|i| (i * 7919 % config.vocab_size) as u32).collect();
    let both = [By::Candle, By::Flash];
    for by in both {
        // The first run has the kernels compiled.
        write(&model, &prompt, 2, by)?;
    }
    // In turns, so that a change of the machine's load meets both.
    let mut runs = both.map(|_| Vec::with_capacity(ROUNDS));
    for _ in 0..ROUNDS {
        for (by, runs) in both.into_iter().zip(&mut runs) {
            runs.push(write(&model, &prompt, count, by)?);
        }
    }
    for (by, runs) in both.into_iter().zip(&runs) {
        let median = |of: usize| {
            let mut rates: Vec<f64> = runs.iter().map(|run| run.rates[of]).collect();
            rates.sort_by(f64::total_cmp);
            rates[ROUNDS / 2]
        };
        println!("{by:?}: {:.0} tokens/s read, {:.1} tokens/s written", median(0), median(1));
    }
    let [candle, flash] = runs.each_ref().map(|runs| &runs[0].tokens);
    let same = candle.iter().zip(flash).take_while(|(a, b)| a == b).count();
    println!("the first {same} of {count} tokens are the same");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sliding_window: Option<usize>) -> Config {
        Config {
            vocab_size: 200,
            hidden_size: 128,
            intermediate_size: 256,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: Some(2),
            rope_theta: usual_theta(),
            rms_norm_eps: 1e-5,
            sliding_window,
            tie_word_embeddings: false,
        }
    }

    #[test]
    fn both_write_the_same_tokens() {
        for window in [None, Some(24)] {
            let config = config(window);
            let weights = config.random(DType::F32, &Device::Cpu).unwrap();
            // Through a file, as a real model comes.
            let file = tempfile::NamedTempFile::new().unwrap();
            candle_core::safetensors::save(&weights, file.path()).unwrap();
            let weights = candle_core::safetensors::load(file.path(), &Device::Cpu).unwrap();
            let weights = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
            let model = Model::new(&config, weights, 80).unwrap();
            let prompt: Vec<u32> = (0..40).map(|i| i * 37 % 200).collect();
            let of = |by| write(&model, &prompt, 30, by).unwrap().tokens;
            let (candle, flash) = (of(By::Candle), of(By::Flash));
            assert_eq!(candle, flash);
            // Written one by one, or read at once: the same next token.
            let mut cache = model.cache().unwrap();
            let all = [&prompt[..], &flash[..29]].concat();
            let scores = model.forward(&all, &mut cache, By::Flash).unwrap();
            assert_eq!(scores.argmax(0).unwrap().to_scalar::<u32>().unwrap(), flash[29]);
        }
    }
}
