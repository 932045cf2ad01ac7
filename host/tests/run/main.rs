//! `run` on small files made here: what it computes, and what it says of files that are
//! not as they must be.

mod attention;
mod backward;
mod decode;
mod module;
mod module_backward;

use std::path::PathBuf;

use assert_cmd::Command;
use flash_attention::{DType, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tempfile::TempDir;

/// A tensor for a file: name, storage type, shape, bytes.
type Entry = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::E4M3 => Dtype::F8_E4M3,
    }
}

fn entry(name: &'static str, tensor: &Tensor) -> Entry {
    (name, stored(tensor.dtype()), tensor.shape().to_vec(), tensor.as_bytes().to_vec())
}

/// A folder of its own, in which the program runs.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes the input.
    fn save(&self, entries: &[Entry]) {
        let views = entries.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &self.path("in.safetensors")).unwrap();
    }

    /// A tensor of the output.
    fn load(&self, name: &str, dtype: DType) -> Tensor {
        let bytes = std::fs::read(self.path("out.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor(name).unwrap();
        assert_eq!(view.dtype(), stored(dtype));
        Tensor::from_bytes(dtype, view.shape(), view.data()).unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("flash-attention"));
        command.current_dir(&self.0).args(["run", "--device", "cpu"]).args(args);
        command
    }

    /// What is printed by a command that ends with this exit code.
    fn printed(&self, args: &[&str], code: i32) -> String {
        let output = self.command(args).assert().code(code).get_output().stdout.clone();
        String::from_utf8(output).unwrap()
    }

    /// The one line that a wrong request is answered with; nothing is written.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.command(args).assert().code(2).get_output().clone();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!self.path("out.safetensors").exists());
        text
    }
}
