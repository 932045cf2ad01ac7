//! Tensors on the host, in the storage type, before they go to a device and after they come back.

use half::{bf16, f16, slice::HalfFloatSliceExt as _};

use crate::{
    dtype::{DType, E4m3, Element},
    error::{Error, Shape},
};

/// Elements of one of the storage types.
#[derive(Clone, Debug, PartialEq)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    E4M3(Vec<E4m3>),
}

/// Runs one expression for the elements' type.
macro_rules! each {
    ($data:expr, $values:ident => $body:expr) => {
        match $data {
            Data::F32($values) => $body,
            Data::F16($values) => $body,
            Data::BF16($values) => $body,
            Data::E4M3($values) => $body,
        }
    };
}

/// Makes [`Data`] of a dtype from an expression generic in the element type `$t`.
macro_rules! make {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $t = f32;
                Data::F32($body)
            }
            DType::F16 => {
                type $t = f16;
                Data::F16($body)
            }
            DType::BF16 => {
                type $t = bf16;
                Data::BF16($body)
            }
            DType::E4M3 => {
                type $t = E4m3;
                Data::E4M3($body)
            }
        }
    };
}

/// A row-major tensor that owns its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

impl Tensor {
    /// A tensor of zeros.
    #[must_use]
    pub fn zeros(dtype: DType, shape: &[usize]) -> Self {
        let len = shape.iter().product();
        Self { shape: shape.to_vec(), data: make!(dtype, T => vec![T::from_f64(0.0); len]) }
    }

    /// A tensor of elements drawn from the normal distribution with mean `mean` and
    /// standard deviation 1. The same seed gives the same numbers on every platform.
    #[cfg(feature = "verify")]
    #[must_use]
    pub fn random(dtype: DType, shape: &[usize], seed: u64, mean: f64) -> Self {
        use rand::SeedableRng;
        use rand_chacha::ChaCha8Rng;
        use rand_distr::{Distribution, StandardNormal};
        use rayon::prelude::*;

        /// Elements from one stream of the generator; streams run in parallel.
        const STREAM: usize = 1 << 20;
        let len: usize = shape.iter().product();
        let data = make!(dtype, T => {
            let mut values = vec![T::from_f64(0.0); len];
            values.par_chunks_mut(STREAM).enumerate().for_each(|(stream, values)| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(stream as u64);
                let mut draw = || -> f64 { StandardNormal.sample(&mut rng) };
                values.fill_with(|| T::from_f64(mean + draw()));
            });
            values
        });
        Self { shape: shape.to_vec(), data }
    }

    /// Rounds `values` to the storage type.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when there are more or fewer values than the shape has.
    pub fn from_f64(dtype: DType, shape: &[usize], values: &[f64]) -> Result<Self, Error> {
        check_len(shape, values.len())?;
        let data = make!(dtype, T => values.iter().map(|&v| T::from_f64(v)).collect());
        Ok(Self { shape: shape.to_vec(), data })
    }

    /// Rounds `values` to the storage type.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when there are more or fewer values than the shape has.
    pub fn from_f32(dtype: DType, shape: &[usize], values: &[f32]) -> Result<Self, Error> {
        check_len(shape, values.len())?;
        let data = make!(dtype, T => values.iter().map(|&v| T::from_f64(f64::from(v))).collect());
        Ok(Self { shape: shape.to_vec(), data })
    }

    /// Takes elements of one of the storage types: `f32`, `f16` or `bf16` of the crate `half`
    /// ([`crate::half`]), or [`E4m3`].
    ///
    /// ```
    /// use flash_attention::{DType, Tensor, half::f16};
    ///
    /// let tensor = Tensor::from_vec(&[2, 1], vec![f16::ONE, f16::ZERO])?;
    /// assert_eq!(tensor.dtype(), DType::F16);
    /// assert_eq!(tensor.as_slice::<f16>()?, [f16::ONE, f16::ZERO]);
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when there are more or fewer elements than the shape has.
    pub fn from_vec<T: Element>(shape: &[usize], values: Vec<T>) -> Result<Self, Error> {
        check_len(shape, values.len())?;
        let mut data = Some(values);
        // One of the arms is the type itself, where the cast gives the vector back.
        let data = make!(T::DTYPE, U => bytemuck::allocation::cast_vec::<T, U>(data.take().unwrap_or_default()));
        Ok(Self { shape: shape.to_vec(), data })
    }

    /// The elements, where the storage type is `T`.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] for another storage type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], Error> {
        if self.dtype() == T::DTYPE {
            return Ok(each!(&self.data, values => bytemuck::cast_slice(values)));
        }
        Err(Error::DTypeMismatch {
            what: "of these elements".into(),
            expected: T::DTYPE,
            given: self.dtype(),
        })
    }

    /// Takes elements in the machine's (little-endian) byte order, at any alignment.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the number of bytes differs from the shape's.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Self, Error> {
        expect_bytes(dtype, shape, bytes.len())?;
        let data = make!(dtype, T => bytemuck::allocation::pod_collect_to_vec::<u8, T>(bytes));
        Ok(Self { shape: shape.to_vec(), data })
    }

    /// Storage type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
            Data::E4M3(_) => DType::E4M3,
        }
    }

    /// Extent of each dimension, slowest first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        each!(&self.data, values => values.len())
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        each!(&self.data, values => bytemuck::cast_slice(values))
    }

    /// The elements as mutable bytes.
    #[must_use]
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        each!(&mut self.data, values => bytemuck::cast_slice_mut(values))
    }

    /// Element `index`, counted over all dimensions, exactly.
    ///
    /// # Panics
    /// When the index is out of range.
    #[must_use]
    pub fn get(&self, index: usize) -> f64 {
        each!(&self.data, values => values[index].to_f64())
    }

    /// All elements, exactly.
    #[must_use]
    pub fn to_f64(&self) -> Vec<f64> {
        each!(&self.data, values => values.iter().map(|v| v.to_f64()).collect())
    }

    /// All elements, exactly: f32 holds every storage type.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Data::F32(values) => values.clone(),
            Data::F16(values) => values.to_f32_vec(),
            Data::BF16(values) => values.to_f32_vec(),
            Data::E4M3(values) => values.iter().map(|value| value.to_f32()).collect(),
        }
    }

    /// The elements rounded to another storage type.
    #[must_use]
    pub fn cast(&self, dtype: DType) -> Self {
        let data = each!(&self.data, values =>
            make!(dtype, T => values.iter().map(|v| T::from_f64(v.to_f64())).collect()));
        Self { shape: self.shape.clone(), data }
    }

    /// Moves each element up or down by one unit in its last place, or leaves it, as its share of
    /// `seed`'s bytes says: about a third each. An element that would become infinite stays.
    #[cfg(feature = "verify")]
    pub(crate) fn beside(&self, seed: u64) -> Self {
        use rand_chacha::{
            ChaCha8Rng,
            rand_core::{Rng, SeedableRng},
        };

        let mut bytes = vec![0; self.len()];
        ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
        let unit = 2.0 * self.dtype().unit_roundoff();
        let step = |byte: u8| f64::from(i8::from(byte > 170) - i8::from(byte < 85)) * unit;
        let data = each!(&self.data, values => make!(self.dtype(), T => {
            let moved = values.iter().zip(bytes).map(|(value, byte)| {
                let x = value.to_f64();
                let moved = T::from_f64(x + step(byte) * x);
                if moved.to_f64().is_finite() { moved } else { T::from_f64(x) }
            });
            moved.collect()
        }));
        Self { shape: self.shape.clone(), data }
    }

    /// Each element multiplied by `factor` and rounded again.
    #[must_use]
    pub fn scaled(&self, factor: f64) -> Self {
        let data = each!(&self.data, values =>
            make!(self.dtype(), T => values.iter().map(|v| T::from_f64(v.to_f64() * factor)).collect()));
        Self { shape: self.shape.clone(), data }
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the new shape has more or fewer elements.
    pub fn reshaped(mut self, shape: &[usize]) -> Result<Self, Error> {
        check_len(shape, self.len())?;
        self.shape = shape.to_vec();
        Ok(self)
    }

    /// Swaps the two middle dimensions of four: `[B, H, N, D]` to `[B, N, H, D]` and back.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when there are not four dimensions.
    pub fn swap_middle(&self) -> Result<Self, Error> {
        let &[a, b, c, d] = self.shape.as_slice() else {
            return Err(Error::ShapeMismatch {
                what: "to transpose".into(),
                expected: [0; 4].into(),
                given: self.shape().into(),
            });
        };
        let mut swapped = Self::zeros(self.dtype(), &[a, c, b, d]);
        let row = d * self.dtype().size();
        let (from, to) = (self.as_bytes(), swapped.as_bytes_mut());
        for (target, chunk) in to.chunks_exact_mut(row.max(1)).enumerate() {
            let (i, k, j) = (target / (c * b), target / b % c, target % b);
            let source = ((i * b + j) * c + k) * row;
            chunk.copy_from_slice(&from[source..source + row]);
        }
        Ok(swapped)
    }

    /// Checks type and shape against the expected ones; `what` names the tensor.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] or [`Error::ShapeMismatch`].
    pub fn expect(&self, what: &str, dtype: DType, shape: &[usize]) -> Result<(), Error> {
        expect_tensor(what, (self.dtype(), dtype), (&self.shape, shape))
    }
}

/// Compares storage type and shape, each `(given, expected)`.
pub(crate) fn expect_tensor(
    what: &str,
    (dtype, expected_dtype): (DType, DType),
    (shape, expected_shape): (&[usize], &[usize]),
) -> Result<(), Error> {
    if shape != expected_shape {
        return Err(Error::ShapeMismatch {
            what: what.into(),
            expected: expected_shape.into(),
            given: shape.into(),
        });
    }
    if dtype != expected_dtype {
        return Err(Error::DTypeMismatch {
            what: what.into(),
            expected: expected_dtype,
            given: dtype,
        });
    }
    Ok(())
}

/// Bytes of a tensor.
pub(crate) fn bytes_of(dtype: DType, shape: &[usize]) -> Result<u64, Error> {
    let size = dtype.size() as u64;
    let bytes = shape.iter().try_fold(size, |n, &extent| n.checked_mul(extent as u64));
    bytes.ok_or_else(|| Error::TooLarge {
        what: "a tensor",
        shape: shape.into(),
        limit: u64::MAX / size,
    })
}

/// Checks that the number of bytes is the tensor's.
pub(crate) fn expect_bytes(dtype: DType, shape: &[usize], given: usize) -> Result<(), Error> {
    if bytes_of(dtype, shape)? == given as u64 {
        return Ok(());
    }
    // Bytes that are no whole elements are told apart from too many or too few elements.
    if given.is_multiple_of(dtype.size()) {
        return check_len(shape, given / dtype.size());
    }
    Err(Error::InvalidValue {
        what: "the length of a tensor",
        given: format!("{given} bytes"),
        remedy: format!("an element of {dtype} has {} bytes", dtype.size()),
    })
}

fn check_len(shape: &[usize], len: usize) -> Result<(), Error> {
    let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    if elements == Some(len) {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        what: "from values".into(),
        expected: Shape(shape.to_vec()),
        given: [len].into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_depend_on_the_seed_alone() {
        let a = Tensor::random(DType::F32, &[2, 500], 42, 0.0);
        assert_eq!(a, Tensor::random(DType::F32, &[2, 500], 42, 0.0));
        assert_ne!(a, Tensor::random(DType::F32, &[2, 500], 43, 0.0));
        let mean = a.to_f64().iter().sum::<f64>() / 1000.0;
        assert!(mean.abs() < 0.1, "{mean}");
        let shifted = Tensor::random(DType::BF16, &[1000], 42, 3.0).to_f64();
        assert!((shifted.iter().sum::<f64>() / 1000.0 - mean - 3.0).abs() < 1e-2);
    }

    #[test]
    fn bytes_come_back_as_the_same_tensor() {
        for dtype in DType::ALL {
            let a = Tensor::random(dtype, &[3, 4], 1, 0.0);
            let mut shifted = vec![0u8];
            shifted.extend_from_slice(a.as_bytes());
            assert_eq!(Tensor::from_bytes(dtype, &[3, 4], &shifted[1..]).unwrap(), a);
            assert!(Tensor::from_bytes(dtype, &[3, 5], &shifted[1..]).is_err());
            assert!(Tensor::from_bytes(dtype, &[3, 4], &shifted[2..]).is_err(), "half an element");
            assert!(Tensor::from_bytes(dtype, &[usize::MAX, 8], &shifted).is_err());
            assert_eq!(a.cast(DType::F32).cast(dtype), a);
        }
    }

    #[test]
    fn elements_that_are_no_whole_are_refused() {
        let error = Tensor::from_bytes(DType::F32, &[1], &[0; 7]).unwrap_err().to_string();
        assert!(error.contains("7 bytes") && error.contains("f32 has 4 bytes"), "{error}");
    }

    #[test]
    fn vectors_go_in_and_slices_come_out() {
        let tensor = Tensor::from_vec(&[2, 2], vec![1.0f32, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(tensor.as_slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
        let error = tensor.as_slice::<half::bf16>().unwrap_err().to_string();
        assert!(error.contains("is f32, expected bf16"), "{error}");
        assert!(Tensor::from_vec(&[3], vec![1.0f32]).is_err());
    }

    #[test]
    fn middle_dimensions_swap() {
        let values: Vec<f64> = (0..2 * 3 * 4 * 5).map(f64::from).collect();
        let a = Tensor::from_f64(DType::F16, &[2, 3, 4, 5], &values).unwrap();
        let b = a.swap_middle().unwrap();
        assert_eq!(b.shape(), [2, 4, 3, 5]);
        assert_eq!(b.get(((4 + 2) * 3 + 1) * 5 + 3), a.get(((3 + 1) * 4 + 2) * 5 + 3));
        assert_eq!(b.swap_middle().unwrap(), a);
    }
}
