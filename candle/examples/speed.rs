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

/// The medians of five runs after one that does not count, in milliseconds. The two take turns, so that
/// whatever else the machine does slows both.
fn times(own: impl Fn() -> Result<()>, ours: impl Fn() -> Result<()>) -> Result<[f64; 2]> {
    let runs: [&dyn Fn() -> Result<()>; 2] = [&own, &ours];
    let mut times = [[Duration::ZERO; 5]; 2];
    for run in runs {
        run()?;
    }
    for at in 0..5 {
        for (run, times) in runs.iter().zip(&mut times) {
            let start = Instant::now();
            run()?;
            times[at] = start.elapsed();
        }
    }
    Ok(times.map(|mut times| {
        times.sort_unstable();
        times[2].as_secs_f64() * 1e3
    }))
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
                let [_, ours] = times(|| Ok(()), || ours().map(drop))?;
                println!("{dtype:?} {name}: candle has no such product; ours {ours:.1}");
                continue;
            };
            let apart = (expected - ours()?)?.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F32)?;
            let forward = times(|| own().map(drop), || ours().map(drop))?;
            let loss = |o: Tensor| o.sum_all()?.backward().map(drop);
            let both = times(
                || loss(own::attention(&q_var, &k_var, &v_var, hidden.as_ref())?),
                || loss(attention(&q_var, &k_var, &v_var, &options)?),
            )?;
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
