//! One request per operation, written down from `linux/fuse.h`, with what the backend must hear and what must come back.

use super::wire::{Wire, wire};

pub(crate) const UNIQUE: u64 = 0x1122_3344_5566_7788;
const WHO: &str = "1000/100/4242";

/// A request and what becomes of it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) opcode: u32,
    /// What follows the header.
    pub(crate) body: Vec<u8>,
    /// What the backend hears, in order.
    pub(crate) calls: Vec<String>,
    /// What follows the header of the reply; `None` if there is no reply.
    pub(crate) reply: Option<Vec<u8>>,
    /// The shortest body that is still a valid request.
    pub(crate) least: usize,
}

impl Case {
    pub(crate) fn request(&self) -> Vec<u8> {
        request(self.opcode, NODE, &self.body)
    }
}

/// The node that every case is about.
pub(crate) const NODE: u64 = 7;

/// A whole request: the header and a body.
pub(crate) fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    extended(opcode, nodeid, body, &[])
}

/// A whole request with an extension area, whose length must be a multiple of 8.
pub(crate) fn extended(opcode: u32, nodeid: u64, body: &[u8], extensions: &[u8]) -> Vec<u8> {
    let len = 40 + body.len() + extensions.len();
    wire()
        .u32(len as u32)
        .u32(opcode)
        .u64(UNIQUE)
        .u64(nodeid)
        .u32(1000)
        .u32(100)
        .u32(4242)
        .u16((extensions.len() / 8) as u16)
        .u16(0)
        .raw(body)
        .raw(extensions)
        .0
}

/// INIT of 64 bytes.
pub(crate) fn init(major: u32, minor: u32, flags: u64) -> Vec<u8> {
    let body = wire()
        .u32(major)
        .u32(minor)
        .u32(1 << 20)
        .u32(flags as u32)
        .u32((flags >> 32) as u32)
        .zeros(44);
    request(26, 0, &body.0)
}

fn case(name: &'static str, opcode: u32, body: Wire, call: &str, reply: Wire) -> Case {
    Case {
        name,
        opcode,
        least: body.0.len(),
        body: body.0,
        calls: vec![call.into()],
        reply: Some(reply.0),
    }
}

fn silent(name: &'static str, opcode: u32, body: Wire, calls: &[&str]) -> Case {
    Case {
        name,
        opcode,
        least: body.0.len(),
        body: body.0,
        calls: calls.iter().map(|&call| call.into()).collect(),
        reply: None,
    }
}

/// `fuse_read_in` and `fuse_write_in` have the same layout.
fn transfer(fh: u64, offset: u64, size: u32) -> Wire {
    wire()
        .u64(fh)
        .u64(offset)
        .u32(size)
        .u32(2)
        .u64(0xabc)
        .u32(0o2)
        .u32(0)
}

fn lock(owner: u64) -> Wire {
    wire()
        .u64(0xf1)
        .u64(owner)
        .u64(10)
        .u64(19)
        .u32(1)
        .u32(4242)
        .u32(1)
        .u32(0)
}

fn ioctl(in_size: u32, out_size: u32) -> Wire {
    wire()
        .u64(0xf1)
        .u32(8)
        .u32(0x5401)
        .u64(0x7fff_0000)
        .u32(in_size)
        .u32(out_size)
}

fn copy() -> Wire {
    wire()
        .u64(0xf1)
        .u64(100)
        .u64(8)
        .u64(0xf2)
        .u64(200)
        .u64(4096)
        .u64(0)
}

/// A case for each operation; several where the reply has several forms.
pub(crate) fn all() -> Vec<Case> {
    let mut all = names();
    all.extend(files());
    all.extend(directories());
    all.extend(attributes());
    all.extend(locks());
    all.extend(session());
    all
}

fn names() -> Vec<Case> {
    vec![
        case(
            "LOOKUP",
            1,
            wire().text("name"),
            &format!("lookup 7 name by {WHO}"),
            wire().entry(77),
        ),
        case(
            "SYMLINK",
            6,
            wire().text("name").text("/any/target"),
            &format!("symlink 7 name /any/target by {WHO}"),
            wire().entry(78),
        ),
        case(
            "MKNOD",
            8,
            wire()
                .u32(0o010644)
                .u32(0x105)
                .u32(0o022)
                .u32(0)
                .text("fifo"),
            &format!("mknod 7 fifo 10644 261 22 by {WHO}"),
            wire().entry(79),
        ),
        case(
            "MKDIR",
            9,
            wire().u32(0o755).u32(0o027).text("dir"),
            &format!("mkdir 7 dir 755 27 by {WHO}"),
            wire().entry(80),
        ),
        case("UNLINK", 10, wire().text("gone"), "unlink 7 gone", wire()),
        case("RMDIR", 11, wire().text("gone"), "rmdir 7 gone", wire()),
        case(
            "RENAME",
            12,
            wire().u64(8).text("old").text("new"),
            "rename 7 old 8 new 0",
            wire(),
        ),
        case(
            "RENAME2",
            45,
            wire().u64(8).u32(2).u32(0).text("old").text("new"),
            "rename 7 old 8 new 2",
            wire(),
        ),
        case(
            "LINK",
            13,
            wire().u64(12).text("second"),
            "link 7 12 second",
            wire().entry(81),
        ),
        Case {
            least: 0,
            ..case(
                "READLINK",
                5,
                wire(),
                "readlink 7",
                wire().raw(b"../elsewhere"),
            )
        },
    ]
}

fn files() -> Vec<Case> {
    let create = wire().u32(0o102).u32(0o644).u32(0o022).u32(1);
    vec![
        case(
            "OPEN",
            14,
            wire().u32(0o2002).u32(1),
            "open 7 2002 1",
            wire().open(0xf1),
        ),
        case(
            "CREATE",
            35,
            create.clone().text("fresh"),
            &format!("create 7 fresh 102 644 22 1 by {WHO}"),
            wire().entry(82).open(0xf2),
        ),
        Case {
            least: 16,
            ..case(
                "TMPFILE",
                51,
                create.text("/"),
                &format!("tmpfile 7 102 644 22 1 by {WHO}"),
                wire().entry(83).open(0xf3),
            )
        },
        case(
            "READ",
            15,
            transfer(0xf1, 4096, 100),
            "read 7 241 4096 100 2 2748 2 into 100",
            wire().raw(b"hello"),
        ),
        case(
            "WRITE",
            16,
            transfer(0xf1, 4096, 9).raw(b"some data"),
            "write 7 241 4096 9 2 2748 2 some data",
            wire().u32(9).u32(0),
        ),
        case(
            "FLUSH",
            25,
            wire().u64(0xf1).u32(0).u32(0).u64(99),
            "flush 7 241 99",
            wire(),
        ),
        case(
            "RELEASE",
            18,
            wire().u64(0xf1).u32(0o2).u32(3).u64(99),
            "release 7 241 2 3 99",
            wire(),
        ),
        case(
            "FSYNC",
            20,
            wire().u64(0xf1).u32(1).u32(0),
            "fsync 7 241 1",
            wire(),
        ),
        case(
            "FALLOCATE",
            43,
            wire().u64(0xf1).u64(10).u64(20).u32(3).u32(0),
            "fallocate 7 241 10 20 3",
            wire(),
        ),
        case(
            "LSEEK",
            46,
            wire().u64(0xf1).u64(30).u32(3).u32(0),
            "lseek 7 241 30 3",
            wire().u64(4096),
        ),
        case(
            "COPY_FILE_RANGE",
            47,
            copy(),
            "copy_file_range 7 241 100 8 242 200 4096 0",
            wire().u32(4096).u32(0),
        ),
        case(
            "COPY_FILE_RANGE_64",
            53,
            copy(),
            "copy_file_range 7 241 100 8 242 200 4096 0",
            wire().u64(4096),
        ),
        case(
            "BMAP",
            37,
            wire().u64(3).u32(512).u32(0),
            "bmap 7 3 512",
            wire().u64(0x1234_5678_9abc),
        ),
        case(
            "IOCTL",
            39,
            ioctl(5, 64).raw(b"given"),
            "ioctl 7 241 8 0x5401 2147418112 given 64",
            // The result, and no request for more memory.
            wire().u32(-7i32 as u32).zeros(12).raw(b"got"),
        ),
        case(
            "POLL",
            40,
            wire().u64(0xf1).u64(0x99).u32(1).u32(4),
            "poll 7 241 153 1 4",
            wire().u32(5).u32(0),
        ),
    ]
}

fn directories() -> Vec<Case> {
    let dirent = |wire: Wire, ino: u64, off: u64, name: &[u8], padding| {
        let wire = wire.u64(ino).u64(off).u32(name.len() as u32).u32(8);
        wire.raw(name).zeros(padding)
    };
    let listing = [
        (1, b".".as_slice(), 7),
        (2, b"eleven_long", 5),
        (3, b"exactly8", 0),
    ];
    let plain = listing.iter().fold(wire(), |wire, &(off, name, padding)| {
        dirent(wire, 0x1_0000_0000 + off, off, name, padding)
    });
    let plus = listing.iter().fold(wire(), |wire, &(off, name, padding)| {
        dirent(wire.entry(90), 1, off, name, padding)
    });
    vec![
        case(
            "OPENDIR",
            27,
            wire().u32(0o200000).u32(0),
            "opendir 7 200000",
            wire().open(0xf4),
        ),
        case(
            "READDIR",
            28,
            transfer(0xf4, 0, 4096),
            "readdir 7 244 0 false",
            plain,
        ),
        case(
            "READDIRPLUS",
            44,
            transfer(0xf4, 0, 4096),
            "readdir 7 244 0 true",
            plus,
        ),
        case(
            "RELEASEDIR",
            29,
            wire().u64(0xf4).u32(0o200000).u32(0).u64(0),
            "releasedir 7 244 200000",
            wire(),
        ),
        case(
            "FSYNCDIR",
            30,
            wire().u64(0xf4).u32(1).u32(0),
            "fsyncdir 7 244 1",
            wire(),
        ),
    ]
}

fn attributes() -> Vec<Case> {
    let attr_out = wire().u64(31).u32(32).u32(0).attr();
    let setattr = wire()
        .u32(0xfff)
        .u32(0)
        .u64(101)
        .u64(102)
        .u64(103)
        .u64(104)
        .u64(105)
        .u64(106)
        .u32(107)
        .u32(108)
        .u32(109)
        .u32(0o4755)
        .u32(0)
        .u32(111)
        .u32(112)
        .u32(0);
    let statx = wire().u64(1).u32(2).u32(0).zeros(16);
    let statx = statx
        .u32(3)
        .u32(4)
        .u64(5)
        .u32(6)
        .u32(7)
        .u32(8)
        .u16(9)
        .u16(0);
    let statx = statx.u64(10).u64(11).u64(12).u64(13);
    let statx = (0..4).fold(statx, |wire, n| {
        wire.u64(14 + 2 * n).u32(15 + 2 * n as u32).u32(0)
    });
    let statx = statx.u32(22).u32(23).u32(24).u32(25).zeros(112);
    vec![
        case(
            "GETATTR",
            3,
            wire().u32(1).u32(0).u64(0xf1),
            "getattr 7 Some(241)",
            attr_out.clone(),
        ),
        case(
            "GETATTR without a handle",
            3,
            wire().u32(0).u32(0).u64(0xf1),
            "getattr 7 None",
            attr_out.clone(),
        ),
        case(
            "SETATTR",
            4,
            setattr,
            "setattr 7 0xfff 101 102 103 104 105 106 107 108 109 4755 111 112",
            attr_out,
        ),
        case(
            "STATX",
            52,
            wire().u32(1).u32(0).u64(0xf1).u32(2).u32(0x7ff),
            "statx 7 1 241 2 2047",
            statx,
        ),
        case("ACCESS", 34, wire().u32(5).u32(0), "access 7 5", wire()),
        Case {
            least: 0,
            ..case(
                "STATFS",
                17,
                wire(),
                "statfs 7",
                (1..=5)
                    .fold(wire(), Wire::u64)
                    .u32(6)
                    .u32(7)
                    .u32(8)
                    .zeros(28),
            )
        },
        Case {
            least: 0,
            ..case("SYNCFS", 50, wire().u64(0), "syncfs 7", wire())
        },
        case(
            "SETXATTR",
            21,
            wire()
                .u32(3)
                .u32(1)
                .u32(1)
                .u32(0)
                .text("user.a/b")
                .raw(b"val"),
            "setxattr 7 user.a/b val 1 1",
            wire(),
        ),
        case(
            "GETXATTR",
            22,
            wire().u32(64).u32(0).text("user.a"),
            "getxattr 7 user.a 64",
            wire().raw(b"value of it"),
        ),
        case(
            "GETXATTR of the length",
            22,
            wire().u32(0).u32(0).text("user.a"),
            "getxattr 7 user.a 0",
            wire().u32(11).u32(0),
        ),
        case(
            "LISTXATTR",
            23,
            wire().u32(64).u32(0),
            "listxattr 7 64",
            wire().raw(b"user.a\0user.b\0"),
        ),
        case(
            "LISTXATTR of the length",
            23,
            wire().u32(0).u32(0),
            "listxattr 7 0",
            wire().u32(14).u32(0),
        ),
        case(
            "REMOVEXATTR",
            24,
            wire().text("user.a"),
            "removexattr 7 user.a",
            wire(),
        ),
    ]
}

fn locks() -> Vec<Case> {
    vec![
        case(
            "GETLK",
            31,
            lock(5),
            "getlk 7 241 5 10 19 1 4242 1",
            wire().u64(1).u64(2).u32(3).u32(4),
        ),
        case("SETLK", 32, lock(5), "setlk 7 241 1 false", wire()),
        case("SETLKW", 33, lock(5), "setlk 7 241 1 true", wire()),
    ]
}

fn session() -> Vec<Case> {
    vec![
        silent("FORGET", 2, wire().u64(3), &["forget 7 3"]),
        silent(
            "BATCH_FORGET",
            42,
            wire().u32(2).u32(0).u64(70).u64(1).u64(71).u64(2),
            &["forget 70 1", "forget 71 2"],
        ),
        Case {
            least: 0,
            ..silent("NOTIFY_REPLY", 41, wire().u32(0).u32(0), &[])
        },
        Case {
            least: 0,
            ..case("DESTROY", 38, wire(), "unmount", wire())
        },
    ]
}

/// A lock request of an owner.
pub(crate) fn lock_request(opcode: u32, owner: u64) -> Vec<u8> {
    request(opcode, NODE, &lock(owner).0)
}

/// READ.
pub(crate) fn read_request(fh: u64, offset: u64, size: u32) -> Vec<u8> {
    request(15, NODE, &transfer(fh, offset, size).0)
}

/// WRITE.
pub(crate) fn write_request(fh: u64, size: u32, data: &[u8]) -> Vec<u8> {
    request(16, NODE, &transfer(fh, 0, size).raw(data).0)
}

/// READDIR (28) or READDIRPLUS (44).
pub(crate) fn readdir_request(opcode: u32, offset: u64, size: u32) -> Vec<u8> {
    request(opcode, NODE, &transfer(0xf4, offset, size).0)
}

/// IOCTL with these flags.
pub(crate) fn ioctl_request(flags: u32, in_size: u32, out_size: u32, input: &[u8]) -> Vec<u8> {
    let mut body = ioctl(in_size, out_size).raw(input).0;
    super::wire::put_u32(&mut body, 8, flags);
    request(39, NODE, &body)
}
