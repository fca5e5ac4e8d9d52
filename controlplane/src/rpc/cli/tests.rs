use serde_json::json;

use super::super::table::Method;
use super::*;

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn call(line: &str) -> (&'static str, Value) {
    let words = words(line);
    match parse(&words[0], &words[1..]) {
        Ok(Parsed::Call(Invocation { method, params })) => (method.name, Value::Object(params)),
        Ok(Parsed::Help(_)) => panic!("{line}: help"),
        Err(error) => panic!("{line}: {error}"),
    }
}

fn mistake(line: &str) -> CliError {
    let words = words(line);
    match parse(&words[0], &words[1..]) {
        Ok(_) => panic!("{line}: accepted"),
        Err(error) => error,
    }
}

#[test]
fn the_guides_command_lines_give_their_requests() {
    let cases = [
        (
            "fsdev_aio_create aio0 /etc/virtiofs",
            json!({"name": "aio0", "root_path": "/etc/virtiofs"}),
        ),
        ("virtio_fs_doca_get_possible_managers", json!({})),
        (
            "virtio_fs_transport_create -t DOCA",
            json!({"transport_name": "DOCA"}),
        ),
        (
            "virtio_fs_doca_manager_create -m mlx5_0",
            json!({"manager": "mlx5_0"}),
        ),
        (
            "virtio_fs_transport_start -t DOCA",
            json!({"transport_name": "DOCA"}),
        ),
        ("virtio_fs_get_transports", json!({})),
        ("virtio_fs_doca_get_functions", json!({})),
        (
            "virtio_fs_device_create --transport-name DOCA --dev-name vfsdev0 --tag doca_test --fsdev aio0 \
             --num-request-queues 8 --queue-size 256 --driver-platform x86_64",
            json!({
                "transport_name": "DOCA", "dev_name": "vfsdev0", "tag": "doca_test", "fsdev": "aio0",
                "num_request_queues": 8, "queue_size": 256, "driver_platform": "x86_64",
            }),
        ),
        (
            "virtio_fs_doca_device_modify --dev-name vfsdev0 --manager mlx5_0 --vuid MT2333XZ0VJQVFSS0D0F2",
            json!({"dev_name": "vfsdev0", "manager": "mlx5_0", "vuid": "MT2333XZ0VJQVFSS0D0F2"}),
        ),
        (
            "virtio_fs_device_start --dev-name vfsdev0",
            json!({"dev_name": "vfsdev0"}),
        ),
        (
            "virtio_fs_doca_function_create --manager mlx5_0",
            json!({"manager": "mlx5_0"}),
        ),
        (
            "virtio_fs_doca_device_hotplug --dev-name vfsdev0 --wait-for-done",
            json!({"dev_name": "vfsdev0", "wait_for_done": true}),
        ),
        (
            "virtio_fs_doca_function_destroy --manager mlx5_0 --vuid MT2333XZ0VJQVFSS0D0F2",
            json!({"manager": "mlx5_0", "vuid": "MT2333XZ0VJQVFSS0D0F2"}),
        ),
        ("save_config -o x.json", json!({"output": "x.json"})),
        (
            "framework_disable_subsystem virtio_fs",
            json!({"name": "virtio_fs"}),
        ),
    ];
    for (line, params) in cases {
        let method = line.split_whitespace().next().unwrap();
        assert_eq!(call(line), (method, params), "{line}");
    }
}

#[test]
fn options_have_many_spellings_with_one_meaning() {
    let expected = json!({"dev_name": "d", "queue_size": 64});
    for line in [
        "virtio_fs_device_modify --dev-name d --queue-size 64",
        "virtio_fs_device_modify --dev_name=d --queue_size=0x40",
        "virtio_fs_device_modify -dd --queue-s 64",
        "virtio_fs_device_modify -d d --queue 64",
        "virtio_fs_device_modify --queue-size 64 d",
        "virtio_fs_device_modify --queue-size 64 -- d",
    ] {
        assert_eq!(call(line).1, expected, "{line}");
    }
}

#[test]
fn sizes_pools_and_switches_are_taken_by_position_and_by_option() {
    let expected = json!({"fsdev_io_pool_size": 1024, "fsdev_io_cache_size": 64});
    for line in [
        "fsdev_set_opts 1024 64",
        "fsdev_set_opts -p 1024 -c 64",
        "fsdev_set_opts -p 1024 64",
    ] {
        assert_eq!(call(line).1, expected, "{line}");
    }
    let (_, params) = call(
        "fsdev_aio_create a / --enable-xattr --disable-writeback-cache --max-write 65536 --skip-rw",
    );
    let expected = json!({
        "name": "a", "root_path": "/", "enable_xattr": true, "enable_writeback_cache": false,
        "max_xfer_size": 65536, "skip_rw": true,
    });
    assert_eq!(params, expected);
    assert_eq!(call("save_config -i -1").1, json!({"indent": -1}));
}

#[test]
fn mistakes_name_their_culprit() {
    for (line, culprits) in [
        (
            "virtio_fs_transport_creat -t DOCA",
            &[
                "virtio_fs_transport_creat",
                "did you mean virtio_fs_transport_create?",
            ][..],
        ),
        ("virtio_fs_transport_create", &["--transport-name"]),
        ("virtio_fs_transport_create -t", &["-t", "value"]),
        ("virtio_fs_transport_create -x DOCA", &["-x"]),
        ("virtio_fs_transport_create DOCA TCP", &["TCP", "too many"]),
        (
            "virtio_fs_device_modify -d a --queue-size big",
            &["queue_size", "big"],
        ),
        (
            "fsdev_aio_create a / --max",
            &["--max", "ambiguous", "--max-readahead"],
        ),
        (
            "fsdev_aio_create a / --disable-xattr=true",
            &["--disable-xattr=true"],
        ),
        ("fsdev_aio_create a", &["root_path"]),
    ] {
        let text = mistake(line).to_string();
        for culprit in culprits {
            assert!(
                text.contains(culprit),
                "{line}: {culprit} is missing in: {text}"
            );
        }
    }
    assert_eq!(nearest("xyzzy"), None);
}

#[test]
fn every_method_explains_every_parameter() {
    let all = list();
    for method in METHODS {
        assert!(
            all.contains(method.name) && !method.help.is_empty(),
            "{}",
            method.name
        );
        let text = help(method);
        for param in method.params {
            assert!(
                !param.help.is_empty() && text.contains(param.help),
                "{} {}",
                method.name,
                param.name
            );
        }
        assert!(
            matches!(parse(method.name, &["-h".to_owned()]), Ok(Parsed::Help(found)) if found.name == method.name)
        );
    }
}

fn spellings(method: &Method) -> Vec<&'static str> {
    method
        .params
        .iter()
        .flat_map(|param| param.options.iter().chain(param.off_options))
        .copied()
        .collect()
}

#[test]
fn rows_of_the_table_do_not_contradict_themselves() {
    for (position, method) in METHODS.iter().enumerate() {
        let names = || {
            METHODS
                .iter()
                .flat_map(|method| method.aliases.iter().chain([&method.name]))
        };
        assert_eq!(
            names().filter(|name| **name == method.name).count(),
            1,
            "{} is listed twice",
            method.name
        );
        assert_eq!(
            table::find(method.name).map(|found| found.name),
            METHODS.get(position).map(|found| found.name)
        );
        let spellings = spellings(method);
        for spelling in &spellings {
            assert!(spelling.starts_with('-'), "{spelling}");
            assert_eq!(
                spellings.iter().filter(|other| *other == spelling).count(),
                1,
                "{} {spelling}",
                method.name
            );
        }
        for param in method.params {
            let reachable = param.positional || !param.options.is_empty();
            assert!(reachable, "{} {} cannot be given", method.name, param.name);
        }
    }
}

#[test]
fn the_nearest_option_is_suggested() {
    let says = |line| mistake(line).to_string();
    let error = says("virtio_fs_device_start --dev-nam=x --nosuch");
    assert!(
        error.contains("--nosuch") && !error.contains("did you mean"),
        "{error}"
    );
    let error = says("virtio_fs_device_start --devname x");
    assert!(error.contains("did you mean --dev-name?"), "{error}");
}

#[test]
fn the_reference_in_the_tree_is_what_the_table_says() {
    let kept = include_str!("../../../RPC.md");
    assert!(
        kept == reference(),
        "run: cargo run --bin ferry -- rpc --reference > controlplane/RPC.md"
    );
}

#[test]
fn the_reference_names_every_method_parameter_and_option() {
    let text = reference();
    for method in METHODS {
        let title = format!("\n### {}\n", method.name);
        let (_, section) = text.split_once(&title).unwrap();
        let section = section.split("\n### ").next().unwrap();
        for word in method
            .params
            .iter()
            .flat_map(|param| {
                param
                    .options
                    .iter()
                    .chain(param.aliases)
                    .chain([&param.name])
            })
            .chain(method.aliases)
        {
            assert!(
                section.contains(&format!("`{word}`")),
                "{}: {word}",
                method.name
            );
        }
    }
}

mod completing {
    use super::super::complete::*;
    use super::words;

    fn value(line: &str) -> Option<&'static str> {
        match expected(&words(line))? {
            Expected::Value(_, param) => Some(param.name),
            Expected::Methods | Expected::Options(..) => None,
        }
    }

    fn positional(line: &str) -> Option<&'static str> {
        match expected(&words(line))? {
            Expected::Options(_, param) => param.map(|param| param.name),
            Expected::Methods | Expected::Value(..) => None,
        }
    }

    #[test]
    fn an_option_expects_its_value_and_a_flag_none() {
        assert_eq!(value("virtio_fs_device_create -t"), Some("transport_name"));
        assert_eq!(value("virtio_fs_device_create -t DOCA --tag"), Some("tag"));
        assert_eq!(value("virtio_fs_device_create --packed-vq"), None);
        assert_eq!(value("virtio_fs_device_create --tag=x"), None);
        assert!(expected(&words("nosuch")).is_none());
        assert!(matches!(expected(&[]), Some(Expected::Methods)));
    }

    #[test]
    fn what_the_help_of_a_parameter_lists_are_its_values() {
        let of = |method, name| {
            let method = super::table::find(method).unwrap();
            let param = method.params.iter().find(|param| param.name == name);
            listed(param.unwrap())
        };
        assert_eq!(
            of("virtio_fs_transport_start", "transport_name"),
            ["DOCA", "VHOST_USER"]
        );
        assert_eq!(
            of("log_set_level", "level"),
            ["ERROR", "WARNING", "NOTICE", "INFO", "DEBUG"]
        );
        assert_eq!(
            of("fsdev_aio_create", "metadata"),
            ["inline", "offload", "auto"]
        );
        assert!(of("fsdev_aio_create", "xattr_map").is_empty());
        assert!(of("virtio_fs_device_create", "tag").is_empty());
    }

    #[test]
    fn what_was_given_by_option_is_not_expected_by_position() {
        assert_eq!(positional("fsdev_aio_create"), Some("name"));
        assert_eq!(positional("fsdev_aio_create a"), Some("root_path"));
        assert_eq!(positional("fsdev_aio_create a /b"), None);
        assert_eq!(positional("virtio_fs_transport_start -t DOCA"), None);
    }
}
