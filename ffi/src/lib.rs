//! The kernel's own definitions of what Ferry speaks: FUSE, virtio, vfio and PCI configuration space.
//!
//! [`raw`] is what bindgen makes of the headers at build time. [`LAYOUTS`] and [`CONSTANTS`] hold the same facts by
//! name, so that a test can compare structs with headers of any age and say which ones a header does not have. Set
//! `FERRY_KERNEL_HEADERS` to the include directory of other kernel headers than the installed ones. Used by tests only;
//! nothing of it is on the request path.
#![no_std]

/// The bindings, under the kernel's names.
#[allow(
    unsafe_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    rustdoc::all,
    unnecessary_transmutes,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    reason = "generated from C headers"
)]
pub mod raw {
    include!(concat!(env!("OUT_DIR"), "/kernel.rs"));
}

/// Where a struct of the kernel headers has its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Name of the struct.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// Name, offset and size of each field, in order; a flexible array has size 0.
    pub fields: &'static [(&'static str, usize, usize)],
}

pub use tables::{CONSTANTS, LAYOUTS};

#[allow(
    unused_imports,
    clippy::all,
    reason = "generated; names the types of the bindings"
)]
mod tables {
    use super::Layout;
    use super::raw::*;

    include!(concat!(env!("OUT_DIR"), "/tables.rs"));
}

/// The layout of a struct, if the headers have it.
pub fn layout(name: &str) -> Option<&'static Layout> {
    LAYOUTS.iter().find(|layout| layout.name == name)
}

/// The value of a constant or an enumerator, if the headers have it.
pub fn constant(name: &str) -> Option<i128> {
    CONSTANTS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_say_what_the_bindings_say() {
        let header = layout("fuse_in_header").map(|layout| layout.size);
        assert_eq!(header, Some(size_of::<raw::fuse_in_header>()));
        assert_eq!(constant("FUSE_LOOKUP"), Some(1));
        assert_eq!(constant("VIRTIO_ID_FS"), Some(26));
        assert_eq!(constant("FUSE_NO_SUCH_THING"), None);
    }

    #[test]
    fn a_flexible_array_has_an_offset_and_no_size() {
        let dirent = layout("fuse_dirent").and_then(|layout| layout.fields.last());
        assert_eq!(dirent, Some(&("name", 24, 0)));
    }
}
