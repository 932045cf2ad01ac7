//! Attention of one's own vectors, with a padding mask and a causal mask: host in, host out.
//!
//! ```sh
//! cargo run --example own_vectors
//! ```

use std::sync::Arc;

use flash_attention::{
    CpuDevice, Device, Error, GpuDevice, Problem, Tensor,
    half::f16,
    registry,
    session::{Inputs, Session},
};

fn main() -> Result<(), Error> {
    // Batch 2, 1 head, 4 tokens, head dim 64.
    let (batch, heads, tokens, head_dim) = (2, 1, 4, 64);
    let values = |f: fn(usize) -> f32| -> Vec<f16> {
        (0..batch * heads * tokens * head_dim).map(|i| f16::from_f32(f(i))).collect()
    };
    let shape = [batch, heads, tokens, head_dim];
    let q = Tensor::from_vec(&shape, values(|i| (i as f32 * 0.01).sin()))?;
    let k = Tensor::from_vec(&shape, values(|i| (i as f32 * 0.02).cos()))?;
    // Every element of a row of V is the number of its token.
    let v = Tensor::from_vec(&shape, values(|i| (i / 64 % 4) as f32))?;
    // The second sequence has two tokens; the other two are padding.
    let mask = [1, 1, 1, 1, 1, 1, 0, 0];

    let problem = Problem::builder(batch, heads, tokens, head_dim)
        .dtype(q.dtype())
        .causal(true)
        .mask(true)
        .build()?;
    // A GPU if there is one, else the emulator.
    let device: Arc<dyn Device> = match GpuDevice::open(0) {
        Ok(gpu) => Arc::new(gpu),
        Err(_) => Arc::new(CpuDevice::new()),
    };
    let session = Session::new(device);
    let kernel = registry::best_for(&problem, &session.target())?.kernel;
    let inputs = Inputs { mask: Some(&mask), ..Inputs::new(&q, &k, &v) };
    let (outputs, _) = session.run(kernel, &problem, &inputs)?;

    println!("{} on {}", kernel.name, session.device().name());
    let o = outputs.o.as_slice::<f16>()?;
    for row in 0..batch * tokens {
        println!(
            "sequence {}, token {}: the mean token it sees is {:.3}, its log-sum-exp {:.3}",
            row / tokens,
            row % tokens,
            o[row * head_dim],
            outputs.lse.get(row)
        );
    }
    Ok(())
}
