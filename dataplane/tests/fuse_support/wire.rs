//! Little-endian bytes by hand, so that the expectations do not come from the code under test.

/// Bytes being written down.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wire(pub(crate) Vec<u8>);

impl Wire {
    pub(crate) fn u16(mut self, value: u16) -> Wire {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Wire {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Wire {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Wire {
        self.0.extend(bytes);
        self
    }

    /// Text and its terminating NUL.
    pub(crate) fn text(self, text: &str) -> Wire {
        self.raw(text.as_bytes()).raw(&[0])
    }

    pub(crate) fn zeros(mut self, count: usize) -> Wire {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// `struct fuse_attr` with the fields 1, 2, 3 and so on.
    pub(crate) fn attr(self) -> Wire {
        let wire = (1..=6).fold(self, Wire::u64);
        (7..=16).fold(wire, Wire::u32)
    }

    /// `struct fuse_entry_out` of a node, with the fields 21, 22 and so on.
    pub(crate) fn entry(self, nodeid: u64) -> Wire {
        let wire = self.u64(nodeid).u64(21).u64(22).u64(23);
        wire.u32(24).u32(25).attr()
    }

    /// `struct fuse_open_out`.
    pub(crate) fn open(self, fh: u64) -> Wire {
        self.u64(fh).u32(4).u32(0)
    }
}

pub(crate) fn wire() -> Wire {
    Wire::default()
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes[offset..offset + N].try_into().expect("N bytes")
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(at(bytes, offset))
}

pub(crate) fn i32_at(bytes: &[u8], offset: usize) -> i32 {
    i32::from_le_bytes(at(bytes, offset))
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(at(bytes, offset))
}

pub(crate) fn put_u32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}
