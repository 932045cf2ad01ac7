//! The start offsets of packed sequences, in device memory. The device would follow these numbers to any
//! address, so only checked numbers get there.

use std::sync::Arc;

use crate::{
    backend::{DeviceBuffer, Memory},
    error::Error,
    problem::{Extras, Problem},
};

/// The checked start offsets of packed sequences in Q and in K; empty before they are set, and where
/// sequences are not packed.
#[derive(Default)]
pub(super) struct Sequences(Option<[DeviceBuffer; 2]>);

impl Sequences {
    /// Checks and uploads the start offsets.
    pub(super) fn upload(
        memory: &Arc<Memory>,
        p: &Problem,
        cu_seqlens_q: &[u32],
        cu_seqlens_k: &[u32],
    ) -> Result<Self, Error> {
        let upload = |what: &'static str, cu_seqlens: &[u32]| {
            if p.varlen().is_none() {
                return Err(Error::UnexpectedTensor { what: what.into() });
            }
            p.check_cu_seqlens(what, cu_seqlens)?;
            memory.upload(cu_seqlens)
        };
        let both = [upload("cu_seqlens_q", cu_seqlens_q)?, upload("cu_seqlens_k", cu_seqlens_k)?];
        Ok(Self(Some(both)))
    }

    /// Takes checked start offsets out of `extras`, if there are any.
    pub(super) fn take(extras: &mut Extras<DeviceBuffer>) -> Self {
        let both = (extras.cu_seqlens_q.take(), extras.cu_seqlens_k.take());
        Self(both.0.zip(both.1).map(<[_; 2]>::from))
    }

    /// `extras` with these start offsets in place of the caller's.
    pub(super) fn within<'a>(
        &'a self,
        extras: Extras<&'a DeviceBuffer>,
    ) -> Result<Extras<&'a DeviceBuffer>, Error> {
        for (what, given) in
            [("cu_seqlens_q", extras.cu_seqlens_q), ("cu_seqlens_k", extras.cu_seqlens_k)]
        {
            if given.is_some() {
                return Err(Error::UnexpectedTensor { what: what.into() });
            }
        }
        let [cu_seqlens_q, cu_seqlens_k] = match &self.0 {
            Some(both) => both.each_ref().map(Some),
            None => [None; 2],
        };
        Ok(Extras { cu_seqlens_q, cu_seqlens_k, ..extras })
    }
}
