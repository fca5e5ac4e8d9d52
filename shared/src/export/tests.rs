use super::*;

fn spec(change: impl FnOnce(&mut ExportSpec)) -> ExportSpec {
    let mut spec = ExportSpec::default();
    change(&mut spec);
    spec
}

#[test]
fn names_of_values_are_read_back() {
    for (name, value) in Cache::NAMES {
        assert_eq!((Cache::parse(name).unwrap(), value.name()), (value, name));
    }
    for (name, value) in Squash::NAMES {
        assert_eq!((Squash::parse(name).unwrap(), value.name()), (value, name));
    }
    let failure = Cache::parse("sometimes").unwrap_err();
    assert!(
        failure.detail.contains("never, auto, metadata, always"),
        "{}",
        failure.detail
    );
}

#[test]
fn validity_follows_the_cache_unless_it_is_given() {
    let times = |spec: &ExportSpec| (spec.attr_ms(), spec.entry_ms(), spec.negative_ms());
    assert_eq!(times(&spec(|_| {})), (0, 0, 0));
    assert_eq!(times(&spec(|s| s.cache = Cache::Never)), (0, 0, 0));
    assert_eq!(
        times(&spec(|s| s.cache = Cache::Metadata)),
        (LONG_MS, LONG_MS, 0)
    );
    assert_eq!(
        times(&spec(|s| s.cache = Cache::Always)),
        (LONG_MS, LONG_MS, LONG_MS)
    );
    assert_eq!(times(&spec(|s| s.attr_valid_ms = Some(7))), (7, 7, 0));
    let given = spec(|s| {
        s.cache = Cache::Always;
        s.attr_valid_ms = Some(1);
        s.entry_valid_ms = Some(2);
        s.negative_valid_ms = Some(3);
    });
    assert_eq!(times(&given), (1, 2, 3));
}

/// Makes a good specification a bad one.
type Spoil = fn(&mut ExportSpec);

#[test]
fn contradictions_are_refused_with_the_parameters_at_fault() {
    let cases: [(Spoil, &str); 6] = [
        (|s| s.cache = Cache::Never, "cache never"),
        (|s| s.read_only = true, "read_only"),
        (|s| s.squash = Squash::Root, "squash"),
        (|s| s.anon_uid = u32::MAX, "anon_uid"),
        (
            |s| {
                s.map_gid = IdMap(Vec::from([IdRange {
                    guest: 0,
                    host: 0,
                    count: 0,
                }]))
            },
            "map_gid",
        ),
        (
            |s| {
                s.xattr_map = XattrMap(Vec::from([XattrRule {
                    guest: "a\n".into(),
                    host: None,
                }]))
            },
            "xattr_map",
        ),
    ];
    for (change, culprit) in cases {
        let failure = spec(change).check(true, true).unwrap_err();
        assert!(failure.detail.contains(culprit), "{}", failure.detail);
    }
    let failure = spec(|s| {
        s.cache = Cache::Never;
        s.attr_valid_ms = Some(1);
    });
    assert!(failure.check(false, true).is_err());
    let map = spec(|s| s.xattr_map = XattrMap::parse("user.=!").unwrap());
    assert!(
        map.check(false, false)
            .unwrap_err()
            .detail
            .contains("enable_xattr")
    );
    assert_eq!(map.check(true, true), Ok(()));
}

#[test]
fn ids_are_mapped_both_ways() {
    let map = IdMap::parse("map_uid", "0:100000:65536,70000:5:1").unwrap();
    assert_eq!(map.to_string(), "0:100000:65536,70000:5:1");
    for (guest, host) in [(0, 100_000), (65_535, 165_535), (70_000, 5)] {
        assert_eq!(
            (map.to_host(guest), map.to_guest(host)),
            (Some(host), guest)
        );
    }
    assert_eq!(map.to_host(65_536), None);
    assert_eq!(map.to_guest(0), OVERFLOW_ID);
    let same = IdMap::parse("map_uid", "").unwrap();
    assert_eq!((same.to_host(9), same.to_guest(9)), (Some(9), 9));
}

#[test]
fn bad_id_maps_are_refused() {
    for text in [
        "1",
        "1:2",
        "1:2:3:4",
        "a:b:c",
        "1:2:0",
        "1:4294967295:1",
        "4294967290:0:10",
        "1:2:3,",
        "0:0:10,9:100:1",
        "0:0:10,20:9:5",
        "0:100:10,50:90:11",
    ] {
        let failure = IdMap::parse("map_uid", text).expect_err(text);
        assert!(
            failure.detail.starts_with("map_uid"),
            "{text}: {}",
            failure.detail
        );
    }
    assert!(IdMap::parse("map_uid", "0:0:10,10:10:5,4294967294:20:1").is_ok());
}

fn names(map: &XattrMap, name: &str) -> (Option<String>, Option<String>) {
    let text = |name: XattrName| String::from_utf8(name.bytes().to_vec()).unwrap();
    (
        map.to_host(name.as_bytes()).map(text),
        map.to_guest(name.as_bytes()).map(text),
    )
}

#[test]
fn names_of_attributes_are_mapped_both_ways() {
    let map = XattrMap::parse("trusted.=user.g.trusted.,security.=!").unwrap();
    assert_eq!(map.to_string(), "trusted.=user.g.trusted.,security.=!");
    let some = |text: &str| Some(text.to_string());
    // The guest's name, and what the host's list shows it as.
    assert_eq!(names(&map, "trusted.a"), (some("user.g.trusted.a"), None));
    assert_eq!(names(&map, "user.g.trusted.a"), (None, some("trusted.a")));
    assert_eq!(names(&map, "user.a"), (some("user.a"), some("user.a")));
    assert_eq!(names(&map, "security.a"), (None, None));
    assert_eq!(
        names(&map, "system.posix_acl_access").0,
        some("system.posix_acl_access")
    );
}

#[test]
fn a_rule_for_all_names_leaves_the_kernels_own_alone() {
    let map = XattrMap::parse("=user.guest.").unwrap();
    let some = |text: &str| Some(text.to_string());
    assert_eq!(names(&map, "user.a"), (some("user.guest.user.a"), None));
    assert_eq!(
        names(&map, "user.guest.a"),
        (some("user.guest.user.guest.a"), some("a"))
    );
    assert_eq!(names(&map, "system.x").0, some("system.x"));
    // A name that becomes too long does not exist.
    assert_eq!(names(&map, &"a".repeat(250)).0, None);
}

#[test]
fn bad_rules_about_attributes_are_refused() {
    for text in [
        "user.",
        "user.=a=b",
        "system.a=user.b",
        "user.a=system.b",
        "a=b,a=c",
        "a=c,b=c",
        "a b=c",
        "a=!,",
        "a=b!c,a=!",
    ] {
        let failure = XattrMap::parse(text).expect_err(text);
        assert!(
            failure.detail.contains("xattr_map"),
            "{text}: {}",
            failure.detail
        );
    }
}
