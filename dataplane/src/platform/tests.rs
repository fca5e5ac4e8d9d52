use super::*;

fn parse(text: &str) -> Result<Platform, String> {
    Platform::parse(Path::new("p.toml"), text).map_err(|e| e.to_string())
}

fn stored(text: &str, settings: &Firmware) -> Result<Platform, String> {
    let (file, store) = (Path::new("p.toml"), Path::new("s.toml"));
    Platform::read(file, text, store, settings).map_err(|e| e.to_string())
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
    let platform = Platform::delivered(None).unwrap();
    let [manager] = platform.managers() else {
        panic!("{platform:?}")
    };
    assert_eq!((manager.name.as_str(), manager.ports.len()), ("mlx5_0", 31));
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
            manager("", "PCI_SWITCH_EMULATION_NUM_PORT = 33"),
            "PCI_SWITCH_EMULATION_NUM_PORT = 33 is not allowed, only an integer from 0 to 32",
        ),
        (
            manager("bus = 230", SWITCH).replacen("bus = 3\n", "", 1),
            "needs the 31 buses that follow bus 230",
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

const SWITCH: &str = "PCI_SWITCH_EMULATION_ENABLE = 1\nPCI_SWITCH_EMULATION_NUM_PORT = 32";

#[test]
fn a_switch_has_one_port_less_for_functions_than_it_has() {
    let platform = parse(&manager("", SWITCH)).unwrap();
    let ports = &platform.managers()[0].ports;
    assert_eq!(ports.len(), 31);
    assert_eq!(
        (ports[0].vuid.as_str(), ports[0].pci_address.as_str()),
        ("MT1VFSS1D0F0", "0000:04:00.0")
    );
    assert_eq!(
        (ports[30].vuid.as_str(), ports[30].pci_address.as_str()),
        ("MT1VFSS31D0F0", "0000:22:00.0")
    );
    for few in ["0", "1"] {
        let text = manager("", &SWITCH.replace("32", few));
        assert_eq!(parse(&text).unwrap().managers()[0].ports, []);
    }
    let off = manager("", &SWITCH.replace("ENABLE = 1", "ENABLE = 0"));
    assert_eq!(parse(&off).unwrap().managers()[0].ports, []);
}

#[test]
fn buses_of_hotplug_ports_belong_to_one_manager() {
    let one = manager("", SWITCH);
    let other = one.replace("mlx5_0", "mlx5_1").replace("MT1", "MT2");
    let near = format!("{one}{}", other.replace("bus = 3", "bus = 33"));
    assert!(parse(&near).unwrap_err().contains("hot-plug ports"));
    let far = format!("{one}{}", other.replace("bus = 3", "bus = 34"));
    assert_eq!(parse(&far).unwrap().managers().len(), 2);
}

#[test]
fn what_is_stored_replaces_what_the_file_says() {
    let mut settings = Firmware::default();
    let text = manager("", "VIRTIO_FS_EMULATION_NUM_PF = 1");
    settings
        .settings
        .insert("mlx5_0".to_owned(), Settings::default());
    assert_eq!(
        stored(&text, &settings).unwrap().managers()[0].functions,
        []
    );
    let mut own = Settings::default();
    for (name, value) in [
        (firmware::EMULATION_ENABLE, 1),
        (firmware::SWITCH_ENABLE, 1),
        (firmware::SWITCH_NUM_PORT, 32),
    ] {
        own.set(name, value, 2).unwrap();
    }
    settings.settings.insert("mlx5_0".to_owned(), own);
    let platform = stored(&text, &settings).unwrap();
    assert_eq!(platform.managers()[0].functions, []);
    assert_eq!(platform.managers()[0].ports.len(), 31);
    let error = stored(&text.replace("bus = 3", "bus = 250"), &settings).unwrap_err();
    assert!(
        error.starts_with("firmware settings s.toml: manager mlx5_0: PCI_SWITCH"),
        "{error}"
    );
}

#[test]
fn a_host_link_names_one_vmm_and_its_places() {
    let link = |lines: &str| {
        let text = format!("{}\n[manager.host_link]\n{lines}\n", manager("", ""));
        parse(&text).map(|p| p.managers()[0].host_link.clone())
    };
    assert_eq!(
        link("qmp = \"/q\"\nbuses = [\"a\", \"b\"]").unwrap(),
        Some(HostLink::Qmp {
            socket: "/q".into(),
            buses: vec!["a".into(), "b".into()]
        })
    );
    assert_eq!(
        link("cloud_hypervisor = \"/c\"").unwrap(),
        Some(HostLink::CloudHypervisor {
            socket: "/c".into()
        })
    );
    for (lines, expected) in [
        ("", "exactly one of"),
        ("qmp = \"/q\"", "needs buses"),
        ("qmp = \"q\"\nbuses = [\"a\"]", "absolute path"),
        ("qmp = \"/q\"\nbuses = [\"a b\"]", "buses = \"a b\""),
        (
            "qmp = \"/q\"\nbuses = [\"a\"]\ncloud_hypervisor = \"/c\"",
            "exactly one of",
        ),
        (
            "cloud_hypervisor = \"/c\"\nbuses = [\"a\"]",
            "buses goes with qmp",
        ),
        ("vmm = 1", "unknown key vmm"),
        (
            "cloud_hypervisor = \"/c\"\nmsix = 1",
            "neither true nor false",
        ),
    ] {
        let error = link(lines).unwrap_err();
        assert!(error.contains(expected), "{lines}: {error}");
    }
}

#[test]
fn functions_that_go_over_qmp_have_msix_only_on_request() {
    let vectors = |lines: &str| {
        let firmware = format!("VIRTIO_FS_EMULATION_NUM_PF = 1\n{SWITCH}");
        let text = format!("{}\n[manager.host_link]\n{lines}\n", manager("", &firmware));
        let platform = parse(&text).unwrap();
        let manager = &platform.managers()[0];
        (manager.functions[0].num_msix, manager.ports[30].num_msix)
    };
    let qmp = "qmp = \"/q\"\nbuses = [\"a\"]";
    assert_eq!(vectors(qmp), (2, 0));
    assert_eq!(vectors(&format!("{qmp}\nmsix = true")), (2, 2));
    assert_eq!(vectors("cloud_hypervisor = \"/c\""), (2, 2));
}

#[test]
fn lookup_says_which_name_is_unknown() {
    let platform = Platform::delivered(None).unwrap();
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
    let error = Platform::delivered(Some(Path::new("/nonexistent/p.toml"))).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/p.toml"));
}

#[test]
fn a_process_that_goes_on_has_the_settings_of_the_former_one_and_a_new_one_those_of_the_store() {
    let dir = std::env::temp_dir().join(format!("ferry-resume-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (file, store) = (dir.join("platform.toml"), dir.join("firmware.toml"));
    std::fs::write(&file, manager("", "VIRTIO_FS_EMULATION_NUM_PF = 2")).unwrap();
    let former = Platform::load(Some(&file), &store).unwrap();
    let kept = former.record(Some(&file), &store).text();
    let mut changed = former.record(None, Path::new(""));
    changed.origin = None;
    let settings = changed.settings.get_mut("mlx5_0").unwrap();
    settings.set(firmware::NUM_PF, 1, 2).unwrap();
    changed.save(&store).unwrap();
    let resumed = Platform::resume(Some(&file), &kept).unwrap();
    assert_eq!(resumed, former);
    let new = Platform::load(Some(&file), &store).unwrap();
    assert_eq!(new.managers()[0].functions.len(), 1);
    std::fs::remove_dir_all(&dir).unwrap();
}
