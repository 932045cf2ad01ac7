//! Causal attention by flash_pipelined on the emulator, compared with f64.

use std::sync::Arc;

use flash_attention::{
    CpuDevice, DType, Error, Problem, Tensor, oracle, ptx, registry,
    session::{Inputs, Session},
};

fn main() -> Result<(), Error> {
    let session = Session::new(Arc::new(CpuDevice::new()));
    // Fewer queries than keys, and neither a multiple of a tile.
    let problem = Problem::builder(1, 2, 70, 64).seq_k(90).dtype(DType::F16).causal(true).build()?;
    let q = Tensor::random(DType::F16, &problem.q_shape(), 1, 0.0);
    let k = Tensor::random(DType::F16, &problem.k_shape(), 2, 0.0);
    let v = Tensor::random(DType::F16, &problem.k_shape(), 3, 0.0);
    let inputs = Inputs::new(&q, &k, &v);
    let (outputs, _) = session.run(registry::find("flash_pipelined")?, &problem, &inputs)?;

    let exact = oracle::reference(&problem, &inputs, &oracle::all_rows(&problem));
    let differences = outputs.o.to_f64().into_iter().zip(&exact.o).map(|(a, b)| (a - b).abs());
    let error = differences.fold(0.0, f64::max);
    println!("flash_pipelined, causal, on the emulator: largest error {error:.1e}");
    assert!(error < 2e-3, "{error}");
    println!("{} PTX modules", ptx::modules().len());
    for module in ptx::modules() {
        let symbol = module.entries().next().expect("each module has an entry");
        assert!(module.entry(symbol).is_some_and(|text| text.contains(".entry ")), "{symbol}");
    }
    Ok(())
}
