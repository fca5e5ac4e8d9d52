use std::io::{Read, Seek, SeekFrom, Write};

use super::*;

/// What a process that ends leaves: the file, as the fd store keeps it.
fn left_by(region: Region) -> OwnedFd {
    region.fd().try_clone_to_owned().unwrap()
}

#[test]
fn areas_and_cells_are_found_again() {
    let mut region = Region::create().unwrap();
    region.cells_mut().put("spec", b"value").unwrap();
    let area = region.add_area("tables", 3 * PAGE - 5).unwrap();
    assert_eq!(area.len(), 3 * PAGE);
    let words = area.words(PAGE, 2).unwrap();
    words[1].store(77, Ordering::Relaxed);
    assert_eq!(region.generation(), 1);
    drop((words, area));

    let region = Region::adopt(left_by(region)).unwrap();
    assert_eq!(region.generation(), 2);
    assert_eq!(region.cells().get("spec"), Some(b"value".to_vec()));
    assert_eq!(region.areas(), ["tables"]);
    let area = region.area("tables").unwrap().unwrap();
    let words = area.words(PAGE, 2).unwrap();
    assert_eq!(words[1].load(Ordering::Relaxed), 77);
    assert!(region.area("other").unwrap().is_none());
}

#[test]
fn records_outside_an_area_or_across_their_alignment_are_refused() {
    let region = Region::create().unwrap();
    let area = region.add_area("a", PAGE).unwrap();
    let words = PAGE as usize / WORD;
    assert!(area.words(0, words).is_ok());
    for (at, count) in [
        (0, words + 1),
        (PAGE, 1),
        (4, 1),
        (u64::MAX, 1),
        (8, usize::MAX),
    ] {
        assert!(area.words(at, count).is_err(), "{at} {count}");
    }
}

#[test]
fn a_discarded_area_goes_with_its_last_user_and_comes_back_zeroed() {
    let region = Region::create().unwrap();
    let area = region.add_area("a", PAGE).unwrap();
    let second = region.add_area("b", PAGE).unwrap();
    let words = area.words(0, 1).unwrap();
    words[0].store(1, Ordering::Relaxed);
    area.discard();
    drop(area);
    assert_eq!(region.areas(), ["a", "b"]);
    assert!(matches!(
        region.add_area("a", 1),
        Err(RegionError::Name { .. })
    ));
    drop(words);
    assert_eq!(region.areas(), ["b"]);
    let again = region.add_area("c", PAGE).unwrap();
    assert_eq!(again.0.extent.offset, AREAS_AT);
    assert_eq!(again.words(0, 1).unwrap()[0].load(Ordering::Relaxed), 0);
    // Not discarded: the process ends, the area stays.
    drop((again, second));
    assert_eq!(Region::adopt(left_by(region)).unwrap().areas(), ["b", "c"]);
}

#[test]
fn what_is_damaged_or_of_another_version_is_refused_with_its_reason() {
    let damage = |word: usize, value: u64| {
        let region = Region::create().unwrap();
        region.add_area("first", PAGE).unwrap();
        region.add_area("second", PAGE).unwrap();
        region.inner.head.store(word, value);
        Region::adopt(left_by(region)).map(drop)
    };
    assert!(damage(AT_GENERATION, 8).is_ok());
    let entry = entry_at(1);
    type Check = fn(&RegionError) -> bool;
    let cases: [(usize, u64, Check); 6] = [
        (AT_MAGIC, 0, |e| matches!(e, RegionError::Magic { .. })),
        (AT_VERSION, VERSION + 1, |e| {
            matches!(e, RegionError::Version { .. })
        }),
        (AT_LAYOUT, 1, |e| matches!(e, RegionError::Version { .. })),
        (entry + STATE, 5, |e| {
            matches!(e, RegionError::Directory { entry: 1, .. })
        }),
        (entry + OFFSET, AREAS_AT, |e| {
            matches!(e, RegionError::Directory { entry: 1, .. })
        }),
        (entry + NAME, 5, |e| {
            matches!(e, RegionError::Directory { entry: 1, .. })
        }),
    ];
    for (word, value, expected) in cases {
        let error = damage(word, value).unwrap_err();
        assert!(expected(&error), "word {word}: {error}");
    }
    let zeroes = memfd_create("short", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    assert!(matches!(
        Region::adopt(zeroes),
        Err(RegionError::Short { .. })
    ));
}

#[test]
fn entries_that_lie_or_overlap_are_refused_even_with_a_right_checksum() {
    for (offset, len) in [
        (0, PAGE),
        (AREAS_AT, 0),
        (AREAS_AT + 1, PAGE),
        (AREAS_AT, 1 << 40),
        (u64::MAX - PAGE + 1, PAGE),
    ] {
        let region = Region::create().unwrap();
        region.add_area("a", PAGE).unwrap();
        let extent = Extent {
            entry: 3,
            offset,
            len,
        };
        write_entry(&region.inner.head, "b", extent);
        let error = Region::adopt(left_by(region)).unwrap_err();
        assert!(matches!(error, RegionError::Directory { .. }), "{error}");
    }
    let region = Region::create().unwrap();
    region.add_area("a", 2 * PAGE).unwrap();
    let extent = Extent {
        entry: 3,
        offset: AREAS_AT + PAGE,
        len: PAGE,
    };
    write_entry(&region.inner.head, "b", extent);
    let error = Region::adopt(left_by(region)).unwrap_err();
    assert!(error.to_string().contains("overlaps"), "{error}");
}

#[test]
fn scrambled_heads_never_panic() {
    let region = Region::create().unwrap();
    region.add_area("a", PAGE).unwrap();
    let mut pristine = vec![0; (CELLS_AT + cells::CELLS) * WORD];
    let mut file = std::fs::File::from(left_by(region));
    file.read_exact(&mut pristine).unwrap();
    for seed in 0..64u32 {
        let mut bytes = pristine.clone();
        for n in 0..8u32 {
            let mixed = (seed * 8 + n).wrapping_mul(2_654_435_761);
            let at = 4 * WORD + mixed as usize % (ENTRIES_AT * WORD + 8 * ENTRY_WORDS * WORD);
            bytes[at] ^= (mixed >> 24) as u8;
        }
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&bytes).unwrap();
        let _ = Region::adopt(file.try_clone().unwrap().into());
    }
}
