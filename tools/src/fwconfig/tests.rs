use super::*;

/// A platform file and a run directory in a directory that goes away.
struct Rig(PathBuf);

impl Rig {
    fn new(name: &str, managers: &[&str]) -> Rig {
        let dir = std::env::temp_dir().join(format!("ferry-fwc-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let text: String = managers
            .iter()
            .zip(1..)
            .map(|(m, n)| format!("[[manager]]\nname = \"{m}\"\nserial = \"S{n}\"\nbus = {n}\n"))
            .collect();
        std::fs::write(dir.join("platform.toml"), text).unwrap();
        Rig(dir)
    }

    fn place(&self, words: &[&str]) -> (Place, Args) {
        let dir = self.0.display();
        let fixed = [
            "mlxconfig".to_owned(),
            format!("--run-dir={dir}"),
            format!("--platform={dir}/platform.toml"),
            format!("--firmware={dir}/store/firmware.toml"),
        ];
        let words = fixed
            .into_iter()
            .chain(words.iter().map(|w| (*w).to_owned()));
        let args = Args::try_parse_from(words).unwrap();
        (Place::find(&args).unwrap(), args)
    }

    fn set(&self, device: &str, changes: &[&str]) -> Result<String, String> {
        let (place, _) = self.place(&["query"]);
        let changes: Result<Vec<_>, _> = changes.iter().map(|c| assignment(c)).collect();
        changes
            .and_then(|changes| place.change(Some(device), &changes))
            .map_err(|e| format!("{e:#}"))
    }

    fn query(&self, names: &[&str]) -> String {
        let (place, args) = self.place(&[&["-d", "mlx5_0", "query"], names].concat());
        let Action::Query { names } = &args.action else {
            panic!("{args:?}")
        };
        place
            .query(args.device.as_deref(), &parameters(names).unwrap())
            .unwrap()
    }

    /// The data plane starts.
    fn boot(&self) {
        let (file, store) = (
            self.0.join("platform.toml"),
            self.0.join("store/firmware.toml"),
        );
        let platform = Platform::load(Some(&file), &store).unwrap();
        let record = platform.record(Some(&file), &store);
        record.save(&self.0.join(firmware::RECORD)).unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn a_change_is_pending_until_the_next_start() {
    let rig = Rig::new("pending", &["mlx5_0"]);
    let line = |rig: &Rig| {
        let text = rig.query(&["VIRTIO_FS_EMULATION_NUM_PF"]);
        text.lines().last().unwrap().to_owned()
    };
    assert_eq!(
        words(&line(&rig)),
        ["VIRTIO_FS_EMULATION_NUM_PF", "0", "-", "0"]
    );
    rig.boot();
    rig.set(
        "mlx5_0",
        &[
            "VIRTIO_FS_EMULATION_ENABLE=1",
            "VIRTIO_FS_EMULATION_NUM_PF=2",
        ],
    )
    .unwrap();
    assert_eq!(
        words(&line(&rig)),
        ["*", "VIRTIO_FS_EMULATION_NUM_PF", "0", "0", "2"]
    );
    rig.boot();
    assert_eq!(
        words(&line(&rig)),
        ["*", "VIRTIO_FS_EMULATION_NUM_PF", "0", "2", "2"]
    );
    let (place, _) = rig.place(&["reset"]);
    let all: Vec<_> = PARAMETERS.iter().map(|p| (p, p.default)).collect();
    place.change(None, &all).unwrap();
    assert_eq!(
        words(&line(&rig)),
        ["*", "VIRTIO_FS_EMULATION_NUM_PF", "0", "2", "0"]
    );
    rig.boot();
    assert_eq!(
        words(&line(&rig)),
        ["VIRTIO_FS_EMULATION_NUM_PF", "0", "0", "0"]
    );
}

#[test]
fn the_table_has_the_five_columns_of_the_guide() {
    let rig = Rig::new("columns", &["mlx5_0"]);
    rig.set("mlx5_0", &["VIRTIO_FS_EMULATION_ENABLE=True"])
        .unwrap();
    rig.boot();
    let text = rig.query(&[]);
    let mut lines = text.lines().skip(3);
    assert_eq!(
        lines.next().unwrap(),
        "Configurations:                           Default             Current             Next Boot"
    );
    assert_eq!(lines.clone().count(), PARAMETERS.len());
    let enable = lines.find(|l| l.contains("VIRTIO_FS_EMULATION_ENABLE"));
    assert_eq!(
        enable.unwrap(),
        "*       VIRTIO_FS_EMULATION_ENABLE        False(0)            True(1)             True(1)"
    );
}

#[test]
fn what_the_hardware_would_refuse_is_refused_and_changes_nothing() {
    let rig = Rig::new("refused", &["mlx5_0", "mlx5_1"]);
    let before = rig.query(&[]);
    for (changes, expected) in [
        (
            &["VIRTIO_FS_EMULATION_NUM_PF=3"][..],
            "only an integer from 0 to 2",
        ),
        (
            &["VIRTIO_FS_EMULATION_NUM_VF=1"],
            "NUM_VF = 1 is not allowed",
        ),
        (&["VIRTIO_FS_EMULATION_NUM_MSIX=64"], "from 0 to 63"),
        (&["PCI_SWITCH_EMULATION_NUM_PORT=33"], "from 0 to 32"),
        (
            &["VIRTIO_FS_EMULATION_NUM_PF=many"],
            "NUM_PF = \"many\" is not allowed",
        ),
        (&["NUM_PF=1"], "there is no parameter NUM_PF"),
        (&["NUM_PF"], "not of the form NAME=VALUE"),
        (
            &[
                "VIRTIO_FS_EMULATION_NUM_PF=1",
                "VIRTIO_FS_EMULATION_ENABLE=1",
                "INTERNAL_CPU_MODEL=0",
            ],
            "INTERNAL_CPU_MODEL = 0 is not possible with VIRTIO_FS_EMULATION_ENABLE = 1",
        ),
    ] {
        let error = rig.set("mlx5_0", changes).unwrap_err();
        assert!(error.contains(expected), "{changes:?}: {error}");
    }
    assert_eq!(rig.query(&[]), before);
    // Each is possible, and both together are not: their buses would be the same.
    let switch = [
        "VIRTIO_FS_EMULATION_ENABLE=1",
        "PCI_SWITCH_EMULATION_ENABLE=1",
        "PCI_SWITCH_EMULATION_NUM_PORT=8",
    ];
    rig.set("mlx5_0", &switch).unwrap();
    let error = rig.set("mlx5_1", &switch).unwrap_err();
    assert!(error.contains("is also that of another manager"), "{error}");
    rig.boot();
}

#[test]
fn devices_have_the_names_of_managers_and_those_of_the_guide() {
    let rig = Rig::new("names", &["mlx5_0", "mlx5_1"]);
    let (place, _) = rig.place(&["query"]);
    let name = |device| place.managers(Some(device)).map(|m| m[0].name.clone());
    for (device, expected) in [
        ("mlx5_1", "mlx5_1"),
        ("/dev/mst/mt41692_pciconf0", "mlx5_0"),
        ("mt41692_pciconf0.1", "mlx5_1"),
    ] {
        assert_eq!(name(device).unwrap(), expected, "{device}");
    }
    for device in [
        "mlx5_2",
        "/dev/mst/mt41692_pciconf0.2",
        "mt41692_pciconf1",
        "",
    ] {
        let error = name(device).unwrap_err().to_string();
        assert!(error.contains("it has mlx5_0, mlx5_1"), "{device}: {error}");
    }
    let several = place.change(None, &[]).unwrap_err().to_string();
    assert!(several.contains("name one with -d"), "{several}");
}
