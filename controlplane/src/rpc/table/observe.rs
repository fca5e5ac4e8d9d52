//! The rows of the methods that look at the service: log, notifications, counters.

use super::DECODE;
use super::Handler;
use super::Kind;
use super::METHOD;
use super::Method;
use super::Output;
use super::PARAM;
use super::Param;
use super::Rule;
use super::When;
use crate::rpc::RpcError;
use crate::rpc::log;
use crate::rpc::notify;
use crate::rpc::params::LEVEL;
use crate::rpc::params::LOG_FLAG;
use crate::rpc::stats;

const DECODE_INTERNAL: Rule =
    Rule::Strict(RpcError::INTERNAL_ERROR, "spdk_json_decode_object failed");

/// What looks at the service.
pub(super) const OBSERVE: &[Method] = &[
    Method {
        name: "log_set_level",
        when: When::Always,
        help: "Set what both processes log; INFO and DEBUG concern the components whose flag is set",
        params: &[LEVEL],
        rule: DECODE_INTERNAL,
        handler: Handler::Later(log::set_level),
        ..METHOD
    },
    Method {
        name: "log_set_print_level",
        when: When::Always,
        help: "Set what of the log is printed on standard error, which is where all of it goes",
        params: &[LEVEL],
        rule: DECODE_INTERNAL,
        handler: Handler::Later(log::set_print_level),
        ..METHOD
    },
    Method {
        name: "log_get_level",
        when: When::Always,
        help: "What both processes log",
        rule: Rule::Absent("log_get_level requires no parameters"),
        output: Output::Json,
        handler: Handler::Now(log::get_level),
        ..METHOD
    },
    Method {
        name: "log_get_print_level",
        when: When::Always,
        help: "What of the log is printed",
        rule: Rule::Absent("log_get_print_level requires no parameters"),
        output: Output::Json,
        handler: Handler::Now(log::get_print_level),
        ..METHOD
    },
    Method {
        name: "log_set_flag",
        when: When::Always,
        help: "Log INFO and DEBUG of a component",
        params: &[LOG_FLAG],
        rule: DECODE_INTERNAL,
        handler: Handler::Later(log::set_flag),
        ..METHOD
    },
    Method {
        name: "log_clear_flag",
        when: When::Always,
        help: "Log no INFO and DEBUG of a component",
        params: &[LOG_FLAG],
        rule: DECODE_INTERNAL,
        handler: Handler::Later(log::clear_flag),
        ..METHOD
    },
    Method {
        name: "log_get_flags",
        when: When::Always,
        help: "List the components that have a flag, and whether it is set",
        rule: Rule::Absent("log_get_flags requires no parameters"),
        output: Output::Json,
        handler: Handler::Now(log::get_flags),
        ..METHOD
    },
    Method {
        name: "log_enable_timestamps",
        help: "Begin the lines of the log with the time, or not",
        params: &[Param {
            name: "enabled",
            kind: Kind::Flag,
            mandatory: true,
            options: &["-e", "--enable"],
            off_options: &["-d", "--disable"],
            help: "with the time or without",
            ..PARAM
        }],
        rule: DECODE,
        handler: Handler::Later(log::enable_timestamps),
        ..METHOD
    },
    Method {
        name: "notify_get_types",
        help: "List the types of notifications",
        rule: Rule::Absent("No parameters required"),
        output: Output::Json,
        handler: Handler::Now(notify::get_types),
        ..METHOD
    },
    Method {
        name: "notify_get_notifications",
        help: "List what has happened; the newest 1024 notifications are kept",
        params: &[
            Param {
                name: "id",
                kind: Kind::Big,
                options: &["-i", "--id"],
                default: "0",
                help: "number of the first one wanted",
                ..PARAM
            },
            Param {
                name: "max",
                kind: Kind::Big,
                options: &["-n", "--max"],
                default: "all",
                help: "how many at most",
                ..PARAM
            },
        ],
        rule: Rule::Strict(RpcError::INVALID_PARAMS, "Invalid argument"),
        output: Output::Json,
        handler: Handler::Now(notify::get_notifications),
        ..METHOD
    },
    Method {
        name: "fsdev_get_iostat",
        help: "Requests, bytes, errors and latencies of the fsdevs",
        params: &[
            Param {
                name: "name",
                options: &["-f", "--name"],
                help: "name of the fsdev",
                ..PARAM
            },
            Param {
                name: "per_channel",
                kind: Kind::Flag,
                options: &["-c", "--per-channel"],
                default: "false",
                help: "for every core by itself",
                ..PARAM
            },
        ],
        rule: DECODE,
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(stats::fsdev_get_iostat),
        ..METHOD
    },
    Method {
        name: "fsdev_reset_iostat",
        help: "Have the numbers of fsdev_get_iostat begin anew",
        params: &[Param {
            name: "name",
            options: &["-f", "--name"],
            help: "name of the fsdev",
            ..PARAM
        }],
        rule: DECODE,
        dataplane: true,
        handler: Handler::Now(stats::fsdev_reset_iostat),
        ..METHOD
    },
    Method {
        name: "framework_get_reactors",
        help: "The cores of the data plane and how busy they have been",
        rule: Rule::Absent("`framework_get_reactors` requires no arguments"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(stats::framework_get_reactors),
        ..METHOD
    },
    Method {
        name: "thread_get_stats",
        help: "Busy and idle times of the threads",
        rule: Rule::Absent("'thread_get_stats' requires no arguments"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(stats::thread_get_stats),
        ..METHOD
    },
    Method {
        name: "thread_get_pollers",
        help: "How often the pollers of the threads have run",
        rule: Rule::Absent("'thread_get_pollers' requires no arguments"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(stats::thread_get_pollers),
        ..METHOD
    },
    Method {
        name: "thread_get_io_channels",
        help: "The devices that each thread has served",
        rule: Rule::Absent("'thread_get_io_channels' requires no arguments"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(stats::thread_get_io_channels),
        ..METHOD
    },
    Method {
        name: "iobuf_get_stats",
        help: "Use of the request slots (small) and the data buffers (large)",
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(stats::iobuf_get_stats),
        ..METHOD
    },
    Method {
        name: "ferry_get_counters",
        help: "All counters of cores and devices as they were counted",
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(stats::get_counters),
        ..METHOD
    },
];
