//! Is a decode right? The forward pass's rule applies: a decode's rows are the last rows of a
//! prefill.

use super::{Verification, verify};
use crate::{
    error::Error,
    oracle::{self, Gathered},
    registry::Decode,
    session::{DecodeInputs, Outputs},
};

/// As [`verify_decode_rows`], for all rows.
///
/// # Errors
/// Inputs or outputs of other shapes than the decode has.
pub fn verify_decode(
    decode: &Decode,
    inputs: &DecodeInputs<'_>,
    outputs: &Outputs,
) -> Result<Verification, Error> {
    verify_decode_rows(decode, inputs, outputs, usize::MAX)
}

/// Verifies at most `count` rows of a decode, spread evenly, against attention over each sequence's
/// keys and values.
///
/// # Errors
/// Inputs or outputs of other shapes than the decode has.
pub fn verify_decode_rows(
    decode: &Decode,
    inputs: &DecodeInputs<'_>,
    outputs: &Outputs,
    count: usize,
) -> Result<Verification, Error> {
    let gathered = Gathered::new(decode, inputs)?;
    let outputs = gathered.outputs(decode.problem(), outputs)?;
    let rows = oracle::sample_rows(&gathered.problem, count);
    Ok(verify(&gathered.problem, &gathered.inputs(), &outputs, &rows))
}
