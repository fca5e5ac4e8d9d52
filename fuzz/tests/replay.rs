//! Runs every committed seed through its target.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use ferry_fuzz::{TARGETS, Target};

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

#[test]
fn every_seed_passes_its_target() {
    for Target { name, run } in TARGETS {
        let folder = corpus().join(name);
        let seeds = fs::read_dir(&folder).unwrap_or_else(|error| {
            panic!("target {name} needs seeds in {}: {error}", folder.display())
        });
        let mut count = 0;
        for seed in seeds {
            let path = seed.expect("a readable folder").path();
            println!("{}", path.display());
            run(&fs::read(&path).expect("a readable seed"));
            count += 1;
        }
        assert!(count > 0, "target {name} has no seeds");
    }
}

#[test]
fn every_folder_of_seeds_has_a_target() {
    let targets: BTreeSet<String> = TARGETS
        .iter()
        .map(|target| target.name.to_owned())
        .collect();
    let folders: BTreeSet<String> = fs::read_dir(corpus())
        .expect("a corpus")
        .map(|entry| entry.expect("a readable folder").file_name())
        .map(|name| name.into_string().expect("ASCII"))
        .collect();
    assert_eq!(folders, targets);
}

#[test]
fn every_seed_cut_anywhere_passes_too() {
    for Target { name, run } in TARGETS {
        for seed in fs::read_dir(corpus().join(name)).expect("seeds") {
            let bytes = fs::read(seed.expect("a readable folder").path()).expect("a seed");
            for len in 0..bytes.len() {
                run(&bytes[..len]);
            }
        }
    }
}
