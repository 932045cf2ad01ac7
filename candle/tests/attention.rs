//! Attention on the CPU and its gradients against f64, by the rule that every kernel is held to.

mod cases;

use candle_core::Device;
use cases::{Case, Variables, cases, faults, oracle};
use flash_attention::{DType, Problem, oracle::all_rows, session::Outputs, verify::verify};
use flash_attention_candle::attention_with_lse;

fn check(dtype: DType) {
    let faults: Vec<String> =
        cases(dtype).iter().flat_map(|case| faults(case, &Device::Cpu).unwrap()).collect();
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
