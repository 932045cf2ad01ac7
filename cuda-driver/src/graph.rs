//! Launches of a stream, captured once and then started together.

use crate::{
    Failure,
    functions::{self, CAPTURE_THREAD_LOCAL, CapturedGraph, ExecutableGraph, Stream},
};

/// Captured launches: [`Graph::launch`] starts all of them by one call of the driver.
#[derive(Debug)]
pub struct Graph(ExecutableGraph);

/// A captured graph until it is made ready.
struct Captured(CapturedGraph);

impl Graph {
    /// Captures the launches of `work` on a stream; they do not run meanwhile. The error of `work` is the inner
    /// one; it ends the capture.
    ///
    /// # Errors
    /// The driver's result code: 901 where `work` did what a capture forbids, allocate or wait or
    /// load a module, say.
    ///
    /// # Safety
    /// The stream is live, not a default stream, and belongs to the context that is current on the
    /// calling thread.
    pub unsafe fn capture<E>(
        stream: Stream,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Result<Self, E>, Failure> {
        // SAFETY: the stream is live and of the current context, as the caller promises.
        unsafe { functions::stream_begin_capture(stream, CAPTURE_THREAD_LOCAL) }?;
        let done = work();
        // Also where `work` failed: the stream must not stay in capture.
        // SAFETY: as above.
        let captured = unsafe { functions::stream_end_capture(stream) }.map(Captured);
        if let Err(error) = done {
            return Ok(Err(error));
        }
        let captured = captured?;
        // SAFETY: the graph was just captured.
        Ok(Ok(Self(unsafe { functions::graph_instantiate(captured.0, 0) }?)))
    }

    /// Starts the launches on a stream; does not wait.
    ///
    /// # Errors
    /// The driver's result code.
    ///
    /// # Safety
    /// - The stream is live, and belongs to the context of the capture, which is current.
    /// - The memory that the launches use stays allocated until the stream has passed them, and no
    ///   other stream uses it in a conflicting way meanwhile.
    pub unsafe fn launch(&self, stream: Stream) -> Result<(), Failure> {
        // SAFETY: the graph lives with this value; the rest is the caller's.
        unsafe { functions::graph_launch(self.0, stream) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // It can fail only when the context is lost, and with it the graph.
        // SAFETY: made by `capture`, and destroyed here alone.
        _ = unsafe { functions::executable_graph_destroy(self.0) };
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // As for `Graph`.
        // SAFETY: made by the driver for this value, and destroyed here alone.
        _ = unsafe { functions::captured_graph_destroy(self.0) };
    }
}
