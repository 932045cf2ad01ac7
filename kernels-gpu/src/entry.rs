//! How a generic kernel becomes entries that can be launched.
//!
//! `extern "ptx-kernel"` functions cannot be generic, so [`entries!`](crate::entries!) makes one
//! per instance: on nvptx64 an `.entry` of that name, on the host a row of a table
//! that the emulator looks the name up in. Both come from the same line, so that
//! they cannot disagree.

/// A kernel instance as the host sees it.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Name of the `.entry` in the PTX.
    pub symbol: &'static str,
    /// Storage type: `f32`, `f16`, `bf16`.
    pub dtype: &'static str,
    /// The size that it is compiled for: head dim, or columns of a tile; 0 where there is none.
    pub size: usize,
    /// PTX module that holds it, which is the least architecture that can run it.
    pub module: &'static str,
    /// Threads of a block: its launch bound. A launch must have as many.
    pub threads: u32,
    /// Blocks that must fit on a multiprocessor at once; bounds the registers. 0: no bound.
    pub min_blocks: u32,
    /// Blocks of a cluster, which must divide the grid's x; 1 without clusters.
    pub cluster: u32,
    /// Size of the argument struct in bytes.
    pub args_bytes: usize,
    /// Runs one lane under the emulator.
    ///
    /// # Safety
    /// The pointer must lead to the entry's argument struct, and the struct must
    /// describe memory that lives until the launch ends.
    #[cfg(feature = "emulator")]
    pub run: unsafe fn(*const core::ffi::c_void),
}

/// A copy of an argument struct's bytes for [`Entry::run`], aligned for every one of them.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Debug)]
pub struct ArgsCopy(Vec<ArgsUnit>);

#[cfg(not(target_arch = "nvptx64"))]
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
struct ArgsUnit([u8; 64]);

#[cfg(not(target_arch = "nvptx64"))]
const _: () = assert!(align_of::<ArgsUnit>() >= align_of::<simt::tma::TensorMap>());

#[cfg(not(target_arch = "nvptx64"))]
impl ArgsCopy {
    /// Copies the bytes; what follows them up to a multiple of 64 is zero.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let unit = |bytes: &[u8]| {
            let mut unit = ArgsUnit([0; 64]);
            unit.0[..bytes.len()].copy_from_slice(bytes);
            unit
        };
        Self(bytes.chunks(64).map(unit).collect())
    }

    /// Where the struct is.
    #[must_use]
    pub fn as_ptr(&self) -> *const core::ffi::c_void {
        self.0.as_ptr().cast()
    }
}

/// The entries of one kernel.
#[derive(Clone, Copy, Debug)]
pub struct Instances(#[doc(hidden)] pub &'static [&'static [Entry]]);

impl Instances {
    /// The entry for a storage type, by its name, and a size.
    #[must_use]
    pub fn find(self, dtype: &str, size: usize) -> Option<&'static Entry> {
        self.iter().find(|entry| entry.dtype == dtype && entry.size == size)
    }

    /// Every entry.
    pub fn iter(self) -> impl Iterator<Item = &'static Entry> {
        self.0.iter().copied().flatten()
    }
}

/// Declares the instances of a generic kernel: one for each type, or for each type and size.
///
/// ```ignore
/// entries! {
///     /// The entries flash_tiled_f32_d64, flash_tiled_f32_d128, flash_tiled_f16_d64, …
///     pub static ENTRIES: AttentionArgs => "sm_75", threads 128, min_blocks 2;
///     flash_tiled: T in [f32, f16], d D in [64, 128] = flash_tiled::<T, D>;
/// }
/// ```
///
/// The kernel is an `unsafe fn(&Args)`; it is inlined into each entry. `T` is a type and `D` a
/// `usize` there, and in the numbers of threads and blocks. `cluster 2` after `min_blocks` makes
/// clusters of two blocks; a literal before the `=` ends each name.
#[macro_export]
macro_rules! entries {
    (
        $(#[$meta:meta])*
        pub static $table:ident: $args:ty => $module:literal, threads $threads:expr,
            min_blocks $min_blocks:expr $(, cluster $cluster:expr)?;
        $name:ident: $T:ident in [$($t:ident),+]
            $(, $letter:ident $D:ident in [$($d:literal),+])? $(, $end:literal)? = $kernel:expr;
    ) => {
        $crate::entries! {
            @each $(#[$meta])* $table $T [$($t)+]
            [$($D $((concat!("_", stringify!($letter), $d)) $d)+)?]
            {
                $name $args, $module, $threads, $min_blocks, (1 $(* $cluster)?),
                concat!("" $(, $end)?), $kernel
            }
        }
    };
    // One size, which no name has.
    (@each $(#[$meta:meta])* $table:ident $T:ident $types:tt [] $rest:tt) => {
        $crate::entries! { @each $(#[$meta])* $table $T $types [SIZE ("") 0] $rest }
    };
    (@each $(#[$meta:meta])* $table:ident $T:ident [$($t:ident)+] $sizes:tt $rest:tt) => {
        $(#[$meta])*
        #[cfg(not(target_arch = "nvptx64"))]
        pub static $table: $crate::entry::Instances =
            $crate::entry::Instances(&[$($crate::entries!(@host $T $t $sizes $rest)),+]);
        $($crate::entries! { @device $T $t $sizes $rest })+
    };
    (
        @host $T:ident $t:ident [$D:ident $(($size:expr) $d:literal)+] {
            $name:ident $args:ty, $module:literal, $threads:expr, $min_blocks:expr, $cluster:expr,
            $end:expr, $kernel:expr
        }
    ) => {
        &[$({
            #[allow(dead_code)]
            type $T = $t;
            #[allow(dead_code)]
            const $D: usize = $d;
            /// # Safety
            /// As `Entry::run` says.
            // Without a use it is checked, but not compiled.
            #[cfg_attr(not(feature = "emulator"), allow(dead_code))]
            unsafe fn run(args: *const core::ffi::c_void) {
                let kernel: unsafe fn(&$args) = $kernel;
                // SAFETY: the caller passes the entry's argument struct.
                unsafe { kernel(&*args.cast::<$args>()) }
            }
            $crate::entry::Entry {
                symbol: concat!(stringify!($name), "_", stringify!($t), $size, $end),
                dtype: stringify!($t),
                size: $d,
                module: $module,
                threads: $threads,
                min_blocks: $min_blocks,
                cluster: $cluster,
                args_bytes: size_of::<$args>(),
                #[cfg(feature = "emulator")]
                run,
            }
        }),+]
    };
    (
        @device $T:ident $t:ident [$D:ident $(($size:expr) $d:literal)+] {
            $name:ident $args:ty, $module:literal, $threads:expr, $min_blocks:expr, $cluster:expr,
            $end:expr, $kernel:expr
        }
    ) => {$(
        #[cfg(all(target_arch = "nvptx64", feature = $module))]
        const _: () = {
            #[allow(dead_code)]
            type $T = $t;
            #[allow(dead_code)]
            const $D: usize = $d;
            /// # Safety
            /// Launch with the threads and arguments that the kernel documents.
            #[unsafe(export_name = concat!(stringify!($name), "_", stringify!($t), $size, $end))]
            pub unsafe extern "ptx-kernel" fn entry(args: $args) {
                simt::launch_bounds!($threads, $min_blocks, cluster $cluster);
                let kernel: unsafe fn(&$args) = $kernel;
                // SAFETY: the launch has the threads, the arguments and the memory that the kernel
                // documents.
                unsafe { kernel(&args) }
            }
        };
    )+};
}
