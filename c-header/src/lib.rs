//! The C header of `examples/c_abi.rs`, made by cbindgen: the documentation in Rust is the header's.

use std::path::Path;

use cbindgen::{Builder, Config, DocumentationStyle, Language, Style};

/// The header of a source file.
///
/// # Errors
/// Source that cbindgen cannot read.
pub fn header_of(source: &Path) -> Result<String, cbindgen::Error> {
    let config = Config {
        header: Some(
            "/* Attention in a CUDA context, on a stream and in memory of the caller's.\n   \
             Made of examples/c_abi.rs: edit that, then UPDATE_EXPECT=1 cargo test -p c-header. */"
                .into(),
        ),
        include_guard: Some("FLASH_ATTENTION_H".into()),
        no_includes: true,
        sys_includes: vec!["stdint.h".into()],
        language: Language::C,
        cpp_compat: true,
        style: Style::Both,
        documentation_style: DocumentationStyle::Doxy,
        line_length: 100,
        ..Config::default()
    };
    let bindings = Builder::new().with_src(source).with_config(config).generate()?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    Ok(String::from_utf8_lossy(&text).into_owned())
}
