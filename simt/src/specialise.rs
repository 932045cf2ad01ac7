//! Specialisation constants: numbers that a launch fixes before its entry is compiled.
//!
//! A kernel with many features pays for features that are off: with branches, and with registers
//! for both of their sides. One entry per combination of features means as many entries as
//! combinations. A specialisation constant is SPIR-V's way out: on a GPU a symbol
//! stands in the entry's PTX, the loader writes a number in its place, and the driver's
//! compiler folds it, drops the dead branches, and allocates registers after that. Under the
//! emulator the constants are part of the launch ([`Options::constants`]).
//!
//! [`specialisation_constants!`](crate::specialisation_constants!) declares the constants of a
//! crate of kernels.
//!
//! Source: the SPIR-V specification, section 2.12, "Specialization".
//!
//! [`Options::constants`]: crate::emulator::Options::constants

#[cfg(not(target_arch = "nvptx64"))]
pub use crate::hardware::MAX_CONSTANTS;

#[cfg(not(target_arch = "nvptx64"))]
mod text;

#[cfg(not(target_arch = "nvptx64"))]
pub use text::{PREFIX, names, replace};

/// The constant at place `index` of the launch that runs.
#[cfg(not(target_arch = "nvptx64"))]
#[must_use]
pub fn of_launch(index: usize) -> u32 {
    crate::emulator::current::with(|block| block.options.constants[index])
}

/// Declares the specialisation constants of a crate of kernels: a struct of their values for
/// the caller that launches, and a function of the same name for the kernel that reads one.
///
/// ```
/// simt::specialisation_constants! {
///     /// The features of a launch.
///     pub struct Constants {
///         /// 1: later rows see more.
///         causal,
///     }
/// }
///
/// // In a kernel: `if Constants::causal() != 0 { ... }`
/// let full = Constants::default();
/// let text = full.specialise("mov.b32 %r1, simt_constant_causal;").unwrap();
/// assert_eq!(text, "mov.b32 %r1, 0;");
/// ```
#[macro_export]
macro_rules! specialisation_constants {
    (
        $(#[$meta:meta])*
        pub struct $constants:ident {
            $( $(#[$doc:meta])* $name:ident, )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $constants {
            $( $(#[$doc])* pub $name: u32, )*
        }

        const _: () = {
            /// Places of the constants among a launch's.
            #[cfg(not(target_arch = "nvptx64"))]
            #[allow(non_camel_case_types)]
            enum Place { $( $name, )* }

            impl $constants {
                /// All of them 0.
                pub const NONE: Self = Self { $( $name: 0, )* };

                $(
                    $(#[$doc])*
                    ///
                    /// As a kernel reads it.
                    #[inline(always)]
                    #[must_use]
                    pub fn $name() -> u32 {
                        #[cfg(target_arch = "nvptx64")]
                        {
                            let value;
                            // SAFETY: a number stands in the place of the symbol when the
                            // entry is compiled; nothing is accessed.
                            unsafe {
                                core::arch::asm!(
                                    concat!("mov.b32 {0}, simt_constant_", stringify!($name), ";"),
                                    out(reg32) value,
                                    options(pure, nomem, nostack, preserves_flags)
                                );
                            }
                            value
                        }
                        #[cfg(not(target_arch = "nvptx64"))]
                        {
                            $crate::specialise::of_launch(Place::$name as usize)
                        }
                    }
                )*

                /// Names and values, in the order of the declaration.
                #[cfg(not(target_arch = "nvptx64"))]
                pub fn iter(&self) -> impl Iterator<Item = (&'static str, u32)> + use<> {
                    [$( (stringify!($name), self.$name), )*].into_iter()
                }

                /// The constants whose values `value` gives by their names.
                #[cfg(not(target_arch = "nvptx64"))]
                #[must_use]
                pub fn by_name(value: impl Fn(&str) -> u32) -> Self {
                    Self { $( $name: value(stringify!($name)), )* }
                }

                /// The values as the emulator's launches take them.
                #[cfg(not(target_arch = "nvptx64"))]
                #[must_use]
                pub fn values(&self) -> [u32; $crate::specialise::MAX_CONSTANTS] {
                    let mut values = [0; $crate::specialise::MAX_CONSTANTS];
                    $( values[Place::$name as usize] = self.$name; )*
                    values
                }

                /// The PTX of an entry with these values in place of the constants' symbols.
                ///
                /// # Errors
                /// The name of a constant in the text that is none of these.
                #[cfg(not(target_arch = "nvptx64"))]
                pub fn specialise(&self, text: &str) -> Result<String, String> {
                    $crate::specialise::replace(text, |name| {
                        self.iter().find(|(of, _)| *of == name).map(|(_, value)| value)
                    })
                }
            }
        };
    };
}
