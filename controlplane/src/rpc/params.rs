//! What a parameter is, and the parameters that several methods share.

/// One parameter.
pub struct Param {
    /// Key on the wire.
    pub name: &'static str,
    /// Other keys that are accepted.
    pub aliases: &'static [&'static str],
    /// Its type.
    pub kind: Kind,
    /// Whether it must be given.
    pub mandatory: bool,
    /// Whether the command line takes it by position too.
    pub positional: bool,
    /// Command-line options that set it.
    pub options: &'static [&'static str],
    /// Command-line options that set a boolean to false.
    pub off_options: &'static [&'static str],
    /// What the help calls the default; empty when there is none.
    pub default: &'static str,
    /// One line for the help.
    pub help: &'static str,
}

/// The type of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    Text,
    /// An unsigned 32-bit number.
    Number,
    /// An unsigned 64-bit number.
    Big,
    /// A signed 32-bit number.
    Signed,
    /// A boolean.
    Flag,
    /// A boolean that older clients send as 0 or 1.
    OldFlag,
}

pub(super) const PARAM: Param = Param {
    name: "",
    aliases: &[],
    kind: Kind::Text,
    mandatory: false,
    positional: false,
    options: &[],
    off_options: &[],
    default: "",
    help: "",
};

pub(super) const TRANSPORT: Param = Param {
    name: "transport_name",
    aliases: &["name"],
    mandatory: true,
    positional: true,
    options: &["-t", "--transport-name", "--transport_name"],
    help: "transport: DOCA or VHOST_USER",
    ..PARAM
};
pub(super) const DEVICE: Param = Param {
    name: "dev_name",
    aliases: &["name"],
    mandatory: true,
    positional: true,
    options: &["-d", "--dev-name", "--dev_name"],
    help: "name of the virtio-fs device",
    ..PARAM
};
pub(super) const MANAGER: Param = Param {
    name: "manager",
    aliases: &["manager_name"],
    mandatory: true,
    positional: true,
    options: &["-m", "--manager"],
    help: "name of the emulation manager, for example mlx5_0",
    ..PARAM
};
pub(super) const VUID: Param = Param {
    name: "vuid",
    mandatory: true,
    options: &["--vuid"],
    help: "vendor unique identifier of the function",
    ..PARAM
};
pub(super) const WAIT: Param = Param {
    name: "wait_for_done",
    aliases: &["wait-for-done"],
    kind: Kind::Flag,
    options: &["-w", "--wait-for-done", "--wait_for_done"],
    default: "false",
    help: "return when the host has seen it",
    ..PARAM
};
pub(super) const TAG: Param = Param {
    name: "tag",
    options: &["--tag"],
    help: "tag that the guest mounts by: up to 20 bytes on DOCA, 36 on VHOST_USER; needed before the start",
    ..PARAM
};
pub(super) const FSDEV: Param = Param {
    name: "fsdev",
    options: &["--fsdev"],
    help: "fsdev behind the device; not looked up; needed before the start",
    ..PARAM
};
pub(super) const REQUEST_QUEUES: Param = Param {
    name: "num_request_queues",
    kind: Kind::Number,
    options: &["--num-request-queues", "--num_request_queues"],
    default: "31",
    help: "request queues, 1 to 254",
    ..PARAM
};
pub(super) const QUEUE_SIZE: Param = Param {
    name: "queue_size",
    kind: Kind::Number,
    options: &["--queue-size", "--queue_size"],
    default: "64",
    help: "largest size of every queue, a power of two from 8 to 256",
    ..PARAM
};
pub(super) const PACKED: Param = Param {
    name: "packed_vq",
    aliases: &["packed_ring"],
    kind: Kind::Flag,
    options: &["--packed-vq", "--packed_vq"],
    off_options: &["--no-packed-vq"],
    default: "false",
    help: "offer packed virtqueues",
    ..PARAM
};
pub(super) const PLATFORM: Param = Param {
    name: "driver_platform",
    options: &["--driver-platform", "--driver_platform"],
    default: "native",
    help: "architecture of the guest: native, x86, x86_64, aarch32 or aarch64",
    ..PARAM
};
pub(super) const NOTIFICATION: Param = Param {
    name: "notification_vq",
    kind: Kind::Flag,
    options: &["--notification-vq", "--notification_vq"],
    off_options: &["--no-notification-vq"],
    default: "false",
    help: "offer the notification queue",
    ..PARAM
};
pub(super) const FSDEV_NAME: Param = Param {
    name: "name",
    mandatory: true,
    positional: true,
    help: "name of the fsdev",
    ..PARAM
};
pub(super) const SUBSYSTEM: Param = Param {
    name: "name",
    mandatory: true,
    positional: true,
    help: "name of the subsystem",
    ..PARAM
};
pub(super) const LEVEL: Param = Param {
    name: "level",
    mandatory: true,
    positional: true,
    help: "ERROR, WARNING, NOTICE, INFO or DEBUG",
    ..PARAM
};
pub(super) const LOG_FLAG: Param = Param {
    name: "flag",
    mandatory: true,
    positional: true,
    help: "name of the component, with * and ? for many; or all",
    ..PARAM
};
pub(super) const INDENT: Param = Param {
    name: "indent",
    kind: Kind::Signed,
    options: &["-i", "--indent"],
    default: "2",
    help: "blanks per level; negative for one line",
    ..PARAM
};
pub(super) const JSON_CONF: Param = Param {
    name: "json_conf",
    options: &["-j", "--json-conf", "--json_conf"],
    default: "standard input",
    help: "file with the configuration",
    ..PARAM
};

/// The transport parameter of methods whose `name` is something else.
pub(super) const TRANSPORT_ONLY: Param = Param {
    aliases: &[],
    ..TRANSPORT
};
pub(super) const AIO: &[Param] = &[
    FSDEV_NAME,
    Param {
        name: "root_path",
        mandatory: true,
        positional: true,
        help: "absolute path of the directory",
        ..PARAM
    },
    Param {
        name: "enable_xattr",
        aliases: &["xattr_enabled"],
        kind: Kind::OldFlag,
        options: &["--enable-xattr"],
        off_options: &["--disable-xattr"],
        default: "false",
        help: "serve extended attributes",
        ..PARAM
    },
    Param {
        name: "enable_writeback_cache",
        aliases: &["writeback_cache"],
        kind: Kind::OldFlag,
        options: &["--enable-writeback-cache"],
        off_options: &["--disable-writeback-cache"],
        default: "false",
        help: "let the guest cache writes",
        ..PARAM
    },
    Param {
        name: "max_xfer_size",
        aliases: &["max_write"],
        kind: Kind::Number,
        options: &["-w", "--max-xfer-size", "--max-write"],
        default: "131072",
        help: "largest READ or WRITE in bytes, up to 261120",
        ..PARAM
    },
    Param {
        name: "max_readahead",
        kind: Kind::Number,
        options: &["-r", "--max-readahead"],
        default: "131072",
        help: "largest read-ahead of the guest in bytes",
        ..PARAM
    },
    Param {
        name: "skip_rw",
        aliases: &["enable_skip_rw"],
        kind: Kind::OldFlag,
        options: &["--skip-rw", "--enable-skip-rw"],
        default: "false",
        help: "complete READ and WRITE without doing them; for measurement only",
        ..PARAM
    },
    Param {
        name: "metadata",
        options: &["--metadata"],
        default: "auto",
        help: "where calls that may block are made: inline, offload or auto",
        ..PARAM
    },
    Param {
        name: "cache",
        options: &["--cache"],
        default: "auto",
        help: "what the guest may cache: never, auto, metadata or always",
        ..PARAM
    },
    Param {
        name: "attr_valid_ms",
        kind: Kind::Number,
        options: &["--attr-valid-ms"],
        default: "as cache says",
        help: "how long the guest may trust attributes, in milliseconds",
        ..PARAM
    },
    Param {
        name: "entry_valid_ms",
        kind: Kind::Number,
        options: &["--entry-valid-ms"],
        default: "attr_valid_ms",
        help: "how long the guest may trust names, in milliseconds",
        ..PARAM
    },
    Param {
        name: "negative_valid_ms",
        kind: Kind::Number,
        options: &["--negative-valid-ms"],
        default: "as cache says",
        help: "how long the guest may trust that a name does not exist, in milliseconds",
        ..PARAM
    },
    Param {
        name: "read_only",
        kind: Kind::OldFlag,
        options: &["--read-only"],
        default: "false",
        help: "refuse every change with EROFS",
        ..PARAM
    },
    Param {
        name: "map_uid",
        options: &["--map-uid"],
        default: "all as they are",
        help: "user ids, as GUEST:HOST:COUNT, several separated by commas; others are refused",
        ..PARAM
    },
    Param {
        name: "map_gid",
        options: &["--map-gid"],
        default: "all as they are",
        help: "group ids, as map_uid",
        ..PARAM
    },
    Param {
        name: "squash",
        options: &["--squash"],
        default: "none",
        help: "users that act as anon_uid and anon_gid: none, root or all",
        ..PARAM
    },
    Param {
        name: "anon_uid",
        kind: Kind::Number,
        options: &["--anon-uid"],
        default: "65534",
        help: "the host's user id for squashed users",
        ..PARAM
    },
    Param {
        name: "anon_gid",
        kind: Kind::Number,
        options: &["--anon-gid"],
        default: "65534",
        help: "the host's group id for squashed users",
        ..PARAM
    },
    Param {
        name: "xattr_map",
        options: &["--xattr-map"],
        default: "all as they are",
        help: "names of extended attributes, as PREFIX=HOST_PREFIX or PREFIX=! to deny, several separated by commas; the first that fits decides",
        ..PARAM
    },
];
pub(super) const FSDEV_OPTIONS: &[Param] = &[
    Param {
        name: "fsdev_io_pool_size",
        kind: Kind::Number,
        mandatory: true,
        positional: true,
        options: &["-p", "--fsdev-io-pool-size"],
        default: "65535",
        help: "objects in the request pool",
        ..PARAM
    },
    Param {
        name: "fsdev_io_cache_size",
        kind: Kind::Number,
        mandatory: true,
        positional: true,
        options: &["-c", "--fsdev-io-cache-size"],
        default: "256",
        help: "objects in the cache of each thread",
        ..PARAM
    },
];
/// What the schedulers can be told; the static one has no use for it.
pub(super) const SCHEDULER: &[Param] = &[
    Param {
        name: "name",
        mandatory: true,
        positional: true,
        help: "static or dynamic",
        ..PARAM
    },
    Param {
        name: "period",
        kind: Kind::Big,
        options: &["-p", "--period"],
        default: "1000000",
        help: "time between two looks at the loads, in microseconds",
        ..PARAM
    },
    Param {
        name: "load_limit",
        kind: Kind::Number,
        options: &["--load-limit"],
        default: "20",
        help: "a queue with less load, in per cent of a core, is not moved",
        ..PARAM
    },
    Param {
        name: "core_limit",
        kind: Kind::Number,
        options: &["--core-limit"],
        default: "80",
        help: "a core with so much load, in per cent, gives queues away",
        ..PARAM
    },
    Param {
        name: "core_busy",
        kind: Kind::Number,
        options: &["--core-busy"],
        default: "95",
        help: "no core is given more load than this, in per cent",
        ..PARAM
    },
];
