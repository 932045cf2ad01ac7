//! Attention as operations of candle's graph.

use std::sync::{Arc, OnceLock};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage, bail,
};
use flash_attention::Problem;

use crate::{check, cpu::Wanted, on_cpu, options::Options, paged};

/// Attention of `q`, `k` and `v`: `softmax(Q Kᵀ scale) V`, with the features of the options.
///
/// In the default layout, `q` is `[B, H, Nq, D]`, `k` `[B, Hkv, Nk, D]`, `v` `[B, Hkv, Nk, Dv]`, and the
/// result `[B, H, Nq, Dv]`, contiguous. `Hkv` divides `H`.
///
/// # Errors
/// [What is wrong](crate#shapes-types-strides-errors) with a tensor or an option.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options) -> Result<Tensor> {
    attention_with_lse(q, k, v, options).map(|(o, _)| o)
}

/// As [`attention`], with the log-sum-exp of each row's scores: f32 `[B, H, Nq]`, of packed sequences
/// `[H, total_q]`, natural log. The graph does not include it.
///
/// # Errors
/// As [`attention`].
pub fn attention_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Options,
) -> Result<(Tensor, Tensor)> {
    let problem = check::problem(q, k, v, options)?;
    if let (Some(_), Some(varlen), true) =
        (&options.page_table, &options.varlen, q.device().is_cuda())
    {
        return paged::padded(q, k, v, options, varlen);
    }
    let [bias, sinks] = [&options.bias, &options.sinks]
        .map(|tensor| tensor.as_ref().filter(|tensor| tensor.track_op()));
    // The passes read them; their gradients are operations of their own.
    let detached = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::detach);
    let options = Options {
        bias: detached(&options.bias),
        sinks: detached(&options.sinks),
        ..options.clone()
    };
    let call = Arc::new(Call { problem, options, lse: OnceLock::new() });
    let mut o = q.apply_op3(k, v, Attention(call.clone()))?;
    let Some(lse) = call.lse.get().cloned() else { bail!("attention left no LSE") };
    for (tensor, wanted) in [
        (bias, Wanted { bias: true, ..Wanted::default() }),
        (sinks, Wanted { sinks: true, ..Wanted::default() }),
    ] {
        if let Some(tensor) = tensor {
            let qkvo = [q, k, v, &o].map(Tensor::detach);
            o = o.apply_op2(tensor, OfBeside { call: call.clone(), qkvo, wanted })?;
        }
    }
    Ok((o, lse))
}

/// The state that both passes of a call share.
#[derive(Debug)]
pub struct Call {
    pub problem: Problem,
    pub options: Options,
    /// Left by the forward pass.
    pub lse: OnceLock<Tensor>,
}

/// The requested gradients; dQ, dK and dV have the shapes of Q, K and V.
#[derive(Debug, Default)]
pub struct Gradients {
    pub qkv: Option<[Tensor; 3]>,
    pub bias: Option<Tensor>,
    pub sinks: Option<Tensor>,
}

impl Call {
    /// Keeps the LSE for the backward pass and for the caller.
    pub fn keep_lse(&self, storage: Storage) {
        let shape: Shape = match self.problem.lse_shape() {
            [_, heads, rows] if self.problem.varlen().is_some() => (heads, rows).into(),
            [batch, heads, rows] => (batch, heads, rows).into(),
        };
        let none = candle_core::op::BackpropOp::none();
        _ = self.lse.set(Tensor::from_storage(storage, shape, none, false));
    }

    /// Shape of O.
    pub fn o_shape(&self) -> Shape {
        match self.problem.o_shape() {
            [_, rows, heads, d] if self.problem.varlen().is_some() => (rows, heads, d).into(),
            shape => shape.to_vec().into(),
        }
    }

    /// The gradients, given the gradient of O.
    fn gradients(&self, qkvo: [&Tensor; 4], d_o: &Tensor, wanted: Wanted) -> Result<Gradients> {
        for (name, tensor) in
            [("key_lengths", &self.options.key_lengths), ("page_table", &self.options.page_table)]
        {
            if tensor.is_some() {
                bail!("attention with {name} has no gradient: a cache is not trained through")
            }
        }
        let Some(lse) = self.lse.get() else { bail!("attention left no LSE") };
        let d_o = d_o.contiguous()?;
        match qkvo[0].device() {
            candle_core::Device::Cpu => on_cpu::backward(self, qkvo, lse, &d_o, wanted),
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(_) => crate::cuda::backward(self, qkvo, lse, &d_o, wanted),
            other => bail!("attention has no gradients on {:?}", other.location()),
        }
    }
}

/// O of Q, K and V.
struct Attention(Arc<Call>);

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "flash-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let qkv = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let (o, lse) = on_cpu::forward(&self.0, qkv)?;
        self.0.keep_lse(Storage::Cpu(lse));
        Ok((o, self.0.o_shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let qkv = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let (o, lse) = crate::cuda::forward(&self.0, qkv)?;
        self.0.keep_lse(Storage::Cuda(lse));
        Ok((o, self.0.o_shape()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wanted = Wanted { qkv: true, ..Wanted::default() };
        let gradients = self.0.gradients([q, k, v, o], d_o, wanted)?;
        Ok(gradients.qkv.map_or((None, None, None), |[dq, dk, dv]| (Some(dq), Some(dk), Some(dv))))
    }
}

/// Passes O on, and takes a bias or sinks: an operation has at most three tensors, so their gradients come
/// from this one.
struct OfBeside {
    call: Arc<Call>,
    /// The call's tensors and outputs.
    qkvo: [Tensor; 4],
    wanted: Wanted,
}

impl CustomOp2 for OfBeside {
    fn name(&self) -> &'static str {
        "flash-attention-beside"
    }

    fn cpu_fwd(
        &self,
        o: &CpuStorage,
        o_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((o.try_clone(o_layout)?, self.call.o_shape()))
    }

    fn cuda_fwd(
        &self,
        o: &CudaStorage,
        o_layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((o.try_clone(o_layout)?, self.call.o_shape()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [q, k, v, o] = &self.qkvo;
        let gradients = self.call.gradients([q, k, v, o], d_o, self.wanted)?;
        Ok((Some(d_o.clone()), gradients.bias.or(gradients.sinks)))
    }
}

/// Elements from one batch entry, head and row to the next, of a tensor of Q, K, V or O.
pub fn strides(p: &Problem, layout: &Layout) -> [usize; 3] {
    match *layout.stride() {
        [row, head, _] => [0, head, row],
        [batch, second, third, _] => match p.layout() {
            flash_attention::Layout::HeadsFirst => [batch, second, third],
            flash_attention::Layout::TokensFirst => [batch, third, second],
        },
        _ => [0; 3],
    }
}

/// Pages of a cache, and keys of each.
pub fn pages(p: &Problem, k: &Layout) -> [usize; 2] {
    match (k.dims(), p.layout()) {
        (&[pages, _, size, _], flash_attention::Layout::HeadsFirst)
        | (&[pages, size, ..], flash_attention::Layout::TokensFirst) => [pages, size],
        _ => [0; 2],
    }
}
