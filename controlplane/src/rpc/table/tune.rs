//! The rows of the methods that change how the service works: placement, pools, traces, claims on CPUs.

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
use crate::rpc::fsdev;
use crate::rpc::params::FSDEV_NAME;
use crate::rpc::params::SCHEDULER;
use crate::rpc::trace;
use crate::rpc::tune;

const GROUP: Param = Param {
    name: "name",
    mandatory: true,
    positional: true,
    help: "name of the group, or all",
    ..PARAM
};

const POINTS: Param = Param {
    name: "tpoint_mask",
    kind: Kind::Big,
    positional: true,
    options: &["--tpoint-mask"],
    default: "all of the group",
    help: "points of the group, one bit each",
    ..PARAM
};

/// What changes how the service works.
pub(super) const TUNE: &[Method] = &[
    Method {
        name: "fsdev_passthru_ext_create",
        help: "Create an fsdev that hands everything on to another one",
        params: &[
            Param {
                name: "base_fsdev_name",
                mandatory: true,
                positional: true,
                options: &["-b", "--base-fsdev-name"],
                help: "name of the other fsdev",
                ..PARAM
            },
            Param {
                options: &["-n", "--name"],
                ..FSDEV_NAME
            },
        ],
        rule: DECODE,
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(fsdev::fsdev_passthru_create),
        ..METHOD
    },
    Method {
        name: "fsdev_passthru_ext_delete",
        help: "Delete an fsdev that hands everything on to another one",
        params: &[FSDEV_NAME],
        rule: DECODE,
        dataplane: true,
        handler: Handler::Later(fsdev::fsdev_passthru_delete),
        ..METHOD
    },
    Method {
        name: "framework_get_scheduler",
        help: "How queues are spread over the cores",
        rule: Rule::Absent("'rpc_get_scheduler' requires no arguments"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(tune::framework_get_scheduler),
        ..METHOD
    },
    Method {
        name: "framework_set_scheduler",
        when: When::Always,
        help: "Choose how queues are spread over the cores: static leaves them where they start, dynamic moves them to idle cores",
        params: SCHEDULER,
        rule: Rule::Strict(RpcError::INVALID_PARAMS, "Invalid parameters"),
        handler: Handler::Later(tune::framework_set_scheduler),
        ..METHOD
    },
    Method {
        name: "thread_set_cpumask",
        help: "Have a queue, which is a thread of thread_get_stats, served on other CPUs",
        params: &[
            Param {
                name: "id",
                kind: Kind::Big,
                mandatory: true,
                options: &["-i", "--id"],
                help: "number of the thread",
                ..PARAM
            },
            Param {
                name: "cpumask",
                mandatory: true,
                options: &["-m", "--cpumask"],
                help: "CPUs that may serve it, as a hexadecimal mask or a list like [0,2-3]",
                ..PARAM
            },
        ],
        rule: DECODE,
        dataplane: true,
        handler: Handler::Later(tune::thread_set_cpumask),
        ..METHOD
    },
    Method {
        name: "iobuf_set_options",
        when: When::Startup,
        help: "Size the pools of all cores together; the memory comes at once",
        params: &[
            Param {
                name: "small_pool_count",
                kind: Kind::Big,
                options: &["--small-pool-count"],
                default: "256 for each core",
                help: "request slots, 64 at least",
                ..PARAM
            },
            Param {
                name: "large_pool_count",
                kind: Kind::Big,
                options: &["--large-pool-count"],
                default: "32 for each core",
                help: "data buffers, 8 at least",
                ..PARAM
            },
            Param {
                name: "small_bufsize",
                kind: Kind::Number,
                options: &["--small-bufsize"],
                default: "8192",
                help: "bytes wanted of a request slot, 4096 to 8192; it has 8192 in any case",
                ..PARAM
            },
            Param {
                name: "large_bufsize",
                kind: Kind::Number,
                options: &["--large-bufsize"],
                default: "261120",
                help: "bytes wanted of a data buffer, 8192 to 261120; it has 261120 in any case",
                ..PARAM
            },
            Param {
                name: "enable_numa",
                kind: Kind::Flag,
                options: &["--enable-numa"],
                default: "false",
                help: "not supported: each core has pools of its own",
                ..PARAM
            },
        ],
        rule: DECODE,
        handler: Handler::Later(tune::iobuf_set_options),
        ..METHOD
    },
    Method {
        name: "framework_enable_cpumask_locks",
        when: When::Always,
        help: "Claim the CPUs of the cores by lock files in /var/tmp",
        rule: Rule::Absent("framework_enable_cpumask_locksrequires no arguments"),
        dataplane: true,
        handler: Handler::Later(tune::enable_cpumask_locks),
        ..METHOD
    },
    Method {
        name: "framework_disable_cpumask_locks",
        when: When::Always,
        help: "Give up the claims on the CPUs of the cores",
        rule: Rule::Absent("framework_disable_cpumask_locksrequires no arguments"),
        dataplane: true,
        handler: Handler::Later(tune::disable_cpumask_locks),
        ..METHOD
    },
    Method {
        name: "framework_monitor_context_switch",
        help: "Count context switches of the cores, which framework_get_reactors then shows; or tell whether they are counted",
        params: &[Param {
            name: "enabled",
            kind: Kind::Flag,
            options: &["-e", "--enable"],
            off_options: &["-d", "--disable"],
            help: "whether they are counted",
            ..PARAM
        }],
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(tune::monitor_context_switch),
        ..METHOD
    },
    Method {
        name: "framework_get_pci_devices",
        help: "The PCIe functions that a host sees, with their configuration spaces",
        rule: Rule::Absent("framework_get_pci_devices doesn't accept any parameters.\n"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(tune::get_pci_devices),
        ..METHOD
    },
    Method {
        name: "env_dpdk_get_mem_stats",
        help: "Write the sizes and the use of the pools to a file, and name it",
        rule: Rule::Absent("env_dpdk_get_mem_stats doesn't accept any parameters.\n"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(tune::get_mem_stats),
        ..METHOD
    },
    Method {
        name: "trace_enable_tpoint_group",
        when: When::Always,
        help: "Trace at all points of a group",
        params: &[GROUP],
        rule: DECODE,
        dataplane: true,
        handler: Handler::Later(trace::enable_group),
        ..METHOD
    },
    Method {
        name: "trace_disable_tpoint_group",
        when: When::Always,
        help: "Trace at no point of a group",
        params: &[GROUP],
        rule: DECODE,
        dataplane: true,
        handler: Handler::Later(trace::disable_group),
        ..METHOD
    },
    Method {
        name: "trace_set_tpoint_mask",
        when: When::Always,
        help: "Trace at these points of a group too",
        params: &[GROUP, POINTS],
        rule: DECODE,
        dataplane: true,
        handler: Handler::Later(trace::set_mask),
        ..METHOD
    },
    Method {
        name: "trace_clear_tpoint_mask",
        when: When::Always,
        help: "Trace at these points of a group no more",
        params: &[GROUP, POINTS],
        rule: DECODE,
        dataplane: true,
        handler: Handler::Later(trace::clear_mask),
        ..METHOD
    },
    Method {
        name: "trace_get_tpoint_group_mask",
        when: When::Always,
        help: "The groups of trace points, and what is on",
        rule: Rule::Absent("trace_get_tpoint_group_mask requires no parameters"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(trace::get_group_mask),
        ..METHOD
    },
    Method {
        name: "trace_get_info",
        when: When::Always,
        help: "The file that the cores trace into, for ferry trace, and what is on",
        rule: Rule::Absent("trace_get_info requires no parameters"),
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(trace::get_info),
        ..METHOD
    },
];
