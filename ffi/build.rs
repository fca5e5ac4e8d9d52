//! Generates the bindings of the kernel headers, and the tables of their layouts and constants.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use quote::{ToTokens, quote};
use syn::{Item, Type};

/// Include directory of the kernel headers, if not the system's.
const HEADERS: &str = "FERRY_KERNEL_HEADERS";
const NAMES: &str =
    "(fuse|FUSE|FATTR|FOPEN|CUSE|cuse|virtio|VIRTIO|vring|VRING|vfio|VFIO|vhost|VHOST|PCI)_.*";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=include/kernel.h");
    println!("cargo:rerun-if-env-changed={HEADERS}");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut builder = bindgen::builder()
        .header("include/kernel.h")
        .use_core()
        .wrap_unsafe_ops(true)
        .default_non_copy_union_style(bindgen::NonCopyUnionStyle::ManuallyDrop)
        .allowlist_type(NAMES)
        .allowlist_var(NAMES)
        .prepend_enum_name(false)
        .clang_macro_fallback()
        .clang_macro_fallback_build_dir(&out)
        .formatter(bindgen::Formatter::Prettyplease)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    if let Some(dir) = env::var_os(HEADERS).map(PathBuf::from) {
        for dir in [
            dir.join(format!("{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH")?)),
            dir,
        ] {
            check(&dir)?;
            builder = builder.clang_arg(format!("-I{}", dir.display()));
        }
    }
    let code = builder.generate()?.to_string();
    fs::write(out.join("kernel.rs"), &code)?;
    fs::write(out.join("tables.rs"), tables(&syn::parse_file(&code)?))?;
    Ok(())
}

fn check(dir: &Path) -> Result<(), String> {
    if dir.is_dir() {
        Ok(())
    } else {
        Err(format!("{HEADERS}: {} is not a directory", dir.display()))
    }
}

/// Rust source of the two tables.
fn tables(file: &syn::File) -> String {
    let layouts = file.items.iter().filter_map(layout);
    let constants = file.items.iter().filter_map(|item| match item {
        // The others are strings.
        Item::Const(constant) if matches!(*constant.ty, Type::Path(_)) => {
            let ident = &constant.ident;
            let name = ident.to_string();
            Some(quote!((#name, #ident as i128)))
        }
        _ => None,
    });
    quote! {
        /// Every struct of the headers.
        pub static LAYOUTS: &[Layout] = &[#(#layouts),*];
        /// Every integer constant and enumerator of the headers.
        pub static CONSTANTS: &[(&str, i128)] = &[#(#constants),*];
    }
    .to_string()
}

/// The row of a struct with named fields and without type parameters.
fn layout(item: &Item) -> Option<impl ToTokens> {
    let Item::Struct(item) = item else {
        return None;
    };
    if !item.generics.params.is_empty() || item.ident.to_string().starts_with("__") {
        return None;
    }
    let ident = &item.ident;
    let name = ident.to_string();
    let fields = item.fields.iter().filter_map(|field| {
        let (ident_of_field, ty) = (field.ident.as_ref()?, &field.ty);
        let name = ident_of_field.to_string();
        Some(quote!((#name, core::mem::offset_of!(#ident, #ident_of_field), size_of::<#ty>())))
    });
    Some(quote!(Layout { name: #name, size: size_of::<#ident>(), fields: &[#(#fields),*] }))
}
