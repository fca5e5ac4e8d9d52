use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::*;

/// Memory that stops taking stores after a number of them, as if the process had ended.
#[derive(Clone)]
struct Mortal {
    words: Rc<RefCell<BTreeMap<usize, u64>>>,
    left: Rc<Cell<usize>>,
}

impl Mortal {
    fn new() -> Mortal {
        Mortal {
            words: Rc::default(),
            left: Rc::new(Cell::new(usize::MAX)),
        }
    }

    fn dies_after(&self, stores: usize) -> Mortal {
        Mortal {
            words: Rc::new(RefCell::new(self.words.borrow().clone())),
            left: Rc::new(Cell::new(stores)),
        }
    }

    fn revived(&self) -> Mortal {
        self.dies_after(usize::MAX)
    }
}

impl Words for Mortal {
    fn load(&self, at: usize) -> u64 {
        self.words.borrow().get(&at).copied().unwrap_or(0)
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(left) = self.left.get().checked_sub(1) {
            self.left.set(left);
            self.words.borrow_mut().insert(at, value);
        }
    }
}

fn contents(cells: &Cells<Mortal>) -> Vec<(String, Vec<u8>)> {
    cells.iter().map(|(k, v)| (k.into(), v)).collect()
}

#[test]
fn values_are_found_again_by_the_next_process() {
    let memory = Mortal::new();
    let mut cells = Cells::adopt(memory.clone()).unwrap();
    let long = vec![7; MAX_VALUE];
    cells.put("a", b"one").unwrap();
    cells.put("b", b"").unwrap();
    cells.put(&"k".repeat(MAX_KEY), &long).unwrap();
    cells.put("a", b"two").unwrap();
    assert!(cells.remove("b"));
    assert!(!cells.remove("b"));
    let next = Cells::adopt(memory.revived()).unwrap();
    assert_eq!(next.get("a"), Some(b"two".to_vec()));
    assert_eq!(next.get("b"), None);
    assert_eq!(next.get(&"k".repeat(MAX_KEY)), Some(long));
    assert_eq!(contents(&next), contents(&cells));
}

#[test]
fn a_crash_at_any_store_leaves_the_old_or_the_new_state() {
    type Change = fn(&mut Cells<Mortal>);
    let changes: [Change; 5] = [
        |c| c.put("fresh", &[1; 100]).unwrap(),
        |c| c.put("old", &[2; 50]).unwrap(),
        |c| c.put("old", b"").unwrap(),
        |c| assert!(c.remove("old")),
        |c| {
            c.remove("other");
            c.put("reuses its cell", &[3; 33]).unwrap();
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let memory = Mortal::new();
        let mut cells = Cells::adopt(memory.clone()).unwrap();
        cells.put("old", &[9; 80]).unwrap();
        cells.put("other", b"stays").unwrap();
        let before = contents(&cells);
        let mut states = vec![before];
        // A change of two steps has a state in between.
        if number == 4 {
            let mut half = Cells::adopt(memory.revived()).unwrap();
            half.remove("other");
            states.push(contents(&half));
        }
        let mut done = Cells::adopt(memory.revived()).unwrap();
        change(&mut done);
        states.push(contents(&done));
        let mut at = 0;
        for stores in 0.. {
            let dying = memory.dies_after(stores);
            let mut cells = Cells::adopt(dying.clone()).unwrap();
            change(&mut cells);
            let found = contents(&Cells::adopt(dying.revived()).unwrap());
            // States follow each other and never go back.
            while states[at] != found {
                at += 1;
                assert!(
                    at < states.len(),
                    "change {number}, store {stores}: {found:?}"
                );
            }
            if dying.left.get() > 0 {
                break;
            }
        }
        assert_eq!(at, states.len() - 1, "change {number}");
    }
}

#[test]
fn full_cells_and_impossible_keys_are_refused_and_change_nothing() {
    let mut cells = Cells::adopt(Mortal::new()).unwrap();
    for n in 0..CELLS {
        cells.put(&format!("{n}"), b"x").unwrap();
    }
    assert_eq!(cells.put("more", b"x"), Err(CellError::Full));
    cells.put("7", b"changed").unwrap();
    assert!(cells.remove("8"));
    cells.put("more", b"x").unwrap();
    assert!(matches!(cells.put("", b""), Err(CellError::Key { .. })));
    let long = "k".repeat(MAX_KEY + 1);
    assert!(matches!(cells.put(&long, b""), Err(CellError::Key { .. })));
    let value = vec![0; MAX_VALUE + 1];
    assert!(matches!(
        cells.put("7", &value),
        Err(CellError::TooLong { .. })
    ));
    assert_eq!(cells.get("7"), Some(b"changed".to_vec()));
}

#[test]
fn damage_is_told_from_a_crash() {
    let memory = Mortal::new();
    let mut cells = Cells::adopt(memory.clone()).unwrap();
    cells.put("a", b"value of a").unwrap();
    cells.put("a", b"newer value of a").unwrap();
    let touched: Vec<usize> = memory.words.borrow().keys().copied().collect();
    let mut refused = 0;
    for at in touched {
        for bit in [0, 31, 63] {
            let damaged = memory.revived();
            damaged.store(at, damaged.load(at) ^ 1 << bit);
            match Cells::adopt(damaged) {
                Err(_) => refused += 1,
                // A flipped bit can void a copy, or hide the cell, as a crash could; it cannot make up a value.
                Ok(cells) => assert!(
                    cells
                        .iter()
                        .all(|(k, v)| k == "a" && v.ends_with(b"value of a")),
                    "word {at} bit {bit}"
                ),
            }
        }
    }
    assert!(refused > 20, "{refused}");
    memory.store(USED, CELLS as u64 + 1);
    assert!(matches!(Cells::adopt(memory), Err(CellError::Used { .. })));
}
