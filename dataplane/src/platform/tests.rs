use super::*;

fn parse(text: &str) -> Result<Platform, String> {
    Platform::parse(Path::new("p.toml"), text).map_err(|e| e.to_string())
}

/// A manager with the lines given put into its own table and into its firmware table.
fn manager(own: &str, firmware: &str) -> String {
    format!(
        "[[manager]]\nname = \"mlx5_0\"\nserial = \"MT1\"\nbus = 3\n{own}\n[manager.firmware]\n\
         VIRTIO_FS_EMULATION_ENABLE = 1\n{firmware}\n"
    )
}

#[test]
fn built_in_platform_has_one_manager_with_two_functions() {
    let platform = Platform::load(None).unwrap();
    let [manager] = platform.managers() else {
        panic!("{platform:?}")
    };
    assert_eq!(
        (manager.name.as_str(), manager.hotplug_ports),
        ("mlx5_0", 0)
    );
    let functions: Vec<_> = platform.describe_functions(Path::new("/run/f")).collect();
    assert_eq!(functions.len(), 2);
    assert_eq!(functions[0].vuid, "MT2251XZ02WZVFSS0D0F2");
    assert_eq!(functions[0].pci_address, "0000:29:00.2");
    assert_eq!(functions[0].socket, "/run/f/pci/MT2251XZ02WZVFSS0D0F2.sock");
    assert_eq!(functions[1].vuid, "MT2251XZ02WZVFSS0D0F3");
    assert_eq!(manager.functions[1].num_msix, 63);
    assert_eq!(
        (
            manager.functions[1].subsystem_vendor,
            manager.functions[1].subsystem
        ),
        (6900, 4186)
    );
}

#[test]
fn firmware_defaults_hold_for_what_the_file_does_not_say() {
    let platform = parse("[[manager]]\nname = \"m\"\nserial = \"S\"\n").unwrap();
    assert_eq!(platform.managers()[0].functions, []);
    let platform = parse(&manager("", "VIRTIO_FS_EMULATION_NUM_PF = 1")).unwrap();
    assert_eq!(platform.managers()[0].functions[0].num_msix, 2);
    assert_eq!(platform.managers()[0].functions[0].subsystem_vendor, 0x1af4);
}

#[test]
fn eight_functions_need_the_extension_and_keep_distinct_addresses() {
    let eight = "VIRTIO_FS_EMULATION_NUM_PF = 8";
    let error = parse(&manager("", eight)).unwrap_err();
    assert!(
        error
            .contains("VIRTIO_FS_EMULATION_NUM_PF = 8 is not allowed, only an integer from 0 to 2"),
        "{error}"
    );
    let platform = parse(&manager("max_static_functions = 8", eight)).unwrap();
    let functions = &platform.managers()[0].functions;
    assert_eq!(functions.len(), 8);
    assert_eq!(functions[7].vuid, "MT1VFSS0D1F1");
    assert_eq!(functions[7].pci_address, "0000:03:01.1");
}

#[test]
fn wrong_values_name_file_manager_key_value_and_range() {
    let cases = [
        (
            manager("", "VIRTIO_FS_EMULATION_NUM_MSIX = 64"),
            "VIRTIO_FS_EMULATION_NUM_MSIX = 64 is not allowed, only an integer from 0 to 63",
        ),
        (
            manager("", "VIRTIO_FS_EMULATION_NUM_PF = \"2\""),
            "VIRTIO_FS_EMULATION_NUM_PF = \"2\" is not allowed",
        ),
        (
            manager("", "VIRTIO_FS_EMULATION_NUM_VF = 1"),
            "VIRTIO_FS_EMULATION_NUM_VF = 1 is not allowed, only 0",
        ),
        (
            manager("", "PCI_SWITCH_EMULATION_ENABLE = 1"),
            "hot-plug is not supported",
        ),
        (
            manager("", "INTERNAL_CPU_MODEL = 0"),
            "INTERNAL_CPU_MODEL = 0 is not possible",
        ),
        (
            manager("", "VIRTIO_FS_NUM = 1"),
            "unknown key VIRTIO_FS_NUM = 1",
        ),
        (manager("colour = 1", ""), "unknown key colour = 1"),
        (
            manager("domain = 65536", ""),
            "domain = 65536 is not allowed",
        ),
    ];
    for (text, expected) in cases {
        let error = parse(&text).unwrap_err();
        assert!(
            error.starts_with("platform file p.toml: manager mlx5_0"),
            "{error}"
        );
        assert!(error.contains(expected), "{error}");
    }
    assert!(
        parse("x = 1")
            .unwrap_err()
            .contains("top level: unknown key x = 1")
    );
    assert!(parse("manager = 1").unwrap_err().contains("not a list"));
    assert!(
        parse("[[manager]]\nname = \"a/b\"")
            .unwrap_err()
            .contains("name = \"a/b\"")
    );
    assert!(
        parse("[[manager]]\nname = \"a\"")
            .unwrap_err()
            .contains("serial is missing")
    );
    assert!(parse("[[manager").unwrap_err().contains("not valid TOML"));
}

#[test]
fn managers_must_not_share_names_serials_or_buses() {
    let pf = "VIRTIO_FS_EMULATION_NUM_PF = 1";
    let one = manager("", pf);
    let other = |from: &str, to: &str| one.replace("mlx5_0", "mlx5_1").replace(from, to);
    assert!(
        parse(&format!("{one}{one}"))
            .unwrap_err()
            .contains("name mlx5_0")
    );
    let same_serial = format!("{one}{}", other("bus = 3", "bus = 4"));
    assert!(parse(&same_serial).unwrap_err().contains("MT1VFSS0D0F2"));
    let same_bus = format!("{one}{}", other("MT1", "MT2"));
    assert!(parse(&same_bus).unwrap_err().contains("0000:03:00.2"));
    let both = format!("{one}{}", other("MT1", "MT2").replace("bus = 3", "bus = 4"));
    assert_eq!(parse(&both).unwrap().managers().len(), 2);
}

#[test]
fn lookup_says_which_name_is_unknown() {
    let platform = Platform::load(None).unwrap();
    assert!(platform.find("mlx5_0", "MT2251XZ02WZVFSS0D0F3").is_ok());
    let error = platform.find("mlx5_9", "x").unwrap_err();
    assert_eq!(error.errno, Errno::ENODEV);
    assert!(error.detail.contains("mlx5_9"));
    assert!(
        platform
            .find("mlx5_0", "nope")
            .unwrap_err()
            .detail
            .contains("nope")
    );
}

#[test]
fn a_missing_file_is_named() {
    let error = Platform::load(Some(Path::new("/nonexistent/p.toml"))).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/p.toml"));
}
