//! The help text below the options: examples, and the defaults of each device.

use crate::{compare, decode, results::Repeats, verify};

/// Below the program's options.
pub const PROGRAM: &str = "\
Examples:
  flash-attention env
  flash-attention compare --seq 512,1024 --kernels naive,flash_tiled
  flash-attention verify --dtype bf16 --causal
  flash-attention run --input in.safetensors --output out.safetensors

Exit codes: 0 done and right; 1 a verdict was bad, or work failed; 2 the request cannot be met as it \
stands; 128 + signal (130: Ctrl-C) stopped, with what was measured printed and written.";

/// Below the options of `run`.
pub const RUN: &str = "\
Examples:
  flash-attention run --input qkv.safetensors --output o.safetensors --causal
  flash-attention run --input qkvo.safetensors --check --kernel flash_mma
  flash-attention run --input x.safetensors --weights w.safetensors --heads 12 --check
  flash-attention run --backward --input qkv_do.safetensors --output gradients.safetensors
  flash-attention run --backward --input in.safetensors --weights w.safetensors --heads 8 --output g";

/// Below the options of `break`.
pub const BREAK: &str = "\
Examples:
  flash-attention break --kernel flash_tiled
  flash-attention break --kernel flash_tiled --without 1
  flash-attention break --kernel flash_hopper --without 12 --other-parity
  flash-attention break --kernel backward_mma --all";

/// Below the options of `profile`.
pub const PROFILE: &str = "\
Examples:
  flash-attention profile --kernel flash_tiled
  flash-attention profile --kernel flash_swizzled --html profile.html
  flash-attention profile --kernel flash_mma --gpu a100 --seq 512 --causal";

/// Below the options of `trace`.
pub const TRACE: &str = "\
Examples:
  flash-attention trace --kernel flash_hopper --out trace.json
  flash-attention trace --kernel flash_tiled --seq 64 --head-dim 32 --html steps.html";

/// Below the options of `report`.
pub const REPORT: &str = "\
Example:
  flash-attention compare --json results.json
  flash-attention report results.json --out report";

/// Below the options of `completions`.
pub const COMPLETIONS: &str = "\
Example:
  flash-attention completions bash > ~/.local/share/bash-completion/completions/flash-attention";

/// Below the options of `man`.
pub const MAN: &str = "\
Examples:
  flash-attention man | man -l -
  flash-attention man compare > flash-attention-compare.1";

const COMPARE: &str = "\
Examples:
  flash-attention compare --seq 512,1024 --kernels naive,flash_tiled --level attention
  flash-attention compare --causal --dtype bf16 --report out
  flash-attention compare --level backward --kernels backward_mma,backward_hopper
  flash-attention compare --level module-backward
  flash-attention compare --json - | jq '.rows[].median_ms'";

const VERIFY: &str = "\
Examples:
  flash-attention verify --dtype f16 --causal --mask
  flash-attention verify --seq 4096 --rows 64 --kernels flash_pipelined";

const DECODE: &str = "\
Examples:
  flash-attention decode --seq-k 4096,131072 --batch 8 --heads 64 --kv-heads 8
  flash-attention decode --page-size 1,16,48 --queries 4 --splits 3
  flash-attention decode --cache-dtype e4m3 --seq-k 4096
  flash-attention decode --peers --json decode.json
  flash-attention verify --level decode --seq-k 4096 --page-size 16";

/// Defaults of `decode`.
#[must_use]
pub fn decode_defaults() -> String {
    defaults(&decode::ON_GPU.to_string(), &decode::EMULATED.to_string())
}

/// Below the options of `decode`.
#[must_use]
pub fn decode() -> String {
    format!("{}\n\n{DECODE}", decode_defaults())
}

/// Defaults of `compare`.
#[must_use]
pub fn compare_defaults() -> String {
    let line = |defaults, repeats: Repeats| {
        let Repeats { warmup, iters, .. } = repeats;
        format!("{defaults} --warmup {warmup} --iters {iters}")
    };
    defaults(
        &line(compare::ON_GPU, compare::REPEATS_ON_GPU),
        &line(compare::EMULATED, compare::REPEATS_EMULATED),
    )
}

/// Defaults of `verify`.
#[must_use]
pub fn verify_defaults() -> String {
    defaults(&verify::LAB.to_string(), &verify::EMULATED.to_string())
}

fn defaults(on_gpu: &str, emulated: &str) -> String {
    format!("Defaults on a GPU:\n  {on_gpu}\nOn the emulator:\n  {emulated}")
}

/// Below the options of `compare`.
#[must_use]
pub fn compare() -> String {
    format!("{}\n\n{COMPARE}", compare_defaults())
}

/// Below the options of `verify`.
#[must_use]
pub fn verify() -> String {
    format!("{}\n\n{VERIFY}", verify_defaults())
}
