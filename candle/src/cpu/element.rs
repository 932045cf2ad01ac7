//! Storage types: what tensors hold, while arithmetic is in f32.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// A storage type.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// The numbers in f32. Both slices are of one length.
    fn widen(from: &[Self], to: &mut [f32]);

    /// The numbers rounded to the storage type. Both slices are of one length.
    fn narrow(from: &[f32], to: &mut [Self]);

    /// The same numbers without a copy, where the storage type is f32.
    fn as_f32(_numbers: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Element for f32 {
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

    fn as_f32(numbers: &[Self]) -> Option<&[f32]> {
        Some(numbers)
    }
}

impl Element for f16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for bf16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}
