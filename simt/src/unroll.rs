//! Loops that are gone before the compiler sees them.

/// Repeats a block with a constant index: `unroll!(for I in 0..4 { a[I] += b[I]; })`.
///
/// An array stays in registers only if every index is a constant when LLVM breaks it up,
/// and LLVM does that before it unrolls nested loops with large bodies: the array then
/// ends in local memory, silently. Here the copies are made of tokens, so that there is
/// no loop to begin with. The bound is one of the literals below;
/// guard the body with a constant condition where a generic bound is smaller.
///
/// On the host it is a loop: there is nothing to win there, and copies take long to compile.
/// So the index is no constant for `const { }` and const generics.
#[macro_export]
macro_rules! unroll {
    (for $i:ident in 0..2 $body:block) => { $crate::unroll!(@ $i $body 0 1) };
    (for $i:ident in 0..3 $body:block) => { $crate::unroll!(@ $i $body 0 1 2) };
    (for $i:ident in 0..4 $body:block) => { $crate::unroll!(@ $i $body 0 1 2 3) };
    (for $i:ident in 0..8 $body:block) => { $crate::unroll!(@ $i $body 0 1 2 3 4 5 6 7) };
    (for $i:ident in 0..16 $body:block) => {
        $crate::unroll!(@ $i $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (for $i:ident in 0..32 $body:block) => {
        $crate::unroll!(@ $i $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
            16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31)
    };
    (@ $i:ident $body:block $($k:literal)*) => {{
        #[cfg(target_arch = "nvptx64")]
        { $( { const $i: usize = $k; $body } )* }
        #[cfg(not(target_arch = "nvptx64"))]
        #[allow(non_snake_case, reason = "a constant on the other target")]
        for $i in [$($k),*] $body
    }};
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_index_comes_once_and_in_order() {
        let mut seen = Vec::new();
        unroll!(for I in 0..3 {
            unroll!(for J in 0..2 {
                seen.push((I, J));
            });
        });
        assert_eq!(seen, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]);
    }

    #[test]
    fn every_bound_has_as_many_copies() {
        let mut count = [0; 32];
        unroll!(for I in 0..32 {
            count[I] += 1;
        });
        unroll!(for I in 0..16 {
            count[I] += 1;
        });
        unroll!(for I in 0..8 {
            count[I] += 1;
        });
        unroll!(for I in 0..4 {
            count[I] += 1;
        });
        let expected = |i| 1 + usize::from(i < 16) + usize::from(i < 8) + usize::from(i < 4);
        assert!((0..32).all(|i| count[i] == expected(i)), "{count:?}");
    }
}
