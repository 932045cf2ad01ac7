//! Tensor-core products of a warpgroup: `wgmma`, from sm_90 on (`sm_90a`).
//!
//! The 128 threads of a warpgroup multiply a 64-row tile A by a tile B of up to 256
//! columns; the result stays spread over their registers, in an [`Accumulator`]. B is
//! read from shared memory, A from there or from registers, while the threads go on:
//! [`Accumulator::wait_group`] waits for the product, and only then may operands be
//! overwritten and the accumulator be looked at. Storage is f16 or bf16, sums are f32.
//!
//! # Registers
//! Group `g` of an accumulator covers columns `8 g .. 8 g + 8`. With `w`, `l` the warp
//! in the warpgroup and the lane, the four values of a group are the elements in
//!
//! ```text
//! row 16 w + l / 4      columns 8 g + 2 (l % 4), + 1
//! row 16 w + l / 4 + 8  the same columns
//! ```
//!
//! and the A operand in registers ([`Fragments`]) packs two neighbouring groups of such a
//! tile into four registers per step of 16 columns: S = QKᵀ becomes P of P V in place.
//!
//! # Shared memory
//! Tiles have rows of 64 elements (128 bytes) with the 128-byte swizzle, as TMA writes
//! them; a wider tile is several such *chunks*, one after another. A chunk is aligned to
//! 1024 bytes. Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
//!
//! Each product is one `asm!` from fence to commit, with its accumulators as operands:
//! nothing else keeps LLVM from moving arithmetic between the two.

use half::{bf16, f16};

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::tensor_core::{self, OperandA, Product, SharedTile};
use crate::{
    mma::{Ampere, TensorCore},
    scalar::Scalar,
};

/// Columns of a chunk: 128 bytes, the width of the swizzle.
pub const CHUNK_COLUMNS: u32 = 64;
/// Bytes of a chunk's row.
pub const CHUNK_ROW_BYTES: u32 = 128;
/// Columns of A, and rows of B, that one instruction multiplies.
pub const STEP: u32 = 16;

/// A type that tensor cores multiply.
pub trait Operand: Scalar {
    /// Whether it is bf16, and not f16.
    const IS_BF16: bool;
    /// Rounds two values and packs them, `low` in the lower half.
    fn pack(low: f32, high: f32) -> u32;
    /// The two values of [`pack`](Self::pack).
    fn unpack(packed: u32) -> (f32, f32);
}

macro_rules! operand {
    ($type:ident, $is_bf16:literal) => {
        impl Operand for $type {
            const IS_BF16: bool = $is_bf16;
            #[inline(always)]
            fn pack(low: f32, high: f32) -> u32 {
                <Ampere as TensorCore<$type>>::pack(low, high)
            }
            #[inline(always)]
            fn unpack(packed: u32) -> (f32, f32) {
                let half = |bits: u32| Scalar::to_f32($type::from_bits(bits as u16));
                (half(packed), half(packed >> 16))
            }
        }
    };
}

operand!(f16, false);
operand!(bf16, true);

/// The direction of an operand's rows.
pub trait Major: 'static {
    /// Whether they run along the rows or columns of the result, and not along the dimension that is
    /// summed over.
    const IS_MN: bool;
    /// From one step of 16 to the next, in units of 16 bytes: along a swizzled row, or 16 rows on.
    const STEP_UNITS: u32 = if Self::IS_MN { STEP * CHUNK_ROW_BYTES / 16 } else { 2 };
}

/// Rows run along the dimension that is summed over: [`Descriptor::k_major`].
#[derive(Clone, Copy, Debug)]
pub struct KMajor;

/// Rows run along the rows or columns of the result: [`Descriptor::n_major`].
#[derive(Clone, Copy, Debug)]
pub struct MnMajor;

impl Major for KMajor {
    const IS_MN: bool = false;
}

impl Major for MnMajor {
    const IS_MN: bool = true;
}

/// The place and the layout of a tile in shared memory: the lower half of the 64 bits that wgmma
/// takes. The upper half is the same for every tile here, and address arithmetic in 32 bits
/// needs no carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(u32);

impl Descriptor {
    /// The upper half: the 128-byte swizzle, and the bytes from one group of eight rows of a
    /// chunk to the next.
    const HIGH: u32 = 1 << 30 | Self::field(8 * CHUNK_ROW_BYTES);

    const fn new(address: u32, leading_bytes: u32) -> Self {
        Self(Self::field(address) | Self::field(leading_bytes) << 16)
    }

    const fn field(bytes: u32) -> u32 {
        (bytes & 0x3_ffff) >> 4
    }

    /// A tile whose rows run along the dimension that is summed over: Q and K.
    /// `address` is that of its first row.
    #[inline(always)]
    #[must_use]
    pub const fn k_major(address: u32) -> Self {
        // One step of 16 lies within the swizzle's width: there is no leading stride.
        Self::new(address, 16)
    }

    /// A tile whose rows run along the columns of the result: V. (Or along its rows, of an A that is
    /// transposed: dSᵀ.) Its chunks are `chunk_bytes` apart.
    #[inline(always)]
    #[must_use]
    pub const fn n_major(address: u32, chunk_bytes: u32) -> Self {
        Self::new(address, chunk_bytes)
    }

    /// The same tile `bytes` (a multiple of 1024) further on, such as in another stage.
    #[inline(always)]
    #[must_use]
    pub const fn offset(self, bytes: u32) -> Self {
        Self(self.0 + (bytes >> 4))
    }

    /// The bits.
    #[inline(always)]
    #[must_use]
    pub const fn bits(self) -> u64 {
        (Self::HIGH as u64) << 32 | self.0 as u64
    }
}

/// An A operand in registers: `STEPS` steps of 16 columns, as the module's header says.
pub type Fragments<const STEPS: usize> = [[u32; 4]; STEPS];

/// A 64-row tile of f32 over the registers of a warpgroup, `GROUPS` groups of 8 columns.
#[derive(Debug)]
pub struct Accumulator<const GROUPS: usize> {
    values: [[f32; 4]; GROUPS],
    /// Number of the product in flight, for the emulator.
    #[cfg(not(target_arch = "nvptx64"))]
    in_flight: Option<u64>,
}

impl<const GROUPS: usize> Accumulator<GROUPS> {
    /// All zero.
    #[inline(always)]
    #[must_use]
    pub const fn zero() -> Self {
        Self {
            values: [[0.0; 4]; GROUPS],
            #[cfg(not(target_arch = "nvptx64"))]
            in_flight: None,
        }
    }

    /// The values of this thread. The emulator faults while a product is in flight.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn values(&self) -> &[[f32; 4]; GROUPS] {
        #[cfg(not(target_arch = "nvptx64"))]
        tensor_core::check_landed(self.in_flight, Location::caller());
        &self.values
    }

    /// As [`values`](Self::values), to be changed.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn values_mut(&mut self) -> &mut [[f32; 4]; GROUPS] {
        #[cfg(not(target_arch = "nvptx64"))]
        tensor_core::check_landed(self.in_flight, Location::caller());
        &mut self.values
    }

    /// Starts a product under the emulator; the values are NaN until it is waited for.
    #[cfg(not(target_arch = "nvptx64"))]
    fn start(&mut self, a: OperandA<'_>, b: SharedTile, accumulate: bool, bf16: bool, at: Place) {
        let columns = GROUPS * 8;
        let product = Product { a, b, columns, accumulate, bf16 };
        let flat = self.values.as_flattened();
        self.in_flight = Some(tensor_core::start(&product, self.in_flight, flat, at));
        self.values = [[f32::NAN; 4]; GROUPS];
    }
}

#[cfg(not(target_arch = "nvptx64"))]
type Place = &'static Location<'static>;

/// Waiting for products.
pub trait WaitGroup {
    /// Waits until all but the last `PENDING` products of this warpgroup are complete.
    /// The wait makes its own accumulator readable: call it on each.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn wait_group<const PENDING: u32>(&mut self) {
        self.wait_group_in::<PENDING, 0>();
    }

    /// The same, in arm `ARM` of a branch. ptxas moves a wait to the beginning of its basic
    /// block; work that is to come before it needs its own block, and the wait then stands in
    /// every arm of the branch that ends that block. LLVM would move equal instructions of
    /// all arms back before the branch: different numbers make them different.
    fn wait_group_in<const PENDING: u32, const ARM: u32>(&mut self);
}

/// Products with both operands in shared memory, over `STEPS` steps of 16 columns.
pub trait SharedProduct<const STEPS: usize>: WaitGroup {
    /// Starts `self = A Bᵀ` with A `[64, 16 * STEPS]` and B `[8 * GROUPS, 16 * STEPS]`, both
    /// [`Descriptor::k_major`], whose chunks are `A_CHUNK` and `B_CHUNK` bytes apart.
    ///
    /// # Safety
    /// All threads of the warpgroup call it alike. The operands stay as they are, and
    /// the accumulator untouched, until it is waited for.
    unsafe fn product_shared<T: Operand, const A_CHUNK: u32, const B_CHUNK: u32>(
        &mut self,
        a: Descriptor,
        b: Descriptor,
    );
}

/// Products of slices of 64 terms, four steps of 16, with both operands in shared memory.
pub trait SliceProduct: WaitGroup {
    /// Starts `self += A B` with A `[64, 64]` and B `[64, 8 * GROUPS]`, each stored as its type says.
    ///
    /// # Safety
    /// As for [`SharedProduct::product_shared`].
    unsafe fn accumulate_slice<T: Operand, A: Major, B: Major>(
        &mut self,
        a: Descriptor,
        b: Descriptor,
    );
}

/// Products with A in registers and B in shared memory, over `STEPS` steps of 16 rows.
pub trait RegisterProduct<const STEPS: usize>: WaitGroup {
    /// Starts `self += A B` with A `[64, 16 * STEPS]` and B `[16 * STEPS, 8 * GROUPS]`,
    /// [`Descriptor::n_major`].
    ///
    /// # Safety
    /// As for [`SharedProduct::product_shared`].
    unsafe fn product_registers<T: Operand>(&mut self, a: &Fragments<STEPS>, b: Descriptor);
}

/// Products with both operands in shared memory, A transposed, over `STEPS` steps of 16 rows.
pub trait TransposedProduct<const STEPS: usize>: WaitGroup {
    /// Starts `self = Aᵀ B` with A `[16 * STEPS, 64]` and B `[16 * STEPS, 8 * GROUPS]`, both
    /// [`Descriptor::n_major`].
    ///
    /// # Safety
    /// As for [`SharedProduct::product_shared`].
    unsafe fn product_transposed<T: Operand>(&mut self, a: Descriptor, b: Descriptor);
}

/// Calls `$then` with the groups of a tile of that many columns: for each, its number and
/// the numbers of its four registers.
macro_rules! with_groups {
    (64 $then:ident $args:tt) => {
        $then! { 64 $args
        (0 0 1 2 3) (1 4 5 6 7) (2 8 9 10 11) (3 12 13 14 15)
        (4 16 17 18 19) (5 20 21 22 23) (6 24 25 26 27) (7 28 29 30 31) }
    };
    (80 $then:ident $args:tt) => {
        $then! { 80 $args
        (0 0 1 2 3) (1 4 5 6 7) (2 8 9 10 11) (3 12 13 14 15)
        (4 16 17 18 19) (5 20 21 22 23) (6 24 25 26 27) (7 28 29 30 31)
        (8 32 33 34 35) (9 36 37 38 39) }
    };
    (96 $then:ident $args:tt) => {
        $then! { 96 $args
        (0 0 1 2 3) (1 4 5 6 7) (2 8 9 10 11) (3 12 13 14 15)
        (4 16 17 18 19) (5 20 21 22 23) (6 24 25 26 27) (7 28 29 30 31)
        (8 32 33 34 35) (9 36 37 38 39) (10 40 41 42 43) (11 44 45 46 47) }
    };
    (112 $then:ident $args:tt) => {
        $then! { 112 $args
        (0 0 1 2 3) (1 4 5 6 7) (2 8 9 10 11) (3 12 13 14 15)
        (4 16 17 18 19) (5 20 21 22 23) (6 24 25 26 27) (7 28 29 30 31)
        (8 32 33 34 35) (9 36 37 38 39) (10 40 41 42 43) (11 44 45 46 47)
        (12 48 49 50 51) (13 52 53 54 55) }
    };
    (128 $then:ident $args:tt) => {
        $then! { 128 $args
        (0 0 1 2 3) (1 4 5 6 7) (2 8 9 10 11) (3 12 13 14 15)
        (4 16 17 18 19) (5 20 21 22 23) (6 24 25 26 27) (7 28 29 30 31)
        (8 32 33 34 35) (9 36 37 38 39) (10 40 41 42 43) (11 44 45 46 47)
        (12 48 49 50 51) (13 52 53 54 55) (14 56 57 58 59) (15 60 61 62 63) }
    };
    (192 $then:ident $args:tt) => {
        $then! { 192 $args
        (0 0 1 2 3) (1 4 5 6 7) (2 8 9 10 11) (3 12 13 14 15)
        (4 16 17 18 19) (5 20 21 22 23) (6 24 25 26 27) (7 28 29 30 31)
        (8 32 33 34 35) (9 36 37 38 39) (10 40 41 42 43) (11 44 45 46 47)
        (12 48 49 50 51) (13 52 53 54 55) (14 56 57 58 59) (15 60 61 62 63)
        (16 64 65 66 67) (17 68 69 70 71) (18 72 73 74 75) (19 76 77 78 79)
        (20 80 81 82 83) (21 84 85 86 87) (22 88 89 90 91) (23 92 93 94 95) }
    };
    (256 $then:ident $args:tt) => {
        $then! { 256 $args
        (0 0 1 2 3) (1 4 5 6 7) (2 8 9 10 11) (3 12 13 14 15)
        (4 16 17 18 19) (5 20 21 22 23) (6 24 25 26 27) (7 28 29 30 31)
        (8 32 33 34 35) (9 36 37 38 39) (10 40 41 42 43) (11 44 45 46 47)
        (12 48 49 50 51) (13 52 53 54 55) (14 56 57 58 59) (15 60 61 62 63)
        (16 64 65 66 67) (17 68 69 70 71) (18 72 73 74 75) (19 76 77 78 79)
        (20 80 81 82 83) (21 84 85 86 87) (22 88 89 90 91) (23 92 93 94 95)
        (24 96 97 98 99) (25 100 101 102 103) (26 104 105 106 107) (27 108 109 110 111)
        (28 112 113 114 115) (29 116 117 118 119) (30 120 121 122 123) (31 124 125 126 127) }
    };
}

/// The operand list of an instruction: `{{0}, {1}, …}` as a template.
#[cfg(target_arch = "nvptx64")]
macro_rules! register_list {
    (($g0:literal $a0:literal $b0:literal $c0:literal $d0:literal)
     $(($g:literal $a:literal $b:literal $c:literal $d:literal))*) => {
        concat!("{{{", $a0, "},{", $b0, "},{", $c0, "},{", $d0, "}",
            $(",{", $a, "},{", $b, "},{", $c, "},{", $d, "}",)* "}}")
    };
}

macro_rules! wait_group {
    ($n:literal () $(($g:literal $a:literal $b:literal $c:literal $d:literal))*) => {
        impl WaitGroup for Accumulator<{ $n / 8 }> {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            fn wait_group_in<const PENDING: u32, const ARM: u32>(&mut self) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let d = &mut self.values;
                    // SAFETY: waits; the operands tie the product's results to the wait.
                    unsafe {
                        core::arch::asm!(
                            concat!("wgmma.wait_group.sync.aligned {pending}; // {arm} ",
                                register_list!($(($g $a $b $c $d))*)),
                            $(inout(reg32) d[$g][0], inout(reg32) d[$g][1],
                              inout(reg32) d[$g][2], inout(reg32) d[$g][3],)*
                            pending = const PENDING, arm = const ARM, options(nostack)
                        );
                    }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    let flat = self.values.as_flattened_mut();
                    tensor_core::wait_group(PENDING, &mut self.in_flight, flat, Location::caller());
                }
            }
        }
    };
}

/// One step with A in shared memory. `(k % 4) * 32` bytes along the swizzled row, then
/// on to the next chunk; addresses count 16 bytes.
#[cfg(target_arch = "nvptx64")]
macro_rules! shared_step {
    ($n:literal $type:literal $k:literal $list:expr) => {
        concat!(
            "add.s32 low, {a}, (",
            $k,
            "&3)*2+(",
            $k,
            ">>2)*{a_chunk}; mov.b64 a, {{low, {high}}}; ",
            "add.s32 low, {b}, (",
            $k,
            "&3)*2+(",
            $k,
            ">>2)*{b_chunk}; mov.b64 b, {{low, {high}}}; ",
            "wgmma.mma_async.sync.aligned.m64n",
            $n,
            "k16.f32.",
            $type,
            ".",
            $type,
            " ",
            $list,
            ", a, b, (",
            $k,
            ">=1), 1, 1, 0, 0; "
        )
    };
}

macro_rules! shared_product {
    ($n:literal ($steps:literal $k:tt) $($groups:tt)*) => {
        shared_product!(@impl $n $steps $k (register_list!($($groups)*)) $($groups)*);
    };
    (@impl $n:literal $steps:literal [$($k:literal)*] ($list:expr)
     $(($g:literal $a:literal $b:literal $c:literal $d:literal))*) => {
        impl SharedProduct<$steps> for Accumulator<{ $n / 8 }> {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn product_shared<T: Operand, const A_CHUNK: u32, const B_CHUNK: u32>(
                &mut self,
                a: Descriptor,
                b: Descriptor,
            ) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let d = &mut self.values;
                    macro_rules! issue {
                        ($type:literal) => {
                            // SAFETY: the whole warpgroup is here, and the operands stay until the
                            // wait, as the trait asks. Every output is written.
                            unsafe {
                                core::arch::asm!(
                                    "{{ .reg .b64 a, b; .reg .b32 low; wgmma.fence.sync.aligned; ",
                                    $(shared_step!($n $type $k $list),)*
                                    "wgmma.commit_group.sync.aligned; }}",
                                    $(out(reg32) d[$g][0], out(reg32) d[$g][1],
                                      out(reg32) d[$g][2], out(reg32) d[$g][3],)*
                                    a = in(reg32) a.0, b = in(reg32) b.0,
                                    high = const Descriptor::HIGH,
                                    a_chunk = const A_CHUNK / 16, b_chunk = const B_CHUNK / 16,
                                    options(nostack)
                                );
                            }
                        };
                    }
                    if T::IS_BF16 { issue!("bf16") } else { issue!("f16") }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    let a = SharedTile::KMajor { tile: a.bits(), chunk: A_CHUNK };
                    let b = SharedTile::KMajor { tile: b.bits(), chunk: B_CHUNK };
                    self.start(OperandA::Shared(a, $steps), b, false, T::IS_BF16, Location::caller());
                }
            }
        }
    };
}

/// One step of a slice.
#[cfg(target_arch = "nvptx64")]
macro_rules! slice_step {
    ($n:literal $type:literal $k:literal $list:expr) => {
        concat!(
            "add.s32 low, {a}, ",
            $k,
            "*{a_step}; mov.b64 a, {{low, {high}}}; ",
            "add.s32 low, {b}, ",
            $k,
            "*{b_step}; mov.b64 b, {{low, {high}}}; ",
            "wgmma.mma_async.sync.aligned.m64n",
            $n,
            "k16.f32.",
            $type,
            ".",
            $type,
            " ",
            $list,
            ", a, b, 1, 1, 1, {a_mn}, {b_mn}; "
        )
    };
}

macro_rules! slice_product {
    ($n:literal () $($groups:tt)*) => {
        slice_product!(@impl $n (register_list!($($groups)*)) $($groups)*);
    };
    (@impl $n:literal ($list:expr)
     $(($g:literal $a:literal $b:literal $c:literal $d:literal))*) => {
        impl SliceProduct for Accumulator<{ $n / 8 }> {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn accumulate_slice<T: Operand, A: Major, B: Major>(
                &mut self,
                a: Descriptor,
                b: Descriptor,
            ) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let d = &mut self.values;
                    macro_rules! issue {
                        ($type:literal) => {
                            // SAFETY: the whole warpgroup is here, and the operands stay until the
                            // wait, as the trait asks.
                            unsafe {
                                core::arch::asm!(
                                    "{{ .reg .b64 a, b; .reg .b32 low; wgmma.fence.sync.aligned; ",
                                    slice_step!($n $type 0 $list),
                                    slice_step!($n $type 1 $list),
                                    slice_step!($n $type 2 $list),
                                    slice_step!($n $type 3 $list),
                                    "wgmma.commit_group.sync.aligned; }}",
                                    $(inout(reg32) d[$g][0], inout(reg32) d[$g][1],
                                      inout(reg32) d[$g][2], inout(reg32) d[$g][3],)*
                                    a = in(reg32) a.0, b = in(reg32) b.0,
                                    high = const Descriptor::HIGH,
                                    a_step = const A::STEP_UNITS, b_step = const B::STEP_UNITS,
                                    a_mn = const A::IS_MN as u32, b_mn = const B::IS_MN as u32,
                                    options(nostack)
                                );
                            }
                        };
                    }
                    if T::IS_BF16 { issue!("bf16") } else { issue!("f16") }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    let (a, b) = (SharedTile::of_slice::<A>(a), SharedTile::of_slice::<B>(b));
                    self.start(OperandA::Shared(a, 4), b, true, T::IS_BF16, Location::caller());
                }
            }
        }
    };
}

#[cfg(not(target_arch = "nvptx64"))]
impl SharedTile {
    /// A slice of an operand; of terms it has one chunk.
    const fn of_slice<M: Major>(tile: Descriptor) -> Self {
        if M::IS_MN {
            Self::MnMajor { tile: tile.bits() }
        } else {
            Self::KMajor { tile: tile.bits(), chunk: 0 }
        }
    }
}

/// One step with A in registers: 16 rows of B further on are 2048 bytes.
#[cfg(target_arch = "nvptx64")]
macro_rules! register_step {
    ($n:literal $type:literal ($k:literal $p0:ident $p1:ident $p2:ident $p3:ident) $list:expr) => {
        concat!(
            "add.s32 low, {b}, ",
            $k,
            "*128; mov.b64 b, {{low, {high}}}; ",
            "wgmma.mma_async.sync.aligned.m64n",
            $n,
            "k16.f32.",
            $type,
            ".",
            $type,
            " ",
            $list,
            ", {{{",
            stringify!($p0),
            "},{",
            stringify!($p1),
            "},{",
            stringify!($p2),
            "},{",
            stringify!($p3),
            "}}}, b, 1, 1, 1, 1; "
        )
    };
}

macro_rules! register_product {
    ($n:literal ($steps:literal $fragments:tt) $($groups:tt)*) => {
        register_product!(@impl $n $steps $fragments (register_list!($($groups)*)) $($groups)*);
    };
    (@impl $n:literal $steps:literal
     [$(($k:literal $p0:ident $p1:ident $p2:ident $p3:ident))*] ($list:expr)
     $(($g:literal $a:literal $b:literal $c:literal $d:literal))*) => {
        impl RegisterProduct<$steps> for Accumulator<{ $n / 8 }> {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn product_registers<T: Operand>(
                &mut self,
                p: &Fragments<$steps>,
                b: Descriptor,
            ) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let d = &mut self.values;
                    macro_rules! issue {
                        ($type:literal) => {
                            // SAFETY: the whole warpgroup is here, and the operands stay until the
                            // wait, as the trait asks.
                            unsafe {
                                core::arch::asm!(
                                    "{{ .reg .b64 b; .reg .b32 low; wgmma.fence.sync.aligned; ",
                                    $(register_step!($n $type ($k $p0 $p1 $p2 $p3) $list),)*
                                    "wgmma.commit_group.sync.aligned; }}",
                                    $(inout(reg32) d[$g][0], inout(reg32) d[$g][1],
                                      inout(reg32) d[$g][2], inout(reg32) d[$g][3],)*
                                    $($p0 = in(reg32) p[$k][0], $p1 = in(reg32) p[$k][1],
                                      $p2 = in(reg32) p[$k][2], $p3 = in(reg32) p[$k][3],)*
                                    b = in(reg32) b.0, high = const Descriptor::HIGH,
                                    options(nostack)
                                );
                            }
                        };
                    }
                    if T::IS_BF16 { issue!("bf16") } else { issue!("f16") }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    let b = SharedTile::MnMajor { tile: b.bits() };
                    let a = OperandA::Registers(p);
                    self.start(a, b, true, T::IS_BF16, Location::caller());
                }
            }
        }
    };
}

/// One step with both operands transposed: 16 rows of each further on are 2048 bytes.
#[cfg(target_arch = "nvptx64")]
macro_rules! transposed_step {
    ($n:literal $type:literal $k:literal $list:expr) => {
        concat!(
            "add.s32 low, {a}, ",
            $k,
            "*128; mov.b64 a, {{low, {high}}}; ",
            "add.s32 low, {b}, ",
            $k,
            "*128; mov.b64 b, {{low, {high}}}; ",
            "wgmma.mma_async.sync.aligned.m64n",
            $n,
            "k16.f32.",
            $type,
            ".",
            $type,
            " ",
            $list,
            ", a, b, (",
            $k,
            ">=1), 1, 1, 1, 1; "
        )
    };
}

macro_rules! transposed_product {
    ($n:literal ($steps:literal $k:tt) $($groups:tt)*) => {
        transposed_product!(@impl $n $steps $k (register_list!($($groups)*)) $($groups)*);
    };
    (@impl $n:literal $steps:literal [$($k:literal)*] ($list:expr)
     $(($g:literal $a:literal $b:literal $c:literal $d:literal))*) => {
        impl TransposedProduct<$steps> for Accumulator<{ $n / 8 }> {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            unsafe fn product_transposed<T: Operand>(&mut self, a: Descriptor, b: Descriptor) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let d = &mut self.values;
                    macro_rules! issue {
                        ($type:literal) => {
                            // SAFETY: the whole warpgroup is here, and the operands stay until the
                            // wait, as the trait asks. Every output is written.
                            unsafe {
                                core::arch::asm!(
                                    "{{ .reg .b64 a, b; .reg .b32 low; wgmma.fence.sync.aligned; ",
                                    $(transposed_step!($n $type $k $list),)*
                                    "wgmma.commit_group.sync.aligned; }}",
                                    $(out(reg32) d[$g][0], out(reg32) d[$g][1],
                                      out(reg32) d[$g][2], out(reg32) d[$g][3],)*
                                    a = in(reg32) a.0, b = in(reg32) b.0,
                                    high = const Descriptor::HIGH,
                                    options(nostack)
                                );
                            }
                        };
                    }
                    if T::IS_BF16 { issue!("bf16") } else { issue!("f16") }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    let a = SharedTile::MnMajor { tile: a.bits() };
                    let b = SharedTile::MnMajor { tile: b.bits() };
                    self.start(OperandA::Shared(a, $steps), b, false, T::IS_BF16, Location::caller());
                }
            }
        }
    };
}

with_groups!(64 wait_group ());
with_groups!(80 wait_group ());
with_groups!(96 wait_group ());
with_groups!(112 wait_group ());
with_groups!(128 wait_group ());
with_groups!(192 wait_group ());
with_groups!(256 wait_group ());

// Projections: the columns of a tile.
with_groups!(128 slice_product ());
with_groups!(192 slice_product ());
with_groups!(256 slice_product ());

// S = QKᵀ: the width of the tile of keys, and the head dims in steps of 16.
with_groups!(64 shared_product (16 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]));
with_groups!(80 shared_product (16 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]));
with_groups!(96 shared_product (12 [0 1 2 3 4 5 6 7 8 9 10 11]));
with_groups!(112 shared_product (5 [0 1 2 3 4]));
with_groups!(112 shared_product (6 [0 1 2 3 4 5]));
with_groups!(128 shared_product (4 [0 1 2 3]));
with_groups!(128 shared_product (5 [0 1 2 3 4]));
with_groups!(128 shared_product (6 [0 1 2 3 4 5]));
with_groups!(128 shared_product (8 [0 1 2 3 4 5 6 7]));
with_groups!(128 shared_product (12 [0 1 2 3 4 5 6 7 8 9 10 11]));

// O += P V: the head dim, and the tile of keys in steps of 16.
with_groups!(256 register_product (4 [(0 p0 p1 p2 p3) (1 p4 p5 p6 p7) (2 p8 p9 p10 p11)
    (3 p12 p13 p14 p15)]));
with_groups!(256 register_product (5 [(0 p0 p1 p2 p3) (1 p4 p5 p6 p7) (2 p8 p9 p10 p11)
    (3 p12 p13 p14 p15) (4 p16 p17 p18 p19)]));
with_groups!(192 register_product (6 [(0 p0 p1 p2 p3) (1 p4 p5 p6 p7) (2 p8 p9 p10 p11)
    (3 p12 p13 p14 p15) (4 p16 p17 p18 p19) (5 p20 p21 p22 p23)]));
macro_rules! register_product_of_112_keys {
    ($n:tt) => {
        with_groups!($n register_product (7 [(0 p0 p1 p2 p3) (1 p4 p5 p6 p7) (2 p8 p9 p10 p11)
            (3 p12 p13 p14 p15) (4 p16 p17 p18 p19) (5 p20 p21 p22 p23) (6 p24 p25 p26 p27)]));
    };
}
register_product_of_112_keys!(80);
register_product_of_112_keys!(96);
macro_rules! register_product_of_128_keys {
    ($n:tt) => {
        with_groups!($n register_product (8 [(0 p0 p1 p2 p3) (1 p4 p5 p6 p7) (2 p8 p9 p10 p11)
            (3 p12 p13 p14 p15) (4 p16 p17 p18 p19) (5 p20 p21 p22 p23) (6 p24 p25 p26 p27)
            (7 p28 p29 p30 p31)]));
    };
}
register_product_of_128_keys!(64);
register_product_of_128_keys!(80);
register_product_of_128_keys!(96);
register_product_of_128_keys!(128);

// The backward pass. Sᵀ = K Qᵀ and dPᵀ = V dOᵀ: the rows of a tile, and head dim 128 in steps of 16
// (64 rows of head dim 128; 128 of 64 are above). dV += Pᵀ dO and dK += dSᵀ Q: the head dim, and the
// rows of a tile in steps of 16. dQ = dS K: 64 columns, and the tile of keys in steps of 16.
with_groups!(64 shared_product (8 [0 1 2 3 4 5 6 7]));
with_groups!(128 register_product (4 [(0 p0 p1 p2 p3) (1 p4 p5 p6 p7) (2 p8 p9 p10 p11)
    (3 p12 p13 p14 p15)]));
with_groups!(64 transposed_product (8 [0 1 2 3 4 5 6 7]));
// Head dims above 128: 64 rows and 64 keys. (64 rows of head dim 256 are above, and so is dV of it.)
with_groups!(64 shared_product (12 [0 1 2 3 4 5 6 7 8 9 10 11]));
with_groups!(192 register_product (4 [(0 p0 p1 p2 p3) (1 p4 p5 p6 p7) (2 p8 p9 p10 p11)
    (3 p12 p13 p14 p15)]));
