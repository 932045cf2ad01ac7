//! The command line's parts, as a library, so that tests and other programs can read
//! what it writes.

pub mod report;
pub mod results;
