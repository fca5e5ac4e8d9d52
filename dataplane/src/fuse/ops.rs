//! The table of operations: one row per opcode that Ferry answers.
//!
//! A row names the opcode, what the request carries in the order of the wire, and what answers it. [`Op`], the decoder
//! and [`info`] are made from the same rows, so they cannot disagree. An opcode without a row gets `ENOSYS`:
//! SETUPMAPPING and REMOVEMAPPING (there is no DAX window), CUSE_INIT, and whatever a newer protocol adds.

use ferry_shared::errno::Errno;

use super::abi;
use super::abi::{
    fuse_access_in, fuse_attr_out, fuse_bmap_in, fuse_bmap_out, fuse_copy_file_range_in,
    fuse_copy_file_range_out, fuse_create_in, fuse_entry_out, fuse_fallocate_in, fuse_flush_in,
    fuse_forget_in, fuse_fsync_in, fuse_getattr_in, fuse_getxattr_in, fuse_init_out,
    fuse_interrupt_in, fuse_ioctl_out, fuse_link_in, fuse_lk_in, fuse_lk_out, fuse_lseek_in,
    fuse_lseek_out, fuse_mkdir_in, fuse_mknod_in, fuse_open_in, fuse_open_out, fuse_poll_in,
    fuse_poll_out, fuse_read_in, fuse_release_in, fuse_rename_in, fuse_rename2_in, fuse_setattr_in,
    fuse_statfs_out, fuse_statx_in, fuse_statx_out, fuse_write_out,
};
use super::parse::{
    BatchForget, Cursor, Init, Ioctl, LinkTarget, LookupName, Name, Setxattr, Take, UnusedName,
    Write, XattrName,
};
use super::reply::fuse_created_out;

/// Which virtqueue Linux sends an operation on (virtio 1.3, section 5.11.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The high-priority queue.
    Hiprio,
    /// A request queue.
    Request,
}

/// What a successful operation is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyKind {
    /// Nothing, not even an error.
    Silent,
    /// A header and one structure.
    Fixed,
    /// A header and as much as the request asks for.
    Variable,
}

/// What an operation does to the file system or the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing that its repetition would notice.
    Keeps,
    /// It changes names, data, handles or counts.
    Mutates,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpInfo {
    /// The opcode's name in `linux/fuse.h`.
    pub name: &'static str,
    /// The opcode.
    pub opcode: u32,
    /// How it is answered.
    pub reply: ReplyKind,
    /// Bytes that every successful reply has after its header.
    pub min_payload: usize,
    /// The queue that it travels on.
    pub class: Class,
    /// Whether repeating it may give another result.
    pub effect: Effect,
}

macro_rules! ops {
    (<$lt:lifetime> $(
        $variant:ident = $opcode:ident { $($field:ident: $arg:ty),* }
            -> $reply:ident($payload:ty), $class:ident, $effect:ident;
    )*) => {
        /// A decoded request without its header.
        #[derive(Clone, Copy, Debug)]
        #[expect(missing_docs, reason = "names are those of linux/fuse.h")]
        pub enum Op<$lt> {
            $($variant { $($field: $arg),* },)*
        }

        impl<$lt> Op<$lt> {
            /// Decodes what follows the header; `ENOSYS` for an opcode without a row.
            pub(super) fn take(opcode: u32, from: &mut Cursor<$lt>) -> Result<Op<$lt>, Errno> {
                match opcode {
                    $(abi::$opcode => Ok(Op::$variant { $($field: Take::take(from)?),* }),)*
                    _ => Err(Errno::ENOSYS),
                }
            }
        }

        /// The fixed part of each operation's reply, by the operation's name.
        pub(crate) mod payload {
            use super::*;
            $(pub(crate) type $variant = $payload;)*
        }

        /// Every row, in the order of the opcodes.
        pub const TABLE: &[OpInfo] = &[$(row::$variant,)*];

        #[expect(non_upper_case_globals, reason = "named after the operations")]
        mod row {
            use super::*;
            $(pub(super) const $variant: OpInfo = OpInfo {
                name: stringify!($opcode),
                opcode: abi::$opcode,
                reply: ReplyKind::$reply,
                min_payload: size_of::<payload::$variant>(),
                class: Class::$class,
                effect: Effect::$effect,
            };)*
        }

        /// The row of an opcode.
        pub fn info(opcode: u32) -> Option<&'static OpInfo> {
            match opcode {
                $(abi::$opcode => Some(&row::$variant),)*
                _ => None,
            }
        }
    };
}

ops! { <'a>
    Lookup = FUSE_LOOKUP { name: LookupName<'a> } -> Fixed(fuse_entry_out), Request, Keeps;
    Forget = FUSE_FORGET { arg: fuse_forget_in } -> Silent(()), Hiprio, Mutates;
    Getattr = FUSE_GETATTR { arg: fuse_getattr_in } -> Fixed(fuse_attr_out), Request, Keeps;
    Setattr = FUSE_SETATTR { arg: fuse_setattr_in } -> Fixed(fuse_attr_out), Request, Mutates;
    Readlink = FUSE_READLINK {} -> Variable(()), Request, Keeps;
    Symlink = FUSE_SYMLINK { name: Name<'a>, target: LinkTarget<'a> } -> Fixed(fuse_entry_out), Request, Mutates;
    Mknod = FUSE_MKNOD { arg: fuse_mknod_in, name: Name<'a> } -> Fixed(fuse_entry_out), Request, Mutates;
    Mkdir = FUSE_MKDIR { arg: fuse_mkdir_in, name: Name<'a> } -> Fixed(fuse_entry_out), Request, Mutates;
    Unlink = FUSE_UNLINK { name: Name<'a> } -> Fixed(()), Request, Mutates;
    Rmdir = FUSE_RMDIR { name: Name<'a> } -> Fixed(()), Request, Mutates;
    Rename = FUSE_RENAME { arg: fuse_rename_in, name: Name<'a>, newname: Name<'a> } -> Fixed(()), Request, Mutates;
    Link = FUSE_LINK { arg: fuse_link_in, name: Name<'a> } -> Fixed(fuse_entry_out), Request, Mutates;
    Open = FUSE_OPEN { arg: fuse_open_in } -> Fixed(fuse_open_out), Request, Mutates;
    Read = FUSE_READ { arg: fuse_read_in } -> Variable(()), Request, Keeps;
    Write = FUSE_WRITE { write: Write } -> Fixed(fuse_write_out), Request, Mutates;
    Statfs = FUSE_STATFS {} -> Fixed(fuse_statfs_out), Request, Keeps;
    Release = FUSE_RELEASE { arg: fuse_release_in } -> Fixed(()), Request, Mutates;
    Fsync = FUSE_FSYNC { arg: fuse_fsync_in } -> Fixed(()), Request, Keeps;
    Setxattr = FUSE_SETXATTR { set: Setxattr<'a> } -> Fixed(()), Request, Mutates;
    Getxattr = FUSE_GETXATTR { arg: fuse_getxattr_in, name: XattrName<'a> } -> Variable(()), Request, Keeps;
    Listxattr = FUSE_LISTXATTR { arg: fuse_getxattr_in } -> Variable(()), Request, Keeps;
    Removexattr = FUSE_REMOVEXATTR { name: XattrName<'a> } -> Fixed(()), Request, Mutates;
    Flush = FUSE_FLUSH { arg: fuse_flush_in } -> Fixed(()), Request, Keeps;
    Init = FUSE_INIT { init: Init } -> Fixed(fuse_init_out), Request, Mutates;
    Opendir = FUSE_OPENDIR { arg: fuse_open_in } -> Fixed(fuse_open_out), Request, Mutates;
    Readdir = FUSE_READDIR { arg: fuse_read_in } -> Variable(()), Request, Keeps;
    Releasedir = FUSE_RELEASEDIR { arg: fuse_release_in } -> Fixed(()), Request, Mutates;
    Fsyncdir = FUSE_FSYNCDIR { arg: fuse_fsync_in } -> Fixed(()), Request, Keeps;
    Getlk = FUSE_GETLK { arg: fuse_lk_in } -> Fixed(fuse_lk_out), Request, Keeps;
    Setlk = FUSE_SETLK { arg: fuse_lk_in } -> Fixed(()), Request, Mutates;
    Setlkw = FUSE_SETLKW { arg: fuse_lk_in } -> Fixed(()), Request, Mutates;
    Access = FUSE_ACCESS { arg: fuse_access_in } -> Fixed(()), Request, Keeps;
    Create = FUSE_CREATE { arg: fuse_create_in, name: Name<'a> } -> Fixed(fuse_created_out), Request, Mutates;
    Interrupt = FUSE_INTERRUPT { arg: fuse_interrupt_in } -> Silent(()), Hiprio, Keeps;
    Bmap = FUSE_BMAP { arg: fuse_bmap_in } -> Fixed(fuse_bmap_out), Request, Keeps;
    Destroy = FUSE_DESTROY {} -> Fixed(()), Request, Mutates;
    Ioctl = FUSE_IOCTL { ioctl: Ioctl<'a> } -> Variable(fuse_ioctl_out), Request, Mutates;
    Poll = FUSE_POLL { arg: fuse_poll_in } -> Fixed(fuse_poll_out), Request, Keeps;
    NotifyReply = FUSE_NOTIFY_REPLY {} -> Silent(()), Request, Keeps;
    BatchForget = FUSE_BATCH_FORGET { batch: BatchForget } -> Silent(()), Hiprio, Mutates;
    Fallocate = FUSE_FALLOCATE { arg: fuse_fallocate_in } -> Fixed(()), Request, Mutates;
    Readdirplus = FUSE_READDIRPLUS { arg: fuse_read_in } -> Variable(()), Request, Mutates;
    Rename2 = FUSE_RENAME2 { arg: fuse_rename2_in, name: Name<'a>, newname: Name<'a> } -> Fixed(()), Request, Mutates;
    Lseek = FUSE_LSEEK { arg: fuse_lseek_in } -> Fixed(fuse_lseek_out), Request, Keeps;
    CopyFileRange = FUSE_COPY_FILE_RANGE { arg: fuse_copy_file_range_in } -> Fixed(fuse_write_out), Request, Mutates;
    Syncfs = FUSE_SYNCFS {} -> Fixed(()), Request, Keeps;
    Tmpfile = FUSE_TMPFILE { arg: fuse_create_in, name: UnusedName } -> Fixed(fuse_created_out), Request, Mutates;
    Statx = FUSE_STATX { arg: fuse_statx_in } -> Fixed(fuse_statx_out), Request, Keeps;
    CopyFileRange64 = FUSE_COPY_FILE_RANGE_64 { arg: fuse_copy_file_range_in } -> Fixed(fuse_copy_file_range_out), Request, Mutates;
}
