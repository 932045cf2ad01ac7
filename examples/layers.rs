//! Several layers of multi-head attention, one after the other on the device: nothing comes back
//! to the host between them, and after the first call nothing is allocated.
//!
//! ```sh
//! cargo run --example layers
//! ```

use std::sync::Arc;

use flash_attention::{
    CpuDevice, DType, Device, Error, GpuDevice, Tensor,
    module::{MultiHeadAttention, Pass, Weights},
    registry,
    session::Session,
};

const LAYERS: u64 = 4;
const HEADS: usize = 2;
const HIDDEN: usize = 128;
const TOKENS: usize = 48;

fn main() -> Result<(), Error> {
    let device: Arc<dyn Device> = match GpuDevice::open(0) {
        Ok(gpu) => Arc::new(gpu),
        Err(_) => Arc::new(CpuDevice::new()),
    };
    let session = Session::new(device);
    // A model would load them: Weights::load(path).
    let layers = (0..LAYERS)
        .map(|seed| {
            let weights = Weights::random(DType::F16, HIDDEN, seed)?;
            MultiHeadAttention::new(&session, &weights, HEADS)
        })
        .collect::<Result<Vec<_>, Error>>()?;

    let pass = Pass { causal: true, ..Pass::default() };
    let problem = layers[0].problem(1, TOKENS, false, &pass)?;
    let kernel = registry::best_for(&problem, &session.target())?.kernel;
    // Two sets of buffers, since a layer reads the output of the one before.
    let mut buffers = [
        layers[0].forward_buffers(kernel, &problem)?,
        layers[0].forward_buffers(kernel, &problem)?,
    ];
    let x = Tensor::random(DType::F16, &[1, TOKENS, HIDDEN], 42, 0.0);
    let x = session.upload(&x)?;
    let before = session.memory().current();
    for call in 1..=3 {
        let [mut from, mut to] = buffers.each_mut();
        from.run(&layers[0], &x, None)?;
        for layer in &layers[1..] {
            to.run(layer, from.y(), None)?;
            std::mem::swap(&mut from, &mut to);
        }
        let y = from.y().to_host()?;
        println!("call {call}: y[0] = {:.5}", y.get(0));
    }
    assert_eq!(session.memory().current(), before, "nothing was allocated");
    println!("{LAYERS} layers by {} on {}", kernel.name, session.device().name());
    Ok(())
}
