//! CUDA graphs and streams as tests need them: their streams and memory outlive their graphs.

use std::convert::Infallible;

use cuda_driver::{
    Failure,
    functions::{self, STREAM_NON_BLOCKING, Stream},
};

/// A stream of the context that is current when it is made.
pub struct OwnStream(pub Stream);

impl OwnStream {
    pub fn new() -> Self {
        Self(functions::stream_create(STREAM_NON_BLOCKING).expect("a stream"))
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed here alone.
        _ = unsafe { functions::stream_destroy(self.0) };
    }
}

/// A graph that can be launched.
pub struct Graph(cuda_driver::Graph);

impl Graph {
    /// What `work` starts on a stream.
    pub fn capture(stream: Stream, work: impl FnOnce()) -> Result<Self, Failure> {
        let work = || {
            work();
            Ok::<(), Infallible>(())
        };
        // SAFETY: tests capture streams of their own, in the context that is current.
        let Ok(graph) = unsafe { cuda_driver::Graph::capture(stream, work) }?;
        Ok(Self(graph))
    }

    pub fn launch(&self, stream: Stream) -> Result<(), Failure> {
        // SAFETY: as for `capture`; tensors and workspace live as long as the test's graph.
        unsafe { self.0.launch(stream) }
    }
}
