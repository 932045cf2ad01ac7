//! Is a decode right? By the rule of the forward pass: its rows are the last rows of a prefill.

use super::{Verification, verify};
use crate::{
    error::Error,
    oracle::{self, Gathered},
    registry::Decode,
    session::{DecodeInputs, Outputs},
};

/// Verifies all rows of a decode against attention of the keys and values that each sequence has.
///
/// # Errors
/// Inputs or outputs that are not those of the decode.
pub fn verify_decode(
    decode: &Decode,
    inputs: &DecodeInputs<'_>,
    outputs: &Outputs,
) -> Result<Verification, Error> {
    let gathered = Gathered::new(decode, inputs)?;
    let outputs = gathered.outputs(decode.problem(), outputs)?;
    let rows = oracle::all_rows(&gathered.problem);
    Ok(verify(&gathered.problem, &gathered.inputs(), &outputs, &rows))
}
