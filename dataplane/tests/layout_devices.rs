//! Compares the structs and numbers of virtio, vfio-user and vhost-user with the kernel's headers.
//!
//! vfio-user reuses the structs and numbers of `linux/vfio.h`, and vhost-user two structs of `linux/vhost_types.h`; what
//! those protocols add has no kernel header to be compared with.

use std::mem::offset_of;

use ferry_dataplane::transport::vfio_user::wire::{
    DeviceInfo, DmaUnmap, IrqInfo, IrqSet, RegionInfo, device_flags, dma_flags, irq, irq_flags,
    irq_set_flags, region, region_flags,
};
use ferry_dataplane::transport::vhost_user::wire::{VringAddr, VringState};
use ferry_dataplane::virtio::spec::{
    self, Desc, DescFlags, Features, FsConfig, PackedDesc, Status, UsedElem,
};
use ferry_ffi::{constant, layout};

/// The offset and size of each field, and the size of the whole.
type Shape = (Vec<(usize, usize)>, usize);

/// The size of a field's type, from a function that would return it.
fn size_of_field<S, T>(_: fn(S) -> T) -> usize {
    size_of::<T>()
}

macro_rules! shape {
    ($name:ident { $($field:ident)* }) => {
        (vec![$((offset_of!($name, $field), size_of_field(|it: $name| it.$field))),*], size_of::<$name>())
    };
}

/// The first fields of a struct of the kernel's, and its size without a flexible array.
fn kernel(name: &str, fields: usize) -> Shape {
    let found = layout(name).unwrap_or_else(|| panic!("the headers lack {name}"));
    let fixed = found.fields.iter().filter(|(_, _, size)| *size > 0);
    (
        fixed
            .map(|(_, at, size)| (*at, *size))
            .take(fields)
            .collect(),
        found.size,
    )
}

#[test]
fn structs_that_the_kernel_has_too_are_the_same() {
    let pairs = [
        (shape!(Desc { addr len flags next }), "vring_desc"),
        (
            shape!(PackedDesc { addr len id flags }),
            "vring_packed_desc",
        ),
        (shape!(UsedElem { id len }), "vring_used_elem"),
        (
            shape!(RegionInfo { argsz flags index cap_offset size offset }),
            "vfio_region_info",
        ),
        (shape!(IrqInfo { argsz flags index count }), "vfio_irq_info"),
        (
            shape!(IrqSet { argsz flags index start count }),
            "vfio_irq_set",
        ),
        (
            shape!(DmaUnmap { argsz flags address size }),
            "vfio_iommu_type1_dma_unmap",
        ),
        (shape!(VringState { index num }), "vhost_vring_state"),
        (
            shape!(VringAddr { index flags desc used avail log }),
            "vhost_vring_addr",
        ),
    ];
    for (ours, name) in pairs {
        assert_eq!(ours, kernel(name, usize::MAX), "{name}");
    }
}

#[test]
fn structs_of_which_the_kernel_has_a_shorter_or_longer_form_agree_as_far_as_both_go() {
    // The kernel's ends before the size of the notification buffers.
    let ours = shape!(FsConfig { tag num_request_queues notify_buf_size });
    let theirs = kernel("virtio_fs_config", usize::MAX);
    assert_eq!(ours.0[..2], theirs.0);
    assert_eq!(ours.0[2].0, theirs.1);
    // The kernel's goes on with capabilities, which vfio-user does not have.
    let ours = shape!(DeviceInfo { argsz flags num_regions num_irqs });
    assert_eq!(ours.0, kernel("vfio_device_info", 4).0);
}

#[test]
fn numbers_of_virtio_are_the_kernels() {
    let pairs: &[(u64, &str)] = &[
        (spec::DEVICE_ID_FS.into(), "VIRTIO_ID_FS"),
        (
            spec::AVAIL_F_NO_INTERRUPT.into(),
            "VRING_AVAIL_F_NO_INTERRUPT",
        ),
        (spec::USED_F_NO_NOTIFY.into(), "VRING_USED_F_NO_NOTIFY"),
        (
            spec::EVENT_FLAGS_ENABLE.into(),
            "VRING_PACKED_EVENT_FLAG_ENABLE",
        ),
        (
            spec::EVENT_FLAGS_DISABLE.into(),
            "VRING_PACKED_EVENT_FLAG_DISABLE",
        ),
        (
            spec::EVENT_FLAGS_DESC.into(),
            "VRING_PACKED_EVENT_FLAG_DESC",
        ),
        (
            Status::ACKNOWLEDGE.bits().into(),
            "VIRTIO_CONFIG_S_ACKNOWLEDGE",
        ),
        (Status::DRIVER.bits().into(), "VIRTIO_CONFIG_S_DRIVER"),
        (Status::DRIVER_OK.bits().into(), "VIRTIO_CONFIG_S_DRIVER_OK"),
        (
            Status::FEATURES_OK.bits().into(),
            "VIRTIO_CONFIG_S_FEATURES_OK",
        ),
        (
            Status::NEEDS_RESET.bits().into(),
            "VIRTIO_CONFIG_S_NEEDS_RESET",
        ),
        (Status::FAILED.bits().into(), "VIRTIO_CONFIG_S_FAILED"),
        (DescFlags::NEXT.bits().into(), "VRING_DESC_F_NEXT"),
        (DescFlags::WRITE.bits().into(), "VRING_DESC_F_WRITE"),
        (DescFlags::INDIRECT.bits().into(), "VRING_DESC_F_INDIRECT"),
    ];
    same(pairs);
    // The kernel gives these as bit numbers.
    let bits: Vec<(u64, &str)> = [
        (
            Features::INDIRECT_DESC.bits(),
            "VIRTIO_RING_F_INDIRECT_DESC",
        ),
        (Features::EVENT_IDX.bits(), "VIRTIO_RING_F_EVENT_IDX"),
        (Features::VERSION_1.bits(), "VIRTIO_F_VERSION_1"),
        (Features::ACCESS_PLATFORM.bits(), "VIRTIO_F_ACCESS_PLATFORM"),
        (Features::RING_PACKED.bits(), "VIRTIO_F_RING_PACKED"),
        (Features::IN_ORDER.bits(), "VIRTIO_F_IN_ORDER"),
        (Features::ORDER_PLATFORM.bits(), "VIRTIO_F_ORDER_PLATFORM"),
        (
            Features::NOTIFICATION_DATA.bits(),
            "VIRTIO_F_NOTIFICATION_DATA",
        ),
        (
            Features::NOTIF_CONFIG_DATA.bits(),
            "VIRTIO_F_NOTIF_CONFIG_DATA",
        ),
        (Features::RING_RESET.bits(), "VIRTIO_F_RING_RESET"),
        (DescFlags::AVAIL.bits().into(), "VRING_PACKED_DESC_F_AVAIL"),
        (DescFlags::USED.bits().into(), "VRING_PACKED_DESC_F_USED"),
    ]
    .map(|(bit, name): (u64, &str)| (bit.trailing_zeros().into(), name))
    .to_vec();
    same(&bits);
}

#[test]
fn numbers_of_vfio_user_are_the_kernels() {
    let pairs: &[(u32, &str)] = &[
        (dma_flags::READ, "VFIO_DMA_MAP_FLAG_READ"),
        (dma_flags::WRITE, "VFIO_DMA_MAP_FLAG_WRITE"),
        (
            dma_flags::UNMAP_GET_DIRTY_BITMAP,
            "VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP",
        ),
        (dma_flags::UNMAP_ALL, "VFIO_DMA_UNMAP_FLAG_ALL"),
        (device_flags::RESET, "VFIO_DEVICE_FLAGS_RESET"),
        (device_flags::PCI, "VFIO_DEVICE_FLAGS_PCI"),
        (region_flags::READ, "VFIO_REGION_INFO_FLAG_READ"),
        (region_flags::WRITE, "VFIO_REGION_INFO_FLAG_WRITE"),
        (region_flags::MMAP, "VFIO_REGION_INFO_FLAG_MMAP"),
        (region_flags::CAPS, "VFIO_REGION_INFO_FLAG_CAPS"),
        (irq_flags::EVENTFD, "VFIO_IRQ_INFO_EVENTFD"),
        (irq_flags::MASKABLE, "VFIO_IRQ_INFO_MASKABLE"),
        (irq_flags::AUTOMASKED, "VFIO_IRQ_INFO_AUTOMASKED"),
        (irq_flags::NORESIZE, "VFIO_IRQ_INFO_NORESIZE"),
        (irq_set_flags::DATA_NONE, "VFIO_IRQ_SET_DATA_NONE"),
        (irq_set_flags::DATA_BOOL, "VFIO_IRQ_SET_DATA_BOOL"),
        (irq_set_flags::DATA_EVENTFD, "VFIO_IRQ_SET_DATA_EVENTFD"),
        (irq_set_flags::DATA_MASK, "VFIO_IRQ_SET_DATA_TYPE_MASK"),
        (irq_set_flags::ACTION_MASK, "VFIO_IRQ_SET_ACTION_MASK"),
        (irq_set_flags::ACTION_UNMASK, "VFIO_IRQ_SET_ACTION_UNMASK"),
        (irq_set_flags::ACTION_TRIGGER, "VFIO_IRQ_SET_ACTION_TRIGGER"),
        (irq_set_flags::ACTION_KIND, "VFIO_IRQ_SET_ACTION_TYPE_MASK"),
        (region::BAR0, "VFIO_PCI_BAR0_REGION_INDEX"),
        (region::BAR5, "VFIO_PCI_BAR5_REGION_INDEX"),
        (region::ROM, "VFIO_PCI_ROM_REGION_INDEX"),
        (region::CONFIG, "VFIO_PCI_CONFIG_REGION_INDEX"),
        (region::VGA, "VFIO_PCI_VGA_REGION_INDEX"),
        (region::COUNT, "VFIO_PCI_NUM_REGIONS"),
        (irq::INTX, "VFIO_PCI_INTX_IRQ_INDEX"),
        (irq::MSI, "VFIO_PCI_MSI_IRQ_INDEX"),
        (irq::MSIX, "VFIO_PCI_MSIX_IRQ_INDEX"),
        (irq::ERR, "VFIO_PCI_ERR_IRQ_INDEX"),
        (irq::REQ, "VFIO_PCI_REQ_IRQ_INDEX"),
        (irq::COUNT, "VFIO_PCI_NUM_IRQS"),
    ];
    same(
        &pairs
            .iter()
            .map(|(ours, name)| (u64::from(*ours), *name))
            .collect::<Vec<_>>(),
    );
}

/// Compares numbers; those that an older header lacks are skipped, and with `REQUIRE_ALL=1` they are failures.
fn same(pairs: &[(u64, &str)]) {
    for (ours, name) in pairs {
        match constant(name) {
            Some(theirs) => assert_eq!(i128::from(*ours), theirs, "{name}"),
            None => {
                assert!(
                    std::env::var_os("REQUIRE_ALL").is_none(),
                    "the kernel header lacks {name}"
                );
                println!("SKIP the kernel header lacks {name}");
                eprintln!("SKIP the kernel header lacks {name}");
            }
        }
    }
}
