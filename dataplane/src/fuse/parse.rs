//! From the copied bytes of a request to a typed [`Op`].
//!
//! Works on a private copy, so what has been checked stays true. Every length is compared with the bytes present before
//! it is used; nothing here allocates, indexes or panics. Called by [`crate::dispatch`].

use core::ffi::CStr;

use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_FORGETS, MAX_TRANSFER, NAME_MAX, SYMLINK_MAX, XATTR_SIZE_MAX};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::abi::{
    FUSE_CREATE, FUSE_CREATE_SUPP_GROUP, FUSE_EXPORT_SUPPORT, FUSE_EXT_GROUPS, FUSE_INIT_EXT,
    FUSE_MAX_NR_SECCTX, FUSE_MKDIR, FUSE_MKNOD, FUSE_SECURITY_CTX, FUSE_SETXATTR_EXT, FUSE_SYMLINK,
    FUSE_TMPFILE, fuse_batch_forget_in, fuse_ext_header, fuse_forget_one, fuse_in_header,
    fuse_ioctl_in, fuse_secctx, fuse_setxattr_in, fuse_write_in,
};
use super::ops::Op;

/// What the session has negotiated, as far as decoding depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protocol {
    /// Protocol minor version.
    pub minor: u32,
    /// INIT flags in force that change how a request is read: [`Protocol::FLAGS`].
    pub flags: u64,
}

impl Protocol {
    /// The INIT flags that decoding depends on.
    pub const FLAGS: u64 =
        FUSE_EXPORT_SUPPORT | FUSE_SETXATTR_EXT | FUSE_SECURITY_CTX | FUSE_CREATE_SUPP_GROUP;

    fn has(self, flag: u64) -> bool {
        self.flags & flag != 0
    }

    /// Whether security contexts follow the names without being declared in the header, as before protocol 7.38.
    fn undeclared_contexts(self, opcode: u32) -> bool {
        self.minor < 38
            && self.has(FUSE_SECURITY_CTX)
            && matches!(
                opcode,
                FUSE_SYMLINK | FUSE_MKNOD | FUSE_MKDIR | FUSE_CREATE | FUSE_TMPFILE
            )
    }
}

/// What came in a request's extension area and was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions<'a> {
    /// The supplementary group of `FUSE_EXT_GROUPS`.
    pub supplementary_group: Option<u32>,
    /// Attribute name and value of the security context.
    pub security_context: Option<(&'a CStr, &'a [u8])>,
}

/// A decoded request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its header.
    pub header: fuse_in_header,
    /// What it asks for.
    pub op: Op<'a>,
    /// What its extensions say.
    pub extensions: Extensions<'a>,
}

/// Bytes of a request that [`crate::dispatch::intake`] looks at, at most: the longest fixed part that is followed by data.
pub const FIRST: usize = size_of::<fuse_in_header>() + size_of::<fuse_write_in>();

/// Reads the header of a request.
#[inline]
pub fn header(input: &[u8]) -> Result<fuse_in_header, Errno> {
    fuse_in_header::read_from_prefix(input)
        .map(|(header, _)| header)
        .map_err(|_| Errno::EINVAL)
}

/// Decodes a request: `input` is the copied part and `following` counts the bytes that stayed in guest memory.
#[inline]
pub fn request(
    header: fuse_in_header,
    input: &[u8],
    following: usize,
    protocol: Protocol,
) -> Result<Request<'_>, Errno> {
    let declared = usize::try_from(header.len).map_err(|_| Errno::EINVAL)?;
    let extension = usize::from(header.total_extlen).saturating_mul(8);
    let body = declared
        .checked_sub(size_of::<fuse_in_header>())
        .and_then(|n| n.checked_sub(extension))
        .ok_or(Errno::EINVAL)?;
    let (_, rest) = fuse_in_header::read_from_prefix(input).map_err(|_| Errno::EINVAL)?;
    if declared > input.len().saturating_add(following) {
        return Err(Errno::EINVAL);
    }
    let (rest, tail) = rest.split_at_checked(body).unwrap_or((rest, &[]));
    let mut cursor = Cursor {
        rest,
        payload: body.saturating_sub(rest.len()),
        protocol,
    };
    let op = Op::take(header.opcode, &mut cursor)?;
    let mut extensions = if protocol.undeclared_contexts(header.opcode) {
        extensions(cursor.rest)?
    } else {
        // The extensions of a request whose data stayed in guest memory lie behind that data; no such operation uses any.
        match extension {
            0 => Extensions::default(),
            _ => extensions(tail.get(..extension).unwrap_or(&[]))?,
        }
    };
    if !protocol.has(FUSE_CREATE_SUPP_GROUP) {
        extensions.supplementary_group = None;
    }
    if !protocol.has(FUSE_SECURITY_CTX) {
        extensions.security_context = None;
    }
    Ok(Request {
        header,
        op,
        extensions,
    })
}

/// The part of a request that is still to be decoded.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a> {
    rest: &'a [u8],
    /// Bytes of the request's body that stayed in guest memory.
    payload: usize,
    protocol: Protocol,
}

impl<'a> Cursor<'a> {
    #[inline]
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Errno::EINVAL)?;
        self.rest = rest;
        Ok(taken)
    }

    fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.rest).map_err(|_| Errno::EINVAL)?;
        self.bytes(text.count_bytes().saturating_add(1))?;
        Ok(text)
    }
}

/// Something that a request carries, taken from the bytes that are left.
pub trait Take<'a>: Sized {
    /// Takes the value and moves on.
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno>;
}

impl<'a, T: FromBytes + KnownLayout + Immutable> Take<'a> for T {
    #[inline]
    fn take(from: &mut Cursor<'a>) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(from.rest).map_err(|_| Errno::EINVAL)?;
        from.rest = rest;
        Ok(value)
    }
}

/// The name of a directory entry: one component, neither `.` nor `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(pub &'a CStr);

/// The name in LOOKUP, which may be `.` or `..` where `FUSE_EXPORT_SUPPORT` is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupName<'a>(pub &'a CStr);

/// The name of an extended attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XattrName<'a>(pub &'a CStr);

/// What a symbolic link points to; any text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkTarget<'a>(pub &'a CStr);

/// The text that Linux sends where TMPFILE's name would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnusedName;

/// INIT in each of its sizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Init {
    /// Protocol major version.
    pub major: u32,
    /// Protocol minor version.
    pub minor: u32,
    /// The rest; absent from requests of 8 bytes, which only a refused version may send.
    pub wishes: Option<InitWishes>,
}

/// What the guest asks for in INIT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InitWishes {
    /// Largest read-ahead, in bytes.
    pub max_readahead: u32,
    /// INIT flags, `flags2` in the upper half.
    pub flags: u64,
}

/// WRITE's arguments; as many bytes of data as `arg.size` says are present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// The structure on the wire.
    pub arg: fuse_write_in,
}

/// SETXATTR in both of its layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setxattr<'a> {
    /// `XATTR_*`.
    pub flags: u32,
    /// `FUSE_SETXATTR_*`, 0 in the short layout.
    pub setxattr_flags: u32,
    /// The attribute's name.
    pub name: &'a CStr,
    /// Its new value.
    pub value: &'a [u8],
}

/// IOCTL with the argument's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ioctl<'a> {
    /// The structure on the wire.
    pub arg: fuse_ioctl_in,
    /// `arg.in_size` bytes.
    pub input: &'a [u8],
}

/// BATCH_FORGET; as many elements as `count` says are present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchForget {
    /// Number of elements.
    pub count: u32,
}

fn component(name: &CStr) -> Result<&CStr, Errno> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes.contains(&b'/') {
        return Err(Errno::EINVAL);
    }
    if bytes.len() > NAME_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    Ok(name)
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

impl<'a> Take<'a> for Name<'a> {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let name = component(from.text()?)?;
        if is_dots(name) {
            return Err(Errno::EINVAL);
        }
        Ok(Name(name))
    }
}

impl<'a> Take<'a> for LookupName<'a> {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let name = component(from.text()?)?;
        if is_dots(name) && !from.protocol.has(FUSE_EXPORT_SUPPORT) {
            return Err(Errno::EINVAL);
        }
        Ok(LookupName(name))
    }
}

impl<'a> Take<'a> for XattrName<'a> {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let name = from.text()?;
        // What setxattr(2) says to a name that is empty or too long.
        if name.is_empty() || name.count_bytes() > NAME_MAX {
            return Err(Errno::ERANGE);
        }
        Ok(XattrName(name))
    }
}

impl<'a> Take<'a> for LinkTarget<'a> {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let target = from.text()?;
        if target.is_empty() {
            return Err(Errno::ENOENT);
        }
        if target.count_bytes() > SYMLINK_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        Ok(LinkTarget(target))
    }
}

impl<'a> Take<'a> for UnusedName {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        if !from.rest.is_empty() {
            from.text()?;
        }
        Ok(UnusedName)
    }
}

impl<'a> Take<'a> for Init {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let [major, minor] = Take::take(from)?;
        let wishes = match <[u32; 2]>::take(from) {
            Ok([max_readahead, low]) => {
                let low = u64::from(low);
                let high = if low & FUSE_INIT_EXT != 0 {
                    let [flags2, ..] = <[u32; 12]>::take(from)?;
                    u64::from(flags2)
                } else {
                    0
                };
                Some(InitWishes {
                    max_readahead,
                    flags: low | high << 32,
                })
            }
            Err(_) => None,
        };
        Ok(Init {
            major,
            minor,
            wishes,
        })
    }
}

impl<'a> Take<'a> for Write {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let arg = fuse_write_in::take(from)?;
        let size = usize::try_from(arg.size).map_err(|_| Errno::EINVAL)?;
        // The data stays in guest memory, all of it behind the copied part.
        if size > from.payload || arg.size > MAX_TRANSFER {
            return Err(Errno::EINVAL);
        }
        Ok(Write { arg })
    }
}

impl<'a> Take<'a> for Setxattr<'a> {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let arg = if from.protocol.has(FUSE_SETXATTR_EXT) {
            fuse_setxattr_in::take(from)?
        } else {
            let [size, flags] = Take::take(from)?;
            fuse_setxattr_in {
                size,
                flags,
                ..fuse_setxattr_in::default()
            }
        };
        let XattrName(name) = Take::take(from)?;
        let size = usize::try_from(arg.size).map_err(|_| Errno::E2BIG)?;
        if size > XATTR_SIZE_MAX {
            return Err(Errno::E2BIG);
        }
        Ok(Setxattr {
            flags: arg.flags,
            setxattr_flags: arg.setxattr_flags,
            name,
            value: from.bytes(size)?,
        })
    }
}

impl<'a> Take<'a> for Ioctl<'a> {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let arg = fuse_ioctl_in::take(from)?;
        let size = usize::try_from(arg.in_size).map_err(|_| Errno::EINVAL)?;
        Ok(Ioctl {
            arg,
            input: from.bytes(size)?,
        })
    }
}

impl<'a> Take<'a> for BatchForget {
    fn take(from: &mut Cursor<'a>) -> Result<Self, Errno> {
        let arg = fuse_batch_forget_in::take(from)?;
        let count = usize::try_from(arg.count).map_err(|_| Errno::EINVAL)?;
        let bytes = count.checked_mul(size_of::<fuse_forget_one>());
        if arg.count > MAX_FORGETS || bytes.is_none_or(|n| n > from.payload) {
            return Err(Errno::EINVAL);
        }
        Ok(BatchForget { count: arg.count })
    }
}

/// Decodes an extension area: headers of 8 bytes, each followed by its content, each padded to 8 bytes.
fn extensions(area: &[u8]) -> Result<Extensions<'_>, Errno> {
    let mut found = Extensions::default();
    let mut contexts_seen = false;
    let mut groups_seen = false;
    let mut area = area;
    while !area.is_empty() {
        let (header, _) = fuse_ext_header::read_from_prefix(area).map_err(|_| Errno::EINVAL)?;
        let size = usize::try_from(header.size).map_err(|_| Errno::EINVAL)?;
        let mut content = Cursor {
            rest: area.get(..size).ok_or(Errno::EINVAL)?,
            payload: 0,
            protocol: Protocol::default(),
        };
        fuse_ext_header::take(&mut content)?;
        if header.type_ <= FUSE_MAX_NR_SECCTX {
            if core::mem::replace(&mut contexts_seen, true) {
                return Err(Errno::EINVAL);
            }
            found.security_context = contexts(header.type_, &mut content)?;
        } else if header.type_ == FUSE_EXT_GROUPS {
            if core::mem::replace(&mut groups_seen, true) {
                return Err(Errno::EINVAL);
            }
            found.supplementary_group = groups(&mut content)?;
        } else {
            return Err(Errno::EINVAL);
        }
        area = area.get(size.next_multiple_of(8)..).ok_or(Errno::EINVAL)?;
    }
    Ok(found)
}

/// The security contexts of a `fuse_secctx_header`; more than one cannot be given to a backend.
fn contexts<'a>(count: u32, from: &mut Cursor<'a>) -> Result<Option<(&'a CStr, &'a [u8])>, Errno> {
    let mut first = None;
    for _ in 0..count {
        let context = fuse_secctx::take(from)?;
        let XattrName(name) = Take::take(from)?;
        let size = usize::try_from(context.size).map_err(|_| Errno::EINVAL)?;
        if size > XATTR_SIZE_MAX {
            return Err(Errno::E2BIG);
        }
        let value = from.bytes(size)?;
        if first.replace((name, value)).is_some() {
            return Err(Errno::EOPNOTSUPP);
        }
        let used = size_of::<fuse_secctx>()
            .saturating_add(name.count_bytes())
            .saturating_add(1)
            .saturating_add(size);
        let padding = used.next_multiple_of(8).saturating_sub(used);
        from.bytes(padding.min(from.rest.len()))?;
    }
    Ok(first)
}

/// The groups of a `fuse_supp_groups`; more than one cannot be given to a backend.
fn groups(from: &mut Cursor<'_>) -> Result<Option<u32>, Errno> {
    match u32::take(from)? {
        0 => Ok(None),
        1 => u32::take(from).map(Some),
        _ => Err(Errno::EOPNOTSUPP),
    }
}

#[cfg(test)]
mod tests;
