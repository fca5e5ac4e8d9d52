//! The local directory as a file-system device, through its public seam. Needs root.

mod ops;
mod rig;
