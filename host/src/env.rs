//! `env`: the computer, the driver, and each GPU with the kernels that it can run, the reasons
//! against the others, and the remedy for missing parts.

use std::fmt::Write as _;

use flash_attention::{
    CpuDevice, DType, Problem,
    backend::gpu::{GpuDescription, describe_all},
    ptx,
    registry::{AttentionLimits, Backward, KERNELS, Operation, Projection, Spec, Target, best_for},
};

use crate::{
    failure::Outcome,
    format,
    machine::{capability, machine},
    progress::print_lines,
    results::Machine,
};

/// Runs the command. A missing part is reported and is no failure.
#[must_use]
pub fn run() -> Outcome {
    let mut text = computer(&machine());
    text += &modules();
    match describe_all() {
        Ok(gpus) if gpus.is_empty() => {
            text += "\nno GPU: the driver lists none; check CUDA_VISIBLE_DEVICES\n"
        }
        Ok(gpus) => gpus.iter().for_each(|gpu| text += &describe(gpu)),
        Err(error) => writeln!(text, "\n{error}").unwrap_or_default(),
    }
    text += &emulator();
    print_lines(text.trim_end());
    Outcome::Good
}

fn computer(machine: &Machine) -> String {
    let Machine { os, arch, cpu, threads, memory_bytes } = machine;
    let memory =
        memory_bytes.map_or_else(String::new, |b| format!(", {}", format::bytes(b as f64)));
    format!(
        "flash-attention {} (commit {}) on {os} {arch}: {}, {}{memory}\n",
        env!("CARGO_PKG_VERSION"),
        env!("HOST_COMMIT"),
        cpu.as_deref().unwrap_or("unknown CPU"),
        format::counted(*threads, "thread"),
    )
}

/// The PTX that this program holds.
fn modules() -> String {
    let modules = ptx::modules();
    if modules.is_empty() {
        return "PTX: none in this build, so that it runs no kernel on a GPU; build it with \
                the feature `ptx`\n"
            .into();
    }
    let list: Vec<_> = modules
        .iter()
        .map(|m| format!("{} ({})", m.name, needs(m.compute_capability, m.exact)))
        .collect();
    format!("PTX: {}\n", list.join(", "))
}

fn needs(least: (u32, u32), exact: bool) -> String {
    format!(
        "compute capability {}{}",
        capability(least),
        if exact { " only" } else { " and later" }
    )
}

/// One GPU and its kernels.
fn describe(gpu: &GpuDescription) -> String {
    let driver = gpu.driver_version.as_deref().unwrap_or("of unknown version");
    let mut text = format!(
        "\nGPU {}: {}\n  driver {driver}, CUDA {}\n  compute capability {}, {} multiprocessors at up to {} MHz\n",
        gpu.index,
        gpu.name,
        capability(gpu.cuda_version),
        capability(gpu.compute_capability),
        gpu.multiprocessors,
        gpu.clock_mhz,
    );
    let free = match gpu.free_bytes {
        Some(free) => format!("{} free", format::bytes(free as f64)),
        None => "the GPU cannot be used now: end the process that has taken it, or wait".into(),
    };
    let (total, shared, l2) = (gpu.total_bytes, gpu.max_shared_bytes, gpu.l2_bytes);
    let _ = writeln!(
        text,
        "  memory {}, {free}; shared memory of a block up to {}, L2 cache {}",
        format::bytes(total as f64),
        format::bytes(f64::from(shared)),
        format::bytes(f64::from(l2)),
    );
    let loadable: Vec<_> = ptx::loadable(gpu.compute_capability).map(|m| m.name).collect();
    let _ = match loadable.as_slice() {
        [] => writeln!(text, "  PTX: no module of this build loads here"),
        [best, ..] => writeln!(
            text,
            "  PTX: {best} is the newest that loads here; each kernel comes from the oldest module that has its instructions"
        ),
    };
    let target = Target::new(gpu.compute_capability, shared, gpu.multiprocessors);
    text + &kernels(&target) + &chosen(&target)
}

/// The default kernel for each storage type, and the rule that chooses it.
fn chosen(target: &Target) -> String {
    let of = |dtype: DType| {
        // Head dim 64, which every kernel has.
        let problem = Problem::builder(1, 1, 1024, 64).dtype(dtype).build().ok()?;
        let kernel = best_for(&problem, target).ok()?.kernel;
        Some(format!("{} for {dtype}", kernel.name))
    };
    match DType::ALL.into_iter().filter_map(of).collect::<Vec<_>>().as_slice() {
        [] => String::new(),
        all => format!(
            "  chosen for attention at head dim 64: {}; the last of the list that can do a problem\n",
            all.join(", ")
        ),
    }
}

/// One line per kernel of attention, of its gradients and of projections: the kernel's module, or
/// the reason that it cannot run.
fn kernels(target: &Target) -> String {
    let head_dims = |limits: &AttentionLimits| format!("; head dims: {}", limits.head_dims());
    let all = [
        of_operation::<Problem>(target, head_dims),
        of_operation::<Backward>(target, head_dims),
        of_operation::<Projection>(target, |()| String::new()),
    ]
    .concat();
    let width = all.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, what) in all {
        let _ = writeln!(text, "  {name:width$}  {what}");
    }
    text
}

/// Name of each kernel of an operation, with its module or the reason that it cannot run.
fn of_operation<P: Operation>(
    target: &Target,
    has: impl Fn(&P::Limits) -> String,
) -> Vec<(&'static str, String)> {
    let line = |k: &'static Spec<P>| {
        let what = match (k.runs_on(target), module(k.capability, k.exact_capability)) {
            (Err(unsupported), _) => format!("no: {}", unsupported.reason),
            (Ok(()), None) => "no: this build has no PTX for it".into(),
            (Ok(()), Some(module)) => {
                format!("yes, from {module}: {}; {}{}", k.summary, list(k.dtypes), has(&k.limits))
            }
        };
        (k.name, what)
    };
    P::kernels().iter().map(line).collect()
}

fn list<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// The module that holds a kernel, by the kernel's compute capability.
fn module(capability: (u32, u32), exact: bool) -> Option<&'static str> {
    let mut modules = ptx::modules().iter();
    modules.find(|m| m.compute_capability == capability && m.exact == exact).map(|m| m.name)
}

fn emulator() -> String {
    let target = Target::of(&CpuDevice::new());
    let able = KERNELS.iter().filter(|kernel| kernel.runs_on(&target).is_ok()).count();
    format!(
        "\nemulator: runs {able} of {} kernels on the CPU (--device cpu), as compute capability {}, and \
         checks every access; its times are not a GPU's\n",
        KERNELS.len(),
        capability(target.capability),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(compute_capability: (u32, u32)) -> GpuDescription {
        GpuDescription {
            index: 1,
            name: "A GPU".into(),
            total_bytes: 80 << 30,
            free_bytes: Some(79 << 30),
            compute_capability,
            multiprocessors: 132,
            max_shared_bytes: 232_448,
            l2_bytes: 50 << 20,
            clock_mhz: 1980,
            cuda_version: (13, 0),
            driver_version: Some("580.1".into()),
        }
    }

    #[test]
    fn a_gpu_is_described_with_its_kernels() {
        let text = describe(&gpu((9, 0)));
        for part in ["GPU 1: A GPU", "80.0 GiB", "79.0 GiB free", "227 KiB", "CUDA 13.0", "580.1"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let all = KERNELS.len() + Backward::kernels().len() + Projection::kernels().len();
        if !ptx::modules().is_empty() {
            let naive = text.lines().find(|line| line.trim_start().starts_with("naive")).unwrap();
            assert!(
                naive.ends_with("; f32, f16, bf16; head dims: multiples of 8 up to 128"),
                "{naive}"
            );
        }
        assert_eq!(
            text.lines().filter(|line| line.contains("no: ")).count(),
            if ptx::modules().is_empty() { all } else { 0 }
        );
    }

    #[test]
    fn what_cannot_run_says_why() {
        let text = describe(&GpuDescription { free_bytes: None, ..gpu((6, 1)) });
        assert!(
            text.contains("no: needs compute capability 7.5 or later, this GPU has 6.1"),
            "{text}"
        );
        assert!(text.contains("no module of this build loads here"), "{text}");
        assert!(text.contains("taken it"), "{text}");
    }

    #[test]
    fn each_generation_has_its_best_kernel() {
        for (capability, f32, f16, bf16) in [
            ((9, 0), "flash_tf32", "flash_hopper", "flash_hopper"),
            ((10, 0), "flash_tf32", "flash_pipelined", "flash_pipelined"),
            ((8, 0), "flash_tf32", "flash_pipelined", "flash_pipelined"),
            ((7, 5), "flash_tiled", "flash_turing", "flash_tiled"),
        ] {
            let text = describe(&gpu(capability));
            let chosen = format!("{f32} for f32, {f16} for f16, {bf16} for bf16");
            assert!(text.contains(&chosen), "{capability:?}: {text}");
        }
        assert!(!describe(&gpu((6, 1))).contains("chosen"));
    }
}
