use super::*;

fn place(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("ferry-fw-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir.join("firmware.toml")
}

fn two(_: &str) -> u32 {
    2
}

#[test]
fn what_is_saved_is_loaded_again() {
    let path = place("again");
    assert_eq!(Firmware::load(&path, two).unwrap(), None);
    let mut firmware = Firmware {
        origin: Some(Origin {
            platform: Some("/a \"b\"".into()),
            store: "/s".into(),
        }),
        ..Firmware::default()
    };
    let mut settings = Settings::default();
    settings.set(NUM_PF, 2, 2).unwrap();
    settings.set(SUBSYSTEM_ID, 0xffff, 2).unwrap();
    firmware.settings.insert("mlx5_0".into(), settings);
    firmware
        .settings
        .insert("mlx5-1".into(), Settings::default());
    firmware.save(&path).unwrap();
    assert_eq!(Firmware::load(&path, two).unwrap(), Some(firmware));
    std::fs::remove_dir_all(parent(&path)).unwrap();
}

#[test]
fn a_spoilt_store_names_file_manager_and_value() {
    let path = place("spoilt");
    for (text, expected) in [
        (
            "[manager.m]\nVIRTIO_FS_EMULATION_NUM_PF = 3",
            "manager m: VIRTIO_FS_EMULATION_NUM_PF = 3",
        ),
        (
            "[manager.m]\nVIRTIO_FS_EMULATION_NUM_PF = \"1\"",
            "NUM_PF = \"1\" is not allowed",
        ),
        ("[manager.m]\nX = 1", "unknown key X"),
        ("manager = 1", "unknown key manager"),
        ("x = 1", "unknown key x"),
        (
            "[manager.m]\nINTERNAL_CPU_MODEL = 0\nVIRTIO_FS_EMULATION_ENABLE = 1",
            "INTERNAL_CPU_MODEL = 0 is not possible",
        ),
        ("[manager.m", "not valid TOML"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = Firmware::load(&path, two).unwrap_err().to_string();
        assert!(error.starts_with("firmware settings /"), "{error}");
        assert!(error.contains(expected), "{text}: {error}");
    }
    std::fs::remove_dir_all(parent(&path)).unwrap();
}

#[test]
fn every_default_is_allowed_and_every_bound_is_a_bound() {
    for parameter in PARAMETERS {
        let (low, high) = (i64::from(parameter.low), i64::from(parameter.high));
        let mut settings = Settings::default();
        settings
            .set(parameter.name, parameter.default.into(), 2)
            .unwrap();
        assert_eq!(settings, Settings::default(), "{}", parameter.name);
        for value in [low, high] {
            settings.set(parameter.name, value, 2).unwrap();
            assert_eq!(i64::from(settings.get(parameter.name)), value);
        }
        for value in [low - 1, high + 1, i64::MIN, i64::MAX] {
            settings.set(parameter.name, value, 2).unwrap_err();
        }
    }
    let mut settings = Settings::default();
    settings.set(NUM_PF, 8, 8).unwrap();
}

#[test]
fn values_have_the_names_of_the_original() {
    let model = Parameter::find(INTERNAL_CPU_MODEL).unwrap();
    assert_eq!(model.show(1), "EMBEDDED_CPU(1)");
    let enable = Parameter::find(EMULATION_ENABLE).unwrap();
    assert_eq!(enable.show(0), "False(0)");
    for (text, value) in [
        ("1", Some(1)),
        ("true", Some(1)),
        ("False", Some(0)),
        ("0x1", Some(1)),
        ("yes", None),
        ("-1", None),
    ] {
        assert_eq!(enable.read(text), value, "{text}");
    }
    assert_eq!(
        Parameter::find(SUBSYSTEM_VENDOR_ID).unwrap().show(6900),
        "6900"
    );
}
