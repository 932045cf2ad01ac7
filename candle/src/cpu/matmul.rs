//! Matrices seen through strides, and their product on one thread.

/// A matrix `[rows, cols]`: element `(r, c)` is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Rows of `cols` neighbours, `row_stride` elements from one to the next.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed matrix.
    pub const fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(needed <= len, "{rows} rows of {cols} with a stride of {row_stride} in {len} elements");
}

/// `c = a b`, or `c += a b` if `add`. `c` is `[a.rows, b.cols]`, its rows `row_stride` apart.
pub fn matmul(c: &mut [f32], row_stride: usize, add: bool, a: Mat<'_>, b: Mat<'_>) {
    assert_eq!(a.cols, b.rows, "the inner dimensions must agree");
    assert!(row_stride >= b.cols || a.rows <= 1, "rows of the product must not overlap");
    check(c.len(), a.rows, b.cols, row_stride);
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    let stride = |stride: usize| stride as isize;
    // SAFETY: `check` says that `c` has all of `[a.rows, b.cols]` at these strides, no two elements at
    // one place. `c` is borrowed alone. `a` and `b` were made with all of their elements.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.as_mut_ptr(),
            1,
            stride(row_stride),
            add,
            a.data.as_ptr(),
            stride(a.col_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.col_stride),
            stride(b.row_stride),
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_the_sums_of_the_definition() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * 4).map(|i| i as f32 - 6.0).collect();
        let b: Vec<f32> = (0..n * 5).map(|i| 3.0 - i as f32).collect();
        let (a, b) = (Mat::new(&a, m, k, 4), Mat::new(&b, n, k, 5).t());
        let mut c = vec![1.0; m * 8];
        for add in [false, true] {
            let before = c.clone();
            matmul(&mut c, 8, add, a, b);
            for (i, j) in (0..m).flat_map(|i| (0..8).map(move |j| (i, j))) {
                let product = |p| a.data[i * 4 + p] * b.data[j * 5 + p];
                let kept = if add { before[i * 8 + j] } else { 0.0 };
                let expected =
                    if j < n { kept + (0..k).map(product).sum::<f32>() } else { before[i * 8 + j] };
                assert_eq!(c[i * 8 + j], expected, "{i} {j}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "3 rows of 4 with a stride of 5 in 13 elements")]
    fn a_matrix_has_all_its_elements() {
        _ = Mat::new(&[0.0; 13], 3, 4, 5);
    }
}
