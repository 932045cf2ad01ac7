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
    /// PTX module that holds it, which is the least architecture that can run it.
    pub module: &'static str,
    /// Threads of a block: its launch bound, and what it must be launched with.
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

/// Declares instances of a generic kernel.
///
/// ```ignore
/// entries! {
///     /// Rows of the host's table.
///     pub static ENTRIES: AttentionArgs => "sm_75", threads 128, min_blocks 2;
///     flash_tiled_f32_d64 = flash_tiled::<f32, 64>;
/// }
/// ```
///
/// The kernel is an `unsafe fn(&Args)`; it is inlined into each entry. `cluster 2` after
/// `min_blocks` makes clusters of two blocks.
#[macro_export]
macro_rules! entries {
    (
        $(#[$meta:meta])*
        pub static $table:ident: $args:ty => $module:literal, threads $threads:expr, min_blocks $min_blocks:expr;
        $($instances:tt)*
    ) => {
        $crate::entries! {
            $(#[$meta])*
            pub static $table: $args => $module, threads $threads, min_blocks $min_blocks, cluster 1;
            $($instances)*
        }
    };
    (
        $(#[$meta:meta])*
        pub static $table:ident: $args:ty => $module:literal, threads $threads:expr, min_blocks $min_blocks:expr, cluster $cluster:expr;
        $( $symbol:ident = $kernel:expr; )*
    ) => {
        $(#[$meta])*
        #[cfg(not(target_arch = "nvptx64"))]
        pub static $table: &[$crate::entry::Entry] = &[
            $( {
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
                    symbol: stringify!($symbol),
                    module: $module,
                    threads: $threads,
                    min_blocks: $min_blocks,
                    cluster: $cluster,
                    args_bytes: size_of::<$args>(),
                    #[cfg(feature = "emulator")]
                    run,
                }
            }, )*
        ];
        $(
            /// # Safety
            /// Launch with the threads and arguments that the kernel documents.
            #[cfg(all(target_arch = "nvptx64", feature = $module))]
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $symbol(args: $args) {
                simt::launch_bounds!($threads, $min_blocks, cluster $cluster);
                let kernel: unsafe fn(&$args) = $kernel;
                // SAFETY: passed on to whoever launches.
                unsafe { kernel(&args) }
            }
        )*
    };
}
