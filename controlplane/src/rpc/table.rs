//! The table of methods.
//!
//! A row says everything about a method: its name, when it may be called, its parameters on the wire and on the command
//! line, and the function that answers it. Rows of methods that look at the service are in `observe`,
//! those of methods that change how it works in `tune`. To add a method,
//! write the function in the file of its noun and add a row.

mod observe;
mod tune;

use super::RpcError;
use super::doca;
use super::framework;
use super::fsdev;
pub use super::method::Answer;
pub use super::method::ClientCommand;
pub use super::method::Handler;
pub use super::method::Method;
pub use super::method::Output;
pub use super::method::Rule;
pub use super::method::When;
use super::params::AIO;
use super::params::DEVICE;
use super::params::FSDEV;
use super::params::FSDEV_NAME;
use super::params::FSDEV_OPTIONS;
use super::params::INDENT;
use super::params::JSON_CONF;
pub use super::params::Kind;
use super::params::MANAGER;
use super::params::NOTIFICATION;
use super::params::PACKED;
use super::params::PARAM;
use super::params::PLATFORM;
pub use super::params::Param;
use super::params::QUEUE_SIZE;
use super::params::REQUEST_QUEUES;
use super::params::SUBSYSTEM;
use super::params::TAG;
use super::params::TRANSPORT;
use super::params::TRANSPORT_ONLY;
use super::params::VUID;
use super::params::WAIT;
use super::virtio_fs;

/// Finds a method by its name or an older one.
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS
        .iter()
        .find(|method| method.name == name || method.aliases.contains(&name))
}

const INVALID: Rule = Rule::Strict(RpcError::INVALID_PARAMS, "Invalid parameters");
const DECODE: Rule = Rule::Strict(RpcError::INVALID_PARAMS, "spdk_json_decode_object failed");
const ARGUMENTS: Rule = Rule::Strict(RpcError::INVALID_PARAMS, "Invalid arguments");

const METHOD: Method = Method {
    name: "",
    aliases: &[],
    when: When::Runtime,
    help: "",
    params: &[],
    rule: INVALID,
    dataplane: false,
    output: Output::Nothing,
    handler: Handler::Client(ClientCommand::SaveConfig),
};

/// Every method and client command.
pub static METHODS: &[Method] = &ALL;

static ALL: [Method; OPERATE.len() + observe::OBSERVE.len() + tune::TUNE.len()] =
    join(&[OPERATE, observe::OBSERVE, tune::TUNE]);

/// One table after the other.
const fn join<const N: usize>(tables: &[&[Method]]) -> [Method; N] {
    let mut all = [METHOD; N];
    let (mut table, mut row, mut at) = (0, 0, 0);
    while at < N {
        if row == tables[table].len() {
            (table, row) = (table + 1, 0);
            continue;
        }
        all[at] = tables[table][row];
        (row, at) = (row + 1, at + 1);
    }
    all
}

/// What operates the service.
const OPERATE: &[Method] = &[
    Method {
        name: "spdk_get_version",
        when: When::Always,
        help: "Version of the service; also tells that it answers",
        rule: Rule::Absent("spdk_get_version method requires no parameters"),
        output: Output::Json,
        handler: Handler::Now(framework::spdk_get_version),
        ..METHOD
    },
    Method {
        name: "rpc_get_methods",
        aliases: &["get_rpc_methods"],
        when: When::Always,
        help: "List the methods",
        params: &[
            Param {
                name: "current",
                kind: Kind::Flag,
                options: &["-c", "--current"],
                default: "false",
                help: "only those that may be called now",
                ..PARAM
            },
            Param {
                name: "include_aliases",
                kind: Kind::Flag,
                options: &["-i", "--include-aliases"],
                default: "false",
                help: "older names too",
                ..PARAM
            },
        ],
        output: Output::Json,
        handler: Handler::Now(framework::rpc_get_methods),
        ..METHOD
    },
    Method {
        name: "framework_start_init",
        aliases: &["start_subsystem_init"],
        when: When::Startup,
        help: "Leave the startup state that --wait-for-rpc began",
        rule: Rule::Absent("framework_start_init requires no parameters"),
        handler: Handler::Later(framework::framework_start_init),
        ..METHOD
    },
    Method {
        name: "framework_wait_init",
        aliases: &["wait_subsystem_init"],
        when: When::Always,
        help: "Wait until the service is initialised and its configuration applied",
        rule: Rule::Ignored,
        handler: Handler::Detached(framework::framework_wait_init),
        ..METHOD
    },
    Method {
        name: "framework_disable_subsystem",
        when: When::Startup,
        help: "Disable a subsystem",
        params: &[SUBSYSTEM],
        rule: ARGUMENTS,
        handler: Handler::Now(framework::framework_disable_subsystem),
        ..METHOD
    },
    Method {
        name: "framework_enable_subsystem",
        when: When::Startup,
        help: "Enable a subsystem again",
        params: &[SUBSYSTEM],
        rule: ARGUMENTS,
        handler: Handler::Now(framework::framework_enable_subsystem),
        ..METHOD
    },
    Method {
        name: "framework_get_subsystems",
        aliases: &["get_subsystems"],
        when: When::Always,
        help: "List the subsystems in the order of their dependencies",
        rule: Rule::Absent("'framework_get_subsystems' requires no arguments"),
        output: Output::Json,
        handler: Handler::Now(framework::framework_get_subsystems),
        ..METHOD
    },
    Method {
        name: "framework_get_config",
        aliases: &["get_subsystem_config"],
        help: "The requests that rebuild one subsystem",
        params: &[
            SUBSYSTEM,
            Param {
                name: "with_batches",
                kind: Kind::Flag,
                options: &["--with-batches"],
                default: "false",
                help: "accepted for today's clients: no request of this service needs to go with others",
                ..PARAM
            },
        ],
        rule: ARGUMENTS,
        output: Output::Json,
        handler: Handler::Now(framework::framework_get_config),
        ..METHOD
    },
    Method {
        name: "spdk_kill_instance",
        aliases: &["kill_instance"],
        help: "Send a signal to the control plane; one that ends it in order ends the service under ferry up, SIGKILL is a crash",
        params: &[Param {
            name: "sig_name",
            mandatory: true,
            positional: true,
            help: "SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGKILL, SIGUSR1 or its number",
            ..PARAM
        }],
        handler: Handler::Now(framework::spdk_kill_instance),
        ..METHOD
    },
    Method {
        name: "fsdev_set_opts",
        when: When::Always,
        help: "Set the options of the fsdev library; they are checked and kept, but what can be in flight is sized by iobuf_set_options",
        params: FSDEV_OPTIONS,
        rule: DECODE,
        handler: Handler::Now(fsdev::fsdev_set_opts),
        ..METHOD
    },
    Method {
        name: "fsdev_get_opts",
        help: "Options of the fsdev library",
        rule: Rule::Absent("'fsdev_get_opts' requires no arguments"),
        output: Output::Json,
        handler: Handler::Now(fsdev::fsdev_get_opts),
        ..METHOD
    },
    Method {
        name: "fsdev_get_fsdevs",
        help: "List the fsdevs, or describe one",
        params: &[Param {
            name: "name",
            options: &["-f", "--name"],
            help: "name of the fsdev",
            ..PARAM
        }],
        rule: Rule::Strict(RpcError::INTERNAL_ERROR, "spdk_json_decode_object failed"),
        output: Output::Json,
        handler: Handler::Now(fsdev::fsdev_get_fsdevs),
        ..METHOD
    },
    Method {
        name: "fsdev_aio_create",
        help: "Create an fsdev that serves a local directory",
        params: AIO,
        rule: DECODE,
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(fsdev::fsdev_aio_create),
        ..METHOD
    },
    Method {
        name: "fsdev_aio_delete",
        help: "Delete an fsdev that serves a local directory",
        params: &[FSDEV_NAME],
        rule: DECODE,
        handler: Handler::Later(fsdev::fsdev_aio_delete),
        ..METHOD
    },
    Method {
        name: "fsdev_null_create",
        help: "Create an fsdev that answers everything and stores nothing; for measurement",
        params: &[FSDEV_NAME],
        rule: DECODE,
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(fsdev::fsdev_null_create),
        ..METHOD
    },
    Method {
        name: "fsdev_null_delete",
        help: "Delete a null fsdev",
        params: &[FSDEV_NAME],
        rule: DECODE,
        handler: Handler::Later(fsdev::fsdev_null_delete),
        ..METHOD
    },
    Method {
        name: "virtio_fs_transport_create",
        help: "Create a transport",
        params: &[TRANSPORT],
        handler: Handler::Now(virtio_fs::transport_create),
        ..METHOD
    },
    Method {
        name: "virtio_fs_transport_destroy",
        help: "Destroy a stopped transport",
        params: &[TRANSPORT],
        handler: Handler::Now(virtio_fs::transport_destroy),
        ..METHOD
    },
    Method {
        name: "virtio_fs_transport_start",
        help: "Start a transport, so that devices can be created on it",
        params: &[TRANSPORT],
        dataplane: true,
        handler: Handler::Now(virtio_fs::transport_start),
        ..METHOD
    },
    Method {
        name: "virtio_fs_transport_stop",
        help: "Stop a transport that has no devices",
        params: &[TRANSPORT],
        handler: Handler::Now(virtio_fs::transport_stop),
        ..METHOD
    },
    Method {
        name: "virtio_fs_get_transports",
        help: "List the transports, or one",
        params: &[Param {
            mandatory: false,
            ..TRANSPORT
        }],
        output: Output::Json,
        handler: Handler::Now(virtio_fs::get_transports),
        ..METHOD
    },
    Method {
        name: "virtio_fs_device_create",
        help: "Create a device on a started transport",
        params: &[
            Param {
                positional: false,
                ..TRANSPORT_ONLY
            },
            DEVICE,
            TAG,
            FSDEV,
            REQUEST_QUEUES,
            QUEUE_SIZE,
            PACKED,
            PLATFORM,
            NOTIFICATION,
        ],
        handler: Handler::Now(virtio_fs::device_create),
        ..METHOD
    },
    Method {
        name: "virtio_fs_device_modify",
        help: "Change a device that is not running",
        params: &[
            DEVICE,
            TAG,
            FSDEV,
            REQUEST_QUEUES,
            QUEUE_SIZE,
            PACKED,
            PLATFORM,
            NOTIFICATION,
        ],
        handler: Handler::Now(virtio_fs::device_modify),
        ..METHOD
    },
    Method {
        name: "virtio_fs_device_start",
        help: "Start a device, or resume a stopped one",
        params: &[DEVICE],
        dataplane: true,
        handler: Handler::Later(virtio_fs::device_start),
        ..METHOD
    },
    Method {
        name: "virtio_fs_device_stop",
        help: "Stop a device; requests of the guest wait until it is started again",
        params: &[DEVICE],
        dataplane: true,
        handler: Handler::Later(virtio_fs::device_stop),
        ..METHOD
    },
    Method {
        name: "virtio_fs_device_destroy",
        help: "Destroy a device that is not running",
        params: &[DEVICE],
        handler: Handler::Later(virtio_fs::device_destroy),
        ..METHOD
    },
    Method {
        name: "virtio_fs_get_devices",
        help: "List the devices: all, those of a transport, or one",
        params: &[
            Param {
                mandatory: false,
                positional: false,
                ..TRANSPORT_ONLY
            },
            Param {
                mandatory: false,
                positional: false,
                aliases: &[],
                ..DEVICE
            },
        ],
        output: Output::Json,
        handler: Handler::Now(virtio_fs::get_devices),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_device_modify",
        help: "Set the function of a device that is not running",
        params: &[
            DEVICE,
            Param {
                mandatory: false,
                positional: false,
                ..MANAGER
            },
            Param {
                mandatory: false,
                ..VUID
            },
        ],
        handler: Handler::Now(doca::device_modify),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_device_hotplug",
        help: "Plug a started device into the host",
        params: &[DEVICE, WAIT],
        dataplane: true,
        handler: Handler::Later(doca::device_hotplug),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_device_hotunplug",
        help: "Unplug a started device from the host",
        params: &[DEVICE, WAIT],
        dataplane: true,
        handler: Handler::Later(doca::device_hotunplug),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_get_managers",
        help: "List the emulation managers that have been created",
        output: Output::Json,
        handler: Handler::Now(doca::get_managers),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_get_possible_managers",
        help: "List the emulation managers that the platform offers",
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(doca::get_possible_managers),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_manager_create",
        help: "Create an emulation manager",
        params: &[MANAGER],
        dataplane: true,
        handler: Handler::Now(doca::manager_create),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_manager_destroy",
        help: "Destroy an emulation manager whose functions no device uses",
        params: &[MANAGER],
        handler: Handler::Now(doca::manager_destroy),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_get_functions",
        help: "List the emulated PCIe functions of the managers",
        params: &[Param {
            mandatory: false,
            ..MANAGER
        }],
        dataplane: true,
        output: Output::Json,
        handler: Handler::Now(doca::get_functions),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_function_create",
        help: "Create a hot-pluggable function and print its VUID",
        params: &[
            MANAGER,
            Param {
                mandatory: false,
                help: "vendor unique identifier of the wanted function, instead of that of the first free port",
                ..VUID
            },
        ],
        dataplane: true,
        output: Output::Json,
        handler: Handler::Later(doca::function_create),
        ..METHOD
    },
    Method {
        name: "virtio_fs_doca_function_destroy",
        help: "Destroy a hot-pluggable function that no device uses",
        params: &[MANAGER, VUID],
        dataplane: true,
        handler: Handler::Later(doca::function_destroy),
        ..METHOD
    },
    Method {
        name: "save_config",
        when: When::Always,
        help: "Write the configuration of all subsystems",
        params: &[
            Param {
                name: "output",
                options: &["-o", "--output"],
                default: "standard output",
                help: "file to write; it is replaced whole or not at all",
                ..PARAM
            },
            INDENT,
        ],
        output: Output::Json,
        handler: Handler::Client(ClientCommand::SaveConfig),
        ..METHOD
    },
    Method {
        name: "load_config",
        when: When::Always,
        help: "Apply a saved configuration",
        params: &[
            JSON_CONF,
            Param {
                name: "include_aliases",
                kind: Kind::Flag,
                options: &["-i", "--include-aliases"],
                default: "false",
                help: "accept older names of methods",
                ..PARAM
            },
        ],
        handler: Handler::Client(ClientCommand::LoadConfig),
        ..METHOD
    },
    Method {
        name: "save_subsystem_config",
        when: When::Always,
        help: "Write the configuration of one subsystem",
        params: &[
            INDENT,
            Param {
                name: "name",
                mandatory: true,
                options: &["-n", "--name"],
                help: "name of the subsystem",
                ..PARAM
            },
        ],
        output: Output::Json,
        handler: Handler::Client(ClientCommand::SaveSubsystemConfig),
        ..METHOD
    },
    Method {
        name: "load_subsystem_config",
        when: When::Always,
        help: "Apply the configuration of one subsystem",
        params: &[JSON_CONF],
        handler: Handler::Client(ClientCommand::LoadSubsystemConfig),
        ..METHOD
    },
];
