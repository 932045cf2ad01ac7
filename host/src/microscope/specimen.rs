//! A kernel on a small problem, to be run under the emulator again and again.

use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use flash_attention::{
    DType, Error, Layout, Problem, Tensor,
    backend::cpu::{CpuDevice, emulator},
    registry::{BACKWARD_KERNELS, DECODE_KERNELS, Decode, DecodeSpec, KERNELS},
    session::{DecodeInputs, Inputs, Session, Work},
    verify::verify_decode,
};

use crate::{
    accuracy::{self, complaint},
    failure::Usage,
    inputs::Tensors,
    interrupt, machine,
    options::{Defaults, ShapeArgs},
    results::{Check, Level, LevelChoice, ProblemRecord},
    subject::{Effort, Subject, kind},
    values,
};

/// The arguments of the microscope's commands.
#[derive(Args, Clone, Debug)]
pub struct SpecimenArgs {
    /// The kernel
    #[arg(long, value_name = "NAME", value_parser = values::any_kernel())]
    pub kernel: String,
    /// The problem.
    #[command(flatten)]
    pub shape: ShapeArgs,
}

/// Queries of a decode that is not asked for otherwise.
const DECODE_QUERIES: usize = 2;

/// The operation that a kernel belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Level(Level),
    Decode,
}

/// A kernel with its problem, its inputs and the right answer.
pub struct Specimen<'a> {
    /// The kernel's name.
    pub kernel: &'static str,
    /// The problem.
    pub problem: Problem,
    device: &'a CpuDevice,
    drawn: Drawn<'a>,
}

enum Drawn<'a> {
    Level(Box<dyn Subject + 'a>),
    Decode(Box<DrawnDecode<'a>>),
}

/// The emulator, and the session on it.
pub struct Bench {
    device: Arc<CpuDevice>,
    session: Session,
}

impl Bench {
    /// An emulator.
    #[must_use]
    pub fn new() -> Self {
        let device = Arc::new(machine::cpu(machine::memory_for_the_emulator()));
        let session = Session::new(device.clone());
        Self { device, session }
    }

    /// Draws the inputs of the kernel that `args` names.
    ///
    /// # Errors
    /// The message names the wrong value and the right one.
    pub fn draw<'a>(&'a self, args: &SpecimenArgs, defaults: &Defaults) -> Result<Specimen<'a>> {
        let (pass, kernel, dtypes) = find(&args.kernel)?;
        let dtype = if dtypes.contains(&defaults.dtype) { defaults.dtype } else { dtypes[0] };
        let problem = problem(&args.shape, pass, &Defaults { dtype, ..*defaults })?;
        let (session, device) = (&self.session, &*self.device);
        let (problem, drawn) = match pass {
            Pass::Level(level) => {
                let kind = kind(level, args.shape.deterministic);
                let problem = kind.pose(&problem)?;
                // A problem that cannot run is refused before anything is drawn.
                let needed = kind.needed_bytes(kernel, &problem, &session.target())?;
                check_memory(session, needed)?;
                let subject = kind.draw(session, problem, args.shape.seed, Effort::Thorough)?;
                (problem, Drawn::Level(subject))
            }
            Pass::Decode => {
                let problem = problem.to_builder().layout(Layout::TokensFirst).build()?;
                let drawn = DrawnDecode::new(session, kernel, problem, args.shape.seed)?;
                (problem, Drawn::Decode(Box::new(drawn)))
            }
        };
        Ok(Specimen { kernel, problem, device, drawn })
    }

    /// Draws the inputs of the kernel that `args` names and records its run. `None`: a signal ended it.
    ///
    /// # Errors
    /// As [`Bench::draw`]; a fault of the kernel, or a wrong result.
    pub fn record<'a>(
        &'a self,
        args: &SpecimenArgs,
        defaults: &Defaults,
        recorder: &Arc<emulator::Recorder>,
    ) -> Result<Option<Specimen<'a>>> {
        let specimen = match self.draw(args, defaults) {
            Err(_) if interrupt::requested() => return Ok(None),
            drawn => drawn?,
        };
        let options = emulator::Options { recorder: Some(recorder.clone()), ..Default::default() };
        match specimen.run(&options) {
            Err(Error::Stopped) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(Some(wrong)) => anyhow::bail!("{} is wrong: {wrong}", specimen.kernel),
            Ok(None) => Ok(Some(specimen)),
        }
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

/// A kernel by name: its operation and its storage types.
fn find(name: &str) -> Result<(Pass, &'static str, &'static [DType])> {
    let of = |level| move |name, dtypes| (Pass::Level(level), name, dtypes);
    let forward = KERNELS.iter().map(|k| of(Level::Attention)(k.name, k.dtypes));
    let backward = BACKWARD_KERNELS.iter().map(|k| of(Level::Backward)(k.name, k.dtypes));
    let decode = DECODE_KERNELS.iter().map(|k| (Pass::Decode, k.name, k.dtypes));
    let found = forward.chain(backward).chain(decode).find(|(_, known, _)| *known == name);
    found.ok_or_else(|| Usage(format!("unknown kernel {name}: env lists the kernels")).into())
}

fn check_memory(session: &Session, needed: u64) -> Result<(), Error> {
    let device = session.device();
    let free = device.memory_info()?.free;
    if needed <= free {
        return Ok(());
    }
    Err(Error::OutOfMemory { device: device.name(), needed, free })
}

/// The one problem that is asked for.
fn problem(shape: &ShapeArgs, pass: Pass, defaults: &Defaults) -> Result<Problem> {
    let mut shape = shape.clone();
    if let Some([_, _, ..]) = shape.seq.as_deref() {
        let reason = "--seq has several lengths: one problem is run here, so give one";
        return Err(Usage(reason.into()).into());
    }
    let level = match pass {
        Pass::Level(Level::Backward) => LevelChoice::Backward,
        _ => LevelChoice::Attention,
    };
    if pass == Pass::Decode {
        // A few queries against a cache that is as long as a sequence is by default.
        shape.seq_k = shape.seq_k.or_else(|| defaults.seq.first().map(|&keys| vec![keys]));
        shape.seq.get_or_insert_with(|| vec![DECODE_QUERIES]);
        shape.causal = true;
    }
    let problem = shape.problems(defaults, level)?.pop();
    problem.ok_or_else(|| Usage("--seq has no length: give one".into()).into())
}

impl Specimen<'_> {
    /// Runs the kernel with these options. Why the numbers are wrong, if they are.
    ///
    /// # Errors
    /// The fault that the emulator found.
    pub fn run(&self, options: &emulator::Options) -> Result<Option<String>, Error> {
        let launch = |work: &mut dyn Work| {
            self.device.set_options(options.clone());
            let ran = work.launch();
            self.device.set_options(emulator::Options::default());
            ran
        };
        let checks = match &self.drawn {
            Drawn::Level(subject) => subject.run(self.kernel, None, &launch)?.checks,
            Drawn::Decode(decode) => decode.run(&launch)?,
        };
        Ok(checks.iter().find(|check| !check.passed()).map(complaint))
    }

    /// Operations by convention.
    #[must_use]
    pub fn flops(&self) -> f64 {
        match &self.drawn {
            Drawn::Level(subject) => subject.flops(),
            Drawn::Decode(_) => self.problem.flops(),
        }
    }

    /// Q, K and V of attention that has no feature but a causal mask.
    #[must_use]
    pub fn plain_inputs(&self) -> Option<Inputs<'_>> {
        let record = ProblemRecord::from(&self.problem);
        let is_plain = ["", ", causal"].contains(&record.features().to_string().as_str());
        match &self.drawn {
            Drawn::Level(subject) => subject.inputs().filter(|_| is_plain),
            Drawn::Decode(_) => None,
        }
    }

    /// The gradient of O, of a backward pass.
    #[must_use]
    pub fn d_o(&self) -> Option<&Tensor> {
        match &self.drawn {
            // After Q, K and V.
            Drawn::Level(subject) => subject.tensors().get(3).copied(),
            Drawn::Decode(_) => None,
        }
    }

    /// Bytes of inputs and outputs.
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        match &self.drawn {
            Drawn::Level(subject) => subject.own_bytes(),
            Drawn::Decode(_) => self.problem.input_bytes() + self.problem.output_bytes(),
        }
    }

    /// Why a GPU of that compute capability does not run the kernel.
    #[must_use]
    pub fn obstacle_on(&self, (major, minor): (u32, u32)) -> Option<String> {
        let of = |least, exact| (least, exact);
        let forward = KERNELS.iter().map(|k| (k.name, of(k.capability, k.exact_capability)));
        let backward =
            BACKWARD_KERNELS.iter().map(|k| (k.name, of(k.capability, k.exact_capability)));
        let decode = DECODE_KERNELS.iter().map(|k| (k.name, of(k.capability, k.exact_capability)));
        let mut all = forward.chain(backward).chain(decode);
        let (name, (least, exact)) = all.find(|(name, _)| *name == self.kernel)?;
        let runs = if exact { (major, minor) == least } else { (major, minor) >= least };
        let or_later = if exact { "exactly" } else { "at least" };
        (!runs).then(|| {
            format!(
                "{name} needs compute capability {or_later} {}.{}, this GPU has {major}.{minor}: it does \
                 not run there",
                least.0, least.1
            )
        })
    }

    /// The kernel and the problem in one line.
    #[must_use]
    pub fn describe(&self) -> String {
        let p = &self.problem;
        let record = ProblemRecord::from(p);
        let text = format!("{}: batch {}, heads {}", self.kernel, p.batch(), p.heads());
        text + &format!(
            ", N {}, head dim {}, {}{}",
            p.seq_q(),
            p.head_dim(),
            p.dtype(),
            record.features()
        )
    }
}

/// A decode with its inputs.
struct DrawnDecode<'a> {
    session: &'a Session,
    kernel: &'static DecodeSpec,
    decode: Decode,
    tensors: Tensors,
    lengths: Vec<i32>,
}

impl<'a> DrawnDecode<'a> {
    fn new(session: &'a Session, kernel: &str, problem: Problem, seed: u64) -> Result<Self> {
        let kernel = DecodeSpec::find(kernel)?;
        let decode = Decode::new(problem);
        check_memory(session, kernel.plan(&decode, &session.target())?.peak_bytes())?;
        let lengths = vec![i32::try_from(problem.seq_k())?; problem.batch()];
        Ok(Self { session, kernel, decode, tensors: Tensors::random(&problem, seed), lengths })
    }

    fn run(
        &self,
        launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
    ) -> Result<Vec<Check>, Error> {
        let plan = self.kernel.plan(&self.decode, &self.session.target())?;
        let inputs = DecodeInputs {
            tensors: self.tensors.inputs(),
            seqused_k: Some(&self.lengths),
            page_table: None,
            scales: None,
        };
        let mut prepared = self.session.prepare_decode(plan, &inputs)?;
        launch(&mut prepared)?;
        let v = verify_decode(&self.decode, &inputs, &prepared.outputs()?)?;
        let check = |tensor: &str, differences, plain| Check {
            tensor: tensor.into(),
            ..accuracy::check(differences, plain, None)
        };
        Ok(vec![check("o", &v.o, v.credit.o), check("lse", &v.lse, v.credit.lse)])
    }
}
