//! The PTX modules embedded in this library (feature `ptx`): each entry compressed by itself, and
//! unpacked when it is asked for.
//!
//! An entry belongs only to the module of the lowest architecture that can run it. PTX is a virtual
//! instruction set: the driver compiles a module for its GPU when it loads it, so an ordinary
//! module serves every later generation too. An `a` architecture is the exception: its instructions
//! (wgmma, setmaxnreg) exist on that one compute capability alone.
//!
//! | module | loads on | for |
//! |---|---|---|
//! | `sm_75` | 7.5 and later | scalar kernels, `mma.sync` on f16 |
//! | `sm_80` | 8.0 and later | `mma.sync` on bf16 and tf32, `cp.async` |
//! | `sm_90a` | 9.0 only | wgmma, TMA |
//!
//! So a GPU's kernels are the entries of all modules that load on it ([`loadable`]). The registry
//! chooses between kernels.

use std::sync::LazyLock;

use kernels_gpu::constants::Constants;

/// The embedded PTX: freshly compiled if a kernel was edited, otherwise the checked-in text.
#[cfg(all(feature = "ptx", fresh_ptx))]
static PACK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ptx/modules.ptx.zst"));
#[cfg(all(feature = "ptx", not(fresh_ptx)))]
use kernels_gpu::PTX as PACK;
#[cfg(not(feature = "ptx"))]
static PACK: &[u8] = &[];

/// The start of the comment that names a text's constants.
const CONSTANTS: &str = "// constants: ";

/// The pack's index, and the frames after it.
static INDEX: LazyLock<(String, &[u8])> = LazyLock::new(|| {
    let mut frames = PACK;
    (unpack(&mut frames), frames)
});
static MODULES: LazyLock<Vec<PtxModule>> = LazyLock::new(|| {
    let (index, frames) = &*INDEX;
    modules_of(index, frames).expect("a constant of this library, which its tests read")
});

/// A PTX module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PtxModule {
    /// The module's name in entries: `sm_80`.
    pub name: &'static str,
    /// The lowest compute capability that loads the module, major and minor.
    pub compute_capability: (u32, u32),
    /// Whether the module loads only on that compute capability.
    pub exact: bool,
    /// The text in front of the entries, packed.
    head: &'static [u8],
    /// Name and packed text of each entry.
    entries: Vec<(&'static str, &'static [u8])>,
}

impl PtxModule {
    /// The module of an architecture: `sm_90a` loads on compute capability 9.0 alone.
    fn new(name: &'static str, head: &'static [u8]) -> Option<Self> {
        let number = name.strip_prefix("sm_")?;
        let (number, exact) = number.strip_suffix('a').map_or((number, false), |n| (n, true));
        let number: u32 = number.parse().ok()?;
        let compute_capability = (number / 10, number % 10);
        Some(Self { name, compute_capability, exact, head, entries: Vec::new() })
    }

    /// Whether a GPU of this compute capability loads the module.
    #[must_use]
    pub fn loads_on(&self, compute_capability: (u32, u32)) -> bool {
        if self.exact {
            compute_capability == self.compute_capability
        } else {
            compute_capability >= self.compute_capability
        }
    }

    /// The names of the module's entries.
    pub fn entries(&self) -> impl Iterator<Item = &'static str> {
        self.entries.iter().map(|(symbol, _)| *symbol)
    }

    /// The PTX of one entry, as a module of its own with the symbols of the
    /// [constants](simt::specialise). `None` if the module has no such entry.
    ///
    /// No other entry is unpacked: a driver would compile every one that it is given.
    #[must_use]
    pub fn entry(&self, symbol: &str) -> Option<String> {
        let (_, mut packed) = *self.entries.iter().find(|(of, _)| *of == symbol)?;
        let mut head = self.head;
        Some(unpack(&mut head) + &unpack(&mut packed))
    }

    /// One entry of the module with its constants: the text that a driver compiles. A comment
    /// in front names the constants. `None` if the module has no such entry.
    #[must_use]
    pub fn specialised(&self, symbol: &str, constants: &Constants) -> Option<String> {
        let text = constants.specialise(&self.entry(symbol)?).ok()?;
        let values: Vec<_> = constants.iter().map(|(name, n)| format!("{name}={n}")).collect();
        Some(format!("{CONSTANTS}{}\n{text}", values.join(" ")))
    }
}

/// Every module, lowest architecture first; empty in a library built without the feature `ptx`.
#[must_use]
pub fn modules() -> &'static [PtxModule] {
    &MODULES
}

/// The text of the zstd frame that `packed` begins with, which is then behind it.
#[cfg(feature = "ptx")]
fn unpack(packed: &mut &[u8]) -> String {
    ruzstd::decoding::StreamingDecoder::new(packed)
        .map_err(std::io::Error::other)
        .and_then(std::io::read_to_string)
        .expect("a constant of this library, which its tests unpack")
}

#[cfg(not(feature = "ptx"))]
const fn unpack(_: &mut &[u8]) -> String {
    String::new()
}

/// The modules of a pack, whose index has a line for each frame: `module sm_75 133` for
/// what precedes the module's entries, then `entry naive_scores_f32_d64 2141` for each of them.
/// The number is the bytes of the frame. `None` if the index is wrong.
fn modules_of(index: &'static str, mut frames: &'static [u8]) -> Option<Vec<PtxModule>> {
    let mut modules = Vec::new();
    for line in index.lines() {
        let mut words = line.split(' ');
        let (kind, name, bytes) = (words.next()?, words.next()?, words.next()?);
        let frame = frames.split_off(..bytes.parse().ok()?)?;
        match kind {
            "module" => modules.push(PtxModule::new(name, frame)?),
            _ => modules.last_mut()?.entries.push((name, frame)),
        }
    }
    Some(modules)
}

/// The modules that a GPU of this compute capability loads, best first.
pub fn loadable(compute_capability: (u32, u32)) -> impl Iterator<Item = &'static PtxModule> {
    modules().iter().rev().filter(move |module| module.loads_on(compute_capability))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_names_modules_and_entries_and_gives_them_their_frames() {
        let index = "module sm_80 1\nentry a 2\nentry b 0\nmodule sm_100a 3\nentry c 1\n";
        let module = |name, compute_capability, exact, head, entries| PtxModule {
            name,
            compute_capability,
            exact,
            head,
            entries,
        };
        let expected = [
            module("sm_80", (8, 0), false, &b"0"[..], vec![("a", &b"12"[..]), ("b", b"")]),
            module("sm_100a", (10, 0), true, b"345", vec![("c", &b"6"[..])]),
        ];
        assert_eq!(modules_of(index, b"0123456").as_deref(), Some(&expected[..]));
        for wrong in ["module sm_80 8\n", "entry a 1\n", "module sm_80\n", "module 80 1\n"] {
            assert_eq!(modules_of(wrong, b"0123456"), None, "{wrong}");
        }
    }

    fn empty(name: &'static str) -> PtxModule {
        PtxModule::new(name, &[]).unwrap()
    }

    #[test]
    fn an_ordinary_module_loads_on_its_architecture_and_later() {
        let ordinary = empty("sm_80");
        assert!(!ordinary.loads_on((7, 5)));
        for later in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            assert!(ordinary.loads_on(later), "{later:?}");
        }
    }

    #[test]
    fn an_exact_module_loads_on_its_architecture_only() {
        let exact = empty("sm_90a");
        assert!(exact.loads_on((9, 0)));
        for other in [(8, 9), (9, 1), (10, 0), (12, 0)] {
            assert!(!exact.loads_on(other), "{other:?}");
        }
    }

    #[test]
    #[cfg(feature = "ptx")]
    fn every_kernel_is_in_its_module_with_its_launch_bounds() {
        for entry in kernels_gpu::entries() {
            let module = modules().iter().find(|module| module.name == entry.module);
            let text = module.and_then(|module| module.entry(entry.symbol)).unwrap_or_default();
            let start = text.find(&format!(".entry {}(", entry.symbol));
            let start = start.unwrap_or_else(|| panic!("no PTX for {}", entry.symbol));
            let header = text[start..].split('{').next().unwrap_or("");
            let threads = format!(".maxntid {}, 1, 1", entry.threads);
            assert!(header.contains(&threads), "{}: {header}", entry.symbol);
            let parameter = format!("_param_0[{}]", entry.args_bytes);
            assert!(header.contains(&parameter), "{}: {header}", entry.symbol);
        }
    }

    #[test]
    fn the_pack_has_no_entry_that_the_kernels_do_not_list() {
        for module in modules() {
            for symbol in module.entries() {
                assert_eq!(
                    kernels_gpu::entries().filter(|entry| entry.symbol == symbol).count(),
                    1,
                    "{symbol}"
                );
            }
        }
    }

    #[test]
    fn every_entry_stands_alone_with_what_precedes_the_entries() {
        for module in modules() {
            for entry in kernels_gpu::entries().filter(|entry| entry.module == module.name) {
                let text = module
                    .specialised(entry.symbol, &Constants { causal: 1, ..Constants::default() });
                let text = text.expect(entry.symbol);
                assert!(!text.contains(simt::specialise::PREFIX), "{}", entry.symbol);
                assert!(
                    text.starts_with("// constants: causal=1 left=0 padding=0 dropout=0 group=0 ")
                );
                assert_eq!(text.matches(".entry ").count(), 1, "{}", entry.symbol);
                for directive in [".version", ".target", ".address_size", "simt_dynamic_shared"] {
                    assert!(text.contains(directive), "{}: {directive}", entry.symbol);
                }
                assert!(text.ends_with("}\n"), "{}", entry.symbol);
            }
        }
    }

    #[test]
    fn a_newer_gpu_is_offered_the_best_module_first() {
        let names: Vec<_> = loadable((9, 0)).map(|module| module.name).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        assert_eq!(names, sorted);
    }
}
