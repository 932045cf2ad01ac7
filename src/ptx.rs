//! The PTX modules embedded in this library (feature `ptx`), compressed, and unpacked on first use.
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

/// The start of a pack's line that names the module of the text below it.
const HEADING: &str = "// module ";

/// The start of the comment that names a text's constants.
const CONSTANTS: &str = "// constants: ";

/// Every module's text.
static TEXT: LazyLock<String> = LazyLock::new(unpack);
static MODULES: LazyLock<Vec<PtxModule>> = LazyLock::new(|| modules_of(&TEXT));

/// A PTX module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PtxModule {
    /// The module's name in entries: `sm_80`.
    pub name: &'static str,
    /// The lowest compute capability that loads the module, major and minor.
    pub compute_capability: (u32, u32),
    /// Whether the module loads only on that compute capability.
    pub exact: bool,
    /// The PTX.
    pub text: &'static str,
}

impl PtxModule {
    /// The module of an architecture: `sm_90a` loads on compute capability 9.0 alone.
    fn new(name: &'static str, text: &'static str) -> Option<Self> {
        let number = name.strip_prefix("sm_")?;
        let (number, exact) = number.strip_suffix('a').map_or((number, false), |n| (n, true));
        let number: u32 = number.parse().ok()?;
        Some(Self { name, compute_capability: (number / 10, number % 10), exact, text })
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

    /// One entry of the module with its constants: the text that a driver compiles. A comment
    /// in front names the constants. `None` if the module has no such entry.
    #[must_use]
    pub fn specialised(&self, symbol: &str, constants: &Constants) -> Option<String> {
        let text = simt::specialise::entry(self.text, symbol)?;
        let text = constants.specialise(&text).ok()?;
        let values: Vec<_> = constants.iter().map(|(name, n)| format!("{name}={n}")).collect();
        Some(format!("{CONSTANTS}{}\n{text}", values.join(" ")))
    }
}

/// Every module, lowest architecture first; empty in a library built without the feature `ptx`.
#[must_use]
pub fn modules() -> &'static [PtxModule] {
    &MODULES
}

#[cfg(feature = "ptx")]
fn unpack() -> String {
    use std::io::Read as _;

    let mut text = String::new();
    let decoder = ruzstd::decoding::StreamingDecoder::new(PACK);
    decoder
        .map_err(std::io::Error::other)
        .and_then(|mut decoder| decoder.read_to_string(&mut text))
        .expect("a constant of this library, which its tests unpack");
    text
}

#[cfg(not(feature = "ptx"))]
const fn unpack() -> String {
    String::new()
}

fn modules_of(pack: &'static str) -> Vec<PtxModule> {
    pack.split(HEADING)
        .filter_map(|part| part.split_once('\n'))
        .filter_map(|(name, text)| PtxModule::new(name, text))
        .collect()
}

/// The modules that a GPU of this compute capability loads, best first.
pub fn loadable(compute_capability: (u32, u32)) -> impl Iterator<Item = &'static PtxModule> {
    modules().iter().rev().filter(move |module| module.loads_on(compute_capability))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modules_name_says_what_loads_it() {
        let modules = modules_of("// module sm_80\n.a\n.b\n// module sm_100a\n.c\n");
        let sm_100a =
            PtxModule { name: "sm_100a", compute_capability: (10, 0), exact: true, text: ".c\n" };
        assert_eq!(modules, [PtxModule { text: ".a\n.b\n", ..ORDINARY }, sm_100a]);
    }

    const ORDINARY: PtxModule =
        PtxModule { name: "sm_80", compute_capability: (8, 0), exact: false, text: "" };
    const EXACT: PtxModule =
        PtxModule { name: "sm_90a", compute_capability: (9, 0), exact: true, text: "" };

    #[test]
    fn an_ordinary_module_loads_on_its_architecture_and_later() {
        assert!(!ORDINARY.loads_on((7, 5)));
        for later in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            assert!(ORDINARY.loads_on(later), "{later:?}");
        }
    }

    #[test]
    fn an_exact_module_loads_on_its_architecture_only() {
        assert!(EXACT.loads_on((9, 0)));
        for other in [(8, 9), (9, 1), (10, 0), (12, 0)] {
            assert!(!EXACT.loads_on(other), "{other:?}");
        }
    }

    #[test]
    #[cfg(feature = "ptx")]
    fn every_kernel_is_in_its_module_with_its_launch_bounds() {
        for entry in kernels_gpu::entries() {
            let module = modules().iter().find(|module| module.name == entry.module);
            let text = module.map_or("", |module| module.text);
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
