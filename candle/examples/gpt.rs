//! A small GPT, trained twice on the text of this repository's book: with this crate's attention, and with
//! candle's own operations, from the same weights on the same batches. Prints both losses, writes a picture
//! of the curves, and a sample of what the model has learnt.
//!
//! ```sh
//! cargo run --release -p flash-attention-candle --example gpt -- --steps 200 --picture curves.svg
//! # On a GPU, a larger one:
//! cargo run --release -p flash-attention-candle --features cuda --example gpt -- \
//!     --device cuda --context 1024 --layers 6 --heads 6 --hidden 384 --batch 16
//! ```
//!
//! | option | default | |
//! |---|---|---|
//! | `--device` | cpu | or cuda |
//! | `--steps` | 60 | steps of AdamW |
//! | `--batch`, `--context` | 4, 128 | texts of a step, and bytes of a text |
//! | `--layers`, `--heads`, `--hidden` | 2, 4, 128 | sizes of the model |
//! | `--rate` | 0.002 | learning rate |
//! | `--text` | the book | a file |
//! | `--picture` | none | an SVG file for the curves |

mod own;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use flash_attention_candle::flash_attn;
use kuva::{
    plot::line::LinePlot,
    prelude::{Layout, Plot},
};
use own::argument;

/// Sizes of a model and of its training.
#[derive(Clone, Copy, Debug)]
struct Config {
    layers: usize,
    heads: usize,
    hidden: usize,
    context: usize,
    batch: usize,
    steps: usize,
    rate: f64,
}

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Candle,
    Flash,
}

/// A token is a byte.
const VOCABULARY: usize = 256;

/// Weights by layer; every one is a variable.
struct Model {
    tokens: Var,
    positions: Var,
    layers: Vec<[Var; 4]>,
    heads: usize,
    by: By,
}

impl Model {
    /// The same weights each time.
    fn new(config: &Config, by: By, device: &Device) -> Result<Self> {
        let mut seed = 0;
        let mut random = |shape: &[usize], deviation: f64| {
            seed += 1;
            let dtype = flash_attention::DType::F32;
            let numbers =
                flash_attention::Tensor::random(dtype, shape, seed, 0.0).scaled(deviation);
            Var::from_tensor(&Tensor::from_vec(numbers.to_f32(), shape, device)?)
        };
        let c = config.hidden;
        let (of_input, of_wide) = (1.0 / (c as f64).sqrt(), 1.0 / (4.0 * c as f64).sqrt());
        let tokens = random(&[VOCABULARY, c], 0.1)?;
        let positions = random(&[config.context, c], 0.1)?;
        let mut layer = || -> Result<[Var; 4]> {
            Ok([
                random(&[c, 3 * c], of_input)?,
                random(&[c, c], of_input)?,
                random(&[c, 4 * c], of_input)?,
                random(&[4 * c, c], of_wide)?,
            ])
        };
        let layers = (0..config.layers).map(|_| layer()).collect::<Result<_>>()?;
        Ok(Self { tokens, positions, layers, heads: config.heads, by })
    }

    fn variables(&self) -> Vec<Var> {
        let of_layers = self.layers.iter().flatten();
        [&self.tokens, &self.positions].into_iter().chain(of_layers).cloned().collect()
    }

    /// Scores `[B, N, 256]` of the bytes that follow each of `[B, N]`.
    fn forward(&self, text: &Tensor) -> Result<Tensor> {
        let (b, n) = text.dims2()?;
        let embedded = self.tokens.embedding(&text.flatten_all()?)?.reshape((b, n, ()))?;
        let mut x = embedded.broadcast_add(&self.positions.narrow(0, 0, n)?)?;
        for [qkv, out, wide, narrow] in &self.layers {
            let attended = self.attention(&linear(&norm(&x)?, qkv)?)?;
            x = (x + linear(&attended, out)?)?;
            x = (&x + linear(&linear(&norm(&x)?, wide)?.gelu()?, narrow)?)?;
        }
        // The embedding again, transposed.
        let (b, n, c) = x.dims3()?;
        norm(&x)?.reshape((b * n, c))?.matmul(&self.tokens.t()?)?.reshape((b, n, VOCABULARY))
    }

    /// Attention of `[B, N, 3 C]`.
    fn attention(&self, qkv: &Tensor) -> Result<Tensor> {
        let (b, n, c) = qkv.dims3()?;
        let (c, h) = (c / 3, self.heads);
        // Views of [B, N, H, D].
        let part = |at: usize| qkv.narrow(2, at * c, c)?.reshape((b, n, h, c / h));
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let o = match self.by {
            By::Flash => flash_attn(&q, &k, &v, 1.0 / ((c / h) as f32).sqrt(), true)?,
            By::Candle => {
                let hidden = own::causal(n, qkv.dtype(), qkv.device())?;
                let turned = |x: &Tensor| x.transpose(1, 2)?.contiguous();
                own::attention(&turned(&q)?, &turned(&k)?, &turned(&v)?, Some(&hidden))?
                    .transpose(1, 2)?
            }
        };
        o.reshape((b, n, c))
    }
}

fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (b, n, c) = x.dims3()?;
    x.reshape((b * n, c))?.matmul(w)?.reshape((b, n, ()))
}

/// To a mean square of 1. (candle's fused norms have no gradient.)
fn norm(x: &Tensor) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + 1e-5)?.sqrt()?)
}

/// A model in training.
struct Training {
    model: Model,
    optimizer: AdamW,
    losses: Vec<f32>,
    times: Vec<Duration>,
}

impl Training {
    fn new(config: &Config, by: By, device: &Device) -> Result<Self> {
        let model = Model::new(config, by, device)?;
        let parameters =
            ParamsAdamW { lr: config.rate, weight_decay: 0.01, ..ParamsAdamW::default() };
        let optimizer = AdamW::new(model.variables(), parameters)?;
        Ok(Self { model, optimizer, losses: Vec::new(), times: Vec::new() })
    }

    /// One step, of texts `[B, N + 1]`.
    fn step(&mut self, texts: &Tensor) -> Result<()> {
        let n = texts.dim(1)? - 1;
        let start = Instant::now();
        let scores = self.model.forward(&texts.narrow(1, 0, n)?.contiguous()?)?;
        let targets = texts.narrow(1, 1, n)?.contiguous()?.flatten_all()?;
        let loss = candle_nn::loss::cross_entropy(&scores.flatten_to(1)?, &targets)?;
        self.optimizer.backward_step(&loss)?;
        self.losses.push(loss.to_scalar::<f32>()?);
        self.times.push(start.elapsed());
        Ok(())
    }

    /// The median of the steps, in milliseconds.
    fn step_ms(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e3
    }
}

/// Trains with candle's own attention and with this crate's, on the same batches. The two take turns, so that
/// whatever else the machine does slows both.
fn train(config: &Config, text: &[u8], device: &Device) -> Result<[Training; 2]> {
    let of = |by| Training::new(config, by, device);
    let mut trainings = [of(By::Candle)?, of(By::Flash)?];
    // A generator of one multiplication (Knuth's MMIX).
    let mut state = 1u64;
    let mut below = |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % n
    };
    for _ in 0..config.steps {
        let n = config.context;
        let mut numbers = Vec::with_capacity(config.batch * (n + 1));
        for _ in 0..config.batch {
            let first = below(text.len() - n);
            numbers.extend(text[first..=first + n].iter().map(|&byte| u32::from(byte)));
        }
        let texts = Tensor::from_vec(numbers, (config.batch, n + 1), device)?;
        for training in &mut trainings {
            training.step(&texts)?;
        }
    }
    Ok(trainings)
}

/// The most probable bytes after a text.
fn sample(
    model: &Model,
    text: &str,
    count: usize,
    context: usize,
    device: &Device,
) -> Result<String> {
    let mut bytes: Vec<u32> = text.bytes().map(u32::from).collect();
    for _ in 0..count {
        let seen = &bytes[bytes.len().saturating_sub(context)..];
        let scores = model.forward(&Tensor::new(seen, device)?.unsqueeze(0)?)?;
        let last = scores.narrow(1, seen.len() - 1, 1)?.flatten_all()?;
        bytes.push(last.argmax(0)?.to_scalar()?);
    }
    let bytes: Vec<u8> = bytes.iter().map(|&byte| byte as u8).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The chapters of the book, one after the other.
fn book() -> Result<Vec<u8>> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let mut chapters: Vec<_> = fs::read_dir(docs)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    chapters.sort();
    let mut text = Vec::new();
    for chapter in chapters {
        text.extend(fs::read(chapter)?);
    }
    Ok(text)
}

/// Both curves as SVG.
fn picture(curves: [(&str, &[f32]); 2]) -> String {
    let line = |losses: &[f32], colour: &str, width: f64| -> Plot {
        let points: Vec<(f64, f64)> =
            losses.iter().enumerate().map(|(step, &loss)| (step as f64, f64::from(loss))).collect();
        LinePlot::new().with_data(points).with_color(colour).with_stroke_width(width).into()
    };
    // They lie on each other: the first is drawn wider.
    let [(first, a), (second, b)] = curves;
    let plots = vec![line(a, "#c9a227", 5.0), line(b, "#1f5fa8", 1.5)];
    let title = format!("loss of a small GPT: {first} (wide), {second} (thin)");
    let layout =
        Layout::auto_from_plots(&plots).with_title(title).with_x_label("step").with_y_label("loss");
    kuva::render_to_svg(plots, layout)
}

fn main() -> Result<()> {
    let config = Config {
        layers: argument("--layers", 2)?,
        heads: argument("--heads", 4)?,
        hidden: argument("--hidden", 128)?,
        context: argument("--context", 128)?,
        batch: argument("--batch", 4)?,
        steps: argument("--steps", 60)?,
        rate: argument("--rate", 2e-3)?,
    };
    let device = own::device(&argument("--device", "cpu".to_owned())?)?;
    let path = argument("--text", String::new())?;
    let text = if path.is_empty() { book()? } else { fs::read(path)? };
    if text.len() <= config.context {
        candle_core::bail!("the text has {} bytes: a context is {}", text.len(), config.context)
    }
    println!("{config:?}, {} bytes of text", text.len());
    let [candle, flash] = train(&config, &text, &device)?;
    println!("step   candle's own   flash-attention-candle");
    for step in (0..config.steps).step_by((config.steps / 12).max(1)) {
        println!("{step:4}   {:12.5}   {:12.5}", candle.losses[step], flash.losses[step]);
    }
    println!(
        "a step takes {:.1} ms and {:.1} ms; losses are at most {:.1e} apart",
        candle.step_ms(),
        flash.step_ms(),
        apart(&candle.losses, &flash.losses)
    );
    let picture_path = argument("--picture", String::new())?;
    if !picture_path.is_empty() {
        let curves =
            [("candle's own", &candle.losses[..]), ("flash-attention-candle", &flash.losses)];
        fs::write(&picture_path, picture(curves))?;
    }
    println!("{:?}", sample(&flash.model, "A warp ", 60, config.context, &device)?);
    Ok(())
}

/// The largest relative difference.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / a.abs()).fold(0.0, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_trainings_learn_the_same() {
        let config = Config {
            layers: 2,
            heads: 2,
            hidden: 64,
            context: 48,
            batch: 2,
            steps: 25,
            rate: 3e-3,
        };
        let text = book().unwrap();
        let [candle, flash] = train(&config, &text, &Device::Cpu).unwrap();
        let apart = apart(&candle.losses, &flash.losses);
        // A difference in rounding grows with each step.
        assert!(apart < 1e-3, "{apart}: {:?} {:?}", candle.losses, flash.losses);
        let (first, last) = (flash.losses[0], flash.losses[24]);
        assert!(last < 0.8 * first, "{first} to {last}");
        assert!(picture([("a", &candle.losses), ("b", &flash.losses)]).contains("<svg"));
    }
}
