use std::os::unix::fs::MetadataExt;

use super::*;
use crate::test_dir;

fn state(name: &str) -> StateV1 {
    StateV1 {
        options: OptionsV1 {
            fsdev_io_pool_size: 1000,
            fsdev_io_cache_size: 10,
        },
        fsdevs: vec![FsdevV1 {
            name: name.to_owned(),
            kind: FsdevKindV1::Null {},
        }],
        transports: Vec::new(),
        managers: Vec::new(),
        functions: Vec::new(),
        devices: Vec::new(),
        disabled: Vec::new(),
        wishes: WishesV1::default(),
    }
}

#[test]
fn what_is_saved_is_read_again_and_the_generation_before_is_kept() {
    let dir = test_dir("state-save");
    let dir = dir.join("made");
    let (mut store, none) = Store::open(&dir).unwrap();
    assert_eq!(none, None);
    store.save(&state("first")).unwrap();
    store.save(&state("second")).unwrap();
    drop(store);
    let (_, read) = Store::open(&dir).unwrap();
    assert_eq!(read, Some(state("second")));
    let previous = std::fs::read(dir.join("state.prev")).unwrap();
    assert_eq!(decode(&previous), Ok(state("first")));
    let mut names: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["state", "state.lock", "state.prev"]);
}

#[test]
fn an_unchanged_state_is_not_written_again() {
    let dir = test_dir("state-same");
    let (mut store, _) = Store::open(&dir).unwrap();
    let inode = || std::fs::metadata(dir.join("state")).unwrap().ino();
    store.save(&state("a")).unwrap();
    let first = inode();
    store.save(&state("a")).unwrap();
    assert_eq!(inode(), first);
    store.save(&state("b")).unwrap();
    assert_ne!(inode(), first);
}

#[test]
fn what_a_crash_leaves_behind_is_no_obstacle() {
    let dir = test_dir("state-crash");
    for name in ["state.tmp", "state.prev.tmp"] {
        std::fs::write(dir.join(name), "half a st").unwrap();
    }
    let (mut store, _) = Store::open(&dir).unwrap();
    store.save(&state("a")).unwrap();
    store.save(&state("b")).unwrap();
    drop(store);
    assert_eq!(Store::open(&dir).unwrap().1, Some(state("b")));
}

#[test]
fn every_torn_file_is_refused_and_left_as_it_is() {
    let whole = encode(&state("torn")).unwrap();
    assert_eq!(decode(&whole), Ok(state("torn")));
    for end in 0..whole.len() {
        let error = decode(&whole[..end]).unwrap_err();
        assert!(error.contains("damaged"), "{end}: {error}");
    }
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        assert!(decode(&changed).is_err(), "byte {at} may be changed");
    }
}

#[test]
fn unusable_files_are_refused_with_advice_and_never_written() {
    let dir = test_dir("state-unusable");
    let path = dir.join("state");
    let newer = "ferry-state 2 0 00000000\n";
    let cases = [
        ("", "is damaged: it is empty"),
        ("{\"subsystems\": []}", "is not a state file of Ferry"),
        (newer, "has form 2"),
        (
            "ferry-state 1 9 00000000\nhalf",
            "4 bytes follow the header",
        ),
    ];
    for (content, says) in cases {
        std::fs::write(&path, content).unwrap();
        let error = Store::open(&dir).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert!(error.contains("move it away"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    }
    std::fs::write(dir.join("state.prev"), "").unwrap();
    let error = Store::open(&dir).unwrap_err().to_string();
    assert!(error.contains("state.prev"), "{error}");
}

#[test]
fn a_directory_serves_one_control_plane_at_a_time() {
    let dir = test_dir("state-lock");
    let (store, _) = Store::open(&dir).unwrap();
    let error = Store::open(&dir).unwrap_err();
    assert!(matches!(error, StateError::Locked(_)), "{error}");
    drop(store);
    Store::open(&dir).unwrap();
}

#[test]
fn a_state_that_cannot_be_written_is_an_error_and_the_old_one_stays() {
    let dir = test_dir("state-fails");
    let (mut store, _) = Store::open(&dir).unwrap();
    store.save(&state("old")).unwrap();
    // A directory in the place of the temporary file works for root too, whom modes do not stop.
    std::fs::create_dir(dir.join("state.tmp")).unwrap();
    let error = store.save(&state("new")).unwrap_err().to_string();
    assert!(
        error.contains("state") && error.contains("--state-dir"),
        "{error}"
    );
    std::fs::remove_dir(dir.join("state.tmp")).unwrap();
    assert_eq!(
        decode(&std::fs::read(dir.join("state")).unwrap()),
        Ok(state("old"))
    );
    store.save(&state("new")).unwrap();
    assert_eq!(
        decode(&std::fs::read(dir.join("state")).unwrap()),
        Ok(state("new"))
    );
}
