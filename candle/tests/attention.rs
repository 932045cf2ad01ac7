//! Attention on the CPU and its gradients against f64, by the rule that every kernel is held to.

mod cases;

use candle_core::{Device, Tensor};
use cases::{Case, Variables, cases, oracle};
use flash_attention::{
    DType, Problem,
    oracle::{all_heads, all_rows},
    session::{Gradients, Outputs},
    verify::{verify, verify_gradients},
};
use flash_attention_candle::attention_with_lse;

/// What is wrong with O, the LSE and the gradients of a case.
fn faults(case: &Case) -> Vec<String> {
    let p = &case.problem;
    let draw = case.draw(1);
    let variables = draw.variables(p, &Device::Cpu).unwrap();
    let Variables { q, k, v, bias, sinks, d_o, options } = &variables;
    let (o, lse) = attention_with_lse(q, k, v, options).unwrap();
    let outputs = Outputs {
        o: oracle(&o, &p.o_shape()).unwrap(),
        lse: oracle(&lse, &p.lse_shape()).unwrap(),
        weights: None,
    };
    let mut faults = Vec::new();
    let verdict = verify(p, &draw.inputs(), &outputs, &all_rows(p));
    if !verdict.passes() {
        faults.push(format!("{} {}: {verdict}", p.dtype(), case.name));
    }
    // No key, no gradient: what the oracle does not know.
    if p.seq_k() == 0 {
        return faults;
    }
    let store = (o * d_o).unwrap().sum_all().unwrap().backward().unwrap();
    let of = |tensor: &Tensor, shape: &[usize]| oracle(store.get(tensor).unwrap(), shape).unwrap();
    let gradients = Gradients {
        dq: of(q, &p.q_shape()),
        dk: of(k, &p.k_shape()),
        dv: of(v, &p.v_shape()),
        d_bias: bias.as_ref().map(|bias| of(bias, bias.dims())),
        d_sinks: sinks.as_ref().map(|sinks| of(sinks, sinks.dims())),
    };
    let verdict = verify_gradients(p, &draw.inputs(), &draw.d_o, &gradients, &all_heads(p));
    if !verdict.passes() {
        faults.push(format!("{} gradients of {}: {verdict}", p.dtype(), case.name));
    }
    faults
}

fn check(dtype: DType) {
    let faults: Vec<String> = cases(dtype).iter().flat_map(faults).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_case_is_right_in_f32() {
    check(DType::F32);
}

#[test]
fn every_case_is_right_in_f16() {
    check(DType::F16);
}

#[test]
fn every_case_is_right_in_bf16() {
    check(DType::BF16);
}

/// The verdict knows a wrong answer: of the same tensors, another problem's.
#[test]
fn a_wrong_answer_is_found() {
    let p = Problem::builder(1, 2, 60, 64).causal(true).build().unwrap();
    let case = Case { name: "causal", problem: p, size: 1.0, cu_seqlens: None };
    let draw = case.draw(1);
    let mut variables = draw.variables(&p, &Device::Cpu).unwrap();
    variables.options.window.right = Some(1);
    variables.options.causal = false;
    let Variables { q, k, v, options, .. } = &variables;
    let (o, lse) = attention_with_lse(q, k, v, options).unwrap();
    let outputs = Outputs {
        o: oracle(&o, &p.o_shape()).unwrap(),
        lse: oracle(&lse, &p.lse_shape()).unwrap(),
        weights: None,
    };
    assert!(!verify(&p, &draw.inputs(), &outputs, &all_rows(&p)).passes());
}
