use super::irq_set_flags::*;
use super::*;
use std::os::fd::AsFd;

fn set(index: u32, flags: u32, start: u32, count: u32) -> IrqSet {
    IrqSet {
        argsz: 20,
        flags,
        index,
        start,
        count,
    }
}

/// An event counter and a descriptor of it to send.
fn event() -> (EventFd, OwnedFd) {
    let event = EventFd::new().unwrap();
    let fd = event.as_fd().try_clone_to_owned().unwrap();
    (event, fd)
}

fn fired(event: &EventFd) -> bool {
    let mut count = [0; 8];
    nix::unistd::read(event, &mut count).is_ok()
}

const EVENTS: u32 = DATA_EVENTFD | ACTION_TRIGGER;

#[test]
fn vectors_go_where_the_client_says() {
    let mut irqs = Interrupts::new(3, &Arc::default());
    let ((a, fa), (b, fb)) = (event(), event());
    let changed = irqs
        .set(&set(irq::MSIX, EVENTS, 1, 2), &[], vec![fa, fb])
        .unwrap();
    assert!(changed.vectors && !changed.pin);
    assert!(irqs.any_vector() && irqs.vector(0).is_none() && irqs.vector(3).is_none());
    irqs.vector(2).unwrap().signal();
    assert!(!fired(&a) && fired(&b));
    // No descriptors: taken away.
    irqs.set(&set(irq::MSIX, EVENTS, 2, 1), &[], vec![])
        .unwrap();
    assert!(irqs.vector(1).is_some() && irqs.vector(2).is_none());
    irqs.set(
        &set(irq::MSIX, DATA_NONE | ACTION_TRIGGER, 0, 0),
        &[],
        vec![],
    )
    .unwrap();
    assert!(!irqs.any_vector());
}

#[test]
fn the_client_can_fire_its_own_interrupts() {
    let mut irqs = Interrupts::new(2, &Arc::default());
    let ((a, fa), (b, fb)) = (event(), event());
    irqs.set(&set(irq::MSIX, EVENTS, 0, 2), &[], vec![fa, fb])
        .unwrap();
    irqs.set(
        &set(irq::MSIX, DATA_BOOL | ACTION_TRIGGER, 0, 2),
        &[0, 1],
        vec![],
    )
    .unwrap();
    assert!(!fired(&a) && fired(&b));
    irqs.set(
        &set(irq::MSIX, DATA_NONE | ACTION_TRIGGER, 0, 2),
        &[],
        vec![],
    )
    .unwrap();
    assert!(fired(&a) && fired(&b));
}

#[test]
fn the_pin_fires_once_until_it_is_unmasked() {
    let mut irqs = Interrupts::new(0, &Arc::default());
    let (pin, fd) = event();
    assert!(
        irqs.set(&set(irq::INTX, EVENTS, 0, 1), &[], vec![fd])
            .unwrap()
            .pin
    );
    irqs.fire_pin();
    assert!(fired(&pin));
    irqs.fire_pin();
    assert!(!fired(&pin));
    assert!(
        irqs.set(
            &set(irq::INTX, DATA_NONE | ACTION_UNMASK, 0, 1),
            &[],
            vec![]
        )
        .unwrap()
        .pin
    );
    irqs.fire_pin();
    assert!(fired(&pin));
    irqs.set(
        &set(irq::INTX, DATA_NONE | ACTION_UNMASK, 0, 1),
        &[],
        vec![],
    )
    .unwrap();
    irqs.set(&set(irq::INTX, DATA_BOOL | ACTION_MASK, 0, 1), &[1], vec![])
        .unwrap();
    irqs.fire_pin();
    assert!(!fired(&pin));
}

#[test]
fn malformed_requests_are_refused_and_change_nothing() {
    let mut irqs = Interrupts::new(3, &Arc::default());
    let refused = [
        set(5, EVENTS, 0, 1),
        set(irq::MSIX, EVENTS, 0, 4),
        set(irq::MSIX, EVENTS, u32::MAX, 2),
        set(irq::MSIX, EVENTS, 0, u32::MAX),
        set(irq::MSIX, EVENTS, 0, 2),
        set(irq::MSIX, EVENTS, 0, 0),
        set(irq::MSI, EVENTS, 0, 1),
        set(irq::MSIX, DATA_NONE | DATA_BOOL | ACTION_TRIGGER, 0, 1),
        set(irq::MSIX, DATA_NONE, 0, 1),
        set(irq::MSIX, ACTION_TRIGGER, 0, 1),
        set(irq::ERR, DATA_NONE | ACTION_MASK, 0, 1),
        set(irq::MSIX, DATA_BOOL | ACTION_TRIGGER, 0, 2),
        set(irq::INTX, DATA_EVENTFD | ACTION_UNMASK, 0, 1),
        set(irq::INTX, DATA_NONE | ACTION_TRIGGER, 1, 0),
        set(irq::MSIX, EVENTS | 0x40, 0, 1),
    ];
    for request in refused {
        let (_, fd) = event();
        let result = irqs.set(&request, &[1], vec![fd]);
        assert_eq!(result, Err(Errno::EINVAL), "{request:?}");
    }
    assert!(!irqs.any_vector() && irqs.pin.is_none());
}

#[test]
fn every_kind_tells_its_number() {
    let irqs = Interrupts::new(3, &Arc::default());
    let counts: Vec<_> = (0..5).map(|i| irqs.info(i).unwrap().1).collect();
    assert_eq!(counts, [1, 0, 3, 1, 1]);
    assert_eq!(irqs.info(5), None);
}

#[test]
fn a_masked_vector_keeps_its_interrupt_for_later_also_when_it_goes_elsewhere() {
    let mut irqs = Interrupts::new(3, &Arc::default());
    let ((a, fa), (b, fb), (c, fc)) = (event(), event(), event());
    irqs.set(&set(irq::MSIX, EVENTS, 0, 2), &[], vec![fa, fb])
        .unwrap();
    let mask = set(irq::MSIX, DATA_BOOL | ACTION_MASK, 0, 3);
    irqs.set(&mask, &[0, 1, 1], vec![]).unwrap();
    irqs.vector(0).unwrap().signal();
    irqs.vector(1).unwrap().signal();
    irqs.vector(1).unwrap().signal();
    assert!(fired(&a) && !fired(&b));
    assert_eq!(irqs.pending(), [2, 0, 0, 0, 0, 0, 0, 0]);

    irqs.set(&set(irq::MSIX, EVENTS, 1, 1), &[], vec![fc])
        .unwrap();
    assert_eq!(irqs.pending()[0], 2);
    // Both masks must go.
    irqs.mask_vectors(|n| n == 1);
    let unmask = set(irq::MSIX, DATA_NONE | ACTION_UNMASK, 0, 3);
    irqs.set(&unmask, &[], vec![]).unwrap();
    assert!(!fired(&c));
    irqs.mask_vectors(|_| false);
    assert!(fired(&c) && !fired(&b));
    assert_eq!(irqs.pending(), [0; 8]);
    irqs.vector(1).unwrap().signal();
    assert!(fired(&c));
}
