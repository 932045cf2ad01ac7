use safetensors::{Dtype, tensor::TensorView};

use super::*;
use crate::{
    backend::CpuDevice,
    registry::{BACKWARD_KERNELS, KERNELS, KernelSpec, LINEAR_KERNELS, find, find_backward},
    session::counting::{Calls, Counting},
};

const HIDDEN: usize = 128;

fn session() -> Session {
    Session::new(Arc::new(CpuDevice::new()))
}

fn module(session: &Session, dtype: DType) -> MultiHeadAttention {
    MultiHeadAttention::new(session, &Weights::random(dtype, HIDDEN, 7).unwrap(), 2).unwrap()
}

#[test]
fn memory_is_as_predicted() {
    let session = session();
    let module = module(&session, DType::F16);
    let x = Tensor::random(DType::F16, &[2, 40, HIDDEN], 1, 0.0);
    let mask = vec![1; 80];
    let able = |k: &&KernelSpec| k.dtypes.contains(&DType::F16) && k.limits.head_dims.contains(&64);
    for kernel in KERNELS.iter().filter(able) {
        for weights in [false, true] {
            let pass = Pass { weights, ..Pass::default() };
            let problem = module.problem(2, 40, true, &pass).unwrap();
            let (outputs, memory) = module.forward(kernel, &x, Some(&mask), &pass).unwrap();
            let extra =
                if weights && !kernel.limits.features.weights { 2 * 2 * 40 * 40 * 2 } else { 0 };
            let pass_bytes = pass_bytes(&kernel.plan(&problem, &session.target()).unwrap());
            assert_eq!(memory.peak, memory.parameters + pass_bytes + extra, "{}", kernel.name);
            assert_eq!(memory.parameters, parameter_bytes(&problem));
            assert_eq!((memory.inputs, memory.outputs), (2 * 40 * 128 * 2 + 80, 2 * 40 * 128 * 2));
            assert_eq!(outputs.weights.is_some(), weights);
            // Everything but the parameters is given back.
            assert_eq!(session.memory().current(), memory.parameters);
        }
    }
    drop(module);
    assert_eq!(session.memory().current(), 0);
}

#[test]
fn memory_of_the_backward_pass_is_as_predicted() {
    let session = session();
    let module = module(&session, DType::F16);
    let random = |seed| Tensor::random(DType::F16, &[2, 40, HIDDEN], seed, 0.0);
    let (x, dy, mask) = (random(1), random(2), vec![1; 80]);
    let forward = find("flash_tiled").unwrap();
    for backward in BACKWARD_KERNELS {
        let pass = Pass::default();
        let problem = module.problem(2, 40, true, &pass).unwrap();
        let (_, memory) =
            module.backward(Kernels { forward, backward }, &x, &dy, Some(&mask), &pass).unwrap();
        let plans = (
            forward.plan(&problem, &session.target()).unwrap(),
            backward.plan(&registry::Backward::new(problem), &session.target()).unwrap(),
        );
        let predicted = memory.parameters + training_bytes(&plans.0, &plans.1);
        assert_eq!(memory.peak, predicted, "{}", backward.name);
        let (x_bytes, parameters) = (2 * 40 * 128 * 2, parameter_bytes(&problem));
        assert_eq!(memory.inputs, 2 * x_bytes + 80);
        assert_eq!(memory.outputs, 2 * x_bytes + parameters);
        assert_eq!(session.memory().current(), memory.parameters);
        // One byte less, and nothing is tried.
        let limited = Session::new(Arc::new(CpuDevice::with_memory_limit(predicted - 1)));
        let module = self::module(&limited, DType::F16);
        let kernels = Kernels { forward, backward };
        let error = module.backward(kernels, &x, &dy, Some(&mask), &pass).unwrap_err();
        assert!(error.is_out_of_memory(), "{error}");
    }
}

/// The backward pass's buffers, used again: by another layer, and for other inputs.
#[test]
fn layers_are_trained_on_the_device_without_the_host_between() {
    let device = Arc::new(Counting::default());
    let session = Session::new(device.clone());
    let layer = |seed| {
        let weights = Weights::random(DType::F16, HIDDEN, seed).unwrap();
        MultiHeadAttention::new(&session, &weights, 2).unwrap()
    };
    let layers = [layer(1), layer(2)];
    let pass = Pass { causal: true, ..Pass::default() };
    let problem = layers[0].problem(1, 40, false, &pass).unwrap();
    let gradients = registry::Backward::new(problem);
    let kernels = Kernels::best(&gradients, &session.target()).unwrap();
    let random = |seed| Tensor::random(DType::F16, &[1, 40, HIDDEN], seed, 0.0);
    let (x, dy) = (random(5), random(6));
    // The host between the layers.
    let (inner, _) = layers[0].forward(kernels.forward, &x, None, &pass).unwrap();
    let (outer, _) = layers[1].backward(kernels, &inner.y, &dy, None, &pass).unwrap();
    let (first, _) = layers[0].backward(kernels, &x, &outer.dx, None, &pass).unwrap();

    let forward = || layers[0].forward_buffers(kernels.forward, &problem).unwrap();
    let backward = || layers[0].backward_buffers(kernels.backward, &gradients).unwrap();
    let (mut forwards, mut backwards) = ([forward(), forward()], [backward(), backward()]);
    let (x, dy) = (session.upload(&x).unwrap(), session.upload(&dy).unwrap());
    for round in 0..2 {
        device.reset();
        let [inner, outer] = &mut forwards;
        let y = inner.run(&layers[0], &x, None).unwrap();
        outer.run(&layers[1], y, None).unwrap();
        let [of_inner, of_outer] = &mut backwards;
        let dx = of_outer.run(&layers[1], outer, inner.y(), None, &dy).unwrap();
        of_inner.run(&layers[0], inner, &x, None, dx).unwrap();
        let calls = device.calls();
        // The first round zeroes each queue once.
        let fill = if round == 0 { calls.fill } else { 0 };
        let uncounted = Calls { launch: 0, encode: 0, fill: 0, ..calls };
        assert_eq!((uncounted, calls.fill), (Calls::default(), fill));
        let found = of_inner.gradients().unwrap();
        assert_eq!((&found.dx, &found.weights), (&first.dx, &first.weights));
    }
}

#[test]
fn what_does_not_fit_is_not_tried() {
    let problem = Problem::builder(1, 2, 64, 64).layout(Layout::TokensFirst).build().unwrap();
    let (naive, flash) = (find("naive").unwrap(), find("flash_tiled").unwrap());
    let target = session().target();
    let [naive_bytes, flash_bytes] =
        [naive, flash].map(|kernel| pass_bytes(&kernel.plan(&problem, &target).unwrap()));
    let limit = parameter_bytes(&problem) + flash_bytes;
    let session = Session::new(Arc::new(CpuDevice::with_memory_limit(limit)));
    let module = module(&session, DType::F32);
    let x = Tensor::random(DType::F32, &[1, 64, HIDDEN], 1, 0.0);
    let error = module.forward(naive, &x, None, &Pass::default()).err().unwrap();
    let expected = (naive_bytes, flash_bytes);
    assert!(
        matches!(error, Error::OutOfMemory { needed, free, .. } if (needed, free) == expected),
        "{error}"
    );
    assert!(module.forward(flash, &x, None, &Pass::default()).is_ok());
    // The weights come on top.
    let pass = Pass { weights: true, ..Pass::default() };
    assert!(module.forward(flash, &x, None, &pass).err().unwrap().is_out_of_memory());
}

#[test]
fn wrong_requests_are_named() {
    let session = session();
    let module = module(&session, DType::F32);
    let kernel = find("flash_tiled").unwrap();
    let message = |x: &Tensor, mask: Option<&[u8]>| {
        let error = module.forward(kernel, x, mask, &Pass::default()).err().unwrap();
        assert!(error.is_usage());
        error.to_string()
    };
    let x = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape);
    let text = message(&x(DType::F32, &[3, 128]), None);
    assert_eq!(text, "shape of x = [3, 128] is not possible: it must be [batch, tokens, 128]");
    assert!(message(&x(DType::F32, &[1, 3, 127]), None).contains("[batch, tokens, 128]"));
    assert!(message(&x(DType::F16, &[1, 3, 128]), None).contains("x is f16, expected f32"));
    assert!(message(&x(DType::F32, &[1, 0, 128]), None).contains("= 0 is not possible"));
    let text = message(&x(DType::F32, &[2, 3, 128]), Some(&[1; 5]));
    assert_eq!(text, "tensor mask has shape [5], expected [2, 3]");
    let hopper = find("flash_hopper").unwrap();
    let x = x(DType::F32, &[1, 3, 128]);
    let error = module.forward(hopper, &x, None, &Pass::default()).err().unwrap();
    assert!(error.to_string().contains("does not support f32"), "{error}");

    let weights = Weights::random(DType::F32, 128, 7).unwrap();
    let error = MultiHeadAttention::new(&session, &weights, 3).err().unwrap();
    assert!(error.to_string().contains("hidden = 128 is not divisible by heads = 3"), "{error}");
    let error = module.with_dropout(1.0).err().unwrap();
    assert!(error.to_string().contains("dropout = 1 "), "{error}");
    assert!(Weights::random(DType::F32, 0, 7).unwrap_err().to_string().contains("hidden = 0"));
}

#[test]
fn wrong_requests_of_the_backward_pass_are_named() {
    let session = session();
    let module = module(&session, DType::F16);
    let zeros = |seq| Tensor::zeros(DType::F16, &[1, seq, HIDDEN]);
    let kernels = |backward| Kernels {
        forward: find("flash_tiled").unwrap(),
        backward: find_backward(backward).unwrap(),
    };
    let pass = Pass::default();
    let message = |x: &Tensor, dy: &Tensor, mask: Option<&[u8]>| {
        let error = module.backward(kernels("backward_mma"), x, dy, mask, &pass).unwrap_err();
        assert!(error.is_usage());
        error.to_string()
    };
    let text = message(&zeros(5), &zeros(4), None);
    assert_eq!(text, "tensor dy has shape [1, 4, 128], expected [1, 5, 128]");
    let text = message(&zeros(5), &Tensor::zeros(DType::F32, &[1, 5, HIDDEN]), None);
    assert!(text.starts_with("tensor dy is f32, expected f16"), "{text}");
    assert!(message(&Tensor::zeros(DType::F16, &[5, HIDDEN]), &zeros(5), None).contains("of x = "));
    assert!(message(&zeros(5), &zeros(5), Some(&[1; 4])).contains("mask has shape [4]"));

    // More keys than two blocks have, which add to dQ in an order.
    let ordered = Pass { deterministic: true, ..pass };
    let (x, seq) = (zeros(270), 270);
    let run = |name| module.backward(kernels(name), &x, &x, None, &ordered).err();
    assert!(run("backward_mma").is_none() && run("backward_tiled").is_none());

    // Buffers of another pass.
    let problem = |pass: &Pass| module.problem(1, seq, false, pass).unwrap();
    let causal = Pass { causal: true, ..pass };
    let mut forward =
        module.forward_buffers(find("flash_tiled").unwrap(), &problem(&causal)).unwrap();
    let gradients = registry::Backward::new(problem(&pass));
    let tiled = find_backward("backward_tiled").unwrap();
    let mut backward = module.backward_buffers(tiled, &gradients).unwrap();
    let x = session.upload(&x).unwrap();
    forward.run(&module, &x, None).unwrap();
    let error = backward.run(&module, &forward, &x, None, &x).unwrap_err();
    assert!(error.to_string().starts_with("problem of the forward pass = "), "{error}");
    let other = Weights::random(DType::F16, HIDDEN, 1).unwrap();
    let other = MultiHeadAttention::new(&session, &other, 4).unwrap();
    let mut forward =
        module.forward_buffers(find("flash_tiled").unwrap(), &gradients.problem).unwrap();
    forward.run(&module, &x, None).unwrap();
    let text = backward.run(&other, &forward, &x, None, &x).unwrap_err().to_string();
    assert!(text.contains("heads = 2 is not possible: the module has 4"), "{text}");
    let target = session.target();
    let plans = (
        find("flash_tiled").unwrap().plan(&problem(&causal), &target).unwrap(),
        tiled.plan(&gradients, &target).unwrap(),
    );
    let error = module.prepare_backward(plans, &[], &[], &[]).unwrap_err();
    assert!(error.to_string().starts_with("problem of the backward pass = "), "{error}");
}

#[test]
fn a_projection_runs_on_the_kernel_that_was_asked_for() {
    let session = session();
    let x = Tensor::random(DType::BF16, &[1, 5, HIDDEN], 1, 0.0);
    for linear in LINEAR_KERNELS {
        let module = module(&session, DType::BF16);
        let problem = module.problem(1, 5, false, &Pass::default()).unwrap();
        let [_, best] = module.linear(&problem).unwrap();
        assert_eq!(best.kernel().name, LINEAR_KERNELS.last().unwrap().name);
        let module = module.with_linear(linear);
        let kernel = find("flash_tiled").unwrap();
        let forward = module.prepare(kernel, &x, None, &Pass::default()).unwrap();
        let symbol = forward.forward().linear()[1].entries().next().unwrap().entry.symbol;
        assert!(symbol.starts_with(linear.name), "{symbol}");
    }
}

/// Layers one after the other: nothing is allocated, filled or uploaded once the buffers are there.
#[test]
fn layers_run_on_the_device_without_the_host_between() {
    let device = Arc::new(Counting::default());
    let session = Session::new(device.clone());
    let layer = |seed| {
        let weights = Weights::random(DType::F16, HIDDEN, seed).unwrap();
        MultiHeadAttention::new(&session, &weights, 2).unwrap()
    };
    let layers = [layer(1), layer(2), layer(3)];
    let kernel = find("flash_hopper").unwrap();
    let pass = Pass { causal: true, ..Pass::default() };
    let x = Tensor::random(DType::F16, &[1, 40, HIDDEN], 5, 0.0);
    // The host between the layers.
    let mut expected = x.clone();
    for layer in &layers {
        expected = layer.forward(kernel, &expected, None, &pass).unwrap().0.y;
    }
    let problem = layers[0].problem(1, 40, false, &pass).unwrap();
    let buffers = || layers[0].forward_buffers(kernel, &problem).unwrap();
    let (mut a, mut b, x) = (buffers(), buffers(), session.upload(&x).unwrap());
    for round in 0..2 {
        device.reset();
        let y = a.run(&layers[0], &x, None).unwrap();
        let y = b.run(&layers[1], y, None).unwrap();
        let y = a.run(&layers[2], y, None).unwrap();
        let calls = device.calls();
        // The first round zeroes each queue once.
        let fill = if round == 0 { 2 } else { 0 };
        let uncounted = Calls { launch: 0, encode: 0, fill: 0, ..calls };
        assert_eq!(uncounted, Calls::default());
        assert_eq!((calls.launch, calls.fill), (9, fill));
        assert_eq!(y.to_host().unwrap(), expected);
    }
    let other =
        MultiHeadAttention::new(&session, &Weights::random(DType::F16, HIDDEN, 1).unwrap(), 4);
    let message = a.run(&other.unwrap(), &x, None).unwrap_err().to_string();
    assert!(message.contains("heads = 2 is not possible: the module has 4"), "{message}");
}

#[test]
fn files_read_back_and_what_is_wrong_in_them_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    for dtype in DType::ALL {
        let weights = Weights::random(dtype, 6, 1).unwrap();
        weights.save(&path).unwrap();
        assert_eq!(Weights::load(&path).unwrap(), weights);
    }
    let data = [0; 6 * 6 * 4];
    let save = |skip: &str, odd: (&str, Dtype, Vec<usize>)| {
        let names = Weights::NAMES.map(|n| [format!("{n}.weight"), format!("{n}.bias")]);
        let tensors = names.iter().flatten().filter(|name| *name != skip).map(|name| {
            let shape = if name.ends_with("bias") { vec![6] } else { vec![6, 6] };
            let (dtype, shape) =
                if *name == odd.0 { (odd.1, odd.2.clone()) } else { (Dtype::F32, shape) };
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(dtype, shape, &data[..bytes]).unwrap())
        });
        safetensors::serialize_to_file(tensors, None, &path).unwrap();
        let error = Weights::load(&path).unwrap_err();
        assert!(error.is_usage());
        error.to_string()
    };
    let same = || (Dtype::F32, vec![6, 6]);
    let with = |name, (dtype, shape)| (name, dtype, shape);
    let text = save("k_proj.weight", with("", same()));
    assert!(text.starts_with("tensor k_proj.weight is missing: "), "{text}");
    assert!(text.contains("w.safetensors has k_proj.bias, out_proj.bias,"), "{text}");
    let text = save("", with("v_proj.weight", (Dtype::F32, vec![6, 5])));
    assert_eq!(text, "tensor v_proj.weight has shape [6, 5], expected [6, 6]");
    let text = save("", with("out_proj.bias", (Dtype::F32, vec![1, 6])));
    assert_eq!(text, "tensor out_proj.bias has shape [1, 6], expected [6]");
    let text = save("", with("q_proj.weight", (Dtype::F32, vec![2, 3])));
    assert_eq!(text, "tensor q_proj.weight has shape [2, 3], expected [2, 2]");
    let text = save("", with("k_proj.weight", (Dtype::F16, vec![6, 6])));
    assert!(text.contains("tensor k_proj.weight is f16, expected f32"), "{text}");
    let text = save("", with("k_proj.weight", (Dtype::I32, vec![6, 6])));
    assert!(text.contains("k_proj.weight is i32 [6, 6]: it must be f32, f16 or bf16"), "{text}");
    std::fs::write(&path, "not tensors").unwrap();
    assert!(Weights::load(&path).unwrap_err().to_string().contains("not a whole safetensors"));
    let missing = Weights::load(&folder.path().join("none")).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }), "{missing}");
}

fn save_tensors(path: &std::path::Path, tensors: &[(&str, Tensor)]) {
    let views = tensors.iter().map(|(name, t)| {
        (*name, TensorView::new(Dtype::F32, t.shape().to_vec(), t.as_bytes()).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn state_dicts_of_other_modules_load() {
    let weights = Weights::random(DType::F32, 6, 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let [q, k, v, out] = weights.projections();
    let packed = |parts: [&Tensor; 3], shape: &[usize]| {
        Tensor::from_bytes(DType::F32, shape, &parts.map(Tensor::as_bytes).concat()).unwrap()
    };
    let weight = packed([&q.weight, &k.weight, &v.weight], &[18, 6]);
    let bias = packed([&q.bias, &k.bias, &v.bias], &[18]);
    let other = Tensor::zeros(DType::F32, &[3]);
    // As torch.nn.MultiheadAttention has them, alone and in a layer beside other tensors.
    for prefix in ["", "layers.0.attn."] {
        let names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "norm"]
            .map(|name| format!("{prefix}{name}"));
        let tensors = [&weight, &bias, &out.weight, &out.bias, &other];
        let all: Vec<_> = names.iter().map(String::as_str).zip(tensors.map(Clone::clone)).collect();
        save_tensors(&path, &all);
        assert_eq!(Weights::load(&path).unwrap(), weights, "{prefix}");
        // bias=False.
        save_tensors(&path, &[all[0].clone(), all[2].clone()]);
        let unbiased = Weights::load(&path).unwrap();
        for (ours, theirs) in unbiased.projections().iter().zip(weights.projections()) {
            assert_eq!(ours.weight, theirs.weight);
            assert_eq!(ours.bias, Tensor::zeros(DType::F32, &[6]));
        }
    }
    // One by one, some with and some without a bias.
    save_tensors(
        &path,
        &[
            ("a.q_proj.weight", q.weight.clone()),
            ("a.q_proj.bias", q.bias.clone()),
            ("a.k_proj.weight", k.weight.clone()),
            ("a.v_proj.weight", v.weight.clone()),
            ("a.out_proj.weight", out.weight.clone()),
        ],
    );
    let some = Weights::load(&path).unwrap();
    assert_eq!(&some.projections()[0], q);
    assert_eq!(some.projections()[3].bias, Tensor::zeros(DType::F32, &[6]));
}

#[test]
fn state_dicts_that_are_no_such_module_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let zeros = |name, shape: &[usize]| (name, Tensor::zeros(DType::F32, shape));
    let refused = |tensors: &[(&str, Tensor)], part: &str| {
        save_tensors(&path, tensors);
        let text = Weights::load(&path).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    };
    let packed = |shape: &[usize]| zeros("in_proj_weight", shape);
    let (whole, out) = (|| packed(&[18, 6]), || zeros("out_proj.weight", &[6, 6]));
    refused(&[], "tensor q_proj.weight (or in_proj_weight) is missing: ");
    refused(&[whole()], "tensor out_proj.weight is missing: ");
    let text = "in_proj_weight has shape [17, 6]: it must be [3 hidden, hidden]";
    refused(&[packed(&[17, 6]), out()], text);
    refused(&[packed(&[18]), out()], "in_proj_weight has shape [18]: it must be");
    refused(&[packed(&[0, 0]), out()], "expected [0, 0]");
    // 3 times that is no number of elements.
    refused(&[packed(&[0, usize::MAX / 2]), out()], "it must be [3 hidden, hidden]");
    let bias = zeros("in_proj_bias", &[6]);
    refused(&[whole(), bias, out()], "in_proj_bias has shape [6]: it must be [18]");
    let wide = zeros("out_proj.weight", &[6, 7]);
    refused(&[whole(), wide], "out_proj.weight has shape [6, 7], expected [6, 6]");
    let q = zeros("q_proj.weight", &[6, 6]);
    refused(&[whole(), out(), q], "has both q_proj.weight and in_proj_weight");
    let text = "has k_proj_weight: queries, keys and values have sizes of their own (kdim, vdim)";
    refused(&[zeros("k_proj_weight", &[6, 5]), out()], text);
    let added = zeros("bias_k", &[1, 1, 6]);
    refused(&[whole(), out(), added], "has bias_k: a key and a value are added");
    let two = ["a.in_proj_weight", "b.in_proj_weight"].map(|name| zeros(name, &[18, 6]));
    refused(&two, "has several modules: a., b.: save the state_dict of one alone");
}

#[cfg(unix)]
#[test]
fn weights_are_saved_through_links_with_the_usual_mode() {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    let folder = tempfile::tempdir().unwrap();
    let [target, link, other] = ["target", "link", "other"].map(|name| folder.path().join(name));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    fs::write(&other, "").unwrap();
    Weights::random(DType::F32, 6, 1).unwrap().save(&link).unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert!(link.is_symlink());
    assert_eq!(mode(&target), mode(&other));
}
