//! Capture of a stream's launches into a graph, and its launch. Only kernels can be captured;
//! what a real driver forbids meanwhile (allocating, waiting, loading modules) breaks the
//! capture here, too, and so do copies and fills, which a launch has no use for.

use std::sync::Arc;

use kernels_gpu::{
    constants::Constants,
    entry::{ArgsCopy, Entry},
};
use simt::emulator;

use crate::{
    P, call, call_in_context, code,
    launch::run,
    state::{object, register, state, unregister},
    stream, write,
};

/// A kernel that was launched while its stream was captured.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) entry: &'static Entry,
    pub(crate) constants: Constants,
    pub(crate) launch: emulator::Launch,
    pub(crate) args: Arc<ArgsCopy>,
}

/// A capture that was begun and not ended.
pub(crate) struct Capture {
    pub(crate) stream: usize,
    pub(crate) nodes: Vec<Node>,
    pub(crate) broken: bool,
}

struct Graph(Vec<Node>);
struct Executable(Vec<Node>);

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: P, _mode: u32) -> u32 {
    /// Null and `CU_STREAM_LEGACY`.
    const LEGACY: usize = 1;
    call_in_context(|| {
        stream::check(stream)?;
        let mut state = state();
        if stream as usize <= LEGACY || state.capture.is_some() {
            return Err(code::CAPTURE_UNSUPPORTED);
        }
        let capture = Capture { stream: stream as usize, nodes: Vec::new(), broken: false };
        state.capture = Some(capture);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: P, graph: P) -> u32 {
    call_in_context(|| {
        let ended = state().capture.take_if(|capture| capture.stream == stream as usize);
        let capture = ended.ok_or(code::INVALID_VALUE)?;
        if capture.broken {
            return Err(code::CAPTURE_INVALIDATED);
        }
        write(graph, register(Graph(capture.nodes)))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(executable: P, graph: P, _flags: u64) -> u32 {
    call_in_context(|| {
        // SAFETY: callers pass graphs.
        let graph = unsafe { object::<Graph>(graph as usize) }?;
        write(executable, register(Executable(graph.0.clone())))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: P, stream: P) -> u32 {
    call_in_context(|| {
        stream::check(stream)?;
        // SAFETY: callers pass executable graphs.
        let executable = unsafe { object::<Executable>(executable as usize) }?;
        state().busy.insert(stream as usize);
        executable.0.iter().for_each(run);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: P) -> u32 {
    // SAFETY: callers pass executable graphs.
    call(|| unsafe { unregister::<Executable>(executable as usize) })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: P) -> u32 {
    // SAFETY: callers pass graphs.
    call(|| unsafe { unregister::<Graph>(graph as usize) })
}
