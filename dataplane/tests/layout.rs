//! Compares every wire struct and constant of the FUSE ABI with the kernel's own header, field by field.
//!
//! An older header lacks the newer structs, fields and constants. They are skipped, loudly, and `REQUIRE_ALL=1` turns
//! that into a failure. `FERRY_KERNEL_HEADERS` names the headers to compare with.

use std::collections::BTreeSet;
use std::mem::offset_of;

use ferry_dataplane::fuse::abi;
use ferry_ffi::{constant, layout, raw};

/// The source of the definitions; the lists below are checked against it, so that they are complete.
const SOURCE: &str = include_str!("../src/fuse/abi.rs");
/// Constants that are Ferry's own.
const NOT_THE_KERNELS: &[&str] = &["FUSE_MIN_MINOR_VERSION"];

/// A struct of ours.
struct Ours {
    name: &'static str,
    size: usize,
    /// Name, offset and size of each field.
    fields: Vec<(&'static str, usize, usize)>,
}

/// The size of a field's type, from a function that would return it.
fn size_of_field<S, T>(_: fn(S) -> T) -> usize {
    size_of::<T>()
}

macro_rules! structs {
    ($($name:ident { $($field:ident)* })*) => {
        vec![$(Ours {
            name: stringify!($name),
            size: size_of::<abi::$name>(),
            fields: vec![$((
                stringify!($field),
                offset_of!(abi::$name, $field),
                size_of_field(|it: abi::$name| it.$field),
            )),*],
        }),*]
    };
}

macro_rules! constants {
    ($($name:ident)*) => {
        vec![$((stringify!($name), abi::$name as i128, 8 * size_of_val(&abi::$name))),*]
    };
}

fn our_structs() -> Vec<Ours> {
    structs! {
        fuse_attr { ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid
            rdev blksize flags }
        fuse_sx_time { tv_sec tv_nsec reserved }
        fuse_statx { mask blksize attributes nlink uid gid mode spare0 ino size blocks attributes_mask
            atime btime ctime mtime rdev_major rdev_minor dev_major dev_minor spare2 }
        fuse_kstatfs { blocks bfree bavail files ffree bsize namelen frsize padding spare }
        fuse_file_lock { start end type_ pid }
        fuse_entry_out { nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec attr
            }
        fuse_forget_in { nlookup }
        fuse_forget_one { nodeid nlookup }
        fuse_batch_forget_in { count dummy }
        fuse_getattr_in { getattr_flags dummy fh }
        fuse_attr_out { attr_valid attr_valid_nsec dummy attr }
        fuse_statx_in { getattr_flags reserved fh sx_flags sx_mask }
        fuse_statx_out { attr_valid attr_valid_nsec flags spare stat }
        fuse_mknod_in { mode rdev umask padding }
        fuse_mkdir_in { mode umask }
        fuse_rename_in { newdir }
        fuse_rename2_in { newdir flags padding }
        fuse_link_in { oldnodeid }
        fuse_setattr_in { valid padding fh size lock_owner atime mtime ctime atimensec mtimensec
            ctimensec mode unused4 uid gid unused5 }
        fuse_open_in { flags open_flags }
        fuse_create_in { flags mode umask open_flags }
        fuse_open_out { fh open_flags backing_id }
        fuse_release_in { fh flags release_flags lock_owner }
        fuse_flush_in { fh unused padding lock_owner }
        fuse_read_in { fh offset size read_flags lock_owner flags padding }
        fuse_write_in { fh offset size write_flags lock_owner flags padding }
        fuse_write_out { size padding }
        fuse_statfs_out { st }
        fuse_fsync_in { fh fsync_flags padding }
        fuse_setxattr_in { size flags setxattr_flags padding }
        fuse_getxattr_in { size padding }
        fuse_getxattr_out { size padding }
        fuse_lk_in { fh owner lk lk_flags padding }
        fuse_lk_out { lk }
        fuse_access_in { mask padding }
        fuse_init_in { major minor max_readahead flags flags2 unused }
        fuse_init_out { major minor max_readahead flags max_background congestion_threshold max_write
            time_gran max_pages map_alignment flags2 max_stack_depth request_timeout unused }
        fuse_interrupt_in { unique }
        fuse_bmap_in { block blocksize padding }
        fuse_bmap_out { block }
        fuse_ioctl_in { fh flags cmd arg in_size out_size }
        fuse_ioctl_iovec { base len }
        fuse_ioctl_out { result flags in_iovs out_iovs }
        fuse_poll_in { fh kh flags events }
        fuse_poll_out { revents padding }
        fuse_notify_poll_wakeup_out { kh }
        fuse_fallocate_in { fh offset length mode padding }
        fuse_in_header { len opcode unique nodeid uid gid pid total_extlen padding }
        fuse_out_header { len error unique }
        fuse_notify_inval_inode_out { ino off len }
        fuse_notify_inval_entry_out { parent namelen flags }
        fuse_notify_delete_out { parent child namelen padding }
        fuse_notify_store_out { nodeid offset size padding }
        fuse_notify_retrieve_out { notify_unique nodeid offset size padding }
        fuse_notify_retrieve_in { dummy1 offset size dummy2 dummy3 dummy4 }
        fuse_notify_prune_out { count padding spare }
        fuse_lseek_in { fh offset whence padding }
        fuse_lseek_out { offset }
        fuse_copy_file_range_in { fh_in off_in nodeid_out fh_out off_out len flags }
        fuse_copy_file_range_out { bytes_copied }
        fuse_syncfs_in { padding }
        fuse_secctx { size padding }
        fuse_secctx_header { size nr_secctx }
        fuse_ext_header { size type_ }
        fuse_dirent { ino off namelen type_ }
        fuse_direntplus { entry_out dirent }
    }
}

/// Name, value and number of bits of each constant.
fn our_constants() -> Vec<(&'static str, i128, usize)> {
    constants! {
        FUSE_KERNEL_VERSION FUSE_KERNEL_MINOR_VERSION FUSE_ROOT_ID FATTR_MODE FATTR_UID FATTR_GID
        FATTR_SIZE FATTR_ATIME FATTR_MTIME FATTR_FH FATTR_ATIME_NOW FATTR_MTIME_NOW FATTR_LOCKOWNER
        FATTR_CTIME FATTR_KILL_SUIDGID FOPEN_DIRECT_IO FOPEN_KEEP_CACHE FOPEN_NONSEEKABLE
        FOPEN_CACHE_DIR FOPEN_STREAM FOPEN_NOFLUSH FOPEN_PARALLEL_DIRECT_WRITES FOPEN_PASSTHROUGH
        FUSE_RELEASE_FLUSH FUSE_RELEASE_FLOCK_UNLOCK FUSE_GETATTR_FH FUSE_LK_FLOCK FUSE_WRITE_CACHE
        FUSE_WRITE_LOCKOWNER FUSE_WRITE_KILL_SUIDGID FUSE_READ_LOCKOWNER FUSE_IOCTL_COMPAT
        FUSE_IOCTL_UNRESTRICTED FUSE_IOCTL_RETRY FUSE_IOCTL_32BIT FUSE_IOCTL_DIR FUSE_IOCTL_COMPAT_X32
        FUSE_POLL_SCHEDULE_NOTIFY FUSE_FSYNC_FDATASYNC FUSE_ATTR_SUBMOUNT FUSE_ATTR_DAX
        FUSE_OPEN_KILL_SUIDGID FUSE_SETXATTR_ACL_KILL_SGID FUSE_EXPIRE_ONLY FUSE_ASYNC_READ
        FUSE_POSIX_LOCKS FUSE_FILE_OPS FUSE_ATOMIC_O_TRUNC FUSE_EXPORT_SUPPORT FUSE_BIG_WRITES
        FUSE_DONT_MASK FUSE_SPLICE_WRITE FUSE_SPLICE_MOVE FUSE_SPLICE_READ FUSE_FLOCK_LOCKS
        FUSE_HAS_IOCTL_DIR FUSE_AUTO_INVAL_DATA FUSE_DO_READDIRPLUS FUSE_READDIRPLUS_AUTO FUSE_ASYNC_DIO
        FUSE_WRITEBACK_CACHE FUSE_NO_OPEN_SUPPORT FUSE_PARALLEL_DIROPS FUSE_HANDLE_KILLPRIV
        FUSE_POSIX_ACL FUSE_ABORT_ERROR FUSE_MAX_PAGES FUSE_CACHE_SYMLINKS FUSE_NO_OPENDIR_SUPPORT
        FUSE_EXPLICIT_INVAL_DATA FUSE_MAP_ALIGNMENT FUSE_SUBMOUNTS FUSE_HANDLE_KILLPRIV_V2
        FUSE_SETXATTR_EXT FUSE_INIT_EXT FUSE_SECURITY_CTX FUSE_HAS_INODE_DAX FUSE_CREATE_SUPP_GROUP
        FUSE_HAS_EXPIRE_ONLY FUSE_DIRECT_IO_ALLOW_MMAP FUSE_PASSTHROUGH FUSE_NO_EXPORT_SUPPORT
        FUSE_HAS_RESEND FUSE_ALLOW_IDMAP FUSE_OVER_IO_URING FUSE_REQUEST_TIMEOUT FUSE_UNIQUE_RESEND
        FUSE_IOCTL_MAX_IOV FUSE_MIN_READ_BUFFER FUSE_INVALID_UIDGID FUSE_MAX_NR_SECCTX FUSE_EXT_GROUPS
        FUSE_COMPAT_INIT_OUT_SIZE FUSE_COMPAT_22_INIT_OUT_SIZE FUSE_LOOKUP FUSE_FORGET FUSE_GETATTR
        FUSE_SETATTR FUSE_READLINK FUSE_SYMLINK FUSE_MKNOD FUSE_MKDIR FUSE_UNLINK FUSE_RMDIR FUSE_RENAME
        FUSE_LINK FUSE_OPEN FUSE_READ FUSE_WRITE FUSE_STATFS FUSE_RELEASE FUSE_FSYNC FUSE_SETXATTR
        FUSE_GETXATTR FUSE_LISTXATTR FUSE_REMOVEXATTR FUSE_FLUSH FUSE_INIT FUSE_OPENDIR FUSE_READDIR
        FUSE_RELEASEDIR FUSE_FSYNCDIR FUSE_GETLK FUSE_SETLK FUSE_SETLKW FUSE_ACCESS FUSE_CREATE
        FUSE_INTERRUPT FUSE_BMAP FUSE_DESTROY FUSE_IOCTL FUSE_POLL FUSE_NOTIFY_REPLY FUSE_BATCH_FORGET
        FUSE_FALLOCATE FUSE_READDIRPLUS FUSE_RENAME2 FUSE_LSEEK FUSE_COPY_FILE_RANGE FUSE_SETUPMAPPING
        FUSE_REMOVEMAPPING FUSE_SYNCFS FUSE_TMPFILE FUSE_STATX FUSE_COPY_FILE_RANGE_64 CUSE_INIT
        FUSE_NOTIFY_POLL FUSE_NOTIFY_INVAL_INODE FUSE_NOTIFY_INVAL_ENTRY FUSE_NOTIFY_STORE
        FUSE_NOTIFY_RETRIEVE FUSE_NOTIFY_DELETE FUSE_NOTIFY_RESEND FUSE_NOTIFY_INC_EPOCH
        FUSE_NOTIFY_PRUNE
    }
}

/// Whether the header is at least as new as the definitions, so that nothing may be missing from it.
fn header_is_new_enough() -> bool {
    raw::FUSE_KERNEL_MINOR_VERSION >= abi::FUSE_KERNEL_MINOR_VERSION
}

/// Reports what could not be compared.
fn skip(missing: &[String]) {
    if missing.is_empty() {
        return;
    }
    let version = raw::FUSE_KERNEL_MINOR_VERSION;
    let line = format!(
        "SKIP the kernel header is of protocol 7.{version} and lacks {}",
        missing.join(", ")
    );
    assert!(
        !header_is_new_enough() && std::env::var_os("REQUIRE_ALL").is_none(),
        "{line}"
    );
    println!("{line}");
    eprintln!("{line}");
}

#[test]
fn every_struct_has_the_size_and_the_offsets_of_the_kernels() {
    let mut missing = Vec::new();
    for ours in our_structs() {
        let Some(theirs) = layout(ours.name) else {
            missing.push(ours.name.to_string());
            continue;
        };
        assert_eq!(ours.size, theirs.size, "size of {}", ours.name);
        // A flexible array is what follows the struct.
        let theirs = theirs.fields.iter().filter(|(_, _, size)| *size > 0);
        // The kernel marks some reserved fields with underscores.
        let named: Vec<_> = theirs
            .map(|(name, at, size)| (name.trim_start_matches('_'), *at, *size))
            .collect();
        let known = |field: &str| named.iter().any(|(name, ..)| *name == field);
        let unknown: Vec<_> = ours
            .fields
            .iter()
            .filter(|(field, ..)| !known(field))
            .collect();
        if unknown.is_empty() || header_is_new_enough() {
            assert_eq!(ours.fields, named, "fields of {}", ours.name);
        }
        missing.extend(
            unknown
                .iter()
                .map(|(field, ..)| format!("{}.{field}", ours.name)),
        );
    }
    skip(&missing);
}

#[test]
fn every_constant_has_the_value_of_the_kernels() {
    let mut missing = Vec::new();
    for (name, value, bits) in our_constants() {
        // C gives some constants as signed that fill their type: `(uint32_t)-1`, `1ULL << 63`.
        let unsigned = |found: i128| {
            if found < 0 && value >= 0 {
                found + (1 << bits)
            } else {
                found
            }
        };
        match constant(name).map(unsigned) {
            Some(found) if name == "FUSE_KERNEL_MINOR_VERSION" && found < value => {
                missing.push(format!("minor {value}"))
            }
            Some(found) => assert_eq!(value, found, "{name}"),
            None => missing.push(name.to_string()),
        }
    }
    skip(&missing);
}

/// The names that follow `keyword` at the beginning of a line of the source.
fn defined(keyword: &str) -> BTreeSet<&'static str> {
    let name = |line: &'static str| {
        line.strip_prefix(keyword)?
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
    };
    SOURCE.lines().filter_map(name).collect()
}

#[test]
fn no_definition_is_left_out_of_the_comparison() {
    let structs: BTreeSet<_> = our_structs().iter().map(|ours| ours.name).collect();
    assert_eq!(defined("pub struct "), structs);
    let mut constants: BTreeSet<_> = our_constants().iter().map(|(name, ..)| *name).collect();
    constants.extend(NOT_THE_KERNELS);
    assert_eq!(defined("pub const "), constants);
}
