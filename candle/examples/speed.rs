//! Attention beside candle's own products and softmax, forward and with gradients: times, and how far the
//! results are apart.
//!
//! ```sh
//! cargo run --release -p flash-attention-candle --example speed -- 1 8 1024 64
//! ```

mod own;

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor, Var};
use flash_attention_candle::{Options, attention};

/// The median of five runs after one that does not count.
fn time(mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    run()?;
    let mut times = [Duration::ZERO; 5];
    for time in &mut times {
        let start = Instant::now();
        run()?;
        *time = start.elapsed();
    }
    times.sort_unstable();
    Ok(times[2])
}

fn main() -> anyhow::Result<()> {
    let sizes: Vec<usize> =
        std::env::args().skip(1).map(|size| size.parse()).collect::<anyhow::Result<_, _>>()?;
    let [b, h, n, d] = sizes.try_into().unwrap_or([1, 8, 1024, 64]);
    let device = Device::Cpu;
    println!(
        "batch {b}, heads {h}, N {n}, D {d}; milliseconds, candle's own formula and attention"
    );
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let random = || Tensor::randn(0f32, 1.0, (b, h, n, d), &device)?.to_dtype(dtype);
        let (q, k, v) = (random()?, random()?, random()?);
        for causal in [false, true] {
            let hidden = if causal { Some(own::causal(n, dtype, &device)?) } else { None };
            let options = Options { causal, ..Options::default() };
            let own = || own::attention(&q, &k, &v, hidden.as_ref());
            let ours = || attention(&q, &k, &v, &options);
            let [q_var, k_var, v_var] =
                [Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?];
            let name = if causal { "causal" } else { "full" };
            let Ok(expected) = own() else {
                println!(
                    "{dtype:?} {name}: candle has no such product; ours {:.1}",
                    ms(time(|| ours().map(drop))?)
                );
                continue;
            };
            let apart = (expected - ours()?)?.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F32)?;
            let forward = [time(|| own().map(drop))?, time(|| ours().map(drop))?].map(ms);
            let both = [
                time(|| {
                    own::attention(&q_var, &k_var, &v_var, hidden.as_ref())?
                        .sum_all()?
                        .backward()
                        .map(drop)
                })?,
                time(|| {
                    attention(&q_var, &k_var, &v_var, &options)?.sum_all()?.backward().map(drop)
                })?,
            ]
            .map(ms);
            println!(
                "{dtype:?} {name}: forward {:.1} and {:.1}, with gradients {:.1} and {:.1}; at most {:.1e} apart",
                forward[0],
                forward[1],
                both[0],
                both[1],
                apart.to_scalar::<f32>()?
            );
        }
    }
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
