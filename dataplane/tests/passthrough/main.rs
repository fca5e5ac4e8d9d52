//! The local directory as a file-system device, through its public seam. Needs root.

mod alloc;
mod data;
mod escape;
mod export;
mod locks;
mod meta;
mod once;
mod ops;
mod recover;
mod rig;
mod tables;
mod threads;
