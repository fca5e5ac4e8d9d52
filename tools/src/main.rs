//! The `ferry` tool.
fn main() {}
